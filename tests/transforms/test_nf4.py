"""NF4 against bitsandbytes 0.50.2 to the bit (tests/golden/nf4_bitsandbytes.npz), against a plain numpy reference, and inside a product."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxsft.errors import UserError
from jaxsft.kernels.dot import dot
from jaxsft.transforms import nf4

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def bitsandbytes():
  return np.load(GOLDEN / "nf4_bitsandbytes.npz")


def random_kernel(inputs=192, outputs=576, seed=0, std=0.02):
  return jax.random.normal(jax.random.key(seed), (inputs, outputs)) * std


def unpack(packed, shape_OI):
  """bitsandbytes' bytes (first code in the high nibble, row-major [out, in]) as codes [in, out]."""
  return np.stack([packed >> 4, packed & 15], -1).reshape(shape_OI).T


def to_ours(flat, golden):
  """bitsandbytes' scales, row-major [out, in/64], as [in/64, out]."""
  return flat.reshape(golden["x"].shape[0], -1).T


def test_the_two_code_tables_equal_bitsandbytes(bitsandbytes):
  np.testing.assert_array_equal(nf4.CODE, bitsandbytes["nf4_code"], strict=True)
  np.testing.assert_array_equal(nf4.DYNAMIC8, bitsandbytes["dynamic8_code"], strict=True)
  np.testing.assert_array_equal(nf4.DYNAMIC8, bitsandbytes["nf4_b64_dq_f32/nested_code"], strict=True)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("double", [False, True])
def test_codes_scales_and_values_equal_bitsandbytes(bitsandbytes, dtype, double):
  wanted = {name: bitsandbytes[f"nf4_b64_{'dq' if double else 'plain'}_{dtype}/{name}"]
            for name in ("packed", "absmax", "dequant") + (("offset", "nested_absmax") if double else ())}
  kernel_IO = bitsandbytes["x"].T.astype(np.float32 if dtype == "f32" else ml_dtypes.bfloat16)
  w = nf4.quantise(jnp.asarray(kernel_IO), double_quant=double)
  np.testing.assert_array_equal(w.codes, unpack(wanted["packed"], bitsandbytes["x"].shape))
  np.testing.assert_array_equal(w.scales, to_ours(wanted["absmax"], bitsandbytes))
  values = np.asarray(nf4.dequantise(w, jnp.float32 if dtype == "f32" else jnp.bfloat16)).astype(np.float32)
  if not double:
    np.testing.assert_array_equal(values, wanted["dequant"].T)
    return
  # Only the mean of all absmax is a sum whose order is the library's own: torch's float32 sum is vectorised, ours is in float64. One ulp apart at most,
  # and what is left of it in the three nested absmax and in the values is of that size.
  np.testing.assert_array_max_ulp(np.asarray(w.offset), wanted["offset"], maxulp=1)
  np.testing.assert_allclose(w.absmax2, wanted["nested_absmax"], rtol=0, atol=np.spacing(wanted["offset"]))
  np.testing.assert_allclose(values, wanted["dequant"].T, rtol=1e-6 if dtype == "f32" else 2 ** -8, atol=1e-9)


def test_with_bitsandbytes_own_offset_every_value_is_equal_to_the_bit(bitsandbytes, monkeypatch):
  offset = bitsandbytes["nf4_b64_dq_f32/offset"]
  monkeypatch.setattr(nf4, "_mean", lambda flat: np.float32(offset))
  w = nf4.quantise(jnp.asarray(bitsandbytes["x"].T))
  np.testing.assert_array_equal(w.absmax2, bitsandbytes["nf4_b64_dq_f32/nested_absmax"], strict=True)
  np.testing.assert_array_equal(w.scales, to_ours(bitsandbytes["nf4_b64_dq_f32/absmax"], bitsandbytes))
  np.testing.assert_array_equal(nf4.dequantise(w), bitsandbytes["nf4_b64_dq_f32/dequant"].T, strict=True)


def test_a_tie_goes_to_the_lower_code_and_an_all_zero_block_is_code_seven():
  midpoints = (nf4.CODE[:-1] + nf4.CODE[1:]) / np.float32(2)
  ties = np.concatenate([midpoints, np.nextafter(midpoints, np.float32(2)), np.ones(34, np.float32)])
  w = nf4.quantise(jnp.asarray(np.stack([ties, np.zeros(64, np.float32)], 1)), double_quant=False)
  np.testing.assert_array_equal(w.codes[:30, 0], [*range(15), *range(1, 16)])
  np.testing.assert_array_equal(w.codes[:, 1], 7)
  np.testing.assert_array_equal(w.scales, [[1.0, 0.0]])
  np.testing.assert_array_equal(nf4.dequantise(w)[:, 1], 0.0)


def numpy_nf4(kernel_IO):
  """The plain reference, scalar by scalar where order matters: (codes, scales, absmax2, offset, values)."""
  I, O = kernel_IO.shape
  blocks = np.asarray(kernel_IO, np.float32).T.reshape(-1, 64)                  # row-major [out, in/64]
  absmax = np.abs(blocks).max(1)
  unit = blocks * (np.float32(1) / absmax)[:, None]
  codes = np.argmin(np.abs(unit[..., None].astype(np.float64) - nf4.CODE.astype(np.float64)), -1)       # argmin: ties to the lower
  offset = np.float32(absmax.astype(np.float64).mean())
  centred = absmax - offset
  absmax2 = np.array([np.abs(centred[start:start + 256]).max() for start in range(0, len(centred), 256)])
  scaled = centred * (np.float32(1) / np.repeat(absmax2, 256)[:len(centred)])
  scales = np.argmin(np.abs(scaled[:, None].astype(np.float64) - nf4.DYNAMIC8.astype(np.float64)), -1)
  restored = nf4.DYNAMIC8[scales] * np.repeat(absmax2, 256)[:len(centred)] + offset
  values = (nf4.CODE[codes] * restored[:, None]).reshape(O, I).T
  return codes.reshape(O, I).T, scales.reshape(O, -1).T, absmax2, offset, values


