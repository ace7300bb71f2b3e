"""Raw records from files (containers.py), a folder or glob of them, a hub id or a public set by name (sets.py), each with where it came from.

  Records[i]        -> dict, the record as it stands in the source
  Records.where(i)  -> "train.jsonl:17" (line of a JSONL, CSV or TSV file, number of the record in the others, both from 1)

In a folder or glob, .txt files count only where nothing else does (beside data they are licences and notes), and what `datasets` writes about
a saved set is passed over.
"""

from __future__ import annotations

import dataclasses
import glob
import pathlib
import re
import sys
from typing import Any

from jaxsft.data import sets, trees
from jaxsft.data.containers import EXTENSIONS, TABLE_KINDS, TEXT_KINDS, kind_of, read_file
from jaxsft.errors import UserError

ENDINGS = f"{', '.join((*TEXT_KINDS, *TABLE_KINDS))}; text ones also with .gz or .zst"
ABOUT = ("dataset_info.json", "state.json", "dataset_dict.json")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Source:
  """What `read_records` asks for, where no config has it: the fields of configs/common.py source()."""
  path: str
  format: str = "auto"
  split: str = "train"
  revision: str = ""
  rows: int = 0
  policy: str = "drop"


class Records:
  """A list of records with provenance: `rows` are dicts (or a datasets.Dataset), `places` one (name, first, lines) a file.

  `origins`: for each row the number it had in the source, where one raw record became several (trees.py); None: they are the same.
  """

  def __init__(self, rows, places, origins=None):
    self.rows, self.places, self.origins = rows, places, origins

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.rows[index]

  def where(self, index: int) -> str:
    """"file:line" of record `index`."""
    index = index if self.origins is None else self.origins[index]
    for name, first, lines in reversed(self.places):
      if index >= first:
        return f"{name}:{lines[index - first] if lines else index - first + 1}"
    raise IndexError(index)


def read_records(source, knob: str = "data.train.path") -> Records:
  """All records of `source` (path, split, revision, rows, format; rows 0 is all), message trees taken apart into threads.

  Raises UserError: nothing at the path, an unknown extension, an empty file, broken JSON (file and line), a record that is no object.
  """
  records = raw_records(source, source.rows, knob)
  format = getattr(source, "format", "auto")
  if format not in trees.FORMATS or not _holds_trees(records.rows):
    return records
  if source.rows:                            # a limit counts threads: the rows of one tree may lie anywhere
    records = raw_records(source, 0, knob)
  found = trees.expand(records.rows, format)[:source.rows or None]
  return Records([record for record, _ in found], records.places, [number for _, number in found])


def _holds_trees(rows) -> bool:
  if hasattr(rows, "column_names"):
    return {"message_id", "parent_id", "role", "text"} <= set(rows.column_names)
  return any(trees.is_row(record) or trees.is_tree(record) for record in rows)


def raw_records(source, limit: int, knob: str) -> Records:
  """`read_records` with every record as it stands in the source, the first `limit` of them (0: all)."""
  path = str(source.path)
  if not path:
    raise UserError("no path of training data", wanted="a file, a directory, a glob or a hub id", knob=knob)
  if path == "-":
    return _from_files([("standard input", sys.stdin.buffer.read())], limit, knob)
  public = sets.named(path, knob)
  files = [] if public else _files(path, knob)
  if not files:
    return _from_hub(source, limit, knob, public)
  for name, default in (("split", "train"), ("revision", "")):
    if getattr(source, name, default) != default:
      raise UserError(f"{path} lies here and has no {name} {getattr(source, name)!r}", wanted="a hub id, or none", knob=knob.removesuffix("path") + name)
  return _from_files([(str(f), f) for f in files], limit, knob)


def _files(path: str, knob: str) -> list[pathlib.Path]:
  """The files that `path` names, sorted; [] when it can only be a hub id."""
  here = pathlib.Path(path).expanduser()
  if here.is_dir():
    found = _data_files(here.rglob("*"))
    if not found:
      raise UserError(f"directory {path} holds no data file", wanted=f"files ending in {ENDINGS}", knob=knob)
    return found
  if here.is_file():
    if not here.name.endswith(EXTENSIONS):
      raise UserError(f"{path} has an unknown extension", wanted=f"one of {ENDINGS}", knob=knob)
    return [here]
  found = _data_files(pathlib.Path(f) for f in glob.glob(str(here), recursive=True))
  if not found and (path.endswith(EXTENSIONS) or not _HUB_ID.fullmatch(path)):
    raise UserError(f"{path} does not exist", wanted="a file, a directory, a glob, a hub id (owner/name) or a public set (python -m jaxsft.data sets)",
                    knob=knob)
  return found


def _data_files(paths) -> list[pathlib.Path]:
  found = sorted(f for f in paths if f.is_file() and f.name.endswith(EXTENSIONS) and f.name not in ABOUT)
  return [f for f in found if kind_of(f.name) != ".txt"] or found


def _from_files(named, limit: int, knob: str) -> Records:
  rows: list[dict] = []
  places = []
  for name, file in named:
    new, lines = read_file(name, file, knob)
    if not new:
      raise UserError(f"{name} is empty", wanted="at least one record", knob=knob)
    places.append((pathlib.Path(name).name, len(rows), lines))
    rows += new
    if limit and len(rows) >= limit:
      break
  return Records(rows[:limit] if limit else rows, places)


def _from_hub(source, limit: int, knob: str, public=None) -> Records:
  """The rows of a hub id, or of a public set where it lies on the hub."""
  import datasets
  path, split, more = source.path, source.split, {}
  if public is not None:
    path, split = public.hub, public.split if split == "train" else split
    more = {key: value for key, value in (("name", public.subset), ("data_files", list(public.files))) if value}
  try:
    rows = datasets.load_dataset(path, split=split, revision=source.revision or None, **more)
  except Exception as error:  # whatever the hub client raises: no network, no such set, no such split
    raise UserError(f"{path} is no file here, and as a hub id it failed ({(str(error).strip() or type(error).__name__).splitlines()[0][:200]})",
                    wanted="a file, a directory, a glob, a hub id (owner/name) or a public set (python -m jaxsft.data sets)", knob=knob) from None
  if not len(rows):
    raise UserError(f"{path} split {split} is empty", wanted="at least one record", knob=knob)
  rows = rows.select(range(min(limit, len(rows)))) if limit else rows
  return Records(rows, [(path, 0, None)])
