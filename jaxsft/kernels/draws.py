"""Random numbers that depend on names alone: (seed, step, row, place, element) -> 32 bits, the same however a batch is split.

Threefry keys would do; drawn for every element of every layer they took 20 s to compile and most of a step on a CPU. Dropout masks and embedding noise
need no more than this: the lowbias32 integer hash (two multiplications, bias 0.17 bits; C. Wellons, "Prospecting for Hash Functions").
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def seed_of(key) -> jax.Array:
  """uint32 [2] from a jax PRNG key."""
  return jax.random.key_data(key).astype(jnp.uint32)


def derive(seed, number):
  """A seed [..., 2] for one named part of what `seed` [..., 2] stands for; `number` broadcasts against the leading dims."""
  number = jnp.asarray(number).astype(jnp.uint32)
  first = _mix(seed[..., 0] ^ _mix(number * jnp.uint32(0x9E3779B9) + jnp.uint32(1)))
  return jnp.stack(jnp.broadcast_arrays(first, _mix(seed[..., 1] + first + number)), -1)


def uniform(seeds_B, shape):
  """float32 in [0, 1), [B, *shape], from one seed [B, 2] a row; 24 bits each."""
  size = 1
  for dim in shape:
    size *= dim
  index = jnp.arange(size, dtype=jnp.uint32).reshape(1, *shape)
  expand = lambda part: part.reshape(-1, *[1] * len(shape))
  bits = _mix(_mix(index ^ expand(seeds_B[:, 0])) + expand(seeds_B[:, 1]))
  return (bits >> 8).astype(jnp.float32) * (2.0 ** -24)


def _mix(x):
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)
