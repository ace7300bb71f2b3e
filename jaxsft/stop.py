"""SIGTERM and SIGINT during a run: the first asks for a save after this step, the second leaves at once."""

from __future__ import annotations

import os
import signal
import sys
import threading

ASKING = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
  """A signal came; everything there was to save is saved. No Exception: what guards a loader against its errors must not eat it."""


class Stop:
  """While entered, signals set `name` ("SIGTERM") once `stepping` is true; before the first step, with nothing to save, they raise Interrupted.

  A second signal ends the process with exit 1: what is on disk is whole at any moment.
  """

  def __init__(self):
    self.name, self.stepping, self._before = "", False, {}

  def __enter__(self) -> Stop:
    if threading.current_thread() is threading.main_thread():      # Python hands signals to no other
      self._before = {number: signal.signal(number, self._on_signal) for number in ASKING}
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _on_signal(self, number, _frame):
    again, name = bool(self.name), signal.Signals(number).name
    if again:
      _tell(f"{name} again: leaving at once; the same command goes on from the newest checkpoint")
      os._exit(1)
    self.name = name
    if not self.stepping:
      self.check()
    _tell(f"{name}: finishing this step, then saving (again: leave at once)")

  def check(self):
    """Raises Interrupted for a signal that came before the first step: where it came, what it raised may have been eaten (a callback of C code)."""
    if self.name and not self.stepping:
      raise Interrupted(f"{self.name} before the first step: there was nothing to save; the same command starts again")


def _tell(text: str):
  """One line on standard error past Python's buffer, into which the signal may have come; a bar's hidden cursor is shown again."""
  shown = "\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else ""
  os.write(2, f"{shown}{text}\n".encode())
