"""Directories of files: JSON in and out with messages that name the file, and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
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
def whole_directory(out_dir, overwrite: bool = False, bytes_needed: int = 0) -> Iterator[pathlib.Path]:
  """A temporary directory beside `out_dir` that takes its name when the block ends well, and vanishes otherwise.

  Errors: UserError when out_dir holds something and overwrite is off, or when the disk is, or gets, too full.
  """
  out = pathlib.Path(out_dir).absolute()
  if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"{out_dir} is there already", wanted="a new or empty directory", knob="another output path")
  out.parent.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(out.parent).free
  if free < bytes_needed:
    raise UserError(f"the disk of {out_dir} has {free:,} bytes free", wanted=f"{bytes_needed:,}", knob="an output path on a larger disk")
  partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  try:
    yield partial
    _swap(partial, out)
  except OSError as error:
    if error.errno != errno.ENOSPC:
      raise
    raise UserError(f"the disk of {out_dir} is full", wanted=f"{bytes_needed:,} bytes", knob="an output path on a larger disk") from None
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _swap(partial, out):
  """`partial` takes the name `out`; what was there goes only after."""
  old = out.with_name(f".{out.name}.old-{os.getpid()}")
  if out.exists():
    out.rename(old)
  partial.rename(out)
  shutil.rmtree(old, ignore_errors=True)
