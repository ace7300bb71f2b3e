"""Meshes, and where each leaf of any tree lies on one: [(regex, PartitionSpec)], first match wins."""

from __future__ import annotations

import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsft.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")        # both split the batch; fsdp splits the parameters too

# Regexes meet the whole path, so that optimiser moments ("opt/0/mu/layers/...") follow their parameters. Stacked leaves: the L axis is never split.
RULES = [
    (r"/v_(row|col)/|norms/(gradient|parameter)/", P()),          # Adafactor's row and column means, norms by layer: a number a row, a column, a layer
    (r"embed_tokens/embedding", P("tensor", "fsdp")),
    (r"lm_head/kernel", P("fsdp", "tensor")),
    # by both, whichever the mesh has: an adapter and its moments are never whole on each device
    (r"_proj/kernel/a(/codes|/absmax)?$", P(None, ("fsdp", "tensor"), None)),
    (r"_proj/kernel/b(/codes|/absmax)?$", P(None, None, ("fsdp", "tensor"))),
    (r"_proj/kernel/(absmax2|offset)$", P()),
    (r"(q|k|v|gate|up)_proj/kernel(/codes|/scales|/absmax)?$", P(None, "fsdp", "tensor")),
    (r"(o|down)_proj/kernel(/codes|/scales|/absmax)?$", P(None, "tensor", "fsdp")),
    (r"(q|k|v|gate|up)_proj/bias", P(None, "tensor")),
    (r"(o|down)_proj/bias", P()),
    (r"norm/scale", P()),
]


def make_mesh(c, devices=None) -> Mesh:
  """The mesh of c.data x c.fsdp x c.tensor devices; one axis may be -1, what is left.

  Errors: UserError when the numbers do not fit the devices.
  """
  devices = list(devices if devices is not None else jax.devices())
  if jax.process_count() > 1:
    raise UserError(f"{jax.process_count()} processes run this together", wanted="one process with all its devices: several hosts come in a later version")
  sizes = [c.data, c.fsdp, c.tensor]
  fixed = int(np.prod([size for size in sizes if size != -1]))
  if sizes.count(-1) > 1 or min(sizes) < -1 or fixed <= 0 or len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
    raise UserError(f"mesh data={c.data} fsdp={c.fsdp} tensor={c.tensor} does not fit {len(devices)} devices",
                    wanted="a product equal to the number of devices (one axis may be -1)", knob="mesh.data, mesh.fsdp, mesh.tensor")
  return Mesh(np.array(devices).reshape([len(devices) // fixed if size == -1 else size for size in sizes]), AXES)


def row_shards(mesh: Mesh) -> int:
  """In how many parts the rows of a batch lie."""
  return int(np.prod([mesh.shape[axis] for axis in ROWS]))


def check_batch(c, mesh: Mesh):
  """Errors: UserError where rows do not divide over micro-batches and devices."""
  hosts = [{device.process_index for device in row.flat} for row in mesh.devices.reshape(-1, mesh.devices.shape[-1])]
  if any(len(owners) > 1 for owners in hosts):         # each would feed rows of its own as the copies of one
    raise UserError(f"mesh tensor={mesh.shape['tensor']} spans hosts, whose data differ", wanted="a tensor axis inside one host", knob="mesh.tensor")
  parts = c.micro_batches * row_shards(mesh)
  if c.batch_size % parts:
    raise UserError(f"batch_size {c.batch_size} does not divide into {c.micro_batches} micro-batches over {row_shards(mesh)} devices",
                    wanted=f"a multiple of {parts}", knob="batch_size, micro_batches or mesh")


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, micro_batched: bool = True) -> NamedSharding:
  """Of [M, B/M, ...] leaves (or [B, ...]): rows over data and fsdp."""
  return NamedSharding(mesh, P(None, ROWS) if micro_batched else P(ROWS))


def constrain_stream(mesh: Mesh):
  """A constraint that keeps the residual stream [B, T, D] split by rows alone."""
  if mesh.size == 1:
    return lambda x_BTD: x_BTD
  return lambda x_BTD: jax.lax.with_sharding_constraint(x_BTD, NamedSharding(mesh, P(ROWS)))


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """The PartitionSpec of one leaf; axes that do not divide its dimension are left out (a norm of 576 over 7 devices stays whole).

  Errors: UserError for a leaf of two or more dimensions that no rule covers.
  """
  for regex, wanted in RULES:
    if re.search(regex, path):
      axes = tuple(wanted)[-len(shape):] if len(tuple(wanted)) > len(shape) else tuple(wanted)
      return P(*(_dividing(axis, size, mesh) for axis, size in zip(axes, shape)))
  if len(shape) < 2:
    return P()
  raise UserError(f"no sharding rule covers {path!r} {shape}", wanted="a rule in jaxsft/sharding.py RULES")


def _dividing(axes, size: int, mesh: Mesh):
  """The axis, or as many of the first axes of a tuple as divide `size` together; None where not even one does."""
  names = (axes,) if isinstance(axes, str) else tuple(axes or ())
  while names and size % int(np.prod([mesh.shape[name] for name in names])):
    names = names[:-1]
  return names if len(names) > 1 else (names[0] if names else None)


def shardings(tree, mesh: Mesh):
  """A NamedSharding for every array of any tree (parameters, adapters, optimiser state), by the paths of its leaves."""
  def one(path, leaf):
    return NamedSharding(mesh, spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh))
  return jax.tree_util.tree_map_with_path(one, tree)


def place(tree, mesh: Mesh):
  """The tree on the mesh, every leaf where its rule says."""
  return jax.device_put(tree, shardings(tree, mesh))


def place_batch(batch, sharding: NamedSharding):
  """Rows of this host, numpy, as global arrays on the mesh."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def bytes_a_device(tree) -> int:
  """Bytes that the fullest device holds of a tree of placed arrays; uint4 counts half a byte."""
  held: dict[int, int] = {}
  for leaf in jax.tree.leaves(tree):
    for shard in getattr(leaf, "addressable_shards", ()):
      size = shard.data.size // 2 if leaf.dtype == jax.numpy.uint4 else shard.data.nbytes
      held[shard.device.id] = held.get(shard.device.id, 0) + size
  return max(held.values(), default=0)
