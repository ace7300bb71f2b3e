"""Around the optimiser: the average that evaluation uses, spikes that move nothing, norms by layer. Each against numpy, and through the seam."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch

from configs import common
from jaxsft import metrics, optim, sharding, watch
from jaxsft.batch import split_micro_batches
from jaxsft.checkpoint import Checkpoints
from jaxsft.models import decoder
from jaxsft.step import TrainState, evaluated
from jaxsft.transforms import tree as trees

CFG = tiny.config(num_hidden_layers=3, hidden_size=32, intermediate_size=48, vocab_size=64)
OPTIM = {"model.dtype": "float32", "model.base_dtype": "float32", "model.remat": "none", "optim.schedule": "linear", "optim.warmup": 2.0, "optim.learning_rate": 5e-3}


@functools.cache
def built(over: tuple, devices=1):
  """(mesh, jitted step, state, frozen) of full fine-tuning with some keys of the config."""
  over = dict(over)
  norms = over.pop("log.layer_norms", False)
  c = tiny.settings(tiny.FULL, **OPTIM | over)
  mesh = sharding.make_mesh(common.ConfigDict(dict(data=1, fsdp=devices, tensor=1)), jax.devices()[:devices])
  policy, _ = tiny.make(c, CFG, mesh)
  method = tiny.registry.build(c, policy, lambda: optim.make_optimizer(c.optim, 20, norms))
  trainable, frozen, opt, aux = method.init(decoder.init_params(CFG, jax.random.key(0)), jax.random.key(1))
  state = sharding.place(TrainState(jnp.int32(0), trainable, opt, aux, jax.random.key_data(jax.random.key(2))), mesh)
  where = jax.tree.map(lambda x: x.sharding, state)
  return mesh, jax.jit(method.step, out_shardings=(where, sharding.replicated(mesh))), state, sharding.place(frozen, mesh)


def batch(number, bad=False):
  """Rows of few words; a bad batch has other words, whose loss is far higher once the few are learned."""
  rows = tiny.rows(8, 24, 4, seed=number)
  return split_micro_batches(rows | {"tokens": np.where(rows["tokens"] > 0, 60, 0).astype(np.int32)} if bad else rows, 1)


def walk(numbers, bad=(), devices=1, state=None, **over):
  """States and metrics after each step of the batches `numbers`."""
  mesh, step, start, frozen = built(tuple(sorted({key.replace("__", "."): value for key, value in over.items()}.items())), devices)
  state, states, history = state or start, [], []
  for number in numbers:
    state, values = step(state, frozen, sharding.place_batch(batch(number, number in bad), sharding.batch_sharding(mesh)))
    states.append(state)
    history.append(metrics.scalars(jax.device_get(values)))
  return states, history


def identical(one, other):
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), one, other)


# EMA

def test_the_average_is_torchs_and_evaluation_uses_it():
  """torch's AveragedModel over the very parameters of each step; theirs starts with the first parameters it is shown, ours with those of the start."""
  states, _ = walk(range(8), optim__ema=0.9)
  start = built((("optim.ema", 0.9),))[2]
  path = "layers/mlp/up_proj/kernel"
  module = torch.nn.Linear(1, 1)
  module.weight = torch.nn.Parameter(torch.tensor(np.asarray(trees.get(start.trainable, path))))
  averaged = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
  averaged.update_parameters(module)
  for state in states:
    module.weight.data = torch.tensor(np.asarray(trees.get(state.trainable, path)))
    averaged.update_parameters(module)
    np.testing.assert_allclose(trees.get(evaluated(state).trainable, path), averaged.module.weight.detach().numpy(), rtol=1e-6, atol=1e-7)
  assert np.abs(trees.get(states[-1].trainable, path) - trees.get(evaluated(states[-1]).trainable, path)).max() > 1e-3


def test_the_average_changes_nothing_of_the_training():
  with_ema, without = walk(range(4), optim__ema=0.9)[0][-1], walk(range(4))[0][-1]
  identical(with_ema.trainable, without.trainable)
  identical(with_ema.opt.inner, without.opt)
  assert evaluated(without) is not None and evaluated(without).trainable is without.trainable and not watch.averages(without.opt)


def test_bfloat16_parameters_are_averaged_before_they_are_rounded():
  """Updates far below half an ulp of bfloat16: the average moves by each of them."""
  tx = watch.ema(optax.sgd(1.0), 0.5)
  params = {"w": jnp.ones(4, jnp.bfloat16)}
  state = tx.init(params)
  assert state.ema["w"].dtype == jnp.float32
  _, state = tx.update({"w": jnp.full(4, -1e-4)}, state, params)
  np.testing.assert_allclose(state.ema["w"], 1 + 0.5e-4, rtol=1e-6)


# Spikes

SIGMA, WINDOW = 4.0, 6
SPIKES = {"optim__spike_sigma": SIGMA, "optim__spike_window": WINDOW}


def oracle(losses, norms, sigma=SIGMA, window=WINDOW):
  """[skipped] by the documented rule, in float64, without a ring."""
  kept, skipped = ([], []), []
  for pair in zip(losses, norms):
    tops = [np.inf, np.inf]
    if len(kept[0]) >= window:
      tops = [np.mean(values[-window:]) + sigma * max(np.std(values[-window:]), 1e-3 * abs(np.mean(values[-window:]))) for values in kept]
    skipped.append(float(any(value > top for value, top in zip(pair, tops))))
    for values, value, top in zip(kept, pair, tops):
      values.append(min(value, top))
  return skipped, kept


