"""The files that hold records: name -> reader. Each gives the records of one file and, where lines mean something, the line of each.

  .json              a list of objects, {"data": [...]}, one object, or JSON lines under another name
  .jsonl .ndjson     one object a line
  .csv .tsv          a header of field names, quoted as spreadsheets do. A .tsv of two or three columns without a header is read as FLAN's chain-of-
                     thought files are: question, answer (, rationale), unquoted, a line break written "\\\\n"
  .txt               the whole file is one document: trained whole with train_on=all, never guessed to be a conversation
  .parquet           one record a row
  .arrow .feather .ipc  the same; the stream form, as `datasets` saves it, and the file form

All but tables also with .gz or .zst behind. Text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Callable

from jaxsft.errors import UserError

Rows = tuple[list[dict], "list[int] | None"]
TEXT_KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
TABLE_KINDS = (".parquet", ".arrow", ".feather", ".ipc")
EXTENSIONS = (*TEXT_KINDS, *TABLE_KINDS, *(kind + packed for kind in TEXT_KINDS for packed in (".gz", ".zst")))
FIELDS = {"instruction", "input", "output", "context", "response", "prompt", "completion", "question", "answer", "rationale", "messages", "conversations",
          "inputs", "targets", "text", "system", "system_prompt", "chosen", "rejected", "message_id", "parent_id", "role"}
csv.field_size_limit(2**31 - 1)


def kind_of(name: str) -> str:
  """".jsonl" of "a/b.jsonl.gz"; "" when no reader knows the name."""
  bare = pathlib.Path(name).name.removesuffix(".gz").removesuffix(".zst")
  return next((kind for kind in (*TEXT_KINDS, *TABLE_KINDS) if bare.endswith(kind)), "")


def read_file(name: str, file: pathlib.Path | bytes, knob: str) -> Rows:
  """Records of one file (bytes: JSON lines from standard input). Raises UserError for whatever cannot be read, with the line where there is one."""
  kind = kind_of(name) if isinstance(file, pathlib.Path) else ".jsonl"
  if kind in TABLE_KINDS:
    return _read_table(name, kind, knob), None
  return READERS[kind](name, _text(name, file, knob), knob)


def _text(name: str, file: pathlib.Path | bytes, knob: str) -> str:
  try:
    raw = file if isinstance(file, bytes) else file.read_bytes()
    if name.endswith(".gz"):
      raw = gzip.decompress(raw)
    elif name.endswith(".zst"):
      raw = _unzstd(raw)
    return raw.decode("utf-8-sig")
  except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
    raise UserError(f"{name} cannot be read ({error})", wanted="UTF-8 text", knob=knob) from None


def _unzstd(raw: bytes) -> bytes:
  """Every frame of a .zst file, one after the other. Raises OSError for a broken or cut file."""
  import zstandard
  parts = []
  try:
    while raw:
      frame = zstandard.ZstdDecompressor().decompressobj()
      parts.append(frame.decompress(raw))
      if not frame.eof:
        raise OSError("the file is cut off")
      raw = frame.unused_data
  except zstandard.ZstdError as error:
    raise OSError(error) from None
  return b"".join(parts)


def _json(name: str, text: str, knob: str) -> Rows:
  if not text.strip():
    return [], None
  try:
    return _json_records(name, json.loads(text), knob), None
  except json.JSONDecodeError as error:
    if "Extra data" not in error.msg:    # several values one after the other: JSON lines under another name
      raise UserError(f"{name}:{error.lineno}: broken JSON ({error.msg})", wanted="a list of objects", knob=knob) from None
  except (ValueError, RecursionError) as error:      # a number of thousands of digits, brackets without end
    raise UserError(f"{name}: JSON that cannot be read ({error})", wanted="a list of objects", knob=knob) from None
  return _json_lines(name, text, knob)


def _json_records(name: str, value, knob: str) -> list[dict]:
  if isinstance(value, dict) and isinstance(value.get("data"), list) and not all(isinstance(item, str) for item in value["data"]):
    value = value["data"]
  if not isinstance(value, list):
    value = [value]
  for number, record in enumerate(value, 1):
    if not isinstance(record, dict):
      raise UserError(f"{name}:{number}: the record is a {type(record).__name__}", wanted="a JSON object", knob=knob)
  return value


def _json_lines(name: str, text: str, knob: str) -> Rows:
  rows, lines = [], []
  for number, line in enumerate(text.split("\n"), 1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise UserError(f"{name}:{number}: broken JSON ({getattr(error, 'msg', error)})", wanted="one JSON object a line", knob=knob) from None
    if not isinstance(record, dict):
      raise UserError(f"{name}:{number}: the record is a {type(record).__name__}", wanted="one JSON object a line", knob=knob)
    rows.append(record)
    lines.append(number)
  return rows, lines


def _csv(name: str, text: str, knob: str, dialect: str = "excel") -> Rows:
  reader = csv.reader(io.StringIO(text, newline=""), dialect=dialect, strict=True)
  header: list[str] = []
  rows, lines, line = [], [], 1
  try:
    for cells in reader:
      if not header:
        header = _header(name, cells, knob)
      elif cells:
        rows.append(_named(name, line, header, cells, knob))
        lines.append(line)
      line = reader.line_num + 1
  except csv.Error as error:
    raise UserError(f"{name}:{line}: broken quoting ({error})", wanted="fields quoted as spreadsheets do", knob=knob) from None
  return rows, lines


def _header(name: str, cells: list[str], knob: str) -> list[str]:
  header = [cell.strip() for cell in cells]
  if not FIELDS & set(header) or len(set(header)) < len(header):
    raise UserError(f"{name}:1: {', '.join(header)[:80]!r} is no header", wanted=f"names of fields, each once, such as {', '.join(sorted(FIELDS)[:4])}",
                    knob=knob)
  return header


def _named(name: str, line: int, header: list[str], cells: list[str], knob: str) -> dict:
  if len(cells) != len(header):
    raise UserError(f"{name}:{line}: {len(cells)} fields under a header of {len(header)}", wanted="as many", knob=knob)
  return dict(zip(header, cells))


def _tsv(name: str, text: str, knob: str) -> Rows:
  table = text.replace("\r\n", "\n").split("\n")
  columns = table[0].split("\t")
  if FIELDS & {cell.strip() for cell in columns} or len(columns) not in (2, 3):
    return _csv(name, text, knob, "excel-tab")
  header = ["question", "answer", "rationale"][:len(columns)]
  lines = [number for number, line in enumerate(table, 1) if line.strip()]
  return [_named(name, n, header, [cell.replace("\\n", "\n") for cell in table[n - 1].split("\t")], knob) for n in lines], lines


def _txt(name: str, text: str, knob: str) -> Rows:
  return [{"document": text}] if text.strip() else [], None


READERS: dict[str, Callable[[str, str, str], Rows]] = {".json": _json, ".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _csv, ".tsv": _tsv, ".txt": _txt}


def _read_table(name: str, kind: str, knob: str) -> list[dict]:
  import pyarrow
  import pyarrow.ipc
  import pyarrow.parquet
  try:
    if kind == ".parquet":
      return pyarrow.parquet.read_table(name).to_pylist()
    with pyarrow.memory_map(name) as file:
      is_file_form = file.read(6) == b"ARROW1"
      file.seek(0)
      table = (pyarrow.ipc.open_file if is_file_form else pyarrow.ipc.open_stream)(file).read_all()
      return table.to_pylist()
  except (OSError, ValueError) as error:     # pyarrow's own errors are subclasses of both
    what = "Parquet" if kind == ".parquet" else "Arrow"
    raise UserError(f"{name} is no readable {what} file ({error})", wanted=f"a whole {what} file", knob=knob) from None
