"""The folder of a run: locked against a second run, refused for another config, written atomically."""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import tempfile

from jaxsft.config import differences, to_json
from jaxsft.errors import UserError


class Workdir:
  """DIR with its lock held until `close`; `config.json` is written on the first use and compared on every later one."""

  def __init__(self, path, config):
    self.path = pathlib.Path(path)
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._lock = open(self.path / ".lock", "w")  # noqa: SIM115  (held as long as the run lives)
    except OSError as error:
      raise UserError(f"workdir {path} cannot be made ({error.strerror})", wanted="a folder that can be written", knob="--workdir") from None
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise UserError(f"workdir {path} is in use by another run", wanted="one run a folder", knob="--workdir") from None
    self._check_config(config)

  def _check_config(self, config):
    file = self.path / "config.json"
    if not file.exists():
      write_atomically(file, to_json(config))
      return
    changed = differences(file.read_text(), config)
    if changed:
      raise UserError(f"workdir {self.path} belongs to another config: {'; '.join(changed[:6])}{' ...' * (len(changed) > 6)}",
                      wanted="the same config (the run then resumes) or another folder", knob="--workdir")

  def write_json(self, name: str, value):
    """DIR/name as JSON, atomically."""
    write_atomically(self.path / name, json.dumps(value, indent=1))

  def close(self):
    self._lock.close()


def write_atomically(file: pathlib.Path, text: str):
  """Whole or not at all: a temporary file beside it, synced, renamed. Errors: UserError when the disk is full."""
  try:
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}.", delete=False) as temporary:
      temporary.write(text)
      temporary.flush()
      os.fsync(temporary.fileno())
    os.replace(temporary.name, file)
  except OSError as error:
    raise UserError(f"{file} could not be written ({error.strerror})", wanted="free disk space", knob="--workdir") from None
