"""Attention against plain float64 numpy, the golden mask and the golden loss of packed rows."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.batch import next_token_targets
from jaxsft.kernels import attention as kernel
from jaxsft.kernels.attention import attend, attention
from jaxsft.losses import token_nll
from jaxsft.models.config import ModelConfig
from jaxsft.models.rope import rotate, rotations


def reference(q, k, v, segment_ids):
  """Row by row, head by head, token by token, in float64; padding tokens (segment 0) are left 0."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  B, T, H, K = q.shape
  out = np.zeros((B, T, H, K))
  for b, t, h in np.ndindex(B, T, H):
    seen = [s for s in range(t + 1) if segment_ids[b, s] == segment_ids[b, t] > 0]
    if seen:
      n = h // (H // k.shape[2])
      scores = k[b, seen, n] @ q[b, t, h] / math.sqrt(K)
      weights = np.exp(scores - scores.max())
      out[b, t, h] = weights @ v[b, seen, n] / weights.sum()
  return out


def inputs(B, T, H, N, K, seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  return [jax.random.normal(key, (B, T, heads, K)) for key, heads in zip(keys, (H, N, N))]


def packed(*rows):
  """Rows of segment ids from lengths, the last of each row padding."""
  return np.stack([np.repeat([*range(1, len(lengths)), 0], lengths) for lengths in rows]).astype(np.int32)


@pytest.mark.parametrize("H, N", [(4, 4), (4, 2), (3, 1)])
def test_equals_the_plain_reference(H, N):
  q, k, v = inputs(2, 24, H, N, 8)
  segments = packed((9, 11, 4), (1, 2, 21, 0))
  got = np.asarray(jax.jit(attention)(q, k, v, segments))
  real = segments > 0
  np.testing.assert_allclose(got[real], reference(q, k, v, segments)[real], atol=2e-6)
  assert np.isfinite(got).all()


@pytest.mark.parametrize("length", [127, 128, 129, 300, 1023])
def test_query_blocks_of_every_length_equal_one_block(length, monkeypatch):
  q, k, v = inputs(1, length, 2, 1, 4)
  segments = packed((length // 3, length - length // 3 - 5, 5))
  blocks = jax.jit(lambda *x: attention(*x, segments))(q, k, v)
  monkeypatch.setattr(kernel, "QUERY_BLOCKS", 1)
  np.testing.assert_allclose(blocks, jax.jit(lambda *x: attention(*x, segments))(q, k, v), atol=2e-6)


def test_no_query_block_ever_sees_a_later_key(monkeypatch):
  """The blocks cut their keys at their own end: what comes after cannot matter, not even as NaN."""
  q, k, v = inputs(1, 256, 2, 2, 4)
  late = np.where(np.arange(256) < 128, 1.0, np.nan)[None, :, None, None]
  got = np.asarray(jax.jit(lambda k, v: attention(q, k, v, np.ones((1, 256), np.int32)))(k * late, v * late))
  assert np.isfinite(got[:, :128]).all() and np.isnan(got[:, 128:]).all()


def test_the_mask_is_the_golden_one(golden):
  """With q = 0 every seen key weighs the same, and with v one-hot the output IS the row of the mask, divided by its sum."""
  case = golden("packing")["attention_mask"]
  segments, mask = np.array([case["segment_ids"]], np.int32), np.array(case["mask"], np.float64)
  T = mask.shape[0]
  zeros, one_hot = jnp.zeros((1, T, 1, T)), jnp.eye(T)[None, :, None, :]
  got = np.asarray(attention(zeros, zeros, one_hot, segments))[0, :, 0]
  real = segments[0] > 0
  np.testing.assert_allclose(got[real], mask[real] / mask[real].sum(1, keepdims=True), atol=1e-7)
  np.testing.assert_array_equal(got[real] > 0, mask[real] > 0)
  np.testing.assert_array_equal(got[~real][:, real], 0)         # the golden's padding sees nothing, ours padding alone: finite either way, and never counted


def toy_sum(tokens, segments, positions):
  """(NLL sum, count) of the golden's one-layer model: our RoPE, attention, targets and chunked loss."""
  batch = {"tokens": np.array([tokens]), "segment_ids": np.array([segments]), "positions": np.array([positions]), "weights": np.ones((1, len(tokens)), np.float32)}
  labels, weights = next_token_targets(batch)
  return float((np.asarray(toy_nll(batch, labels), np.float64) * weights).sum()), float(weights.sum())


@jax.jit
def toy_nll(batch, labels):
  rng = np.random.default_rng(0)
  E, *W = (jnp.asarray(rng.normal(size=shape) / scale, jnp.float32) for shape, scale in (((11, 8), 1), *[((8, 8), math.sqrt(8))] * 4))
  cfg = ModelConfig(model_type="llama", vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                    head_dim=8)
  x = E[batch["tokens"]]
  q, k, v = ((x @ w)[:, :, None] for w in W[:3])
  turn = lambda x: rotate(x, rotations(batch["positions"], cfg))
  mixed = attention(turn(q), turn(k), v, batch["segment_ids"])[:, :, 0]
  return token_nll(x + mixed @ W[3], E.T, labels, 4, True)


def test_the_loss_of_packed_rows_is_that_of_the_rows_apart(golden):
  """Our RoPE, softmax and loss are float32 by design: six terms of about 10 carry 1e-7 relative each, so 1e-5 of 52.3 is ten times the worst of it
  (the golden's 1e-9 is for float64), and naive attention across segments is off by 3.65."""
  case = golden("packing")["loss_equality"]
  a, b = case["a"], case["b"]
  apart = [toy_sum(tokens, [1] * len(tokens), range(len(tokens))) for tokens in (a, b)]
  together = toy_sum(a + b, [1] * len(a) + [2] * len(b), [*range(len(a)), *range(len(b))])
  padded = toy_sum(a + b + [0, 9], [1] * len(a) + [2] * len(b) + [0, 0], [*range(len(a)), *range(len(b)), 0, 0])
  unreset = toy_sum(a + b, [1] * len(a) + [2] * len(b), range(len(a + b)))
  for value, count in (np.sum(apart, 0), together, padded, unreset):
    assert value == pytest.approx(case["packed_with_segments_sum"], abs=1e-5) and count == case["count"]
  naive = toy_sum(a + b, [1] * len(a + b), range(len(a + b)))
  assert naive == (pytest.approx(case["naive_causal_sum"], abs=1e-5), case["naive_count"])


def test_gradients_of_long_rows_that_recompute_equal_plain_ones(monkeypatch):
  q, k, v = inputs(1, 1100, 2, 1, 4)
  segments = packed((400, 600, 100))
  target = jax.random.normal(jax.random.key(3), q.shape) * (segments > 0)[:, :, None, None]
  gradients = lambda: jax.jit(jax.grad(lambda *qkv: (attention(*qkv, segments) * target).sum(), (0, 1, 2)))(q, k, v)
  count = lambda: str(jax.make_jaxpr(lambda *qkv: attention(*qkv, segments))(q, k, v)).count("remat")
  recomputed, blocks = gradients(), count()
  monkeypatch.setattr(kernel, "RECOMPUTE_FROM", 10 ** 9)
  assert blocks == kernel.QUERY_BLOCKS and count() == 0
  for name, (ours, plain) in zip("qkv", zip(recomputed, gradients())):
    np.testing.assert_allclose(ours, plain, atol=1e-5, err_msg=name)


def test_long_rows_keep_no_probabilities_for_the_backward_pass():
  from jax._src.ad_checkpoint import saved_residuals
  q, k, v = inputs(1, 1024, 2, 1, 4)
  kept = saved_residuals(lambda *qkv: attention(*qkv, np.ones((1, 1024), np.int32)).sum(), q, k, v)
  floats = [aval.size for aval, _ in kept if jnp.issubdtype(aval.dtype, jnp.floating)]
  assert floats and max(floats) <= q.size


def test_bfloat16_keeps_a_float32_softmax():
  q, k, v = (x.astype(jnp.bfloat16) for x in inputs(1, 200, 2, 1, 8))
  got = jax.jit(attention)(q, k, v, np.ones((1, 200), np.int32))
  assert got.dtype == jnp.bfloat16
  wanted = reference(q, k, v, np.ones((1, 200), np.int32))
  assert np.abs(np.asarray(got, np.float64) - wanted).max() < 2 ** -7 * np.abs(wanted).max()
  scores = functools.partial(attend, mask_BTS=np.ones((1, 200, 200), bool))
  exponentials = [line for line in str(jax.make_jaxpr(scores)(q, k, v)).splitlines() if "= exp " in line]
  assert exponentials and all("f32[" in line for line in exponentials)
