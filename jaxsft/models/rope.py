"""Rotary positions: inverse frequencies of every supported type, and the rotation (half-split, as Hugging Face stores q and k)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

# Settings that each type must have, beside rope_theta. "original" stands for original_max_position_embeddings.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
BY_LENGTH = ("dynamic", "longrope")     # types whose frequencies depend on how long a text is


def rotated_dims(cfg) -> int:
  """Leading dimensions of a head that turn; the rest pass."""
  return int(cfg.head_dim * cfg.partial_rotary_factor)


def rotations(positions_BT, cfg, rope: str = "full", lengths_BT=None):
  """(cos, sin) [B, T, 1, R/2] float32 of each token's angle, R = rotated_dims, times the type's attention factor.

  rope: "full" takes cfg.rope_parameters, "local" the plain theta cfg.rope_local_base_freq. lengths_BT: of each token's text, for the types in
  BY_LENGTH: a packed text turns as it would alone. Source of every type: transformers.modeling_rope_utils.
  """
  settings = cfg.rope_parameters if rope == "full" else {"rope_type": "default", "rope_theta": cfg.rope_local_base_freq}
  kind = settings["rope_type"]
  positions = positions_BT[..., None].astype(jnp.float32)
  angles = positions * (LENGTH_SCALINGS[kind](cfg, settings, lengths_BT) if kind in BY_LENGTH else inverse_frequencies(cfg, settings))
  factor = attention_factor(settings, cfg)
  return factor * jnp.cos(angles)[:, :, None], factor * jnp.sin(angles)[:, :, None]


def inverse_frequencies(cfg, settings) -> np.ndarray:
  """float32 [R/2]: theta^(-2i/R), scaled as the settings say; of the types that know no length."""
  return SCALINGS[settings["rope_type"]](_plain(cfg, settings["rope_theta"]), settings).astype(np.float32)


def _plain(cfg, theta):
  dims = rotated_dims(cfg)
  return 1.0 / theta ** (np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims))


def _llama3(frequencies, rope):
  """Long wavelengths are divided by `factor`, short ones kept, those between blended (Llama 3.1)."""
  wavelengths = 2 * math.pi / frequencies
  context = rope["original_max_position_embeddings"]
  low, high = rope["low_freq_factor"], rope["high_freq_factor"]
  blend = np.clip((context / wavelengths - low) / (high - low), 0, 1)
  return (1 - blend) * frequencies / rope["factor"] + blend * frequencies


def _yarn(frequencies, rope):
  """Dimensions that turn often are kept, those that turn rarely divided by `factor`, a ramp between (arXiv 2309.00071, eq. 23)."""
  dims, context = 2 * len(frequencies), rope["original_max_position_embeddings"]
  turning = lambda turns: dims * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))
  low, high = turning(rope.get("beta_fast") or 32), turning(rope.get("beta_slow") or 1)
  if rope.get("truncate", True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dims - 1)
  ramp = np.clip((np.arange(len(frequencies), dtype=np.float32) - low) / (high - low or 0.001), 0, 1)
  return frequencies / rope["factor"] * ramp + frequencies * (1 - ramp)


SCALINGS = {
    "default": lambda frequencies, rope: frequencies,
    "linear": lambda frequencies, rope: frequencies / rope["factor"],
    "llama3": _llama3,
    "yarn": _yarn,
}


def _dynamic(cfg, rope, lengths_BT):
  """Beyond max_position_embeddings theta grows with the text (NTK): [B, T, R/2]."""
  dims, longest = rotated_dims(cfg), cfg.max_position_embeddings
  over = jnp.maximum(lengths_BT, longest).astype(jnp.float32) / longest
  theta_BT = rope["rope_theta"] * (rope["factor"] * over - (rope["factor"] - 1)) ** (dims / (dims - 2))
  return 1.0 / theta_BT[..., None] ** (np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims))


def _longrope(cfg, rope, lengths_BT):
  """Texts beyond the original length take the long factors, others the short ones (Phi-3): [B, T, R/2]."""
  long_BT = lengths_BT > rope["original_max_position_embeddings"]
  short, long = (_plain(cfg, rope["rope_theta"]) / np.asarray(rope[name], np.float32) for name in ("short_factor", "long_factor"))
  return jnp.where(long_BT[..., None], long, short)


LENGTH_SCALINGS = {"dynamic": _dynamic, "longrope": _longrope}


def attention_factor(rope, cfg) -> float:
  """What cos and sin are multiplied by: 1 but for YaRN and longrope."""
  if rope.get("attention_factor") is not None:
    return float(rope["attention_factor"])
  if rope["rope_type"] == "longrope":
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or cfg.max_position_embeddings / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
  if rope["rope_type"] != "yarn":
    return 1.0
  scale = lambda m: 0.1 * m * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0
  if rope.get("mscale") and rope.get("mscale_all_dim"):
    return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
  return scale(1)


def text_lengths(segment_ids_BT):
  """Tokens of the text that each token belongs to, int32 [B, T].

    segment_ids  1 1 1 2 2 0   ->   3 3 3 2 2 1
  """
  count = lambda segments_T: jnp.zeros(segments_T.shape[0] + 1, jnp.int32).at[segments_T].add(1)[segments_T]
  return jax.vmap(count)(segment_ids_BT)


def rotate(x_BTHK, rotation):
  """x with each pair (i, i + R/2) of its first R dimensions turned by its angle; float32 inside, x's dtype outside. None turns nothing."""
  if rotation is None:
    return x_BTHK
  cos, sin = rotation
  dims = 2 * cos.shape[-1]
  first, second = jnp.split(x_BTHK[..., :dims].astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BTHK.dtype)
  return turned if dims == x_BTHK.shape[-1] else jnp.concatenate([turned, x_BTHK[..., dims:]], -1)
