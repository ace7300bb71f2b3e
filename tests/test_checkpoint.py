"""What is saved comes back to the bit: uint4 codes, optimiser tuples, keys; the best and the newest are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsft.checkpoint import Checkpoints
from jaxsft.step import TrainState
from jaxsft.transforms import nf4


def state(seed=0):
  params = {"layers": {"w": jax.random.normal(jax.random.key(seed), (3, 64, 8)), "h": jnp.ones((4,), jnp.bfloat16)}}
  codes = nf4.quantise(jax.random.normal(jax.random.key(seed), (64, 128)), dtype=jnp.uint4)
  return TrainState(jnp.int32(seed), params, optax.adamw(1e-3).init(params), {"codes": codes, "empty": ()}, jax.random.key_data(jax.random.key(seed)))


def test_state_with_nf4_codes_comes_back_to_the_bit(tmp_path):
  saved, like = state(7), state(0)
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  checkpoints.save(3, saved, {"rows": 24}, {"base": "x"})
  checkpoints.wait()
  restored, data, meta = checkpoints.restore(3, like)
  assert (data, meta) == ({"rows": 24}, {"base": "x"})
  assert jax.tree.structure(restored) == jax.tree.structure(saved)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), restored, saved)
  leaves, meta = checkpoints.read(3)
  np.testing.assert_array_equal(leaves["trainable.layers.w"], saved.trainable["layers"]["w"])


def test_the_newest_two_and_the_best_are_kept(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2, keep_best=True)
  for step, loss in enumerate((3.0, 1.0, 2.0, 4.0, 5.0), 1):
    checkpoints.save(step, state(step), {}, {}, eval_loss=loss)
  checkpoints.wait()
  assert Checkpoints(tmp_path, read_only=True).steps() == [2, 4, 5]
