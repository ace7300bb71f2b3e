"""NEFTune against tests/golden/neftune.json, and its noise as a step sees it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from jaxsft.kernels import draws
from jaxsft.kernels.dot import embed, table
from jaxsft.models import decoder
from jaxsft.models.config import ModelConfig
from jaxsft.step import TrainState
from jaxsft.transforms import neftune
from jaxsft.transforms.policy import make_policy, row_seeds

noise = jax.jit(neftune.noise, static_argnums=(2, 3, 4))


def seeds(rows, number=0):
  return draws.derive(draws.seed_of(jax.random.key(number))[None], jnp.arange(rows))


def segments(*lengths, rows=1, pad=0):
  ids = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, pad])
  return np.tile(ids, (rows, 1))


def test_bounds_and_deviations(golden):
  for case in golden("neftune")["magnitudes"]:
    T, D, alpha = case["T"], case["D"], case["alpha"]
    rows = max(1, 20_000 // (T * D))
    drawn = np.asarray(noise(seeds(rows), segments(T, rows=rows), D, alpha), np.float64)
    assert np.abs(drawn).max() <= case["bound"] * (1 + 1e-6)                # float32 against the golden's float64
    assert np.abs(drawn).max() > 0.99 * case["bound"]
    few = 4 / math.sqrt(drawn.size)                                         # four deviations: of a deviation about 0.45, of a mean 1, each over sqrt n
    assert drawn.std() == pytest.approx(case["std"], rel=few)
    assert abs(drawn.mean()) < few * case["std"]
    assert case["bound"] == pytest.approx(alpha / math.sqrt(T * D))


def test_the_frobenius_norm_of_a_segment_is_alpha_over_root_three(golden):
  for alpha, wanted in golden("neftune")["frobenius"]["values"].items():
    drawn = np.asarray(noise(seeds(1), segments(100, 200, 50, pad=30), 64, float(alpha)))[0]
    for start, stop in ((0, 100), (100, 300)):                              # T x D of 6,400 and 12,800
      assert np.linalg.norm(drawn[start:stop]) == pytest.approx(wanted, rel=0.01)


def largest(segment_ids, D, alpha, length):
  """The largest noise of each position over many rows, [T]: the bound, from below."""
  rows = 4000
  return np.abs(np.asarray(noise(seeds(rows), np.tile(segment_ids, (rows, 1)), D, alpha, length))).max((0, 2))


def test_packed_segments_have_bounds_of_their_own_and_padding_none(golden):
  case = golden("neftune")["packed"]
  found, wanted = largest(case["segment_ids"], case["D"], case["alpha"], "segment"), np.array(case["bound_by_position"])
  assert (found <= wanted * (1 + 1e-6)).all() and (found >= wanted * 0.995).all()
  np.testing.assert_array_equal(found[-2:], 0)


def test_row_mode_is_the_hook_of_transformers(golden):
  case = golden("neftune")["row_mode"]
  found = largest(case["segment_ids"], case["D"], case["alpha"], "row")
  assert (found <= case["bound"] * (1 + 1e-6)).all() and (found >= case["bound"] * 0.995).all()       # padding too


def test_row_mode_shrinks_the_noise_of_a_packed_segment(golden):
  case = golden("neftune")["shrink"]
  ids = segments(*[case["segment"]] * (case["row"] // case["segment"]))
  by_segment, by_row = (np.asarray(noise(seeds(1), ids, 8, 5.0, length)) for length in ("segment", "row"))
  np.testing.assert_allclose(by_segment, by_row * case["factor"], rtol=1e-5)          # the same draws


CFG = ModelConfig(model_type="llama", vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=2, head_dim=8)
ROWS = {"tokens": np.arange(24, dtype=np.int32).reshape(2, 12) % 20, "segment_ids": segments(5, 4, rows=2, pad=3).astype(np.int32),
        "positions": np.tile([0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0], (2, 1)).astype(np.int32), "weights": np.ones((2, 12), np.float32),
        "row_ids": np.array([3, 4], np.int32)}


@functools.cache
def policy(alpha=5.0, length="segment", remat="none"):
  c = common.base()
  c.neftune.alpha, c.neftune.length, c.loss_chunk = alpha, length, 8
  return make_policy(c, decoder.make_forward(CFG, remat=remat), decoder.output_kernel, None)


@functools.cache
def params():
  return decoder.init_params(CFG, jax.random.key(0))


def state(step=0, seed=1):
  return TrainState(jnp.int32(step), params(), (), (), jax.random.key(seed))


@functools.cache
def loss_function(**options):
  def loss(trainable, rows, seeds):
    nll_BT, weights_BT = policy(**options).token_nll(trainable, {}, rows, seeds)
    return (nll_BT * weights_BT).sum(-1)
  return jax.jit(loss)


def test_the_noise_is_not_scaled_with_the_embeddings():
  """Gemma multiplies its embeddings by sqrt(D) inside the module that transformers' hook adds noise behind."""
  from jaxsft.kernels.dot import embed
  table, seeds = jnp.full((20, 16), 2.0), jnp.zeros((2, 2), jnp.uint32)
  noisy = neftune.NoisyTable(table, seeds, 5.0, "segment")
  once, scaled = (embed(ROWS["tokens"], noisy, ROWS["segment_ids"], jnp.float32, scale) for scale in (1.0, 4.0))
  np.testing.assert_allclose(np.asarray(scaled) - 8.0, np.asarray(once) - 2.0, atol=1e-6)
  np.testing.assert_array_equal(embed(ROWS["tokens"], table, ROWS["segment_ids"], jnp.float32, 4.0), np.full((2, 12, 16), 8.0))


