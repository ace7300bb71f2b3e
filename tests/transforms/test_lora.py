"""LoRA against peft's Linear layer; dropout drawn by row; what its names and its merge promise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from jaxsft.errors import UserError
from jaxsft.kernels import draws
from jaxsft.kernels.dot import dot
from jaxsft.models import decoder
from jaxsft.models.config import ModelConfig
from jaxsft.transforms import lora, nf4
from jaxsft.transforms import tree as trees

CFG = ModelConfig(model_type="llama", vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=16)
ALL_LINEAR = r"(q|k|v|o|gate|up|down)_proj/kernel$"


def peft_linear(rank, alpha, rslora, inputs=24, outputs=40):
  """peft's LoRA over one torch Linear without bias, B random so that it counts; the layer and (kernel, a, b) in our orientation."""
  torch.manual_seed(0)
  model = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=False))
  model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=["0"]))
  layer = model.base_model.model[0]
  with torch.no_grad():
    layer.lora_B["default"].weight.normal_()
  ours = [tensor.weight.detach().numpy().T for tensor in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])]
  return layer, [jnp.asarray(array) for array in ours]


@pytest.mark.parametrize("rank, alpha, rslora", [(8, 16.0, False), (4, 3.0, False), (9, 16.0, True)])
def test_forward_and_gradients_equal_peft(rank, alpha, rslora):
  layer, (kernel, a, b) = peft_linear(rank, alpha, rslora)
  x = np.random.default_rng(0).normal(size=(2, 5, 24)).astype(np.float32)
  scale = lora.scaling(rank, alpha, rslora)
  assert scale == layer.scaling["default"]
  ours = lambda a, b: dot(jnp.asarray(x), lora.LoRAKernel(kernel, a, b, None, scale, 0.0))
  wanted = layer(torch.tensor(x))
  np.testing.assert_allclose(ours(a, b), wanted.detach().numpy(), rtol=1e-5, atol=1e-5)
  (wanted ** 2).sum().backward()
  da, db = jax.grad(lambda a, b: (ours(a, b) ** 2).sum(), (0, 1))(a, b)
  for gradient, theirs in ((da, layer.lora_A), (db, layer.lora_B)):
    np.testing.assert_allclose(gradient, theirs["default"].weight.grad.numpy().T, rtol=1e-4, atol=1e-2)


def test_adapters_start_as_pefts_do():
  """A uniform within peft's Kaiming bound and filling it, B zero, float32 over a bfloat16 base; every stacked layer and target drawn anew."""
  layer, _ = peft_linear(64, 1.0, False, inputs=64)
  layer.reset_lora_parameters("default", init_lora_weights=True)
  theirs = layer.lora_A["default"].weight.detach().numpy()
  adapters = dict(trees.flatten(lora.init_adapters(decoder.init_params(CFG, jax.random.key(0), "bfloat16"), ALL_LINEAR, 64, jax.random.key(1))))
  assert len(adapters) == 14 and {leaf.dtype for leaf in adapters.values()} == {jnp.dtype("float32")}
  for path, leaf in adapters.items():
    if path.endswith("/b"):
      np.testing.assert_array_equal(leaf, 0)
      continue
    bound = 1 / math.sqrt(leaf.shape[1])
    assert np.abs(leaf).max() <= bound and np.abs(leaf).max() > 0.999 * bound
    assert np.std(leaf) == pytest.approx(bound / math.sqrt(3), rel=0.02) and abs(np.mean(leaf)) < 0.02 * bound
  a = adapters["layers/self_attn/q_proj/kernel/a"]
  assert np.abs(theirs).max() <= 1 / 8 and np.std(theirs) == pytest.approx(float(np.std(a)), rel=0.03)
  assert len({np.asarray(x[layer]).tobytes() for path, x in adapters.items() if path.endswith("/a") for layer in range(3)}) == 21


def test_without_training_the_adapter_changes_nothing():
  kernel = jax.random.normal(jax.random.key(0), (2, 64, 32))
  adapters = lora.init_adapters({"q_proj": {"kernel": kernel}}, "q_proj", 4, jax.random.key(1))
  leaf = jax.tree.map(lambda x: x[1], lora.attach({"q_proj": {"kernel": kernel}}, adapters, 2.0))["q_proj"]["kernel"]
  x = jax.random.normal(jax.random.key(2), (3, 64))
  np.testing.assert_array_equal(dot(x, leaf), dot(x, kernel[1]))
  assert leaf.shape == (64, 32)


SEEDS_8 = draws.derive(draws.seed_of(jax.random.key(5))[None], jnp.arange(8))


def test_dropout_keeps_the_mean_and_its_rate():
  x = jnp.ones((8, 100, 200))
  dropped = np.asarray(lora.drop_rows(x, SEEDS_8, 0.2))
  kept = np.float32(1) / np.float32(0.8)
  assert set(np.unique(dropped)) == {np.float32(0), kept}
  deviation = math.sqrt(0.2 / 0.8 / dropped.size)                # of the mean of x / 0.8 kept with probability 0.8
  assert abs(dropped.mean() - 1) < 4 * deviation
  assert np.abs(dropped.mean((1, 2)) - 1).max() < 4 * deviation * math.sqrt(8)          # and in each row


