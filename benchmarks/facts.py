"""A small table of facts: full, LoRA and QLoRA, NEFTune on and off, 1,000 chosen rows against all; one model, one budget, three seeds.

    python -m benchmarks.facts --data=PATH/gsm8k [--workdir=runs/facts] [--table]

Model: SmolLM2-135M-Instruct (`make demo` leaves it in .cache). Data: train.jsonl of GSM8K; evaluation: the first 48 problems of its test.jsonl. Every cell is
an ordinary run of `jaxsft.main` in a folder of its own, so that the whole goes on where it was stopped; --table only prints what is there.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

from configs.common import ALL_LINEAR

SEEDS = (0, 1, 2)
STEPS, CHOSEN = 16, 1000
BUDGET = [f"--config.steps={STEPS}", f"--config.eval.every={STEPS}", f"--config.checkpoint.every={STEPS}", "--config.eval.rows=0",
          "--config.data.eval.rows=48", "--config.log.every=1", "--config.log.tensorboard=False"]
CELLS = {       # name -> what it changes of configs/gsm8k.py (LoRA rank 16 at 2e-4)
    "full": ["--config.lora.rank=0", "--config.optim.learning_rate=1e-5"],
    "lora": [],
    "qlora": [f"--config.nf4.targets={ALL_LINEAR}"],
    "lora + neftune 5": ["--config.neftune.alpha=5.0"],
    "lora, 1,000 rows": [],
}


def main(argv=None) -> int:
  """0 when every cell is there; the exit code of the first that fails."""
  args = parser().parse_args(argv)
  for seed in SEEDS if not args.table else ():
    for cell in CELLS:
      if code := run(cell, seed, args.data, args.workdir):
        return code
  print(table(args.workdir))
  return 0


def parser() -> argparse.ArgumentParser:
  out = argparse.ArgumentParser(prog="python -m benchmarks.facts", description=__doc__.splitlines()[0])
  out.add_argument("--data", type=pathlib.Path, required=True, help="folder with GSM8K's train.jsonl and test.jsonl")
  out.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/facts"))
  out.add_argument("--table", action="store_true", help="run nothing")
  return out


def folder(workdir: pathlib.Path, cell: str, seed: int) -> pathlib.Path:
  return workdir / f"{cell.replace(' ', '').replace('+', '_').replace(',', '_')}-{seed}"


def run(cell: str, seed: int, data: pathlib.Path, workdir: pathlib.Path) -> int:
  """One cell, from where it stands; nothing when it is done."""
  if (folder(workdir, cell, seed) / "summary.json").is_file():
    return 0
  train = chosen(data / "train.jsonl", workdir) if "rows" in cell else data / "train.jsonl"
  command = [sys.executable, "-m", "jaxsft.main", f"--config=configs/gsm8k.py:data={train},eval={data / 'test.jsonl'}", f"--config.seed={seed}",
             f"--workdir={folder(workdir, cell, seed)}", *BUDGET, *CELLS[cell]]
  return subprocess.run(command, check=False).returncode


def chosen(train: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
  """The CHOSEN rows with the longest answers, in the file's order ("Long is more", arXiv 2402.04833): the plainest selector that has a name."""
  out = workdir / f"longest_{CHOSEN}.jsonl"
  if not out.is_file():
    lines = train.read_text().splitlines()
    best = sorted(sorted(range(len(lines)), key=lambda i: -len(json.loads(lines[i])["answer"]))[:CHOSEN])
    workdir.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(lines[i] + "\n" for i in best))
  return out


def table(workdir: pathlib.Path) -> str:
  """Markdown: median over the seeds, and the range of the evaluation loss."""
  rows = ["| | evaluation loss (range) | tokens/s | peak memory, GiB | trained parameters |", "|---|---|---|---|---|"]
  for cell in CELLS:
    found = [json.loads(path.read_text()) for seed in SEEDS if (path := folder(workdir, cell, seed) / "summary.json").is_file()]
    if found:
      losses, speed, memory = ([one[name] for one in found] for name in ("eval_loss_after", "tokens_per_second", "peak_rss_bytes"))
      rows.append(f"| {cell} | {statistics.median(losses):.4f} ({min(losses):.4f} to {max(losses):.4f}, {len(found)} seeds) "
                  f"| {statistics.median(speed):.0f} | {statistics.median(memory) / 2**30:.2f} | {found[0]['parameters']['trainable']['parameters']:,} |")
  before = [json.loads(path.read_text())["eval_loss_before"] for path in workdir.glob("*/summary.json")]
  return "\n".join([*rows, "", f"before: {statistics.median(before):.4f}" if before else "no cell has run"])


if __name__ == "__main__":
  sys.exit(main())
