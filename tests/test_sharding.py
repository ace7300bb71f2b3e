"""Every leaf of every tree has a rule; what does not fit is refused; every mesh computes what one device computes."""

import functools
import re

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxsft import base, optim, sharding
from jaxsft.errors import UserError
from jaxsft.models import decoder
from jaxsft.step import TrainState
from jaxsft.transforms import tree as trees

FAMILIES = {
    "llama": tiny.config(),
    "llama_tied": tiny.config(tie_word_embeddings=True),
    "llama_biases": tiny.config(attention_bias=True, attention_out_bias=True, mlp_bias=True),
    "qwen2": tiny.config(model_type="qwen2", attention_bias=True),
}


def mesh_of(data=1, fsdp=1, tensor=1, devices=None):
  count = data * fsdp * tensor
  return sharding.make_mesh(ConfigDict(dict(data=data, fsdp=fsdp, tensor=tensor)), devices or jax.devices()[:count])


def all_trees():
  """(name, tree as shapes) of everything a run places: parameters, adapters, NF4, optimiser state, bfloat16 training state."""
  for family, cfg in FAMILIES.items():
    for mode in tiny.MODES:
      yield f"{family} {mode}", tiny.abstract_state(tiny.settings(mode), cfg)
  for name in optim.OPTIMIZERS:
    for mode in (tiny.FULL, tiny.LORA):
      yield f"{name} {mode}", tiny.abstract_state(tiny.settings(mode, **{"optim.name": name, "optim.ema": 0.9 * (name != "schedule_free")}), tiny.config(hidden_size=128))
  yield "bfloat16 state", tiny.abstract_state(tiny.settings(tiny.FULL, **{"optim.state": "bfloat16_stochastic"}), FAMILIES["llama"])


