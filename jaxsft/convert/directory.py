"""Directories of files: JSON in and out with messages that name the file, and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from jaxsft.errors import UserError


def read_json(file: pathlib.Path, required: bool = False) -> dict[str, Any]:
  """The object in a JSON file; {} for a file that is not there and not required. UserError names the file."""
  if not file.is_file():
    if required:
      raise UserError(f"{file.parent} has no {file.name}", wanted="a Hugging Face model directory", knob="model.path")
    return {}
  try:
    value = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{file} is no JSON ({error})", wanted="a whole file", knob="model.path to a whole copy") from None
  if not isinstance(value, dict):
    raise UserError(f"{file} holds a {type(value).__name__}", wanted="an object", knob="model.path to a whole copy")
  return value


def write_json(file: pathlib.Path, value) -> None:
  """`value` as indented UTF-8."""
  file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_directory(out_dir, overwrite: bool = False, bytes_needed: int = 0, check: Callable[[pathlib.Path], Any] | None = None) -> Iterator[pathlib.Path]:
  """A temporary directory beside `out_dir` that takes its name when the block ends well and `check` finds no fault, and vanishes otherwise.

  Errors: UserError when out_dir holds something and overwrite is off, or something that is no export; when its parent cannot be made; when the
  disk is, or gets, too full.
  """
  out = pathlib.Path(out_dir).absolute()
  _check_place(out, out_dir, overwrite)
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"{out_dir} cannot be made ({error.strerror})", wanted="a place below folders that can be written", knob="another output path") from None
  free = shutil.disk_usage(out.parent).free
  if free < bytes_needed:
    raise UserError(f"the disk of {out_dir} has {free:,} bytes free", wanted=f"{bytes_needed:,}", knob="an output path on a larger disk")
  partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  try:
    yield partial
    if check:
      check(partial)
    _swap(partial, out)
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    raise UserError(f"the disk of {out_dir} is full", wanted=f"{bytes_needed:,} bytes", knob="an output path on a larger disk") from None
  finally:
    shutil.rmtree(partial, ignore_errors=True)


EXPORT_FILES = ("config.json", "adapter_config.json", "jaxsft.json")            # one of them stands in every export ...
RUN_FILES = (".lock", "metrics.jsonl", "preflight.json")           # ... and none of these


def _check_place(out: pathlib.Path, name, overwrite: bool):
  """Only an export is ever replaced: a run, or a folder that somebody keeps other things in, is not."""
  if not out.exists() or (out.is_dir() and not any(out.iterdir())):
    return
  if not overwrite:
    raise UserError(f"{name} is there already", wanted="a new or empty directory", knob="another output path, or --overwrite to replace an export")
  export = any((out / file).is_file() for file in EXPORT_FILES) and not any((out / file).exists() for file in RUN_FILES)
  if not export or out == out.parent:
    raise UserError(f"{name} holds something that is no export", wanted="an export to replace, or a new directory", knob="another output path")


def _swap(partial, out):
  """`partial` takes the name `out`; what was there goes only after."""
  old = out.with_name(f".{out.name}.old-{os.getpid()}")
  if out.exists():
    out.rename(old)
  partial.rename(out)
  shutil.rmtree(old, ignore_errors=True)
