"""A gate that is no timing: what XLA compiles the standard steps to may not grow by more than 2 % unless docs/log.md says why.

To accept a change: add a line to docs/log.md, then
  JAXSFT_GATE_WHY="that line, or a part of it" python -m pytest tests/test_compile_gate.py
rewrites tests/golden/compile_gate.json with the new figures and the line that explains them.
"""

import functools
import json
import os
import pathlib

import jax
import numpy as np
import pytest
import tiny

from jaxsft.batch import split_micro_batches

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "compile_gate.json"
WHY = os.environ.get("JAXSFT_GATE_WHY", "")
ALLOWED = 1.02
STEPS = [f"{mode}, {micro} micro-batches" for mode in tiny.MODES for micro in (1, 4)]
COMPILED = "/jax/core/compile/backend_compile_duration"


@functools.cache
def measure(step):
  """Figures of one standard step, 4 rows of 256 tokens: the compiler's own, and how many programs three steps and two evaluations compile.

  The arrays are zeros (only their shapes count here): random ones would compile more than the step does.
  """
  mode, micro = step.split(",")[0], int(step.split()[1])
  cfg = tiny.config(vocab_size=512, hidden_size=128, intermediate_size=320)
  c = tiny.settings(mode, loss_chunk=256, **{"lora.dropout": 0.1, "neftune.alpha": 5.0})
  _, method = tiny.make(c, cfg)
  state, frozen = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), tiny.abstract_state(c, cfg))
  batches = [tiny.rows(4, 256, 512, seed) for seed in range(3)]
  train, evaluate = jax.jit(method.step, donate_argnums=0), jax.jit(method.evaluate)
  with counted() as programs:
    compiled = train.lower(state, frozen, split_micro_batches(batches[0], micro)).compile()
    for batch in batches:
      state, _ = train(state, frozen, split_micro_batches(batch, micro))
    for batch in batches[:2] if micro == 1 else ():              # evaluation knows no micro-batches
      evaluate(state, frozen, batch)
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
  return {"flops": int(cost["flops"]), "bytes_accessed": int(cost["bytes accessed"]), "temporary_bytes": memory.temp_size_in_bytes, "compilations": len(programs)}


class counted(list):
  """The compilations inside a `with`."""

  def __enter__(self):
    jax.monitoring.register_event_duration_secs_listener(self._hear)
    return self

  def __exit__(self, *_):
    jax.monitoring.unregister_event_duration_listener(self._hear)

  def _hear(self, event, seconds, **_):
    if event == COMPILED:
      self.append(seconds)


def grown(golden, now):
  """'figure: was, is' of what grew by more than 2 %; of compilations, at all."""
  return [f"{name}: {golden[name]} -> {value} (+{100 * (value / max(golden[name], 1) - 1):.1f} %)" for name, value in now.items()
          if value > golden[name] * (1 if name == "compilations" else ALLOWED)]


@pytest.mark.skipif(not WHY, reason="rewrites the golden file; set JAXSFT_GATE_WHY")
def test_rewrite_the_figures():
  GOLDEN.write_text(json.dumps({"why": WHY, "jax": jax.__version__, "steps": {step: measure(step) for step in STEPS}}, indent=1) + "\n")


@pytest.mark.parametrize("step", STEPS)
def test_a_standard_step_compiles_to_no_more_than_before(step):
  golden = json.loads(GOLDEN.read_text())
  growth = grown(golden["steps"][step], measure(step))
  assert not growth, (f"{step}: {'; '.join(growth)}. If it is worth it, add a line to docs/log.md that says why, and run\n"
                      f"  JAXSFT_GATE_WHY='that line' python -m pytest tests/test_compile_gate.py\n(figures of jax {golden['jax']}; this is {jax.__version__})")


def test_the_log_says_why_the_figures_are_what_they_are():
  why = json.loads(GOLDEN.read_text())["why"]
  text = " ".join((ROOT / "docs" / "log.md").read_text().split())
  assert why and " ".join(why.split()) in text, f"docs/log.md has no line {why!r}, which tests/golden/compile_gate.json was rewritten for"


def test_the_gate_closes_on_what_grows_and_on_nothing_else():
  golden = {"flops": 100_000, "bytes_accessed": 100_000, "temporary_bytes": 100_000, "compilations": 2}
  assert grown(golden, golden | {"flops": 101_999, "bytes_accessed": 50}) == []
  assert [line.split(":")[0] for line in grown(golden, golden | {"temporary_bytes": 102_100, "compilations": 3})] == ["temporary_bytes", "compilations"]


def test_no_step_is_missing_from_the_file():
  assert list(json.loads(GOLDEN.read_text())["steps"]) == STEPS
