"""Each optimiser by name: some steps against an oracle that is not ours, each layer by itself; then through the seam: falls, splits over devices, resumes."""

import functools

import bitsandbytes
import bitsandbytes.backends.cpu.ops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers

from configs import common
from jaxsft import adamw8bit, optim, sharding
from jaxsft.batch import split_micro_batches
from jaxsft.checkpoint import Checkpoints
from jaxsft.models import decoder
from jaxsft.step import TrainState, evaluated
from jaxsft.transforms import tree as trees

NAMES = [name for name in optim.OPTIMIZERS if name != "adamw"]          # which tests/test_optim.py and test_trajectory.py hold against torch
RATE, DECAY, STEPS = 0.02, 0.1, 10
L = 3
SHAPES = {"embed_tokens/embedding": (130, 132), "layers/self_attn/q_proj/kernel": (L, 132, 140), "layers/self_attn/q_proj/bias": (L, 140),
          "layers/mlp/up_proj/kernel": (L, 5, 3), "layers/mlp/down_proj/kernel/a": (L, 20, 4), "layers/mlp/down_proj/kernel/b": (L, 4, 9),
          "layers/input_layernorm/scale": (L, 132), "lm_head/kernel": (132, 130)}


def settings(name, **over):
  c = common.base().optim
  c.update(dict(name=name, learning_rate=RATE, schedule="constant", warmup=0.0, weight_decay=DECAY, clip_norm=0.0) | over)
  return c


def problem():
  """(parameters, gradients of STEPS steps) by path, float32; the layers of a stack have gradients of unlike sizes."""
  rng = np.random.default_rng(0)
  sizes = lambda shape: 10.0 ** -np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
  one = lambda path, shape: rng.normal(size=shape) * (sizes(shape) if path.startswith("layers") else 1)
  return ({path: one(path, shape).astype(np.float32) for path, shape in SHAPES.items()},
          [{path: (one(path, shape) * scale).astype(np.float32) for path, shape in SHAPES.items()} for scale in rng.choice([0.1, 1, 4], STEPS)])


def ours(c, params, gradients):
  """The parameters by path after each step."""
  tx = optim.make_optimizer(c, STEPS)
  tree = trees.unflatten({path: jnp.asarray(leaf) for path, leaf in params.items()})
  state = tx.init(tree)

  @jax.jit
  def step(tree, state, gradient):
    updates, state = tx.update(gradient, state, tree)
    return optim.apply_updates(tree, updates, jax.random.key(0)), state
  for gradient in gradients:
    tree, state = step(tree, state, trees.unflatten({path: jnp.asarray(leaf) for path, leaf in gradient.items()}))
    yield {path: np.asarray(leaf) for path, leaf in trees.flatten(tree)}


def layers(path, leaf):
  """The matrices or vectors that `leaf` stands for."""
  return list(leaf) if path.startswith("layers/") else [leaf]


def decay_of(path):
  return 0.0 if any(word in path for word in ("bias", "norm")) else DECAY


def assert_steps_equal(c, oracle, rtol, atol):
  """Parameters after each step against `oracle(path, one matrix, its gradients) -> [the matrix after each step]`."""
  params, gradients = problem()
  steps = list(ours(c, params, gradients))
  for path in SHAPES:
    for layer, start in enumerate(layers(path, params[path])):
      wanted = oracle(path, start, [layers(path, gradient[path])[layer] for gradient in gradients])
      for number, theirs in enumerate(wanted):
        got = layers(path, steps[number][path])[layer]
        np.testing.assert_allclose(got, theirs, rtol=rtol, atol=atol, err_msg=f"{path} layer {layer} step {number + 1}")
        assert np.abs(theirs - start).max() > 10 * atol


