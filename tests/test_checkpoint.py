"""What is saved comes back to the bit: uint4 codes, optimiser tuples, keys; the best and the newest are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsft import checkpoint
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


class Clock:
  """Minutes that a test sets."""

  def __init__(self):
    self.minutes = 0.0

  def __call__(self):
    return 60 * self.minutes


def test_a_temporary_save_is_due_so_long_after_the_last_one_of_either_kind(tmp_path):
  clock = Clock()
  checkpoints = Checkpoints(tmp_path, every_minutes=10, clock=clock)
  found = []
  for clock.minutes, kind in ((9.9, "lasting"), (19.8, None), (20.0, "temporary"), (29.0, None), (31.0, "temporary")):
    found.append(checkpoints.due(1))
    if kind:
      checkpoints.save(int(clock.minutes), state(), {}, {}, temporary=kind == "temporary")
  checkpoints.wait()
  assert found == [False, False, True, False, True]
  clock.minutes = 1e6
  assert not Checkpoints(tmp_path, clock=clock).due(1)                     # every_minutes 0: never


def test_a_temporary_save_stays_until_the_next_and_counts_in_no_rule(tmp_path):
  """Over a restart: what is temporary is known from disk. Steps 3, 5, 6 and 8 are temporary; 3 would be the best of all."""
  checkpoints, found = Checkpoints(tmp_path, keep=2, keep_best=True), {}
  for step, loss in ((1, 1.0), (2, 3.0), (3, 0.5), (4, 2.0), (5, None), (6, None), (7, 4.0), (8, None)):
    checkpoints.save(step, state(step), {}, {}, eval_loss=loss, temporary=step in (3, 5, 6, 8))
    checkpoints.wait()
    found[step] = checkpoints.steps()
    if step in (3, 6, 8):
      checkpoints.close()
      checkpoints = Checkpoints(tmp_path, keep=2, keep_best=True)
  assert found == {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 4], 5: [1, 2, 4, 5], 6: [1, 2, 4, 6], 7: [1, 4, 7], 8: [1, 4, 7, 8]}
  assert Checkpoints(tmp_path, read_only=True).steps() == [1, 4, 7, 8]
  restored, _, _ = checkpoints.restore(8, state(0))
  np.testing.assert_array_equal(restored.trainable["layers"]["w"], state(8).trainable["layers"]["w"])


def test_hosts_follow_the_clock_of_host_0(tmp_path, monkeypatch):
  """Two hosts whose clocks differ ask at the same steps alone, and do what host 0 says."""
  from jax.experimental import multihost_utils
  monkeypatch.setattr(checkpoint.jax, "process_count", lambda: 2)
  said: list = []
  monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda late: said.append(bool(late)) or np.bool_(True))
  clock = Clock()
  checkpoints = Checkpoints.__new__(Checkpoints)                           # the manager of two real hosts needs two processes
  checkpoints._period, checkpoints._clock, checkpoints._saved = 600, clock, 0
  assert [step for step in range(1, 33) if checkpoints.due(step)] == [16, 32] and said == [False, False]
  clock.minutes = 11
  assert not checkpoints.due(33) and checkpoints.due(48) and said == [False, False, True]
  checkpoints._period = 0
  assert not checkpoints.due(64) and len(said) == 3                        # off: no host waits for another


def test_tools_read_what_evaluation_used(tmp_path):
  """An average beside the state: `read` gives it in the place of the trained leaves, `restore` goes on from the state."""
  saved = state(7)
  average = jax.tree.map(lambda x: x + 1, saved.trainable)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(3, saved, {}, {}, evaluated={"trainable": average})
  checkpoints.wait()
  for prefix in ("trainable.", ""):
    leaves, _ = checkpoints.read(3, prefix)
    np.testing.assert_array_equal(leaves["trainable.layers.w"], average["layers"]["w"])
    assert ("step" in leaves) == (prefix == "") and len([name for name in leaves if name.startswith("trainable.")]) == 2
  restored, _, _ = checkpoints.restore(3, state(0))
  np.testing.assert_array_equal(restored.trainable["layers"]["w"], saved.trainable["layers"]["w"])
