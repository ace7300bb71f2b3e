"""Causal attention inside segments. One XLA implementation here; kernels for a platform are chosen in `attention` and tested against it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

QUERY_BLOCKS = 8          # a row's queries are walked in at most so many blocks, each against the keys up to its end: 9/16 of the products
RECOMPUTE_FROM = 1024     # rows this long keep no probabilities for the backward pass: they are computed again, block by block


def attention(q_BTHK, k_BTNK, v_BTNK, segment_ids_BT, implementation: str = "auto", window: int | None = None, **scores):
  """softmax(q k^T scale) v over earlier tokens of the same segment, [B, T, H, K] in q's dtype, softmax in float32.

    segment_ids   1 1 1 2 2 0        token i sees token j if j <= i, both in one segment ...      ... and i - j < window (here 2)
                  x . . . . .                                                                      x . . . . .
                  x x . . . .        (padding, segment 0, sees itself and earlier padding:         x x . . . .
                  x x x . . .        finite, and never counted)                                    . x x . . .
                  . . . x . .                                                                      . . . x . .

  N key/value heads each serve H/N query heads. implementation: "auto" or "xla". scores: scale and softcap of `attend`.
  """
  del implementation  # one so far
  length = q_BTHK.shape[1]
  block = max(128, -(-length // QUERY_BLOCKS))
  one_block: Callable = functools.partial(_query_block, window=window, **scores)
  one_block = jax.checkpoint(one_block, static_argnums=(5, 6)) if length >= RECOMPUTE_FROM else one_block
  outputs = []
  for start in range(0, length, block):
    stop = min(start + block, length)
    first = max(0, start - window + 1) if window else 0        # keys that the block's first query sees
    seen = slice(first, stop)
    outputs.append(one_block(q_BTHK[:, start:stop], k_BTNK[:, seen], v_BTNK[:, seen], segment_ids_BT[:, start:stop], segment_ids_BT[:, seen], start, first))
  return jnp.concatenate(outputs, axis=1) if len(outputs) > 1 else outputs[0]


def _query_block(q, k, v, query_segments, key_segments, start, first, window, **scores):
  rows, columns = start + jnp.arange(q.shape[1])[:, None], first + jnp.arange(k.shape[1])[None, :]
  mask_BTS = sees(rows, columns, window) & (query_segments[:, :, None] == key_segments[:, None, :])
  return attend(q, k, v, mask_BTS, **scores)


def sees(query, key, window: int | None):
  """Whether the token at place `query` may look at place `key` of the same text."""
  return (query >= key) & (query - key < window) if window else query >= key


def attend(q_BTHK, k_BSNK, v_BSNK, mask_BTS, scale: float | None = None, softcap: float | None = None):
  """Dense attention of T queries over S keys under a boolean mask; every query must see at least one key.

  scale: of the scores, default 1 / sqrt(K). softcap: scores s become softcap tanh(s / softcap) (Gemma 2).
  """
  B, T, H, K = q_BTHK.shape
  N = k_BSNK.shape[2]
  q = (q_BTHK * (K ** -0.5 if scale is None else scale)).reshape(B, T, N, H // N, K)
  scores = jnp.einsum("btngk,bsnk->bngts", q, k_BSNK, preferred_element_type=jnp.float32)
  if softcap:
    scores = softcap * jnp.tanh(scores / softcap)
  scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
  probabilities = jax.nn.softmax(scores, axis=-1).astype(v_BSNK.dtype)
  return jnp.einsum("bngts,bsnk->btngk", probabilities, v_BSNK).reshape(B, T, H, K)