def adafactor(path, start, gradients):
  """transformers.Adafactor at a fixed rate. What is smaller than 128 it would factor too: given flat, it keeps every element's moment, as we do."""
  shape = start.shape if min(start.shape) >= 128 else (-1,)
  p = torch.nn.Parameter(torch.tensor(start).reshape(shape))
  optimiser = transformers.Adafactor([p], lr=RATE, scale_parameter=False, relative_step=False, warmup_init=False, weight_decay=decay_of(path))
  for gradient in gradients:
    p.grad = torch.tensor(gradient).reshape(shape)
    optimiser.step()
    yield p.detach().numpy().reshape(start.shape).copy()


def test_adafactor_is_transformers_layer_by_layer():
  assert_steps_equal(settings("adafactor"), adafactor, rtol=2e-5, atol=2e-6)


def test_adafactor_keeps_a_row_and_a_column_a_layer():
  tx = optim.make_optimizer(settings("adafactor"), STEPS)
  state = jax.eval_shape(tx.init, trees.unflatten({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in SHAPES.items()}))
  sizes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
  found = lambda kind, path: next(shape for name, shape in sizes.items() if f"/{kind}/{path}" in name)
  assert sorted(found(kind, "layers/self_attn/q_proj/kernel") for kind in ("v_row", "v_col")) == [(L, 132), (L, 140)]
  assert found("v", "layers/self_attn/q_proj/kernel") == (L, 1) and found("v", "layers/mlp/up_proj/kernel") == (L, 5, 3)


def lion(path, start, gradients, b1=0.9, b2=0.99):
  """arXiv 2302.06675, algorithm 2, in float64."""
  p, m = start.astype(np.float64), 0.0
  for g in gradients:
    update = np.sign(b1 * m + (1 - b1) * g)
    p = p - RATE * (update + decay_of(path) * p)
    m = b2 * m + (1 - b2) * g
    yield p


def test_lion_is_the_papers():
  assert_steps_equal(settings("lion", b2=0.99), lion, rtol=1e-5, atol=2e-6)


def newton_schulz(x):
  """Five quintic steps of github.com/KellerJordan/Muon, wide side last, in float64."""
  turned = x.shape[0] > x.shape[1]
  x = x.T if turned else x
  x = x / (np.linalg.norm(x) + 1e-8)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x.T if turned else x


def muon(path, start, gradients, b=0.95, b2=0.999):
  """Muon with Nesterov's momentum (both terms without their bias, as optax has it), updates of RMS 0.2; AdamW on what is no matrix; in float64."""
  p, m, v = start.astype(np.float64), 0.0, 0.0
  for t, g in enumerate(gradients, 1):
    m = b * m + (1 - b) * g
    v = b2 * v + (1 - b2) * g.astype(np.float64) ** 2
    if "kernel" in path and "lm_head" not in path:
      update = 0.2 * np.sqrt(max(p.shape)) * newton_schulz(b * m / (1 - b ** (t + 1)) + (1 - b) * g / (1 - b ** t))
    else:
      update = m / (1 - b ** t) / (np.sqrt(v / (1 - b2 ** t)) + 1e-8)
    p = p - RATE * (update + decay_of(path) * p)
    yield p


def test_muon_orthogonalises_each_layer_by_itself_and_adamw_has_the_rest():
  assert_steps_equal(settings("muon", b1=0.95), muon, rtol=2e-4, atol=2e-5)


