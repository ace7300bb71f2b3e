"""Writers of a run's numbers: metrics.jsonl, TensorBoard, and the terminal (a bar with ETA, or plain lines). They sit at the edge."""

from __future__ import annotations

import json
import math
import pathlib
import sys
import time


class JsonLines:
  """DIR/metrics.jsonl, one object a logged step; on resume lines past the restored step are cut, so that no step stands twice."""

  def __init__(self, path: pathlib.Path, start: int):
    kept = [line for line in path.read_text().splitlines() if _whole(line, start)] if path.exists() else []
    path.write_text("".join(line + "\n" for line in kept))
    self._file = open(path, "a", buffering=1)  # noqa: SIM115

  def write(self, step: int, values: dict):
    self._file.write(json.dumps({"step": step} | {k: _finite(v) for k, v in values.items()}) + "\n")

  def close(self):
    self._file.close()


def append_json(path: pathlib.Path, values: list[dict]):
  """Adds one JSON line a value."""
  with open(path, "a") as file:
    file.write("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def read_json_lines(path: pathlib.Path) -> list[dict]:
  """Every whole line of a JSONL file."""
  return [json.loads(line) for line in path.read_text().splitlines()]


def _whole(line, start) -> bool:
  try:
    return json.loads(line)["step"] <= start
  except (ValueError, KeyError):
    return False        # a line that a power cut left half


def _finite(value):
  return value if not isinstance(value, float) or math.isfinite(value) else str(value)    # JSON has no NaN


class TensorBoard:
  """Scalars under DIR/tensorboard, by tensorboardX (no torch, no tensorflow)."""

  def __init__(self, path: pathlib.Path):
    from tensorboardX import SummaryWriter
    self._writer = SummaryWriter(str(path))

  def write(self, step: int, values: dict):
    for name, value in values.items():
      if isinstance(value, (int, float)):
        self._writer.add_scalar(name, value, step)

  def close(self):
    self._writer.close()


class Terminal:
  """Progress on standard error: a rich bar with ETA, tokens/s and loss on a terminal, plain lines elsewhere."""

  def __init__(self, start: int, steps: int):
    self._steps, self._started, self._start, self._bar = steps, time.monotonic(), start, None
    if sys.stderr.isatty():
      from rich.console import Console
      from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
      self._bar = Progress(TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                           TextColumn("{task.fields[note]}"), console=Console(stderr=True))
      self._bar.start()
      self._task = self._bar.add_task("training", total=steps, completed=start, note="compiling")

  def write(self, step: int, values: dict):
    note = "  ".join(text for name, text in (
        ("loss", "loss {:.4f}"), ("eval_loss", "eval {:.4f}"), ("grad_norm", "grad {:.3f}"), ("tokens_per_second", "{:.0f} tok/s")) if name in values
        for text in [text.format(values[name])])
    if self._bar:
      self._bar.update(self._task, completed=step, note=note)
    else:
      print(f"step {step}/{self._steps}  {note}  {self._eta(step)}", file=sys.stderr, flush=True)

  def _eta(self, step):
    left = (time.monotonic() - self._started) / max(1, step - self._start) * (self._steps - step)
    return f"eta {int(left // 60)}:{int(left % 60):02d}"

  def say(self, text: str):
    """A line that the bar does not swallow."""
    if self._bar:
      self._bar.console.print(text, markup=False, highlight=False)
    else:
      print(text, file=sys.stderr, flush=True)

  def close(self):
    if self._bar:
      self._bar.stop()
