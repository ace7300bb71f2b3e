"""Raw records from files and hubs: JSON, JSONL, Parquet, a folder or glob of them, or a hub id, each with where it came from.

  Records[i]        -> dict, the record as it stands in the source
  Records.where(i)  -> "train.jsonl:17" (line of a JSONL file, number of the record in a JSON or Parquet file, both from 1)
"""

from __future__ import annotations

import glob
import gzip
import json
import pathlib
import re
import sys
import zlib
from typing import Any

from jaxsft.errors import UserError

EXTENSIONS = (".json", ".jsonl", ".parquet", ".json.gz", ".jsonl.gz")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class Records:
  """A list of records with provenance: `rows` are dicts (or a datasets.Dataset), `places` one (name, first, lines) a file."""

  def __init__(self, rows, places):
    self.rows, self.places = rows, places

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.rows[index]

  def where(self, index: int) -> str:
    """"file:line" of record `index`."""
    for name, first, lines in reversed(self.places):
      if index >= first:
        return f"{name}:{lines[index - first] if lines else index - first + 1}"
    raise IndexError(index)


def read_records(source, knob: str = "data.train.path") -> Records:
  """All records of `source` (path, split, revision, rows; rows 0 is all).

  Raises UserError: nothing at the path, an unknown extension, an empty file, broken JSON (file and line), a record that is no object.
  """
  path = str(source.path)
  if not path:
    raise UserError("no path of training data", wanted="a file, a directory, a glob or a hub id", knob=knob)
  if path == "-":
    return _from_files([("standard input", sys.stdin.buffer.read())], source.rows, knob)
  files = _files(path, knob)
  if not files:
    return _from_hub(source, knob)
  for name, default in (("split", "train"), ("revision", "")):
    if getattr(source, name, default) != default:
      raise UserError(f"{path} lies here and has no {name} {getattr(source, name)!r}", wanted="a hub id, or none", knob=knob.removesuffix("path") + name)
  return _from_files([(str(f), f) for f in files], source.rows, knob)


def _files(path: str, knob: str) -> list[pathlib.Path]:
  """The files that `path` names, sorted; [] when it can only be a hub id."""
  here = pathlib.Path(path).expanduser()
  if here.is_dir():
    found = sorted(f for f in here.rglob("*") if f.is_file() and f.name.endswith(EXTENSIONS))
    if not found:
      raise UserError(f"directory {path} holds no data file", wanted=f"files ending in {', '.join(EXTENSIONS)}", knob=knob)
    return found
  if here.is_file():
    if not here.name.endswith(EXTENSIONS):
      raise UserError(f"{path} has an unknown extension", wanted=f"one of {', '.join(EXTENSIONS)}", knob=knob)
    return [here]
  found = sorted(pathlib.Path(f) for f in glob.glob(str(here), recursive=True) if f.endswith(EXTENSIONS))
  if not found and (path.endswith(EXTENSIONS) or not _HUB_ID.fullmatch(path)):
    raise UserError(f"{path} does not exist", wanted="a file, a directory, a glob or a hub id (owner/name)", knob=knob)
  return found


def _from_files(named, limit: int, knob: str) -> Records:
  rows: list[dict] = []
  places = []
  for name, file in named:
    new, lines = _read(name, file, knob)
    if not new:
      raise UserError(f"{name} is empty", wanted="at least one record", knob=knob)
    places.append((pathlib.Path(name).name, len(rows), lines))
    rows += new
    if limit and len(rows) >= limit:
      break
  return Records(rows[:limit] if limit else rows, places)


def _read(name: str, file, knob: str) -> tuple[list[dict], list[int] | None]:
  """Records of one file and, for JSONL, the line of each."""
  if name.endswith(".parquet"):
    return _read_parquet(name, knob), None
  text = _text(name, file, knob)
  if pathlib.Path(name).name.endswith((".json", ".json.gz")):
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


def _text(name: str, file, knob: str) -> str:
  try:
    if isinstance(file, bytes):
      raw = file
    else:
      raw = gzip.decompress(file.read_bytes()) if name.endswith(".gz") else file.read_bytes()
    return raw.decode("utf-8-sig")
  except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
    raise UserError(f"{name} cannot be read ({error})", wanted="UTF-8 text", knob=knob) from None


def _json_records(name: str, value, knob: str) -> list[dict]:
  if isinstance(value, dict) and isinstance(value.get("data"), list) and not all(isinstance(item, str) for item in value["data"]):
    value = value["data"]
  if not isinstance(value, list):
    value = [value]
  for number, record in enumerate(value, 1):
    if not isinstance(record, dict):
      raise UserError(f"{name}:{number}: the record is a {type(record).__name__}", wanted="a JSON object", knob=knob)
  return value


def _json_lines(name: str, text: str, knob: str) -> tuple[list[dict], list[int]]:
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


def _read_parquet(name: str, knob: str) -> list[dict]:
  import pyarrow.parquet
  try:
    return pyarrow.parquet.read_table(name).to_pylist()
  except (OSError, ValueError) as error:     # pyarrow's own errors are subclasses of both
    raise UserError(f"{name} is no readable Parquet file ({error})", wanted="a whole Parquet file", knob=knob) from None


def _from_hub(source, knob: str) -> Records:
  import datasets
  try:
    rows = datasets.load_dataset(source.path, split=source.split, revision=source.revision or None)
  except Exception as error:  # whatever the hub client raises: no network, no such set, no such split
    raise UserError(f"{source.path} is no file here, and as a hub id it failed ({(str(error).strip() or type(error).__name__).splitlines()[0][:200]})",
                    wanted="a file, a directory, a glob or a hub id (owner/name)", knob=knob) from None
  if not len(rows):
    raise UserError(f"{source.path} split {source.split} is empty", wanted="at least one record", knob=knob)
  rows = rows.select(range(min(source.rows, len(rows)))) if source.rows else rows
  return Records(rows, [(source.path, 0, None)])
