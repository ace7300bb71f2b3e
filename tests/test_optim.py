"""Schedules at their corners, AdamW against torch's, decay by name, and bfloat16 state that rounds stochastically."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from configs import common
from jaxsft import optim
from jaxsft.errors import UserError
from jaxsft.models import decoder
from jaxsft.models.config import ModelConfig
from jaxsft.transforms import tree as trees


def settings(**over):
  c = common.base().optim
  c.update(over)
  return c


def rates(steps, **over):
  schedule = jax.jit(jax.vmap(optim.make_schedule(settings(learning_rate=0.1, **over), steps)))
  return np.asarray(schedule(jnp.arange(steps)), np.float64)


def test_warm_up_rises_by_equal_parts_and_never_begins_at_zero():
  got = rates(100, schedule="constant", warmup=10)
  np.testing.assert_allclose(got[:10], 0.1 * np.arange(1, 11) / 11, rtol=1e-6)
  np.testing.assert_allclose(got[10:], 0.1, rtol=1e-6)
  np.testing.assert_array_equal(got, rates(100, schedule="constant", warmup=0.1))             # below 1: a share of the steps


def test_constant_without_warm_up_is_constant():
  np.testing.assert_allclose(rates(7, schedule="constant", warmup=0), 0.1, rtol=1e-6)


@pytest.mark.parametrize("final", [0.0, 0.2])
def test_linear_falls_from_the_peak_towards_the_final_share(final):
  got = rates(50, schedule="linear", warmup=10, final=final)
  np.testing.assert_allclose(got[10:], 0.1 * (1 - (1 - final) * np.arange(40) / 40), rtol=1e-5)
  assert got.argmax() == 10 and got[-1] == pytest.approx(0.1 * (final + (1 - final) / 40))     # the step after the last would be at `final`


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_falls_along_half_a_wave(final):
  got = rates(50, schedule="cosine", warmup=10, final=final)
  np.testing.assert_allclose(got[10:], 0.1 * (final + (1 - final) * (1 + np.cos(np.pi * np.arange(40) / 40)) / 2), rtol=1e-5, atol=1e-8)
  assert got.argmax() == 10


def test_wsd_is_flat_and_then_falls_over_the_last_share():
  got = rates(100, schedule="wsd", warmup=10, decay=0.3)
  np.testing.assert_allclose(got[10:70], 0.1, rtol=1e-6)
  np.testing.assert_allclose(got[70:], 0.1 * (1 - np.arange(30) / 30), rtol=1e-5)
  assert rates(100, schedule="wsd", warmup=10, decay=0.3, final=0.5)[-1] == pytest.approx(0.1 * (0.5 + 0.5 / 30))


@pytest.mark.parametrize("key, value, named", [("schedule", "cosin", "cosine"), ("name", "adam", "adamw"), ("state", "bfloat16", "bfloat16_stochastic")])
def test_an_unknown_name_is_the_users_mistake(key, value, named):
  with pytest.raises(UserError, match=rf"optim\.{key} is '{value}'; wanted .*{named}.*; set optim\.{key}"):
    optim.make_optimizer(settings(**{key: value}), 10)


def problem(seed=0):
  rng = np.random.default_rng(seed)
  params = {"q_proj": {"kernel": rng.normal(size=(6, 4)), "bias": rng.normal(size=4)}, "norm": {"scale": rng.normal(size=6)}}
  gradients = [jax.tree.map(lambda x: rng.normal(size=x.shape) * size, params) for size in (0.01, 5, 1, 0.1, 2, 0.3, 1, 1, 9, 0.02)]
  return jax.tree.map(jnp.float32, params), jax.tree.map(jnp.float32, gradients)


def test_ten_steps_equal_torch_with_clipping_warm_up_and_decay():
  """torch.optim.AdamW, its LambdaLR with our schedule, clip_grad_norm_: small and large gradients, so that clipping acts on some steps alone."""
  params, gradients = problem()
  c = settings(learning_rate=0.05, schedule="cosine", warmup=3, weight_decay=0.2, b1=0.8, b2=0.95, eps=1e-6, clip_norm=1.5)
  theirs = {path: torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for path, leaf in trees.flatten(params)}
  groups = [{"params": [theirs["q_proj/kernel"]], "weight_decay": 0.2}, {"params": [theirs["q_proj/bias"], theirs["norm/scale"]], "weight_decay": 0.0}]
  optimiser = torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.95), eps=1e-6)
  share = [(step + 1) / 4 if step < 3 else (1 + math.cos(math.pi * (step - 3) / 7)) / 2 for step in range(11)]
  schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: share[step])
  tx = optim.make_optimizer(c, 10)
  state, clipped = tx.init(params), []

  @jax.jit
  def step(params, state, gradient):
    updates, state = tx.update(gradient, state, params)
    return optim.apply_updates(params, updates, jax.random.key(0)), state
  for gradient in gradients:
    for path, leaf in trees.flatten(gradient):
      theirs[path].grad = torch.tensor(np.asarray(leaf))
    clipped.append(bool(torch.nn.utils.clip_grad_norm_(theirs.values(), 1.5) > 1.5))
    optimiser.step()
    schedule.step()
    params, state = step(params, state, gradient)
    for path, leaf in trees.flatten(params):
      np.testing.assert_allclose(leaf, theirs[path].detach().numpy(), rtol=2e-6, atol=2e-6, err_msg=path)
  assert 0 < sum(clipped) < 10


def test_without_clip_norm_nothing_is_clipped():
  params, gradients = problem()
  tx = optim.make_optimizer(settings(clip_norm=0.0), 10)
  first, second = (tx.update(jax.tree.map(lambda g: g * size, gradients[0]), tx.init(params), params)[1] for size in (1e3, 1e6))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a * 1e3, b, rtol=1e-5), first[1][0].mu, second[1][0].mu)


def test_decay_goes_by_name():
  """No gradient and a decay: only what decays moves. Biases and norms of every family stay."""
  cfg = ModelConfig(model_type="qwen2", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                    head_dim=4, attention_bias=True)
  params = jax.tree.map(jnp.ones_like, decoder.init_params(cfg, jax.random.key(0)))

  def moved(c):
    tx = optim.make_optimizer(c, 10)
    updates = jax.jit(lambda p: tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)[0])(params)
    return {path for path, leaf in trees.flatten(updates) if np.abs(leaf).max() > 0}
  everything = {path for path, _ in trees.flatten(params)}
  assert moved(settings(weight_decay=0.1)) == {path for path in everything if path.endswith(("kernel", "embedding"))}
  assert moved(settings(weight_decay=0.1, no_decay="embed|norm|bias")) == {path for path in everything if path.endswith("kernel")}
  assert moved(settings(weight_decay=0.0)) == set()


def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour():
  """The mean over 20,000 keys is the value itself: 4 deviations of a coin between two neighbours are 4 x gap / 2 / sqrt(20000)."""
  values = jnp.float32([1.0 + 1e-4, 1.0 + 2 ** -8, -3.1415926, 1e-3, 123.456, -1e-20, 65504.0, 0.0, 2.0])
  rounded = np.asarray(jax.jit(jax.vmap(lambda key: optim.stochastic_round(values, key)))(jax.random.split(jax.random.key(0), 20_000)).astype(jnp.float32))
  low, high, exact = rounded.min(0), rounded.max(0), np.asarray(values, np.float64)
  gap = np.abs(exact) * 2.0 ** -7
  assert (np.abs(rounded - exact) <= gap).all() and all(len(np.unique(column)) <= 2 for column in rounded.T)
  np.testing.assert_array_less(np.abs(rounded.mean(0, dtype=np.float64) - exact), 4 * (high - low) / 2 / math.sqrt(20_000) + 1e-30)
  np.testing.assert_array_equal(rounded[:, -2:], [[0.0, 2.0]] * 20_000)                           # what bfloat16 holds exactly never moves


def test_stochastic_rounding_keeps_infinity_and_nan():
  got = np.asarray(optim.stochastic_round(jnp.float32([np.inf, -np.inf, np.nan]), jax.random.key(0)).astype(jnp.float32))
  np.testing.assert_array_equal(got, np.float32([np.inf, -np.inf, np.nan]))


def test_float32_leaves_are_not_rounded():
  params, updates = {"a": jnp.float32([1.0, 2.0])}, {"a": jnp.float32([1e-6, 3e-6])}
  np.testing.assert_array_equal(optim.apply_updates(params, updates, jax.random.key(0))["a"], jnp.float32([1 + 1e-6, 2 + 3e-6]))


def run_quadratic(state, apply):
  """1,000 steps of |w - 2|^2 from 1 at rate 0.003, whose updates are below half an ulp of bfloat16 above 1 (0.0039); (w, bytes of w and state)."""
  tx = optim.make_optimizer(settings(learning_rate=3e-3, schedule="constant", warmup=0, clip_norm=0.0, state=state), 1000)
  w = {"w": jnp.ones(256, jnp.bfloat16 if state != "float32" else jnp.float32)}

  def step(carry, number):
    w, opt = carry
    updates, opt = tx.update(jax.tree.map(lambda x: 2 * (x.astype(jnp.float32) - 2), w), opt, w)
    return (apply(w, updates, jax.random.fold_in(jax.random.key(1), number)), opt), None
  opt = tx.init(w)
  (w, after), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(1000)))((w, opt))
  assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, opt)
  return np.asarray(w["w"], np.float64), sum(leaf.nbytes for leaf in jax.tree.leaves((w, after)))


def test_bfloat16_state_halves_the_bytes_and_still_converges_where_plain_rounding_stalls():
  exact, full = run_quadratic("float32", optim.apply_updates)
  stochastic, half = run_quadratic("bfloat16_stochastic", optim.apply_updates)
  plain, _ = run_quadratic("bfloat16_stochastic", lambda w, updates, key: jax.tree.map(lambda x, u: (x.astype(jnp.float32) + u).astype(x.dtype), w, updates))
  assert half <= full / 2 + 16                                # a count and the key of the next rounding are all that does not shrink
  assert abs(exact.mean() - 2) < 0.1 and abs(stochastic.mean() - exact.mean()) < 0.02 and np.abs(stochastic - 2).max() < 0.15
  np.testing.assert_array_equal(plain, 1.0)


def test_the_key_of_the_rounding_moves_on_each_step():
  params, gradients = problem()
  tx = optim.make_optimizer(settings(state="bfloat16_stochastic"), 10)
  first = tx.init(params)
  second = tx.update(gradients[0], first, params)[1]
  third = tx.update(gradients[0], second, params)[1]
  assert len({np.asarray(state.key).tobytes() for state in (first, second, third)}) == 3
  jax.tree.map(np.testing.assert_array_equal, third, tx.update(gradients[0], second, params)[1])            # and is part of the state
