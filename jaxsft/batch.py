"""The contract between data and device: names, dtypes and shapes of a batch, and the key of dimension letters (numpy only).

Dimension letters, used as suffixes of tensor names everywhere:

  B rows     T tokens    V vocabulary   D width     H query heads   N key/value heads   K head size
  F hidden   R rank      L layers       M micro-batches   S cache slots   C tokens of one loss chunk

A row holds one or more conversations ("segments"). All fields are aligned with the tokens; nothing is shifted on the host:

  tokens       <s> hi  yo  </s> <s> a   b   </s> pad     int32
  weights       0   0   1   1    0   0   1   1    0      float32: 1 where THIS token is one the model must learn to produce
  segment_ids   1   1   1   1    2   2   2   2    0      int32: 1, 2, ... within the row; 0 is padding
  positions     0   1   2   3    0   1   2   3    0      int32: restart with each segment
  row_ids       one int32 a row: its place in the global stream, the source of every random draw for the row

The loss at position t is that of predicting tokens[t+1], weighted by weights[t+1], and 0 where the segment changes:
`next_token_targets` is the only place that shifts.
"""

from __future__ import annotations

import numpy as np

FIELDS = {"tokens": np.int32, "weights": np.float32, "segment_ids": np.int32, "positions": np.int32}
ROW_IDS = "row_ids"


def padding_row(length: int, pad_id: int = 0) -> dict[str, np.ndarray]:
  """A row of `length` tokens that is all padding: segment 0, weight 0."""
  row = {name: np.zeros(length, dtype) for name, dtype in FIELDS.items()}
  row["tokens"][:] = pad_id
  return row


def next_token_targets(batch):
  """Labels [..., T] int32 and weights [..., T] float32 of next-token prediction, for numpy or jax arrays alike.

    tokens       a  b  c | d  e  pad
    segment_ids  1  1  1   2  2  0
    weights      0  1  1   0  1  0
    labels       b  c  d   e  pad a      (rolled by one; the last is never counted)
    -> weights   1  1  0   1  0  0       (weight of the label; 0 across segments, on padding and at the end)
  """
  tokens, segments, weights = batch["tokens"], batch["segment_ids"], batch["weights"]
  xp = np if isinstance(tokens, np.ndarray) else _jax_numpy()
  labels = xp.roll(tokens, -1, axis=-1)
  next_segments = xp.roll(segments, -1, axis=-1)
  same = (segments == next_segments) & (segments > 0)
  inside = xp.arange(tokens.shape[-1]) < tokens.shape[-1] - 1
  return labels, xp.where(same & inside, xp.roll(weights, -1, axis=-1), 0.0).astype(np.float32)


def _jax_numpy():
  import jax.numpy as jnp  # only when the caller already holds jax arrays: the data side never gets here
  return jnp


def split_micro_batches(batch, micro_batches: int):
  """[B, ...] leaves to [M, B/M, ...], the explicit leading axis that `step.descend` walks. B must divide."""
  return {k: _fold(v, micro_batches) for k, v in batch.items()}


def _fold(value, micro_batches):
  if isinstance(value, dict):
    return split_micro_batches(value, micro_batches)
  return value.reshape(micro_batches, value.shape[0] // micro_batches, *value.shape[1:])