def test_the_first_step_of_muon_is_torchs():
  """torch.optim.Muon orthogonalises in bfloat16 and keeps the bias of its momentum, which the first step does not feel.

  Five steps magnify bfloat16's 0.4 %: 3.4 % of the update at worst here.
  """
  params, gradients = problem()
  first = next(ours(settings("muon", b1=0.95, weight_decay=0.0), params, gradients))
  for path in ("layers/self_attn/q_proj/kernel", "layers/mlp/up_proj/kernel", "layers/mlp/down_proj/kernel/a"):
    for start, gradient, got in zip(params[path], gradients[0][path], first[path]):
      p = torch.nn.Parameter(torch.tensor(start))
      p.grad = torch.tensor(gradient)
      torch.optim.Muon([p], lr=RATE, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw").step()
      moved = p.detach().numpy() - start
      assert np.linalg.norm(got - start - moved) < 0.06 * np.linalg.norm(moved), path


# AdamW in 8 bits, against bitsandbytes

@pytest.mark.parametrize("signed", [True, False])
def test_the_codes_stand_for_bitsandbytes_values(signed):
  theirs, values = bitsandbytes.functional.create_dynamic_map(signed=signed).numpy(), adamw8bit.dynamic_map(signed)
  assert values.shape == (256,) and (np.diff(values) > 0).all() and values[-1] == 1.0 and 0.0 in values
  np.testing.assert_array_max_ulp(values, theirs, maxulp=2)


def nearest_codes(x, code, blocksize=256):
  """(codes, absmax) by comparing with every value: bitsandbytes' GPU kernels. Its CPU one snaps to a grid first, coarser than the small codes."""
  blocks = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % blocksize)).reshape(-1, blocksize)
  absmax = blocks.abs().amax(1)
  distance = (blocks / absmax.clamp(min=1e-38)[:, None])[..., None].double() - code.double()
  return distance.abs().argmin(-1).to(torch.uint8).flatten()[:x.numel()].reshape(x.shape), absmax


@pytest.mark.parametrize("shape, absmax", [((3, 40, 512), (3, 40, 2)), ((3, 40, 130), (3, 1, 21)), ((3, 4100), (3, 17)), ((64, 256), (64, 1))])
@pytest.mark.parametrize("signed", [True, False])
def test_the_codes_are_the_nearest_of_bitsandbytes_map_layer_by_layer(signed, shape, absmax):
  x = np.random.default_rng(1).normal(size=shape).astype(np.float32) * 1e-3
  x = x if signed else x * x
  stacked = int(shape[0] == 3)
  ours = adamw8bit.quantise(jnp.asarray(x), signed, stacked)
  assert ours.codes.dtype == jnp.uint8 and ours.codes.shape == shape and ours.absmax.shape == absmax
  code = bitsandbytes.functional.create_dynamic_map(signed=signed)
  for layer, codes, tops, back in zip(x if stacked else [x], *(np.asarray(y) if stacked else [np.asarray(y)] for y in (ours.codes, ours.absmax, adamw8bit.dequantise(ours, stacked)))):
    theirs, theirs_absmax = nearest_codes(torch.tensor(layer), code)
    np.testing.assert_array_equal(tops.ravel(), theirs_absmax)
    differ = codes.astype(int) - theirs.numpy().astype(int)
    assert (differ != 0).mean() < 1e-3 and np.abs(differ).max() <= 1                  # their map's last place moves a few midpoints
    wanted = bitsandbytes.functional.dequantize_blockwise(torch.tensor(codes), absmax=theirs_absmax, code=code, blocksize=256)
    np.testing.assert_allclose(back, wanted, rtol=1e-6)


def eight_bit_problem():
  """Leaves that are worth codes in both layouts, one that is not (4,095 elements), and the embedding, which keeps float32."""
  rng = np.random.default_rng(2)
  shapes = {"layers/self_attn/q_proj/kernel": (2, 20, 256), "layers/mlp/up_proj/kernel": (2, 50, 90), "layers/mlp/down_proj/kernel": (2, 45, 91), "lm_head/kernel": (24, 512),
            "embed_tokens/embedding": (32, 256)}
  return ({path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()},
          [{path: (rng.normal(size=shape) * 0.01).astype(np.float32) for path, shape in shapes.items()} for _ in range(STEPS)])


