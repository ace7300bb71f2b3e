"""Writers of a run's numbers: metrics.jsonl, TensorBoard, W&B, and the terminal (a bar with ETA, or plain lines). They sit at the edge."""

from __future__ import annotations

import json
import math
import pathlib
import resource
import secrets
import statistics
import sys
import time

from jaxsft.errors import UserError
from jaxsft.workdir import write_atomically


def scalars(values: dict) -> dict[str, float]:
  """A step's metrics as floats, in the order of their names; what has one value a layer becomes NAME/0, NAME/1, ..."""
  out: dict[str, float] = {}
  for name, value in values.items():
    out |= {f"{name}/{layer}": float(one) for layer, one in enumerate(value)} if getattr(value, "ndim", 0) else {name: float(value)}
  return out


def open_writers(log, path: pathlib.Path, start: int, steps: int, config: dict) -> tuple[list, Terminal]:
  """(writers, the terminal among them): metrics.jsonl, the terminal, and what the part `log` of a config asks for.

  start: the step that the run resumes from, of `steps`; config: for W&B's page. Errors: UserError for a W&B that does not let the run in.
  """
  last = [Wandb(path, log.wandb, config)] if log.wandb else []          # opened first: it may refuse, and a bar must not be left behind
  terminal = Terminal(start, steps)
  board = [TensorBoard(path / "tensorboard", start)] if log.tensorboard else []
  return [JsonLines(path / "metrics.jsonl", start), terminal, *board, *last], terminal


class JsonLines:
  """DIR/metrics.jsonl, one object a logged step; on resume lines past the restored step are cut, so that no step stands twice."""

  def __init__(self, path: pathlib.Path, start: int):
    cut(path, start)
    self._file = open(path, "a", buffering=1)  # noqa: SIM115

  def write(self, step: int, values: dict):
    self._file.write(json.dumps({"step": step} | {k: _finite(v) for k, v in values.items()}) + "\n")

  def close(self):
    self._file.close()


def cut(path: pathlib.Path, start: int):
  """Takes the lines past step `start` out of a JSONL file, and one that a kill left half; all of them when nothing was saved (start 0)."""
  if path.exists():
    lines = path.read_text().split("\n")[:-1]       # not splitlines: a text may hold U+2028
    kept = [line for line in lines if _whole(line, start)] if start else []
    if "".join(line + "\n" for line in kept) != path.read_text():
      write_atomically(path, "".join(line + "\n" for line in kept))


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
  except (ValueError, KeyError, TypeError):
    return False


def _finite(value):
  return value if not isinstance(value, float) or math.isfinite(value) else str(value)    # JSON has no NaN


def summarise(lines: list[dict]) -> dict:
  """What summary.json says of a run, from its logged steps: first and last losses, median tokens a second (the first step compiles)."""
  losses = [line["loss"] for line in lines if "loss" in line]
  evals = [line["eval_loss"] for line in lines if "eval_loss" in line]
  speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
  ends = lambda values: (values[0], values[-1]) if values else (None, None)
  return {"train_loss_first": ends(losses)[0], "train_loss_last": ends(losses)[1], "eval_loss_before": ends(evals)[0], "eval_loss_after": ends(evals)[1],
          "tokens_per_second": statistics.median(speeds[1:] or speeds) if speeds else None}


