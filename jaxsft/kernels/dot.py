"""The two places where the model touches a weight: `dot` and `embed`. A leaf richer than an array brings its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dot(x, kernel):
  """x [..., in] times kernel [in, out], in x's dtype. A rich leaf (NF4Array, LoRA view) answers with its own `dot(x)`."""
  if hasattr(kernel, "dot_input"):
    return kernel.dot_input(x)
  return jnp.dot(x, kernel.astype(x.dtype))


def embed(tokens_BT, table_VD, segment_ids_BT, dtype, scale: float = 1.0):
  """Rows of the embedding table times `scale`, [B, T, D] in `dtype`. A rich leaf (NEFTune's noisy table) answers with its own `embed_tokens`."""
  if hasattr(table_VD, "embed_tokens"):
    return table_VD.embed_tokens(tokens_BT, segment_ids_BT, dtype, scale)
  x_BTD = jnp.take(table_VD, tokens_BT, axis=0).astype(dtype)
  return x_BTD * jnp.asarray(scale, dtype) if scale != 1.0 else x_BTD


def table(leaf) -> jax.Array:
  """The plain [V, D] array behind an embedding leaf, rich or not (a tied head reads it)."""
  return leaf.table if hasattr(leaf, "table") else leaf
