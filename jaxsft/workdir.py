"""The folder of a run: locked against a second run, refused for another config, written atomically."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import shutil

from jaxsft.config import differences, to_json
from jaxsft.errors import UserError


class Workdir:
  """DIR, locked until `close`. Its config.json is compared at once, and written by `begin`, when the run has passed its checks:

  a mistake found before that leaves the folder free for the mended config.
  """

  def __init__(self, path, config):
    self.path, self._config = pathlib.Path(path), config
    self._lock = _locked(self.path)
    self._check_config()
    self.scratch = self.path / ".scratch"          # for what must not outlive the run: a killed run's is removed by the next
    shutil.rmtree(self.scratch, ignore_errors=True)
    self.scratch.unlink(missing_ok=True)
    self.scratch.mkdir()

  def _check_config(self):
    file = self.path / "config.json"
    if not file.exists():
      return
    try:
      changed = differences(file.read_text(), self._config)
    except (OSError, ValueError) as error:
      raise UserError(f"{file} cannot be read ({error})", wanted="the config of the run, or another folder", knob="--workdir") from None
    if changed:
      raise UserError(f"workdir {self.path} belongs to another config: {'; '.join(changed[:6])}{' ...' * (len(changed) > 6)}",
                      wanted="the same config (the run then resumes) or another folder", knob="--workdir")

  def begin(self):
    """The run is sound: from now on the folder belongs to its config."""
    if not (self.path / "config.json").exists():
      write_atomically(self.path / "config.json", to_json(self._config))

  def write_json(self, name: str, value):
    """DIR/name as JSON, atomically."""
    write_atomically(self.path / name, json.dumps(value, indent=1))

  def read_json(self, name: str):
    """What `write_json` wrote; None when there is no such file."""
    file = self.path / name
    return json.loads(file.read_text()) if file.exists() else None

  def close(self):
    shutil.rmtree(self.scratch, ignore_errors=True)
    self._lock.close()


def _locked(path: pathlib.Path):
  """An open file that holds the lock of `path`, which is made. Errors: UserError when that fails or another run has it."""
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock = open(path / ".lock", "w")  # noqa: SIM115  (held as long as the run lives)
  except OSError as error:
    raise UserError(f"workdir {path} cannot be written ({error.strerror})", wanted="a folder that can be written", knob="--workdir") from None
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    lock.close()
    raise UserError(f"workdir {path} is in use by another run", wanted="one run a folder", knob="--workdir") from None
  except OSError as error:
    lock.close()
    raise UserError(f"workdir {path} cannot be locked ({error.strerror})", wanted="a file system with locks", knob="--workdir") from None
  return lock


@contextlib.contextmanager
def disk_errors(path):
  """Turns whatever a full disk raises inside (tensorstore ValueError, the file system OSError, Orbax either, wrapped) into a UserError."""
  try:
    yield
  except Exception as error:
    if any(word in str(error).lower() for word in ("no space left", "disk quota", "file too large")):
      raise UserError(f"the disk of {path} is full: nothing more could be written (earlier checkpoints are whole)", wanted="free disk space",
                      knob="--workdir to a larger disk, or checkpoint.keep lower") from error
    raise


def write_atomically(file: pathlib.Path, text: str):
  """Whole or not at all: a temporary file beside it, synced, renamed. Errors: UserError when the disk is full.

  The temporary file's name is fixed, so that killed runs leave one at most.
  """
  temporary = file.with_name(f".{file.name}.partial")
  try:
    with open(temporary, "w", encoding="utf-8") as out:
      out.write(text)
      out.flush()
      os.fsync(out.fileno())
    os.replace(temporary, file)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise UserError(f"{file} could not be written ({error.strerror})", wanted="free disk space", knob="--workdir to a larger disk") from None