def test_a_partial_last_block_of_scales_equals_the_plain_reference():
  kernel = random_kernel(192, 576)            # 1,728 scales: six blocks of 256 and three quarters of one
  w = nf4.quantise(kernel)
  codes, scales, absmax2, offset, values = numpy_nf4(kernel)
  assert w.absmax2.shape == (7,)
  np.testing.assert_array_equal(w.codes, codes)
  np.testing.assert_array_equal(w.absmax2, absmax2)
  assert np.asarray(w.offset) == offset
  # bitsandbytes looks its 8-bit codes up through a grid of 65,536 points: a scale may differ from the nearest by one only where it lies within
  # half a grid step of the midpoint
  differs = np.asarray(w.scales) != scales
  assert differs.mean() < 0.01 and np.abs(np.asarray(w.scales).astype(int) - scales).max() <= 1
  np.testing.assert_allclose(np.asarray(nf4.dequantise(w)).reshape(3, 64, 576).swapaxes(0, 1)[:, ~differs],
                             values.reshape(3, 64, 576).swapaxes(0, 1)[:, ~differs], rtol=1e-6)


def test_inputs_that_64_does_not_divide_are_the_users_mistake():
  with pytest.raises(UserError, match=r"96 inputs.*multiple of 64.*nf4\.targets"):
    nf4.quantise(jnp.zeros((96, 64)))


def test_bits_a_parameter_and_error_on_normal_weights():
  kernel = random_kernel(1024, 2048)
  w = nf4.quantise(kernel, dtype=jnp.uint4)
  assert 8 * w.nbytes / kernel.size == pytest.approx(4.127, abs=5e-4)
  error = np.asarray(nf4.dequantise(w)) - np.asarray(kernel)
  assert np.sqrt((error ** 2).mean() / (np.asarray(kernel) ** 2).mean()) == pytest.approx(0.0922, abs=5e-4)
  assert 8 * nf4.quantise(kernel, double_quant=False, dtype=jnp.uint4).nbytes / kernel.size == 4.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("codes", ["uint8", "uint4"])
def test_the_product_and_its_gradient_are_those_of_the_dequantised_kernel(codes, dtype):
  x = jax.random.normal(jax.random.key(1), (3, 5, 128)).astype(dtype)
  w = nf4.quantise(random_kernel(128, 192), dtype=jnp.dtype(codes))
  ours, plain = (lambda x: nf4.nf4_dot(x, w)), (lambda x: jnp.dot(x, nf4.dequantise(w, x.dtype)))
  (y, pull), (y_plain, pull_plain) = jax.vjp(ours, x), jax.vjp(plain, x)
  dy = jax.random.normal(jax.random.key(2), y.shape).astype(dtype)
  np.testing.assert_array_equal(y, y_plain, strict=True)
  tolerance = dict(rtol=1e-5, atol=1e-6) if dtype == "float32" else dict(rtol=2 ** -7, atol=2 ** -8)      # a bfloat16 sum in another order
  np.testing.assert_allclose(*(np.asarray(pull(dy)[0], np.float32) for pull in (pull, pull_plain)), **tolerance)
  assert pull(dy)[0].dtype == dtype


def test_bytes_and_four_bits_give_the_same_product():
  x, kernel = jax.random.normal(jax.random.key(1), (5, 128)), random_kernel(128, 192)
  narrow, wide = (nf4.nf4_dot(x, nf4.quantise(kernel, dtype=dtype)) for dtype in (jnp.uint4, jnp.uint8))
  np.testing.assert_array_equal(narrow, wide, strict=True)


def test_the_base_gets_no_gradient():
  w, x = nf4.quantise(random_kernel(64, 64)), jnp.ones((2, 64))
  gradient = jax.grad(lambda w: nf4.nf4_dot(x, w).sum(), allow_int=True)(w)
  assert {leaf.dtype for leaf in (gradient.codes, gradient.scales)} == {jax.dtypes.float0}
  np.testing.assert_array_equal(gradient.absmax2, 0.0)
  np.testing.assert_array_equal(gradient.offset, 0.0)


@pytest.mark.parametrize("double", [False, True])
def test_stacked_and_scanned_equals_one_layer_after_another(double):
  layers = [nf4.quantise(random_kernel(192, 192, seed, std=0.1), double_quant=double) for seed in range(3)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
  x = jax.random.normal(jax.random.key(9), (4, 192))

  def scanned(x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(dot(x, w)), None), x, stacked)[0]

  def unrolled(x):
    return functools.reduce(lambda x, w: jnp.tanh(dot(x, w)), layers, x)
  for function in (lambda f: f(x), lambda f: jax.grad(lambda x: (f(x) ** 2).sum())(x)):
    np.testing.assert_allclose(*(function(f) for f in (jax.jit(scanned), jax.jit(unrolled))), rtol=1e-5, atol=1e-7)
