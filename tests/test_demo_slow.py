"""The demo as a person runs it, on three seeds (about five minutes each): the median is what README may claim."""

import json
import os
import pathlib
import statistics
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

KEYS = ("train_loss_first train_loss_last eval_loss_before eval_loss_after exact_match_before exact_match_after tokens_per_second peak_rss_bytes "
        "wall_seconds hf_export adapter_export").split()


def demo(workdir, seed):
  """summary.json of one demo, in a process of its own: this one has eight simulated devices, and a person has none of those."""
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  subprocess.run([sys.executable, "-m", "demo.run", f"--workdir={workdir}", f"--seed={seed}"], cwd=ROOT, env=environment, check=True)
  return json.loads((workdir / "summary.json").read_text())


@pytest.mark.slow
def test_the_median_of_three_seeds_learns_the_tickets(tmp_path):
  found = [demo(tmp_path / f"seed{seed}", seed) for seed in range(3)]
  before, after = ([summary[f"exact_match_{when}"] for summary in found] for when in ("before", "after"))
  print(f"\nexact match before {before}, after {after}: median {statistics.median(after):.2f}; baselines {found[0]['baselines']}")
  assert all(key in summary for key in KEYS for summary in found)
  assert max(before) < 0.1 and statistics.median(after) > 0.8
  assert all(found[0]["baselines"][name] < 0.3 for name in ("constant", "nearest_characters", "nearest_words"))
  assert found[0]["distinct_answers"] >= 50
