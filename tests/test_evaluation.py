"""Held-out loss: one division over all batches, its perplexity; a window with nothing to learn; samples; preflight that stops the run."""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from runs import flags, run, write_records

from jaxsft import base as bases
from jaxsft import preflight, sharding
from jaxsft.errors import NonFinite, UserError
from jaxsft.evaluation import Evaluation
from jaxsft.models import decoder
from jaxsft.step import TrainState
from jaxsft.transforms.policy import trained_whole

CFG = tiny.config()


def made(mode=tiny.FULL, **over):
  """(policy, method, state, frozen) on one device."""
  c = tiny.settings(mode, **{"model.dtype": "float32"} | over)
  policy, method = tiny.make(c, CFG)
  trainable, frozen, opt, aux = method.init(decoder.init_params(CFG, jax.random.key(0)), jax.random.key(1))
  return policy, method, TrainState(jnp.int32(0), trainable, opt, aux, jax.random.key_data(jax.random.key(2))), frozen


def test_the_loss_is_over_all_tokens_whatever_the_batches_hold():
  """Lessons row 1, in evaluation: a mean of batch means weighs a token by its batch."""
  policy, method, state, frozen = made()
  batches = [tiny.rows(B=2, seed=n) for n in range(3)]
  batches[1]["weights"][:] *= batches[1]["positions"] > 6                     # batches of very different counts
  batches[2]["segment_ids"][1:], batches[2]["weights"][1:] = 0, 0             # the last one is filled up with padding rows
  mesh = sharding.make_mesh(types.SimpleNamespace(data=1, fsdp=1, tensor=1), jax.devices()[:1])
  report = Evaluation(method, batches, mesh).run(state, frozen)
  sums, counts = zip(*(token_losses(policy, state, frozen, batch) for batch in batches))
  assert len(set(counts)) == 3
  assert report["eval_loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
  assert abs(report["eval_loss"] - np.mean([s / n for s, n in zip(sums, counts)])) > 1e-4
  assert report["eval_perplexity"] == pytest.approx(math.exp(report["eval_loss"]))


def test_a_loss_that_is_no_number_stops_the_run():
  _, method, state, frozen = made()
  state.trainable["norm"]["scale"] = state.trainable["norm"]["scale"] * jnp.nan
  mesh = sharding.make_mesh(types.SimpleNamespace(data=1, fsdp=1, tensor=1), jax.devices()[:1])
  with pytest.raises(NonFinite, match="the evaluation gives"):
    Evaluation(method, [tiny.rows(B=2)], mesh).run(state, frozen)


def token_losses(policy, state, frozen, batch):
  """(sum of the losses, sum of the weights) by plain log-probabilities."""
  hidden = decoder.make_forward(CFG)(policy.params(state.trainable, frozen), batch)
  log_p = jax.nn.log_softmax(decoder.logits(CFG, policy.params(state.trainable, frozen), hidden))
  total = count = 0.0
  for b, t in np.argwhere(batch["weights"][:, 1:] > 0):
    if batch["segment_ids"][b, t] == batch["segment_ids"][b, t + 1]:
      total -= float(log_p[b, t, batch["tokens"][b, t + 1]])
      count += 1
  return total, count


def test_a_window_without_a_supervised_token_changes_nothing():
  """Lessons row 4: 0/0 is no NaN."""
  _, method, state, frozen = made(tiny.LORA)
  batch = {name: value[None] for name, value in tiny.rows(B=2).items()}
  batch["weights"] = np.zeros_like(batch["weights"])
  after, metrics = jax.jit(method.step)(state, frozen, batch)
  assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0
  jax.tree.map(np.testing.assert_array_equal, after.trainable, state.trainable)


@pytest.mark.parametrize("freeze", ["", "embed_tokens|norm"])
@pytest.mark.parametrize("state, dtype", [("float32", "float32"), ("bfloat16_stochastic", "bfloat16")])
def test_what_full_fine_tuning_trains_has_the_type_of_the_training_state(freeze, state, dtype):
  """A base_dtype of bfloat16, the default, is for what rests: masters and moments stay float32."""
  c = tiny.settings(tiny.FULL, **{"optim.state": state, "freeze": freeze, "seed": 0})
  c.model.base_dtype = "bfloat16"
  mesh = sharding.make_mesh(types.SimpleNamespace(data=1, fsdp=1, tensor=1), jax.devices()[:1])
  params = bases.load(c, bases.Base(CFG, None, None), mesh, trained=trained_whole(c))
  policy, method = tiny.make(c, CFG)
  trainable, frozen, opt, _ = method.init(params, jax.random.key(0))
  floats = [leaf.dtype for leaf in jax.tree.leaves((trainable, opt)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
  assert len(floats) > 10 and set(map(str, floats)) == {dtype}
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(frozen)} == ({"bfloat16"} if freeze else set())


@pytest.mark.parametrize("mode", tiny.MODES)
def test_moments_and_adapters_are_float32_over_a_bfloat16_base(mode):
  """Lessons row 24."""
  c = tiny.settings(mode)
  c.model.base_dtype = "bfloat16" if mode != tiny.FULL else "float32"
  state, frozen = tiny.abstract_state(c, CFG)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state.trainable, state.opt)) if jnp.issubdtype(leaf.dtype, jnp.floating))
  assert mode == tiny.FULL or any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(frozen))