def test_evaluation_is_exactly_the_clean_model():
  clean, noisy = loss_function(alpha=0.0), loss_function()
  np.testing.assert_array_equal(noisy(params(), ROWS, None), clean(params(), ROWS, None))
  np.testing.assert_array_equal(clean(params(), ROWS, row_seeds(state(), ROWS)), clean(params(), ROWS, None))
  assert np.abs(np.asarray(noisy(params(), ROWS, row_seeds(state(), ROWS)) - clean(params(), ROWS, None))).min() > 1e-3
  plain = policy().params(params(), {})                                     # what generation reads
  np.testing.assert_array_equal(plain["embed_tokens"]["embedding"], params()["embed_tokens"]["embedding"])
  assert isinstance(plain["embed_tokens"]["embedding"], jax.Array)


def test_the_same_seed_gives_the_same_noise_and_step_row_and_run_change_it():
  drawn = [np.asarray(noise(row_seeds(state(step, seed), ROWS | {"row_ids": np.array(ids)}), ROWS["segment_ids"], 16, 5.0))
           for step, seed, ids in ((0, 1, [3, 4]), (0, 1, [3, 4]), (1, 1, [3, 4]), (0, 2, [3, 4]), (0, 1, [5, 6]))]
  np.testing.assert_array_equal(drawn[0], drawn[1])
  rows = [row[:9] for each in (drawn[0], *drawn[2:]) for row in each]                    # the nine real tokens of eight rows
  assert np.abs(np.corrcoef(np.reshape(rows, (8, -1))) - np.eye(8)).max() < 5 / math.sqrt(9 * 16)


def test_a_split_into_micro_batches_changes_no_noise():
  loss = loss_function()
  whole = loss(params(), ROWS, row_seeds(state(), ROWS))
  parts = [{name: value[i:i + 1] for name, value in ROWS.items()} for i in range(2)]
  np.testing.assert_allclose(whole, np.concatenate([loss(params(), part, row_seeds(state(), part)) for part in parts]), rtol=1e-6)


def test_no_gradient_flows_through_the_noise():
  """d loss / d embedding is that of an additive constant: the gradient with the noise put in by hand, as an array."""
  cotangent_BTD = jax.random.normal(jax.random.key(7), (2, 12, 16))
  clean = jax.random.normal(jax.random.key(8), (20, 16))
  leaf = lambda table: neftune.NoisyTable(table, seeds(2), 5.0, "segment")
  look_up = lambda table: (embed(ROWS["tokens"], table, ROWS["segment_ids"], jnp.float32) * cotangent_BTD).sum()
  np.testing.assert_allclose(jax.grad(lambda table: look_up(leaf(table)))(clean), jax.grad(look_up)(clean), rtol=1e-6)
  np.testing.assert_array_equal(table(leaf(clean)), clean)                  # a tied head reads the clean table
  added = embed(ROWS["tokens"], leaf(clean), ROWS["segment_ids"], jnp.float32) - embed(ROWS["tokens"], clean, ROWS["segment_ids"], jnp.float32)
  np.testing.assert_allclose(added, noise(seeds(2), ROWS["segment_ids"], 16, 5.0), atol=1e-6)


def test_noise_is_drawn_in_float32_and_cast_last():
  clean = (1 + jax.random.uniform(jax.random.key(8), (20, 16))).astype(jnp.bfloat16)
  got = embed(ROWS["tokens"], neftune.NoisyTable(clean, seeds(2), 0.05, "segment"), ROWS["segment_ids"], jnp.bfloat16)
  exact = np.asarray(clean, np.float32)[ROWS["tokens"]] + np.asarray(noise(seeds(2), ROWS["segment_ids"], 16, 0.05))
  np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


def test_the_recomputation_under_remat_sees_the_same_noise():
  gradient = lambda remat: jax.jit(jax.grad(lambda p: loss_function(remat=remat)(p, ROWS, row_seeds(state(), ROWS)).sum()))(params())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient("none"), gradient("full"))
