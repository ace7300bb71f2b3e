"""NF4 with double quantisation as a leaf: 4-bit codes in the kernel's own [in, out] shape, scales a block of 64 inputs.

Bit-equal to bitsandbytes.functional.quantize_4bit(quant_type="nf4", blocksize=64, compress_statistics=True); arXiv 2305.14314.

  kernel [in, out]      codes   [in, out]      uint4 (uint8 on the CPU, where bytes win), index into CODE
                        scales  [in/64, out]   uint8 index into DYNAMIC8 (float32 absmax itself without double quantisation)
                        absmax2 [ceil(in/64*out / 256)] float32, one for 256 scales in the order of [out, in/64]
                        offset  []             float32, mean of all absmax
  absmax = DYNAMIC8[scales] * absmax2 + offset;    weight = CODE[codes] * absmax
Stacked layers put L in front of every field.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft.errors import UserError

BLOCK, BLOCK2 = 64, 256
CODE = np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
                 -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)


def _dynamic8() -> np.ndarray:
  """bitsandbytes' signed dynamic 8-bit map: 256 sorted float32, seven decades of 2^i evenly spaced means, 0 and 1 (create_dynamic_map)."""
  values = [0.0, 1.0]
  for i in range(7):
    edges = _linspace_float32(0.1, 1.0, 2 ** i + 1)
    means = (edges[:-1] + edges[1:]) / np.float32(2.0) * np.float32(10.0 ** (i - 6))
    values += [*means.tolist(), *(-means).tolist()]
  return np.sort(np.array(values, np.float32))


def _linspace_float32(start: float, stop: float, count: int) -> np.ndarray:
  """torch.linspace to the bit: a float32 step, each half counted from its own end, one rounding (fused multiply-add)."""
  first, last = np.float64(np.float32(start)), np.float64(np.float32(stop))
  step, i = np.float64(np.float32((last - first) / (count - 1))), np.arange(count)
  return np.where(i < count // 2, first + step * i, last - step * (count - 1 - i)).astype(np.float32)


DYNAMIC8 = _dynamic8()


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales", "absmax2", "offset"], meta_fields=[])
@dataclasses.dataclass
class NF4Array:
  """A frozen kernel of 4-bit codes; `dot_input` is what `kernels.dot` calls. Fields as in the module's head."""
  codes: jax.Array
  scales: jax.Array
  absmax2: jax.Array | None
  offset: jax.Array | None

  @property
  def shape(self):
    return self.codes.shape

  @property
  def nbytes(self) -> int:
    """Bytes on the device, 4 bits a code where the platform packs them."""
    code = self.codes.size // 2 if self.codes.dtype == jnp.uint4 else self.codes.size
    return code + sum(x.nbytes for x in (self.scales, self.absmax2, self.offset) if x is not None)

  def dot_input(self, x):
    return nf4_dot(x, self)


def codes_dtype():
  """uint4 on GPU and TPU; bytes on the CPU, which unpacks a whole stack of uint4 (shared facts: 205 against 398 MB)."""
  return jnp.uint8 if jax.default_backend() == "cpu" else jnp.uint4


def quantise(kernel, double_quant: bool = True, dtype=None) -> NF4Array:
  """A kernel [in, out] of any float type as NF4 (float32 arithmetic; a tie goes to the lower code; an all-zero block gets code 7).

  Errors: UserError where `in` is no multiple of 64: bitsandbytes' blocks would run over row ends there, ours do not exist.
  """
  if kernel.shape[0] % BLOCK:
    raise UserError(f"a kernel with {kernel.shape[0]} inputs cannot be cut into NF4 blocks", wanted=f"a multiple of {BLOCK}", knob="nf4.targets")
  codes, absmax_NO = _encode(kernel)
  codes = codes.astype(dtype or codes_dtype())
  if not double_quant:
    return NF4Array(codes, absmax_NO, None, None)
  return NF4Array(codes, *_encode_scales(absmax_NO))


@jax.jit
def _encode(kernel):
  blocks = kernel.astype(jnp.float32).reshape(-1, BLOCK, kernel.shape[1])
  absmax = jnp.abs(blocks).max(1)
  inverse = jnp.where(absmax > 0, 1.0 / absmax, 0.0)
  scaled = blocks * inverse[:, None]
  codes = jnp.zeros(scaled.shape, jnp.uint8)
  for midpoint in (CODE[:-1] + CODE[1:]) / np.float32(2):      # 15 comparisons, no argmin over 16: no temporary 16 times the kernel
    codes += scaled > midpoint
  return codes.reshape(kernel.shape), absmax


def _encode_scales(absmax_NO):
  """Second quantisation, in bitsandbytes' order [out, in/64]; on the host, as it is 1/64 of the kernel and its mean must not depend on devices."""
  absmax_ON = np.asarray(absmax_NO).T
  flat = absmax_ON.reshape(-1)
  offset = _mean(flat)
  centred = np.pad(flat - offset, (0, -flat.size % BLOCK2)).reshape(-1, BLOCK2)
  absmax2 = np.abs(centred).max(1)
  scaled = centred * (np.float32(1) / np.where(absmax2 > 0, absmax2, np.float32(1)))[:, None]
  codes = np.searchsorted((DYNAMIC8[:-1] + DYNAMIC8[1:]) / np.float32(2), _snap(scaled)).astype(np.uint8)
  scales_NO = codes.reshape(-1)[:flat.size].reshape(absmax_ON.shape).T
  return jnp.asarray(scales_NO), jnp.asarray(absmax2), jnp.asarray(offset)


def _snap(scaled: np.ndarray) -> np.ndarray:
  """[-1, 1] on the grid of 65,536 points through which bitsandbytes 0.50 looks up its 8-bit codes (CPU): only near-ties move, yet equal is equal."""
  index = np.floor((np.clip(scaled, -1, 1) + np.float32(1)) * np.float32(0.5) * np.float32(65535) + np.float32(0.5))
  return (index / np.float32(65535) * np.float32(2) - np.float32(1)).astype(np.float32)


def _mean(flat: np.ndarray) -> np.float32:
  return np.float32(flat.mean(dtype=np.float64))


def absmax(w: NF4Array) -> jax.Array:
  """Float32 scales [in/64, out] of one layer."""
  if w.absmax2 is None or w.offset is None:
    return w.scales
  N, O = w.scales.shape
  order_NO = jnp.arange(O)[None, :] * N + jnp.arange(N)[:, None]              # place in [out, in/64]
  return jnp.asarray(DYNAMIC8)[w.scales] * w.absmax2[order_NO // BLOCK2] + w.offset


def dequantise(w: NF4Array, dtype=jnp.float32) -> jax.Array:
  """The kernel [in, out] that the codes stand for (one layer; vmap for a stack)."""
  I, O = w.codes.shape
  values = jnp.asarray(CODE)[w.codes.astype(jnp.uint8)].reshape(I // BLOCK, BLOCK, O) * absmax(w)[:, None]
  return values.reshape(I, O).astype(dtype)


@jax.custom_vjp
def nf4_dot(x, w: NF4Array):
  """x [..., in] times the dequantised kernel. The backward pass dequantises again: nothing of a kernel's size is kept between the two, and no dW exists."""
  return jnp.dot(x, dequantise(w, x.dtype))


def _nf4_fwd(x, w):
  return nf4_dot(x, w), w


def _nf4_bwd(w, dy):
  zeros = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0) if not jnp.issubdtype(a.dtype, jnp.floating) else jnp.zeros_like(a), w)
  return jnp.dot(dy, dequantise(w, dy.dtype).T), zeros


nf4_dot.defvjp(_nf4_fwd, _nf4_bwd)