def test_samples_are_shown_with_each_evaluation(tmp_path):
  write_records(tmp_path / "train.jsonl", range(20))
  write_records(tmp_path / "eval.jsonl", range(4))
  code, said = run(flags(tmp_path, tmp_path / "run", "lora", sample__prompts="('1+1?','2+2?')", sample__max_new_tokens=5, steps=2))
  assert code == 0, said
  shown = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
  assert [(one["step"], one["prompt"]) for one in shown] == [(0, "1+1?"), (0, "2+2?"), (2, "1+1?"), (2, "2+2?")]
  assert all(isinstance(one["answer"], str) for one in shown) and "'1+1?' -> " in said


def test_preflight_stops_a_run_that_would_learn_nothing_or_never_stop():
  batch = tiny.rows(B=2)
  good = {"end_of_turn_trained": 3, "end_of_turn": "<|im_end|>"}
  assert preflight.check_rows(good, batch)["supervised_share"] > 0
  with pytest.raises(UserError, match="no supervised token.*data.length or data.train_on"):
    preflight.check_rows(good, batch | {"weights": np.zeros_like(batch["weights"])})
  with pytest.raises(UserError, match=r"no end-of-turn \('<\|im_end\|>'\) is trained.*data.template"):
    preflight.check_rows(good | {"end_of_turn_trained": 0}, batch)


def test_preflight_stops_a_run_whose_examples_see_each_other():
  """Lessons row 5: an attention that forgets the segments is found before the first step."""
  c, batch = tiny.settings(tiny.FULL, **{"model.dtype": "float32"}), tiny.rows(B=4)
  policy, _, state, frozen = made()

  def sums(forgetful):
    def evaluate(batch):
      batch = batch | ({"segment_ids": (batch["segment_ids"] > 0).astype(np.int32)} if forgetful else {})
      nll_BT, weights_BT = policy.token_nll(state.trainable, frozen, batch)
      return float((nll_BT * weights_BT).sum()), float(weights_BT.sum())
    return evaluate
  for rows in (4, 1):       # one row a batch, as the 7B configs have it: its examples are walked one by one
    assert preflight.check_packing(c, sums(False), {name: value[:rows] for name, value in batch.items()})["relative_difference"] < 1e-5
  with pytest.raises(UserError, match="a packed row's loss is .* its examples alone give .*data.pack=false"):
    preflight.check_packing(c, sums(True), batch)