def test_the_rules_cover_every_leaf_of_every_tree_and_no_rule_is_dead():
  mesh, used = mesh_of(fsdp=8), set()
  for name, tree in all_trees():
    sharding.shardings(tree, mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      text = jax.tree_util.keystr(path, simple=True, separator="/")
      rule = next((regex for regex, _ in sharding.RULES if re.search(regex, text)), None)
      used.add(rule)
      assert rule or len(leaf.shape) < 2, (name, text)
      if leaf.size >= 512:          # lesson 18: kernels, adapters, moments and codes are split, never whole on each device
        held = jax.sharding.NamedSharding(mesh, sharding.spec(text, leaf.shape, mesh)).shard_shape(leaf.shape)
        assert np.prod(held) * 8 == leaf.size, (name, text)
  assert used - {None} == {regex for regex, _ in sharding.RULES}


def test_moments_lie_where_their_parameters_lie():
  mesh = mesh_of(data=2, fsdp=2, tensor=2)
  for mode in tiny.MODES:
    state, _ = tiny.abstract_state(tiny.settings(mode), FAMILIES["llama"])
    where = sharding.shardings(state, mesh)
    for moments in ("mu", "nu"):
      assert getattr(where.opt[1][0], moments) == where.trainable


@pytest.mark.parametrize("path, shape, wanted", [
    ("layers/self_attn/q_proj/kernel", (2, 64, 64), P(None, "fsdp", "tensor")),
    ("layers/self_attn/o_proj/kernel", (2, 64, 64), P(None, "tensor", "fsdp")),
    ("layers/mlp/down_proj/kernel/codes", (2, 64, 64), P(None, "tensor", "fsdp")),
    ("layers/mlp/up_proj/kernel/scales", (2, 1, 64), P(None, None, "tensor")),              # one block of inputs does not divide
    ("opt/1/0/mu/layers/mlp/up_proj/kernel/b", (2, 4, 64), P(None, None, ("fsdp", "tensor"))),
    ("trainable/layers/mlp/up_proj/kernel/a", (2, 66, 4), P(None, "fsdp", None)),           # 66 divides by two, not by four
    ("layers/mlp/up_proj/kernel", (64, 64), P("fsdp", "tensor")),                           # one layer alone
    ("layers/self_attn/q_proj/kernel", (2, 63, 64), P(None, None, "tensor")),
    ("layers/mlp/up_proj/kernel/offset", (), P()), ("rng", (2,), P()), ("step", (), P())])
def test_the_spec_of_a_leaf(path, shape, wanted):
  assert sharding.spec(path, shape, mesh_of(data=2, fsdp=2, tensor=2)) == wanted


def test_an_uncovered_leaf_raises():
  with pytest.raises(UserError, match=r"no sharding rule covers 'layers/router/weight' \(2, 8, 4\); wanted a rule in jaxsft/sharding.py"):
    sharding.shardings({"layers": {"router": {"weight": np.zeros((2, 8, 4))}}}, mesh_of(fsdp=2))


@pytest.mark.parametrize("sizes", [dict(data=3), dict(data=16), dict(data=2, fsdp=2), dict(data=-1, fsdp=3), dict(data=-1, fsdp=-1), dict(data=0)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
  sizes = dict(data=1, fsdp=1, tensor=1) | sizes
  words = " ".join(f"{axis}={size}" for axis, size in sizes.items())
  with pytest.raises(UserError, match=rf"mesh {words} does not fit 8 devices; wanted a product equal.*; set mesh\.data, mesh\.fsdp, mesh\.tensor"):
    sharding.make_mesh(ConfigDict(sizes))


def test_minus_one_is_what_is_left():
  assert dict(sharding.make_mesh(ConfigDict(dict(data=-1, fsdp=2, tensor=2))).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert sharding.row_shards(sharding.make_mesh(ConfigDict(dict(data=2, fsdp=-1, tensor=2)))) == 4


@pytest.mark.parametrize("batch, micro, ok", [(8, 1, True), (16, 2, True), (6, 1, False), (8, 2, False), (4, 1, False)])
def test_a_batch_that_does_not_divide_is_refused(batch, micro, ok):
  c = ConfigDict(dict(batch_size=batch, micro_batches=micro))
  if ok:
    return sharding.check_batch(c, mesh_of(data=4, fsdp=2))
  with pytest.raises(UserError, match=rf"batch_size {batch} does not divide into {micro} micro-batches over 8 devices; wanted a multiple of {8 * micro}; set batch_size"):
    sharding.check_batch(c, mesh_of(data=4, fsdp=2))


@pytest.mark.parametrize("mode", tiny.MODES)
def test_fsdp_over_eight_devices_holds_an_eighth_each(mode):
  cfg = tiny.config(hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8, head_dim=64)
  c = tiny.settings(mode)
  _, method = tiny.make(c, cfg)
  trainable, frozen, opt, _ = method.init(tiny.quantise(c, decoder.init_params(cfg, jax.random.key(0))), jax.random.key(1))
  for tree in filter(jax.tree.leaves, (trainable, frozen, opt)):
    whole, part = (sharding.bytes_a_device(sharding.place(tree, mesh)) for mesh in (mesh_of(), mesh_of(fsdp=8)))
    assert whole / 8 <= part < whole * 0.13           # what is not split: norms (3 x 512), NF4's second absmax, the count of steps


def test_four_bit_codes_count_half_a_byte():
  codes = jax.device_put(np.zeros((64, 8), jax.numpy.uint4), jax.devices()[0])
  assert sharding.bytes_a_device({"codes": codes}) == 256


def test_a_loaded_base_lies_where_the_rules_say():
  """Stacks are filled layer by layer inside jit: their sharding must survive it, NF4's fields too."""
  for mode in (tiny.FULL, tiny.QLORA):
    c, mesh = tiny.settings(mode), mesh_of(fsdp=4, tensor=2)
    params = base.load(c, base.Base(FAMILIES["qwen2"], None, None), mesh)
    jax.tree.map(lambda leaf, wanted: leaf.sharding.is_equivalent_to(wanted, leaf.ndim) or pytest.fail(f"{leaf.sharding} is not {wanted}"),
                 params, sharding.shardings(params, mesh))


CFG = tiny.config(attention_bias=True)
MESHES = {"data=8": dict(data=8), "fsdp=8": dict(fsdp=8), "2x2x2": dict(data=2, fsdp=2, tensor=2)}


@functools.cache
def value_and_gradient(mode, mesh_name, codes=None):
  """(loss of each row, gradient) of the mode on a mesh, with what is trained and frozen placed by the rules; adapters' B is not zero."""
  mesh = mesh_of(**MESHES[mesh_name]) if mesh_name else mesh_of()
  c = tiny.settings(mode, **{"model.dtype": "float32", "model.base_dtype": "float32"})
  policy, method = tiny.make(c, CFG, mesh)
  params = jax.tree.map(lambda x: x + 0.01, decoder.init_params(CFG, jax.random.key(0)))
  trainable, frozen, _, _ = method.init(tiny.quantise(c, params, codes), jax.random.key(1))
  trainable = jax.tree.map(lambda x: x + 0.01, trainable)
  batch = sharding.place_batch(tiny.rows(), sharding.batch_sharding(mesh, micro_batched=False))

  def loss(trainable, frozen, batch):
    nll_BT, weights_BT = policy.token_nll(trainable, frozen, batch)
    return (nll_BT * weights_BT).sum(), (nll_BT * weights_BT).sum(-1)
  (_, loss_B), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(sharding.place(trainable, mesh), sharding.place(frozen, mesh), batch)
  return np.asarray(loss_B), jax.tree.map(np.asarray, gradient)


def assert_same(one, many):
  np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
  for (path, theirs), (_, ours) in zip(trees.flatten(one[1]), trees.flatten(many[1])):
    assert np.linalg.norm(theirs) > 0, path
    assert np.linalg.norm(ours - theirs) <= 2e-6 * np.linalg.norm(theirs) + 1e-6, path


@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("mode", tiny.MODES)
def test_loss_and_gradient_are_the_same_on_every_mesh(mode, mesh_name):
  assert_same(value_and_gradient(mode, ""), value_and_gradient(mode, mesh_name))


def test_four_bit_codes_on_a_mesh_give_what_bytes_give_on_one_device():
  assert_same(value_and_gradient(tiny.QLORA, ""), value_and_gradient(tiny.QLORA, "2x2x2", "uint4"))


def test_a_step_on_a_mesh_leaves_every_leaf_in_its_place():
  mesh, c = mesh_of(data=2, fsdp=2, tensor=2), tiny.settings(tiny.QLORA)
  _, method = tiny.make(c, CFG, mesh)
  trainable, frozen, opt, aux = method.init(tiny.quantise(c, decoder.init_params(CFG, jax.random.key(0))), jax.random.key(1))
  state = sharding.place(TrainState(jax.numpy.int32(0), trainable, opt, aux, jax.random.key_data(jax.random.key(0))), mesh)
  where = jax.tree.map(lambda x: x.sharding, state)
  step = jax.jit(method.step, donate_argnums=0, out_shardings=(where, sharding.replicated(mesh)))
  batch = sharding.place_batch({name: value[None] for name, value in tiny.rows().items()}, sharding.batch_sharding(mesh))
  after, metrics = step(state, sharding.place(frozen, mesh), batch)
  assert jax.tree.map(lambda x: x.sharding, after) == where and np.isfinite(float(metrics["loss"]))
