"""Held-out loss and sample generations during training (benchmarks are the eval binary's)."""

from __future__ import annotations

import math

import jax

from jaxsft import sharding
from jaxsft.errors import NonFinite
from jaxsft.step import evaluated


class Evaluation:
  """The evaluation set and its compiled function: sums over all batches, one division, perplexity."""

  def __init__(self, method, batches, mesh):
    averaged = lambda state, frozen, batch: method.evaluate(evaluated(state), frozen, batch)
    self._evaluate = jax.jit(averaged, out_shardings=sharding.replicated(mesh))
    self._where, self.batches = sharding.batch_sharding(mesh, micro_batched=False), batches

  @property
  def rows(self) -> int:
    """Rows of the evaluation set, padding rows apart."""
    return sum(int((batch["segment_ids"] > 0).any(-1).sum()) for batch in self.batches)

  def sums(self, state, frozen, batch) -> dict:
    """{name: (sum, count)} of one host batch, as floats."""
    return {name: tuple(map(float, pair)) for name, pair in self._evaluate(state, frozen, sharding.place_batch(batch, self._where)).items()}

  def run(self, state, frozen) -> dict:
    """{"eval_loss": ..., "eval_perplexity": ...}; empty without an evaluation set."""
    totals: dict[str, list[float]] = {}
    for batch in self.batches:
      for name, (value, count) in self.sums(state, frozen, batch).items():
        total = totals.setdefault(name, [0.0, 0.0])
        total[0] += value
        total[1] += count
    report = {f"eval_{name}": value / max(count, 1.0) for name, (value, count) in totals.items()}
    if not all(map(math.isfinite, report.values())):
      raise NonFinite(f"the evaluation gives {report}: the model, or a row of the evaluation set, holds what is no number")
    if "eval_loss" in report:
      report["eval_perplexity"] = math.exp(min(report["eval_loss"], 700.0))
    return report


class Samples:
  """Answers of the model as it is to c.sample.prompts, with each evaluation."""

  def __init__(self, c, base, template):
    from jaxsft.generate import make_generator, stop_ids
    self._c, self._tokenizer = c, base.tokenizer
    self._stop = stop_ids(template, base.source, base.cfg, base.tokenizer)
    self._generator = make_generator(base.cfg, c.model.dtype)
    self._prompts = [self._encode(template, prompt) for prompt in c.sample.prompts]

  def _encode(self, template, prompt):
    from jaxsft.data.tokenise import encode_prompt
    return encode_prompt([{"role": "user", "content": prompt}], template, self._tokenizer)

  def run(self, params) -> list[dict]:
    """[{"prompt", "answer"}] in the order of the config."""
    answers = self._generator.generate(params, self._prompts, max_new_tokens=self._c.sample.max_new_tokens, stop_ids=self._stop,
                                       temperature=self._c.sample.temperature, seed=self._c.seed)
    return [{"prompt": prompt, "answer": self._tokenizer.decode(answer, skip_special_tokens=True)} for prompt, answer in zip(self._c.sample.prompts, answers)]
