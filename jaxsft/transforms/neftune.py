"""NEFTune as a leaf over the embedding table: uniform noise of alpha / sqrt(length D) on the embedded tokens. arXiv 2310.05914."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxsft.kernels import draws


@functools.partial(jax.tree_util.register_dataclass, data_fields=["table", "row_seeds"], meta_fields=["alpha", "length"])
@dataclasses.dataclass
class NoisyTable:
  """An embedding [V, D] that adds noise when tokens are looked up; only training arms it. `kernels.embed` and `kernels.table` know it."""
  table: jax.Array
  row_seeds: jax.Array
  alpha: float
  length: str

  def embed_tokens(self, tokens_BT, segment_ids_BT, dtype, scale: float = 1.0):
    """scale: of the embeddings (Gemma), not of the noise: transformers' hook sees what the embedding module gives."""
    clean_BTD = jnp.take(self.table, tokens_BT, axis=0).astype(jnp.float32) * scale
    return (clean_BTD + jax.lax.stop_gradient(noise(self.row_seeds, segment_ids_BT, clean_BTD.shape[-1], self.alpha, self.length))).astype(dtype)


def noise(seeds_B, segment_ids_BT, width: int, alpha: float, length: str = "segment"):
  """[B, T, D] float32, one seed [2] a row.

    segment_ids       1 1 1 2 2 2 2 2 0 0
    length="segment"  alpha / sqrt(3 D) on the first three, / sqrt(5 D) on the next five, exactly 0 on padding (the paper's code)
    length="row"      alpha / sqrt(10 D) everywhere (the hook of transformers)
  """
  unit = draws.uniform(seeds_B, (segment_ids_BT.shape[1], width)) * 2 - 1
  if length == "row":
    return unit * alpha / (segment_ids_BT.shape[1] * width) ** 0.5
  tokens_BT = jax.vmap(_own_length)(segment_ids_BT)
  bound_BT = jnp.where(segment_ids_BT > 0, alpha / jnp.sqrt(tokens_BT * width), 0.0)
  return unit * bound_BT[..., None]


def _own_length(segment_ids_T):
  """Tokens of each token's own segment, [T] float32."""
  counts = jax.ops.segment_sum(jnp.ones(segment_ids_T.shape), segment_ids_T, num_segments=segment_ids_T.shape[0] + 1)
  return counts[segment_ids_T]
