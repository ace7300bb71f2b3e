"""What a run will hold, counted from shapes before anything is read: bytes on each device by group, against what the device has."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from ml_collections import ConfigDict

from jaxsft import sharding
from jaxsft.convert.load import leaf_reads, wants_nf4
from jaxsft.errors import UserError, size
from jaxsft.models import families
from jaxsft.transforms import nf4
from jaxsft.transforms import tree as trees

WIDTH = 100                              # columns of the line where it is printed
REPLICATED, SMALL = 2.0, 100_000_000     # a device may hold so many times its share; of less than so many bytes nobody minds copies
RESIDENT = ("frozen_nf4", "frozen", "trainable", "optimiser", "aux")         # there for the whole run; gradients come and go within a step


def abstract_params(c, cfg, source=None, dtype_of: Callable[[str], Any] | None = None):
  """The tree that `base.load` gives, as shapes and dtypes: c.nf4.targets in NF4 (its scales as `source` holds them), the rest in dtype_of(path)."""
  doubles = {path: read.double_quant(c.nf4.double_quant) for path, _, _, read in leaf_reads(source, cfg)} if source else {}

  def leaf(path, shape):
    if wants_nf4(c.nf4.targets, path):
      return _abstract_nf4(shape, doubles.get(path, c.nf4.double_quant))
    return jax.ShapeDtypeStruct(shape, dtype_of(path) if dtype_of else jnp.dtype(c.model.base_dtype))
  return trees.unflatten({path: leaf(path, shape) for path, shape in families.shapes(cfg).items()})


def _abstract_nf4(shape, double) -> nf4.NF4Array:
  *stack, I, O = shape
  blocks = I // nf4.BLOCK

  def of(dtype, *dims) -> Any:        # stands where an array will
    return jax.ShapeDtypeStruct((*stack, *dims), dtype)
  if not double:
    return nf4.NF4Array(of(nf4.codes_dtype(), I, O), of(jnp.float32, blocks, O), None, None)
  return nf4.NF4Array(of(nf4.codes_dtype(), I, O), of(jnp.uint8, blocks, O), of(jnp.float32, -(-blocks * O // nf4.BLOCK2)), of(jnp.float32))


def bytes_a_device(tree, mesh) -> int:
  """Bytes that each device will hold of a tree of shapes under sharding.RULES, which only cut evenly; uint4 counts half a byte. No array is made."""
  def one(leaf, where):
    count = math.prod(where.shard_shape(leaf.shape))
    return count // 2 if leaf.dtype == jnp.uint4 else count * leaf.dtype.itemsize
  return sum(map(one, jax.tree.leaves(tree), jax.tree.leaves(sharding.shardings(tree, mesh))))


def device_bytes(c, cfg, mesh, init, source=None, dtype_of=None) -> dict[str, int]:
  """{group: bytes on each device} of a run: frozen_nf4, frozen (a reference among it), trainable, gradients (float32, once), optimiser, aux.

  init: the method's, (params, key) -> (trainable, frozen, opt, aux); it is traced, not run. dtype_of(path): of leaves not in NF4; base_dtype.
  """
  trainable, frozen, opt, aux = jax.eval_shape(lambda params: init(params, jax.random.key(0)), abstract_params(c, cfg, source, dtype_of))
  leaves = jax.tree_util.tree_leaves_with_path(frozen, is_leaf=_is_nf4)
  named = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
  groups = {"frozen_nf4": dict(pair for pair in named if _is_nf4(pair[1])), "frozen": dict(pair for pair in named if not _is_nf4(pair[1])),
            "trainable": trainable, "gradients": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trainable),
            "optimiser": opt, "aux": aux}
  return {name: bytes_a_device({name: group}, mesh) for name, group in groups.items()}


def _is_nf4(leaf) -> bool:
  return isinstance(leaf, nf4.NF4Array)


def device_limit(mesh) -> int | None:
  """Bytes that one device may hold, as its runtime says; on a CPU, the host's memory over its devices. None: unknown."""
  device = mesh.local_devices[0]
  if device.platform == "cpu":
    return psutil.virtual_memory().total // len(mesh.local_devices)
  return (device.memory_stats() or {}).get("bytes_limit")


