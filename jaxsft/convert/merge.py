"""Leaves for an export: of a tree in memory or of a source, with or without adapters added, one layer at a time on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from jaxsft.errors import UserError
from jaxsft.transforms import lora, nf4, tree

Leaves = Iterable[tuple[str, Callable[[int | None], np.ndarray]]]


def tree_leaves(params: dict[str, Any]) -> Iterator[tuple[str, Callable[[int | None], np.ndarray]]]:
  """(path, read) of a parameter tree; an NF4 leaf reads as the float32 kernel that its codes stand for."""
  for path, leaf in tree.flatten(params):
    yield path, _reader(leaf)


def _reader(leaf):
  def read(layer: int | None) -> np.ndarray:
    if isinstance(leaf, nf4.NF4Array):
      return np.asarray(nf4.dequantise(leaf if layer is None else _layer(leaf, layer)))
    return np.asarray(leaf if layer is None else leaf[layer])
  return read


def _layer(leaf, layer):
  import jax
  return jax.tree.map(lambda a: a[layer], leaf)


def merged(leaves: Leaves, adapters: dict[str, Any], scale: float) -> Leaves:
  """`leaves` with scale * A B added, in float32, to the kernels that `adapters` covers.

  Errors: UserError when an adapter's kernel is not among the leaves, or is of another shape: it would be lost in silence.
  """
  left = set(lora.kernel_paths(adapters))
  for path, read in leaves:
    if path in left:
      left.remove(path)
      read = _merged_reader(path, read, tree.get(adapters, path), scale)
    yield path, read
  if left:
    raise UserError(f"the adapter has {sorted(left)[0]!r} and the base has not", wanted="the base that the adapter was trained on",
                    knob="model.path")


def _merged_reader(path, read, pair, scale):
  def read_merged(layer: int | None) -> np.ndarray:
    kernel, a, b = read(layer), *(np.asarray(pair[k] if layer is None else pair[k][layer]) for k in ("a", "b"))
    if kernel.shape != (a.shape[0], b.shape[1]):
      raise UserError(f"the adapter of {path} is for a kernel {(a.shape[0], b.shape[1])}, the base has {kernel.shape}",
                      wanted="the base that the adapter was trained on", knob="model.path")
    return np.asarray(lora.merge(np.asarray(kernel, np.float32), a, b, scale))
  return read_merged
