"""4-bit tensors as bitsandbytes keeps them in safetensors, read as they are: no code and no scale is made anew.

  X.weight                                  codes, two a byte, the first in the high nibble, row-major [out, in] (in any storage type)
  X.weight.absmax                           [n/64] float32, or uint8 into nested_quant_map where it is quantised again; row-major [out, in/64]
  X.weight.nested_absmax, .nested_quant_map [n/64/256] and [256] float32, with double quantisation
  X.weight.quant_map                        [16] float32, NF4's table
  X.weight.quant_state.bitsandbytes__nf4    a JSON object in bytes: quant_type, blocksize, shape, dtype, nested_blocksize, nested_offset
Blocks run along `in` within a row where 64 divides it: NF4Array's own blocks, transposed, and its absmax2 is in this very order.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsft.convert import shards
from jaxsft.errors import UserError
from jaxsft.transforms import nf4

STATE = ".quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
KNOB = "model.path to the unquantised model and nf4.targets to quantise here"
MAP_TOLERANCE = 1e-6      # tables that other versions or devices computed differ in the last bit of a few entries


class Quantised(NamedTuple):
  """One weight at rest: `tensors` its parts in the file, "weight" among them; `shape` [out, in]; `double` whether its scales are quantised."""
  name: str
  tensors: dict[str, shards.Tensor]
  shape: tuple[int, ...]
  double: bool
  offset: float

  @property
  def where(self) -> str:
    return f"{self.tensors['weight'].file}: {self.name}"


def find(tensors: dict[str, shards.Tensor]) -> tuple[dict[str, Quantised], set[str]]:
  """({weight's name: Quantised}, names of all parts that are no weight) of a file's tensors; nothing is read but the JSON objects.

  Errors: UserError for FP4, other block sizes, other tables, and parts that are missing or do not fit.
  """
  found, parts = {}, set()
  for state in [name for name in tensors if STATE in name]:
    name, kind = state.split(STATE)
    if name not in tensors:
      raise UserError(f"{tensors[state].file}: {state} has no {name}", wanted="a whole model", knob="model.path to a whole copy")
    if kind != "nf4":
      raise UserError(f"{tensors[state].file}: {name} is quantised as {kind}", wanted="nf4", knob=KNOB)
    mine = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
    found[name] = _checked(name, {"weight": tensors[name]} | mine, _settings(tensors[state], state))
    parts |= {state, *(f"{name}.{part}" for part in mine)}
  return found, parts


def _settings(tensor, name) -> dict[str, Any]:
  try:
    settings = json.loads(shards.read_tensor(tensor).tobytes())
    return settings | {"shape": tuple(int(n) for n in settings["shape"]), "nested_offset": float(settings.get("nested_offset") or 0.0)}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{tensor.file}: {name} is no quantisation state ({type(error).__name__}: {error})", wanted="a whole file",
                    knob="model.path to a whole copy") from None


def _checked(name, tensors, settings) -> Quantised:
  double = "nested_absmax" in tensors
  out = Quantised(name, tensors, settings["shape"], double, settings["nested_offset"])
  for key, wanted in [("quant_type", "nf4"), ("blocksize", nf4.BLOCK)] + [("nested_blocksize", nf4.BLOCK2)] * double:
    if settings.get(key) != wanted:
      raise UserError(f"{out.where} has {key} {settings.get(key)!r}", wanted=repr(wanted), knob=KNOB)
  missing = [part for part in PARTS if part not in tensors and (double or not part.startswith("nested"))]
  if missing:
    raise UserError(f"{out.where} lacks its {', '.join(missing)}", wanted="a whole model", knob="model.path to a whole copy")
  blocks = -(-math.prod(out.shape) // nf4.BLOCK)
  bytes_of = {"weight": -(-math.prod(out.shape) // 2), "absmax": blocks * (1 if double else 4), "nested_absmax": -(-blocks // nf4.BLOCK2) * 4}
  for part, size in bytes_of.items():
    if part in tensors and tensors[part].end - tensors[part].start != size:
      raise UserError(f"{out.where}: {part} has {tensors[part].end - tensors[part].start} bytes", wanted=f"{size} for shape {out.shape}",
                      knob="model.path to a whole copy")
  for part, table in (("quant_map", nf4.CODE), ("nested_quant_map", nf4.DYNAMIC8))[:1 + double]:
    held = shards.read_tensor(tensors[part])
    if held.shape != table.shape or not np.allclose(held, table, rtol=0, atol=MAP_TOLERANCE):
      raise UserError(f"{out.where} has a {part} of its own", wanted="bitsandbytes' table", knob=KNOB)
  return out


def stored(weight: Quantised) -> nf4.NF4Array:
  """The weight as an NF4 kernel [in, out]: codes, scales, absmax2 and offset as they lie in the file.

  Errors: UserError where 64 does not divide `in`: blocks run over row ends there, which NF4Array cannot hold.
  """
  if len(weight.shape) != 2 or weight.shape[1] % nf4.BLOCK:
    raise UserError(f"{weight.where} has shape {weight.shape}: its blocks run over row ends", wanted=f"inputs that are a multiple of {nf4.BLOCK}",
                    knob="nf4.targets without it: it is dequantised then")
  codes_OI = _codes(weight).reshape(weight.shape)
  scales_ON = _part(weight, "absmax").reshape(weight.shape[0], -1)
  codes, scales = jnp.asarray(codes_OI.T).astype(nf4.codes_dtype()), jnp.asarray(scales_ON.T)
  if not weight.double:
    return nf4.NF4Array(codes, scales, None, None)
  return nf4.NF4Array(codes, scales, jnp.asarray(_part(weight, "nested_absmax")), jnp.asarray(np.float32(weight.offset)))


def dequantised(weight: Quantised) -> np.ndarray:
  """The weight [out, in] in float32: what the codes stand for, before bitsandbytes rounds it to the model's dtype. Any shape."""
  absmax = _part(weight, "absmax")
  if weight.double:
    nested = np.repeat(_part(weight, "nested_absmax"), nf4.BLOCK2)[:absmax.size]
    absmax = nf4.DYNAMIC8[absmax] * nested + np.float32(weight.offset)
  size = math.prod(weight.shape)
  values = nf4.CODE[np.pad(_codes(weight), (0, -size % nf4.BLOCK))].reshape(-1, nf4.BLOCK) * absmax[:, None]
  return values.reshape(-1)[:size].reshape(weight.shape)


def _part(weight, part) -> np.ndarray:
  return shards.read_tensor(weight.tensors[part]).reshape(-1)


def _codes(weight) -> np.ndarray:
  """[n] uint8, one code each; the storage type (uint8, or bfloat16 for FSDP) is only a way to carry bytes."""
  packed = _part(weight, "weight").view(np.uint8)
  return np.stack([packed >> 4, packed & 15], -1).reshape(-1)[:math.prod(weight.shape)]
