"""Runs with what stands around the optimiser: evaluation, samples and exports use the average; stopped and resumed to the bit; what is logged and saved."""

import json
import signal

import numpy as np
import pytest
from runs import flags, leaves, numbers, run, signalled, steps

from jaxsft.checkpoint import Checkpoints
from jaxsft.convert.adapter import open_adapter
from jaxsft.transforms import tree as trees


def state_of(workdir, step):
  """Every array of the training state, the average apart."""
  return Checkpoints(workdir / "checkpoints", read_only=True)._leaves(step, "state", "")


def stop_and_resume(data, workdir, mode, **over):
  """A run that is stopped after step 3 and goes on, which ends as `straight` did."""
  argv = flags(data, workdir / "stopped", mode, **over)
  with signalled(signal.SIGTERM, at=3):
    assert run(argv)[0] == 75
  code, said = run(argv)
  assert code == 0, said
  assert numbers(workdir / "stopped") == numbers(workdir / "straight")
  for read in (state_of, leaves):
    one, other = read(workdir / "straight", 4), read(workdir / "stopped", 4)
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name], err_msg=name, strict=True)


AROUND = dict(optim__name="adamw8bit", optim__ema=0.5, optim__spike_sigma=20.0, optim__spike_window=2, log__layer_norms="true", model__dtype="float32")


def test_everything_at_once_evaluates_its_average_and_resumes_to_the_bit(data, tmp_path):
  code, said = run(flags(data, tmp_path / "straight", "full", **AROUND))
  assert code == 0, said
  assert run(flags(data, tmp_path / "plain", "full", optim__name="adamw8bit", model__dtype="float32"))[0] == 0
  lines, plain = numbers(tmp_path / "straight"), numbers(tmp_path / "plain")
  assert [line["loss"] for line in lines[1:]] == pytest.approx([line["loss"] for line in plain[1:]], rel=1e-4)
  evals = [[line["eval_loss"] for line in run_lines if "eval_loss" in line] for run_lines in (lines, plain)]
  assert evals[0][0] == pytest.approx(evals[1][0], rel=1e-6) and evals[0][1] > evals[1][1] + 0.01          # the average lags behind
  assert all(line["skipped"] == 0.0 and line["updates"] == line["step"] for line in lines[1:])
  norms = {name for name in lines[2] if name.startswith("layer_norms/gradient/layers/mlp/up_proj")}
  assert norms == {f"layer_norms/gradient/layers/mlp/up_proj/kernel/{layer}" for layer in (0, 1)} and not [name for name in plain[2] if "layer_norms" in name]
  events = b"".join(file.read_bytes() for file in (tmp_path / "straight" / "tensorboard").iterdir())
  assert events.count(b"layer_norms/gradient/layers/mlp/up_proj/kernel/1") == 4
  state, exported = state_of(tmp_path / "straight", 4), leaves(tmp_path / "straight", 4)
  name = "layers.mlp.up_proj.kernel"
  np.testing.assert_array_equal(exported[f"trainable.{name}"], next(leaf for path, leaf in state.items() if path.endswith(f"ema.{name}")))
  assert np.abs(exported[f"trainable.{name}"] - state[f"trainable.{name}"]).max() > 1e-4
  stop_and_resume(data, tmp_path, "full", **AROUND)


def test_schedule_free_exports_and_resumes(data, tmp_path):
  over = dict(optim__name="schedule_free", optim__schedule="constant")
  code, said = run(flags(data, tmp_path / "straight", "qlora", **over))
  assert code == 0, said
  state = state_of(tmp_path / "straight", 4)
  for path, adapter in trees.flatten(open_adapter(tmp_path / "straight").adapters):
    name = path.replace("/", ".")
    y, z = state[f"trainable.{name}"], next(leaf for key, leaf in state.items() if key.endswith(f"z.{name}"))
    np.testing.assert_allclose(adapter, (y - 0.1 * z) / 0.9, rtol=1e-5, atol=1e-7)
    assert np.abs(adapter - y).max() > 1e-5
  stop_and_resume(data, tmp_path, "qlora", **over)


def test_saves_by_time_stand_between_those_by_step(data, tmp_path, monkeypatch):
  """A clock so slow that each step is late: temporary saves at 1 and 3, which the next save removes."""
  made, save = [], Checkpoints.save
  monkeypatch.setattr(Checkpoints, "save", lambda self, step, *args, **over: made.append((step, over["temporary"])) or save(self, step, *args, **over))
  code, said = run(flags(data, tmp_path, checkpoint__every_minutes=1e-9, checkpoint__keep=1, checkpoint__keep_best="false"))
  assert code == 0, said
  assert made == [(1, True), (2, False), (3, True), (4, False)] and steps(tmp_path) == [4]
  assert [line["step"] for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())] == [0, 1, 2, 3, 4]