def spiky(losses, norms, sigma=SIGMA, window=WINDOW):
  """([skipped], state) of the transformation alone on these numbers."""
  tx = watch.skip_spikes(optax.sgd(1.0), sigma, window)
  w = {"w": jnp.zeros(1)}
  state, skipped = tx.init(w), []
  update = jax.jit(lambda state, loss, norm: tx.update(w, state, w, loss=loss, norm=norm)[1])
  for loss, norm in zip(losses, norms):
    state = update(state, jnp.float32(loss), jnp.float32(norm))
    skipped.append(float(state.skipped))
  return skipped, state


def test_the_rolling_bounds_are_numpys():
  rng = np.random.default_rng(0)
  losses, norms = 3 + rng.normal(size=60) * 0.1, 1 + rng.normal(size=60) * 0.2
  losses[[2, 20, 21]] += 5                          # the first while the window fills
  norms[[30, 45]] *= 10
  skipped, state = spiky(losses, norms)
  wanted, kept = oracle(losses, norms)
  assert skipped == wanted and {20, 21, 30, 45} <= set(np.flatnonzero(wanted)) and wanted[2] == 0.0 and sum(wanted) < 8
  np.testing.assert_allclose(np.sort(state.losses), np.sort(kept[0][-WINDOW:]), rtol=1e-5)
  np.testing.assert_allclose(np.sort(state.norms), np.sort(kept[1][-WINDOW:]), rtol=1e-5)
  assert int(state.recorded) == 60 and int(state.updates) == 60 - sum(wanted)


def test_a_level_that_stays_raised_is_accepted_after_some_steps():
  skipped, _ = spiky([1.0] * 10 + [8.0] * 60, [1.0] * 70, window=10)
  assert skipped[10] == 1.0 and skipped[-30:] == [0.0] * 30


def test_nan_is_no_spike():
  skipped, _ = spiky([1.0] * 8 + [np.nan], [1.0] * 9)
  assert skipped == [0.0] * 9


def test_a_bad_batch_moves_nothing_and_training_goes_on_to_the_bit():
  """Batch 9 is bad. The same run without it, whose statistics recorded its bounds by hand and whose step counted it, ends in the same bits."""
  states, history = walk(range(12), bad={9}, **SPIKES)
  assert [values["skipped"] for values in history] == [0.0] * 9 + [1.0, 0.0, 0.0]
  assert [values["updates"] for values in history[8:]] == [9.0, 9.0, 10.0, 11.0]
  before, after = states[8], states[9]
  identical(before.trainable, after.trainable)
  identical(before.opt.inner, after.opt.inner)
  assert int(after.step) == int(before.step) + 1
  tops = [watch.bound(values, SIGMA) for values in (before.opt.losses, before.opt.norms)]
  place = int(before.opt.recorded) % WINDOW
  values = [jnp.float32(history[9][name]) for name in ("loss", "grad_norm")]
  noted = before.opt._replace(losses=before.opt.losses.at[place].set(jnp.minimum(values[0], tops[0])), norms=before.opt.norms.at[place].set(jnp.minimum(values[1], tops[1])),
                              recorded=before.opt.recorded + 1, skipped=jnp.float32(1))
  resumed, later = walk([10, 11], state=before._replace(step=before.step + 1, opt=noted), **SPIKES)
  identical(resumed[-1].trainable, states[-1].trainable)
  identical(resumed[-1].opt.inner, states[-1].opt.inner)
  assert later == history[10:]


def test_without_a_spike_the_steps_are_those_without_the_rule():
  """To rounding: XLA fuses the two programs differently."""
  states, _ = walk(range(4), **SPIKES)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), states[-1].trainable, walk(range(4))[0][-1].trainable)


def test_a_skip_survives_a_checkpoint(tmp_path):
  states, history = walk(range(12), bad={9}, **SPIKES, optim__ema=0.9)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(8, states[7], {}, {})
  checkpoints.wait()
  resumed, later = walk(range(8, 12), bad={9}, state=checkpoints.restore(8, states[0])[0], **SPIKES, optim__ema=0.9)
  checkpoints.close()
  identical(resumed[-1], states[-1])
  assert later == history[8:] and later[1]["skipped"] == 1.0


# Norms by layer

def test_norms_by_layer_are_numpys():
  states, history = walk(range(2), log__layer_norms=True)
  found = {name: value for name, value in history[1].items() if name.startswith("layer_norms/")}
  for path, leaf in trees.flatten(states[0].trainable):
    matrices = enumerate(np.asarray(leaf)) if path.startswith("layers/") else [("", np.asarray(leaf))]
    for layer, matrix in matrices:
      name = f"{path}/{layer}" if layer != "" else path
      assert found.pop(f"layer_norms/parameter/{name}") == pytest.approx(np.linalg.norm(matrix), rel=1e-5)
      assert found[f"layer_norms/gradient/{name}"] > 0
  squares = sum(found.pop(name) ** 2 for name in list(found))
  assert squares == pytest.approx(history[1]["grad_norm"] ** 2, rel=1e-5) and not found
  assert not [name for name in walk(range(1))[1][0] if name.startswith("layer_norms")]
  identical(states[-1].trainable, walk(range(2))[0][-1].trainable)


def test_one_device_equals_eight():
  over = dict(SPIKES, optim__ema=0.9, log__layer_norms=True)
  (one, first), (eight, second) = walk(range(10), bad={9}, **over), walk(range(10), bad={9}, devices=8, **over)
  assert first[-1]["skipped"] == second[-1]["skipped"] == 1.0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), evaluated(one[-1]).trainable, evaluated(eight[-1]).trainable)
  for name, value in first[0].items():
    assert second[0][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