def test_ten_steps_are_bitsandbytes_adamw8bit(monkeypatch):
  """bitsandbytes.optim.AdamW8bit on the CPU, a parameter a layer, with its rounding to codes replaced by the nearest code, as its GPU kernels have it."""
  def quantise(x, code, absmax, out, blocksize):
    codes, tops = nearest_codes(x, code, blocksize)
    out.copy_(codes)
    absmax.copy_(tops)
  monkeypatch.setattr(bitsandbytes.backends.cpu.ops, "_quant_blockwise_fp32_direct", quantise)
  params, gradients = eight_bit_problem()
  steps = list(ours(settings("adamw8bit", b2=0.99), params, gradients))
  plain = list(ours(settings("adamw", b2=0.99), params, gradients))
  for path in params:
    for layer, start in enumerate(layers(path, params[path])):
      p = torch.nn.Parameter(torch.tensor(start))
      kind = bitsandbytes.optim.AdamW if path.startswith("embed") else bitsandbytes.optim.AdamW8bit       # as transformers' Trainer sets it up
      optimiser = kind([p], lr=RATE, betas=(0.9, 0.99), eps=1e-8, weight_decay=DECAY)
      for number, gradient in enumerate(gradients):
        p.grad = torch.tensor(layers(path, gradient[path])[layer])
        optimiser.step()
        got, moved = layers(path, steps[number][path])[layer], p.detach().numpy() - start
        assert np.linalg.norm(got - p.detach().numpy()) < 2e-3 * np.linalg.norm(moved), (path, layer, number)
      exact = layers(path, plain[-1][path])[layer]
      away = np.linalg.norm(layers(path, steps[-1][path])[layer] - exact) / np.linalg.norm(exact - start)
      coded = start.size >= 4096 and not path.startswith("embed")
      assert (optimiser.state[p]["state1"].dtype == torch.uint8) == coded
      assert (1e-3 < away < 0.05) if coded else away < 1e-5, (path, away)              # what 8 bits cost; and what is small costs nothing


def test_eight_bits_take_a_quarter():
  bytes_of = lambda name: sum(leaf.nbytes for leaf in jax.tree.leaves(optim.make_optimizer(settings(name), STEPS).init({"lm_head": {"kernel": jnp.zeros((256, 1024))}})))
  assert bytes_of("adamw8bit") < 0.26 * bytes_of("adamw")


def schedule_free(path, start, gradients, warm=3, b=0.9, b2=0.999):
  """arXiv 2405.15682, algorithm 1 (AdamW), in float64: (y, x) after each step."""
  x = y = z = start.astype(np.float64)
  v = weights = 0.0
  for t, g in enumerate(gradients, 1):
    rate = RATE * min(1.0, t / (warm + 1))
    v = b2 * v + (1 - b2) * g.astype(np.float64) ** 2
    z = z - rate * (g / (np.sqrt(v / (1 - b2 ** t)) + 1e-8) + decay_of(path) * y)
    weights += rate ** 2                                                            # the rate only rises: it is its own maximum
    x = x + (z - x) * rate ** 2 / weights
    y = b * x + (1 - b) * z
    yield y, x


def test_schedule_free_is_the_papers_and_evaluation_uses_its_average():
  c = settings("schedule_free", warmup=3.0)
  assert_steps_equal(c, lambda *args: (y for y, _ in schedule_free(*args)), rtol=1e-5, atol=4e-6)
  params, gradients = problem()
  tree = lambda leaves: trees.unflatten({path: jnp.asarray(leaf) for path, leaf in leaves.items()})
  tx, now = optim.make_optimizer(c, STEPS), tree(params)
  state = tx.init(now)
  for gradient in gradients:
    updates, state = jax.jit(tx.update)(tree(gradient), state, now)
    now = optim.apply_updates(now, updates, jax.random.key(0))
  average = evaluated(TrainState(jnp.int32(0), now, state, (), jax.random.key(0))).trainable
  for path, leaf in trees.flatten(average):
    for layer, start in enumerate(layers(path, params[path])):
      y, x = list(schedule_free(path, start, [layers(path, gradient[path])[layer] for gradient in gradients]))[-1]
      np.testing.assert_allclose(layers(path, np.asarray(leaf))[layer], x, rtol=1e-5, atol=1e-5)
      assert np.abs(x - y).max() > 1e-3


