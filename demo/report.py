"""What the demo shows: answers side by side, a table of scores, the loss curve."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from demo import judge

PLAIN_WIDTH = 140     # columns where standard output is no terminal


def console():
  """rich's console on standard output: colours on a terminal, plain text elsewhere."""
  from rich.console import Console
  terminal = sys.stdout.isatty()
  return Console(force_terminal=terminal, no_color=None if terminal else True, width=None if terminal else PLAIN_WIDTH, highlight=False, markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False):
  """A rich Table; ASCII lines where standard output is no terminal."""
  from rich import box
  from rich.table import Table
  out = Table(title=title, title_justify="left", box=box.ROUNDED if sys.stdout.isatty() else box.ASCII, show_lines=not numbers)
  for i, column in enumerate(columns):
    out.add_column(column, ratio=None if numbers else 1, justify="right" if numbers and i else "left", overflow="fold")
  for row in rows:
    out.add_row(*row)
  return out


def side_by_side(records: Sequence[dict], before: Sequence[str], after: Sequence[str], limit: int = 8):
  """The first `limit` held-out mails with the answers before and after; a wrong answer after has the right ticket below it."""
  from rich.text import Text
  rows = []
  for record, old, new in list(zip(records, before, after))[:limit]:
    wanted, new = judge.answer(record), new.strip()
    right = new == wanted
    shown = Text(f"right  {new}" if right else f"WRONG  {new}\nwanted {wanted}", style="green" if right else "red")
    rows.append((Text(judge.mail(record)), Text(old.strip(), style="dim"), shown))
  return table("Mails that training never saw, answered before and after", ("mail", "before", "after"), rows)


def scores(before: dict, after: dict, baselines: dict):
  """Exact match and fields, before and after, beside what needs no model."""
  number = lambda values: [f"{values.get(name, float('nan')):.2f}" for name in ("exact_match", *judge.FIELDS)]
  look_up = lambda unit: [f"{baselines[f'nearest_{unit}']:.2f}", "", "", f"{baselines[f'nearest_{unit}_request_only']:.2f}"]
  rows = [("before training", *number(before)), ("after training", *number(after)), ("best constant answer", f"{baselines['constant']:.2f}", "", "", ""),
          ("nearest mail, characters", *look_up("characters")), ("nearest mail, words", *look_up("words"))]
  return table("Share of held-out tickets that are right", ("", "exact match", *judge.FIELDS), rows, numbers=True)


def plot(lines: Sequence[dict], before: float, after: float, path: Path):
  """The loss curve (training and held-out, logarithmic) and exact match before and after, as a PNG. lines: of metrics.jsonl."""
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot
  figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), width_ratios=(3, 1), layout="constrained")
  for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o--")):
    points = [(line["step"], line[key]) for line in lines if key in line]
    if points:
      left.plot(*zip(*points), style, label=label)
  left.set(xlabel="step", ylabel="loss, nats a token", yscale="log", title="QLoRA, SmolLM2-135M-Instruct")
  left.legend()
  bars = right.bar(("before", "after"), (before, after), color=("tab:gray", "tab:green"))
  right.bar_label(bars, fmt="%.2f")
  right.set(ylim=(0, 1.08), title="exact match")
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
