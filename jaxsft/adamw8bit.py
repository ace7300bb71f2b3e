"""AdamW's moments in 8 bits: bitsandbytes' dynamic codes, signed for the mean and unsigned for the square, in blocks of 256 (arXiv 2110.02861)."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsft.transforms import tree as trees

BLOCK = 256
SMALLEST = 4096       # elements of a matrix or vector that is worth codes; what is smaller stays float32


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
  """The 256 values that codes stand for, ascending, float32: decades down from 1, each with twice the fractions of the one below; 0 and 1.

  The numbers of bitsandbytes.functional.create_dynamic_map to a unit or two in the last place (torch's linspace is not the same on all CPUs either).
  """
  values = [0.0, 1.0]
  for decade in range(7):
    edges = np.linspace(0.1, 1, (2 ** decade if signed else 2 ** (decade + 1)) + 1).astype(np.float32)
    means = (np.float32(10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))).tolist()
    values += means + ([-mean for mean in means] if signed else [])
  return np.array(sorted(values), np.float32)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "absmax"], meta_fields=["signed"])
@dataclasses.dataclass
class Blocks:
  """codes: uint8, in the parameter's own shape. absmax: float32, one a block of 256 along the flat matrix (of each layer), in as many dimensions:

    [L, in, out]   absmax [L, in, out / 256] where 256 divides out, so that both are split alike over devices; else [L, 1, ceil(in out / 256)]
  """
  codes: jax.Array
  absmax: jax.Array
  signed: bool


def _blocked(x, layers: int):
  """[..., blocks, 256] of an array whose first `layers` axes are stacks; the end is filled with zeros."""
  if x.shape[-1] % BLOCK == 0:
    return x.reshape(*x.shape[:-1], -1, BLOCK)
  stack, rest = x.shape[:layers], x.ndim - layers
  flat = x.reshape(*stack, -1)
  flat = jnp.pad(flat, [(0, 0)] * layers + [(0, -flat.shape[-1] % BLOCK)])
  return flat.reshape(*stack, *[1] * (rest - 1), -1, BLOCK)


def _unblocked(blocks, shape, layers: int):
  if shape[-1] % BLOCK == 0:
    return blocks.reshape(shape)
  size = int(np.prod(shape[layers:]))
  return blocks.reshape(*shape[:layers], -1)[..., :size].reshape(shape)


def quantise(x, signed: bool, layers: int = 0) -> Blocks:
  """The nearest code of every element over its block's largest; between two, the lower. x: float32."""
  values = dynamic_map(signed)
  blocks = _blocked(x, layers)
  absmax = jnp.abs(blocks).max(-1)
  scaled = blocks * (1 / jnp.maximum(absmax, 1e-38))[..., None]
  codes = jnp.searchsorted(jnp.asarray((values[:-1] + values[1:]) / 2), scaled).astype(jnp.uint8)
  return Blocks(_unblocked(codes, x.shape, layers), absmax, signed)


def dequantise(blocks: Blocks, layers: int = 0):
  """float32, of the codes' shape."""
  values = jnp.asarray(dynamic_map(blocks.signed))[blocks.codes]
  return _unblocked(_blocked(values, layers) * blocks.absmax[..., None], values.shape, layers)


class Adam8bitState(NamedTuple):
  """mu, nu: trees like the parameters, of Blocks or, for what is small, float32 arrays."""
  steps: jax.Array
  mu: trees.Tree
  nu: trees.Tree


def scale_by_adam8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """optax.scale_by_adam whose moments rest in codes: widened, moved, used for the update in float32, and only then rounded to codes again.

  A stacked leaf ("layers/...") is L matrices, each with blocks of its own. The embedding keeps float32 moments, as transformers' Trainer sets
  bitsandbytes up: a row that a batch does not touch has gradient 0, and a square rounded to 0 under a mean that is not would throw it far.
  """
  def layers(path):
    return 1 if path.startswith("layers/") else 0

  def rest(path, x, signed):
    small = np.prod(x.shape[layers(path):]) < SMALLEST or path.startswith("embed_tokens/")
    return x if small else quantise(x, signed, layers(path))

  def widen(path, leaf):
    return dequantise(leaf, layers(path)) if isinstance(leaf, Blocks) else leaf

  def init(params):
    zeros = lambda signed: trees.map_leaves(lambda path, p: rest(path, jnp.zeros(p.shape, jnp.float32), signed), params)
    return Adam8bitState(jnp.int32(0), zeros(True), zeros(False))

  def update(updates, state, params=None):
    del params
    adam = optax.scale_by_adam(b1, b2, eps)
    wide = optax.ScaleByAdamState(state.steps, trees.map_leaves(widen, state.mu), trees.map_leaves(widen, state.nu))
    updates, after = adam.update(updates, wide)
    narrow = lambda tree, signed: trees.map_leaves(lambda path, x: rest(path, x, signed), tree)
    return updates, Adam8bitState(after.count, narrow(after.mu, True), narrow(after.nu, False))
  return optax.GradientTransformation(init, update)
