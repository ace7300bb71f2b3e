"""Rotary positions: inverse frequencies of every supported type, and the rotation (half-split, as Hugging Face stores q and k)."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np


def inverse_frequencies(cfg) -> np.ndarray:
  """float32 [K/2]: theta^(-2i/K), scaled as cfg.rope_parameters says (default, linear, llama3: transformers.modeling_rope_utils)."""
  rope = cfg.rope_parameters
  frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim))
  return SCALINGS[rope["rope_type"]](frequencies, rope).astype(np.float32)


def _llama3(frequencies, rope):
  """Long wavelengths are divided by `factor`, short ones kept, those between blended (Llama 3.1)."""
  wavelengths = 2 * math.pi / frequencies
  context = rope["original_max_position_embeddings"]
  low, high = rope["low_freq_factor"], rope["high_freq_factor"]
  blend = np.clip((context / wavelengths - low) / (high - low), 0, 1)
  return (1 - blend) * frequencies / rope["factor"] + blend * frequencies


SCALINGS = {
    "default": lambda frequencies, rope: frequencies,
    "linear": lambda frequencies, rope: frequencies / rope["factor"],
    "llama3": _llama3,
}


def rotations(positions_BT, cfg):
  """(cos, sin) [B, T, 1, K/2] float32 of each token's angle."""
  angles = positions_BT[..., None, None].astype(jnp.float32) * inverse_frequencies(cfg)
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTHK, rotation):
  """x with each pair (i, i + K/2) turned by its angle; float32 inside, x's dtype outside."""
  cos, sin = rotation
  first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BTHK.dtype)