def peak_rss_bytes() -> int:
  """The most memory that this process has held."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def count_tokens(batch) -> int:
  """Tokens of a batch, nested or not, padding apart."""
  return sum(count_tokens(value) if isinstance(value, dict) else int((value > 0).sum()) * (name == "segment_ids") for name, value in batch.items())


def closing_line(summary: dict, path) -> str:
  """The last line of a run for people."""
  spans = [f"{name} {summary[first]:.4f} -> {summary[last]:.4f}" for name, first, last in (
      ("loss", "train_loss_first", "train_loss_last"), ("eval", "eval_loss_before", "eval_loss_after")) if summary[first] is not None]
  seconds = summary["wall_seconds"]
  return f"done: {summary['steps']} steps in {int(seconds // 60)}:{int(seconds % 60):02d}  {'  '.join(spans)}  in {path}"


class TensorBoard:
  """Scalars under DIR/tensorboard, by tensorboardX (no torch, no tensorflow).

  Its SummaryWriter queues to a thread of its own, which on a full disk ends in tracebacks at exit: events are written here and now.
  """

  def __init__(self, path: pathlib.Path, start: int):
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2
    path.mkdir(exist_ok=True)
    self._scalar, self._event = summary.scalar, event_pb2.Event
    self._writer = event_file_writer.EventsWriter(str(path / "events"), f".from{start}")
    restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)       # TensorBoard then hides what an earlier start wrote past here
    self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=start + 1, session_log=restart))
    self._writer.flush()

  def write(self, step: int, values: dict):
    for name, value in values.items():
      if isinstance(value, (int, float)):
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))
    self._writer.flush()

  def close(self):
    self._writer.close()


class Wandb:
  """A run of Weights & Biases in project `project`, its files under DIR/wandb; its id is kept in DIR/wandb.json, so that a resumed run goes on in it.

  WANDB_MODE=offline works without a network. Steps written before a kill and made again after it are dropped by W&B: they hold the same numbers.
  Errors: UserError where the package is missing or W&B refuses.
  """

  def __init__(self, path: pathlib.Path, project: str, config: dict):
    try:
      import wandb
    except ImportError:
      raise UserError(f"log.wandb is {project!r} and the package wandb is not installed", wanted="pip install 'jaxsft[wandb]'", knob="log.wandb") from None
    kept = path / "wandb.json"
    name = json.loads(kept.read_text())["id"] if kept.exists() else secrets.token_hex(4)
    write_atomically(kept, json.dumps({"id": name, "project": project}))
    try:
      self._run = wandb.init(project=project, id=name, resume="allow", dir=str(path), config=config, settings=wandb.Settings(console="off", silent=True))
    except wandb.Error as error:
      raise UserError(f"W&B refuses the run ({error})", wanted="wandb login, or WANDB_MODE=offline", knob="log.wandb") from None

  def write(self, step: int, values: dict):
    self._run.log(values, step=step)

  def close(self):
    self._run.finish()


SHOWN = {"loss": "loss {:.4f}", "eval_loss": "eval {:.4f}", "grad_norm": "grad {:.3f}", "tokens_per_second": "{:,.0f} tok/s"}


class Terminal:
  """Progress on standard error: a rich bar with ETA, tokens/s and loss on a terminal, plain lines elsewhere."""

  def __init__(self, start: int, steps: int):
    self._steps, self._bar = steps, None
    self._first: tuple[int, float] | None = None
    if not sys.stderr.isatty():
      return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    self._bar = Progress(TextColumn("training"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                         TextColumn("{task.fields[note]}"), console=console())
    self._bar.start()
    self._task = self._bar.add_task("training", total=steps, completed=start, note="compiling")

  def write(self, step: int, values: dict):
    note = "  ".join(text.format(values[name]) for name, text in SHOWN.items() if name in values)
    if self._bar:
      self._bar.update(self._task, completed=step, note=note)
    else:
      print("  ".join(filter(None, (f"step {step}/{self._steps}", note, self._eta(step, values)))), file=sys.stderr, flush=True)

  def _eta(self, step, values):
    """"eta 1:05" by the steps after the first of this start, which compiled."""
    if "loss" not in values or step == self._steps:
      return ""
    now = time.monotonic()
    self._first = self._first or (step, now)
    if step == self._first[0]:
      return ""
    left = (now - self._first[1]) / (step - self._first[0]) * (self._steps - step)
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


def console(width: int | None = None):
  """rich's console on standard error; no escape codes unless it is a terminal, whatever FORCE_COLOR says."""
  from rich.console import Console
  terminal = sys.stderr.isatty()
  return Console(stderr=True, width=width, force_terminal=terminal, no_color=None if terminal else True)