def test_a_rows_dropout_does_not_depend_on_its_neighbours():
  x = jax.random.normal(jax.random.key(0), (8, 7, 6))
  whole = np.asarray(lora.drop_rows(x, SEEDS_8, 0.5))
  order = np.array([5, 2, 7])
  np.testing.assert_array_equal(lora.drop_rows(x[order], SEEDS_8[order], 0.5), whole[order])
  assert len({mask.tobytes() for mask in whole != 0}) == 8


def masks(step=0, layer_count=3):
  """The dropout masks that a step's seeds give to every layer of two targets, [layers of both, B, T x I]."""
  params = {"layers": {name: {"kernel": jnp.zeros((layer_count, 16, 16))} for name in ("q_proj", "k_proj")}}
  adapters = lora.init_adapters(params, "_proj/kernel$", 2, jax.random.key(0))
  seed = draws.seed_of(jax.random.fold_in(jax.random.key(3), step))
  attached = lora.attach(params, adapters, 1.0, 0.5, draws.derive(seed[None], jnp.arange(4)))
  seeds = [attached["layers"][name]["kernel"].row_seeds[layer] for name in ("q_proj", "k_proj") for layer in range(layer_count)]
  return np.stack([np.asarray(lora.drop_rows(jnp.ones((4, 10, 16)), seed_B, 0.5) > 0).reshape(4, -1) for seed_B in seeds])


def test_dropout_differs_between_layers_steps_targets_and_rows():
  first = np.concatenate([masks(0), masks(1)]).reshape(-1, 160)
  assert len({mask.tobytes() for mask in first}) == 2 * 2 * 3 * 4
  agreement = (first[:, None] == first[None]).mean(-1)[~np.eye(len(first), dtype=bool)]
  assert abs(agreement.mean() - 0.5) < 0.01 and np.abs(agreement - 0.5).max() < 5 * math.sqrt(0.25 / 160)       # as independent coins agree


def test_evaluation_and_rate_zero_drop_nothing():
  params = {"q_proj": {"kernel": jnp.zeros((16, 16))}}
  adapters = lora.init_adapters(params, "q_proj", 2, jax.random.key(0))
  assert lora.attach(params, adapters, 1.0, 0.5)["q_proj"]["kernel"].row_seeds is None
  assert lora.attach(params, adapters, 1.0, 0.0, SEEDS_8)["q_proj"]["kernel"].row_seeds is None
  assert lora.attach(params, adapters, 1.0, 0.5, SEEDS_8)["q_proj"]["kernel"].row_seeds.shape == (8, 2)


@pytest.mark.parametrize("targets, named", [(r"query_proj/kernel", "q_proj"), ("up_projj", "up_proj"), ("mlp/gate/kernel$", "gate_proj")])
def test_targets_that_match_nothing_name_the_nearest(targets, named):
  with pytest.raises(UserError, match=rf"lora\.targets=.*matches no parameter; wanted .*{named}.*; set lora\.targets"):
    lora.init_adapters(decoder.abstract_params(CFG), targets, 4, jax.random.key(0))


def test_the_output_projection_takes_no_adapter():
  found = {path for path, _ in trees.flatten(jax.eval_shape(lambda p: lora.init_adapters(p, "kernel$", 4, jax.random.key(0)), decoder.abstract_params(CFG)))}
  assert len(found) == 14 and not any("lm_head" in path for path in found)
  with pytest.raises(UserError, match=r"lora\.targets='lm_head' matches no parameter"):
    lora.init_adapters(decoder.abstract_params(CFG), "lm_head", 4, jax.random.key(0))


def test_targets_that_are_no_pattern_are_the_users_mistake():
  with pytest.raises(UserError, match=r"lora\.targets=.*is no regular expression"):
    lora.init_adapters(decoder.abstract_params(CFG), "(q_proj", 4, jax.random.key(0))


@pytest.mark.parametrize("quantised", [False, True])
def test_the_merged_kernel_equals_the_attached_adapter(quantised):
  keys = jax.random.split(jax.random.key(0), 4)
  kernel, a, b = (jax.random.normal(key, shape) / 8 for key, shape in zip(keys, ((64, 48), (64, 4), (4, 48))))
  x = jax.random.normal(keys[3], (7, 64))
  base = nf4.quantise(kernel) if quantised else kernel
  merged = lora.merge(nf4.dequantise(base) if quantised else kernel, a, b, 1.5)
  assert merged.dtype == jnp.float32
  np.testing.assert_allclose(dot(x, merged), dot(x, lora.LoRAKernel(base, a, b, None, 1.5, 0.0)), rtol=1e-5, atol=1e-5)