# Through the seam

CFG = tiny.config(hidden_size=128, intermediate_size=160, vocab_size=136)         # wide enough for factored moments and for codes
RATES = {"adafactor": 3e-3, "lion": 1e-3, "muon": 3e-3, "adamw8bit": 3e-3, "schedule_free": 1e-2}
MODES = {"full": tiny.FULL, "lora": tiny.LORA}


@functools.cache
def built(name, mode, devices):
  """(mesh, method, jitted step, jitted evaluate, state, frozen)."""
  c = tiny.settings(MODES[mode], **{"model.dtype": "float32", "model.base_dtype": "float32", "model.remat": "none", "optim.name": name, "optim.schedule": "constant",
                                    "optim.warmup": 2.0, "optim.learning_rate": RATES[name] * (1 if mode == "full" else 3)})
  mesh = sharding.make_mesh(common.ConfigDict(dict(data=1, fsdp=devices, tensor=1)), jax.devices()[:devices])
  _, method = tiny.make(c, CFG, mesh)
  trainable, frozen, opt, aux = method.init(decoder.init_params(CFG, jax.random.key(0)), jax.random.key(1))
  state = sharding.place(TrainState(jnp.int32(0), trainable, opt, aux, jax.random.key_data(jax.random.key(2))), mesh)
  where = jax.tree.map(lambda x: x.sharding, state)
  step = jax.jit(method.step, donate_argnums=0, out_shardings=(where, sharding.replicated(mesh)))
  return mesh, step, jax.jit(lambda state, frozen, batch: method.evaluate(evaluated(state), frozen, batch)), state, sharding.place(frozen, mesh)


def run(name, mode, steps, devices=1, restored=None):
  """(state, losses, mean evaluation loss of the first batch)."""
  mesh, step, evaluate, state, frozen = built(name, mode, devices)
  state, losses = restored or jax.tree.map(lambda x: x.copy(), state), []
  first = int(state.step)
  for number in range(first, first + steps):
    batch = split_micro_batches(tiny.rows(8, 24, 136, seed=number % 2), 1)
    state, metrics = step(state, frozen, sharding.place_batch(batch, sharding.batch_sharding(mesh)))
    losses.append(float(metrics["loss"]))
  value, count = evaluate(state, frozen, sharding.place_batch(tiny.rows(8, 24, 136, seed=0), sharding.batch_sharding(mesh, micro_batched=False)))["loss"]
  return state, losses, float(value) / float(count)


each = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize("name, mode", [*((name, "full") for name in NAMES), ("muon", "lora")])
def test_the_loss_falls(name, mode):
  _, losses, after = run(name, mode, 20)
  assert after < 0.9 * losses[0] and losses[-1] < 0.95 * losses[0]


@each
def test_one_device_equals_eight(name):
  start = jax.tree.map(np.asarray, built(name, "full", 1)[3].trainable)
  (one, losses, after), (eight, losses_8, after_8) = run(name, "full", 3), run(name, "full", 3, devices=8)
  np.testing.assert_allclose(losses_8 + [after_8], losses + [after], rtol=1e-4)
  for (path, a), (_, b), (_, begin) in zip(*(trees.flatten(tree) for tree in (one.trainable, eight.trainable, start))):
    moved = np.linalg.norm(a - begin)
    # a sign turns where a mean of gradients is within rounding of 0, and an 8-bit code where a moment lies between two
    assert moved > 0 and np.linalg.norm(np.asarray(b) - a) < (0.05 if name in ("lion", "adamw8bit") else 2e-3) * moved, path


@each
def test_resumed_is_to_the_bit(name, tmp_path):
  straight, half = run(name, "full", 4)[0], run(name, "full", 2)[0]
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(2, half, {}, {})
  checkpoints.wait()
  resumed = run(name, "full", 2, restored=checkpoints.restore(2, built(name, "full", 1)[3])[0])[0]
  checkpoints.close()
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), resumed, straight)