def plan(c, cfg, mesh, init, source=None, dtype_of=None) -> dict[str, Any]:
  """JSON-able: read_bytes (at rest, by each host that holds all), device_bytes, resident_bytes, limit_bytes (None: unknown), devices, mesh."""
  held = device_bytes(c, cfg, mesh, init, source, dtype_of)
  alone = device_bytes(c, cfg, sharding.make_mesh(ConfigDict(dict(data=1, fsdp=1, tensor=1)), mesh.devices.flat[:1]), init, source, dtype_of)
  return {"read_bytes": source.stored_bytes if source else 0, "device_bytes": held, "whole_bytes": sum(alone[name] for name in RESIDENT),
          "resident_bytes": sum(held[name] for name in RESIDENT),
          "limit_bytes": device_limit(mesh), "devices": mesh.size, "mesh": dict(mesh.shape), "frozen_dtype": c.model.base_dtype}


def line(facts: dict[str, Any]) -> str:
  """The plan in one line; groups of nothing are left out."""
  names = {"frozen_nf4": "NF4 base", "frozen": f"{facts['frozen_dtype']} base", "trainable": "trainable", "gradients": "gradients",
           "optimiser": "optimiser", "aux": "method's own"}
  groups = ", ".join(f"{names[name]} {size(count)}" for name, count in facts["device_bytes"].items() if count)
  axes = " x ".join(f"{name} {count}" for name, count in facts["mesh"].items() if count > 1)
  where = f"each of {facts['devices']} devices ({axes})" if facts["devices"] > 1 else "the device"
  total, limit = facts["resident_bytes"] + facts["device_bytes"]["gradients"], facts["limit_bytes"]
  return (f"memory by arithmetic: {size(facts['read_bytes'])} to read; {where} holds {groups}: {size(total)}"
          f"{f' of {size(limit)}' if limit else ''} before activations")


def check(facts: dict[str, Any]) -> None:
  """Errors: UserError where what a device holds for the whole run is more than it has (no batch is small enough then), or where the mesh is named
  for cutting parameters and most of them stay whole (lessons row 18)."""
  held, limit = facts["device_bytes"], facts["limit_bytes"]
  cuts = facts["mesh"]["fsdp"] * facts["mesh"]["tensor"]
  if facts["resident_bytes"] > REPLICATED * facts["whole_bytes"] / cuts and facts["resident_bytes"] > SMALL:
    raise UserError(f"each device would hold {size(facts['resident_bytes'])} of {size(facts['whole_bytes'])}, though the mesh cuts parameters in {cuts}",
                    wanted="sizes that divide the model's (a size that does not divide leaves a leaf whole)", knob="mesh.fsdp or mesh.tensor")
  if not limit or facts["resident_bytes"] <= limit:
    return
  base = held["frozen_nf4"] + held["frozen"]
  if base > limit:
    raise UserError(f"the frozen base alone takes {size(base)} on each device, which has {size(limit)}", wanted="a base that fits",
                    knob="nf4.targets to quantise more of it, or mesh.fsdp to cut it over more devices")
  raise UserError(f"parameters and optimiser take {size(facts['resident_bytes'])} on each device, which has {size(limit)}", wanted="a state that fits",
                  knob="lora.rank to train adapters alone, nf4.targets with it, optim.state, or mesh.fsdp to cut it over more devices")


def tell(c, cfg, mesh, init, source=None, dtype_of=None) -> dict[str, Any]:
  """Prints the plan's line on standard error, once over all hosts, and gives the plan. Errors: as `check`."""
  facts = plan(c, cfg, mesh, init, source, dtype_of)
  if jax.process_index() == 0:
    print(textwrap.fill(line(facts), WIDTH, subsequent_indent="  "), file=sys.stderr)
  check(facts)
  return facts
