"""python -m jaxsft.data stats: how long the records of each source are, how much of a row is padding, how much of it is trained.

Lengths are whole ones, before anything is cut or dropped for being too long: they are what data.length is chosen by.
"""

from __future__ import annotations

import argparse
import types
from collections import Counter
from typing import Any

import numpy as np

from jaxsft import config
from jaxsft.data.command import add_record_flags, answer
from jaxsft.data.examples import outcomes
from jaxsft.data.pack import pack_in_groups
from jaxsft.data.records import Source
from jaxsft.data.schemas import FOUND_BY
from jaxsft.data.template import get_template
from jaxsft.data.tokenizer import load_tokenizer
from jaxsft.errors import UserError

PERCENTILES = (0, 5, 25, 50, 75, 90, 95, 99, 100)


def source_stats(results, records, length: int, pack: bool) -> dict[str, Any]:
  """JSON-able counts of one source's outcomes (examples.outcomes).

  Keys: records, kept, drops {code: count}, repairs, format {schema: count}, tokens, trained_share (of tokens), length_percentiles {"p50": ...},
  longer_than_row, rows, padding_share, padding_share_unpacked, files {name: {records, kept, tokens, p50, p99}}.
  """
  kept = [r for r in results if not r.drop]
  lengths, tokens = np.array([len(r.tokens) for r in kept], np.int64), sum(len(r.tokens) for r in kept)
  rows = len(pack_in_groups(lengths, length)) if pack and kept else len(kept)
  files: dict[str, list] = {}
  for r in results:
    files.setdefault(records.where(r.index).rpartition(":")[0], []).append(r)
  return {
      "records": len(results), "kept": len(kept), "drops": dict(Counter(r.drop for r in results if r.drop)),
      "repairs": dict(Counter(code for r in results for code in r.repairs)), "format": dict(Counter(r.schema for r in results if r.schema)),
      "tokens": tokens, "trained_share": sum(int(r.weights.sum()) for r in kept) / tokens if tokens else 0.0,
      "length_percentiles": _percentiles(results), "longer_than_row": sum(r.full_length > length for r in results),
      "rows": rows, "padding_share": 1 - tokens / (rows * length) if rows else 0.0,
      "padding_share_unpacked": 1 - tokens / (len(kept) * length) if kept else 0.0,
      "files": {name: {"records": len(part), "kept": sum(not r.drop for r in part), "tokens": sum(len(r.tokens) for r in part),
                       **{key: value for key, value in _percentiles(part).items() if key in ("p50", "p99")}} for name, part in files.items()},
  }


def _percentiles(results) -> dict[str, int]:
  """Of the whole lengths of every record that could be tokenised, too long ones included."""
  lengths = [r.full_length for r in results if r.full_length]
  return {f"p{p}": int(np.percentile(lengths, p, method="nearest")) for p in PERCENTILES} if lengths else {}


def run(arguments) -> dict[str, Any]:
  """{"length", "pack", "sources": {"train": ..., "eval"?: ...}}. Raises UserError."""
  c = config.load(arguments.config) if arguments.config else None
  flags = {name: value for name, value in vars(arguments).items() if value is not None}
  if c is not None:
    if "path" in flags:
      c.data.train.path, c.data.train.split, c.data.train.revision = flags["path"], "train", ""
    data, seed = c.data, c.seed
    c.data.train.format = flags.get("format", c.data.train.format)
    for name in ("template", "tokenizer", "length", "train_on", "position"):
      data[name] = flags.get(name, data[name])
    tokenizer_path = data.tokenizer or c.model.path
  else:
    data = types.SimpleNamespace(train=Source(flags.get("path", ""), flags.get("format", "auto")), eval=Source(""), eval_share=0.0, pack=True, workers=0,
                                 template=flags.get("template", "tokenizer"), length=flags.get("length", 2048), long_rows="drop",
                                 train_on=flags.get("train_on", "assistant"), position=flags.get("position", "pre"))
    seed, tokenizer_path = 0, flags.get("tokenizer", "")
  if data.length < 1:
    raise UserError(f"length is {data.length}", wanted="1 or more", knob="--length")
  tokenizer = load_tokenizer(tokenizer_path, knob="--tokenizer")
  template = get_template(data.template, tokenizer, data.position)
  out: dict[str, Any] = {"length": data.length, "pack": data.pack, "sources": {}}
  for which in ("train", "eval") if data.eval.path or data.eval_share else ("train",):
    results, records, source, _, _ = outcomes(data, seed, tokenizer, template, which)
    out["sources"][which] = {"path": source.path} | source_stats(results, records, data.length, data.pack)
  return out


def print_stats(found: dict, console=None) -> None:
  """A table a source."""
  import rich.console
  import rich.table
  console = console or rich.console.Console()
  for name, part in found["sources"].items():
    table = rich.table.Table(title=f"{name}: {part['path']}", show_header=False)
    say = lambda counts: ", ".join(f"{key} {count}" for key, count in counts.items()) or "none"
    format = "; ".join(f"{name} {count} ({FOUND_BY.get(name, 'as asked')})" for name, count in part["format"].items()) or "none"
    for label, text in (("records", f"{part['records']}, kept {part['kept']}"), ("format", format), ("dropped", say(part["drops"])),
                        ("repaired", say(part["repairs"])), ("tokens", f"{part['tokens']}, {part['trained_share']:.1%} trained"),
                        ("length", say(part["length_percentiles"])), (f"longer than {found['length']}", str(part["longer_than_row"])),
                        ("rows", f"{part['rows']}, {part['padding_share']:.1%} padding ({part['padding_share_unpacked']:.1%} unpacked)"),
                        *((f"  {file}", f"{f['kept']} of {f['records']}, {f['tokens']} tokens, p50 {f.get('p50', 0)}, p99 {f.get('p99', 0)}")
                          for file, f in part["files"].items() if len(part["files"]) > 1)):
      table.add_row(label, rich.markup.escape(text))
    console.print(table)


def parser() -> argparse.ArgumentParser:
  out = argparse.ArgumentParser(prog="python -m jaxsft.data stats", description="Lengths, padding and trained tokens of each source.")
  add_record_flags(out)
  return out


def main(argv=None) -> int:
  """Exit code: 0, or 2 for the user's mistake."""
  return answer(parser().parse_args(argv), run, print_stats)
