"""Adapters as `peft` knows them: its own loader, its own merge, its own files, both ways."""

import copy
import json

import numpy as np
import pytest

from jaxsft.convert import hf, load, merge, peft
from jaxsft.convert.source import open_source
from jaxsft.errors import UserError
from jaxsft.models import families
from jaxsft.models.config import ModelConfig
from jaxsft.transforms import lora, tree

ALL = [f"layers/self_attn/{x}_proj/kernel" for x in "qkvo"] + [f"layers/mlp/{x}_proj/kernel" for x in ("gate", "up", "down")]


def random_adapters(cfg, paths, rank=4):
  """Random A and B, the same in each run."""
  rng, shapes = np.random.default_rng(1), families.shapes(cfg)
  leaves = {}
  for path in paths:
    *stack, inputs, outputs = shapes[path]
    leaves[f"{path}/a"] = rng.standard_normal((*stack, inputs, rank)).astype(np.float32) * 0.1
    leaves[f"{path}/b"] = rng.standard_normal((*stack, rank, outputs)).astype(np.float32) * 0.1
  return tree.unflatten(leaves)


@pytest.fixture
def base(hf_dir):
  directory, model = hf_dir()
  source = open_source(directory)
  return source, ModelConfig.from_hf(source.config), model


def logits(model):
  import torch
  with torch.no_grad():
    return model(torch.arange(20)[None] * 3 % 96).logits.numpy()


@pytest.mark.parametrize("paths", [ALL, ALL[:2], ["layers/mlp/down_proj/kernel", "lm_head/kernel"]])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_it_and_every_matrix_is_in_its_place(base, tmp_path, paths, rslora):
  import torch
  from peft import PeftModel
  source, cfg, model = base
  adapters = random_adapters(cfg, paths)
  before, merged = logits(model), copy.deepcopy(model)
  out = peft.write_peft(tmp_path / "adapter", adapters, cfg, rank=4, alpha=16.0, dropout=0.1, rslora=rslora, base=source.identity)
  theirs = PeftModel.from_pretrained(model, out)
  scale, seen = lora.scaling(4, 16.0, rslora), 0
  for name, module in theirs.named_modules():
    if hasattr(module, "lora_A"):
      seen += 1
      assert module.scaling["default"] == pytest.approx(scale)
      hf_name = name.removeprefix("base_model.model.") + ".weight"
      path, layer = next((n.path, i) for n in families.leaves(cfg) for i in range(3) if n.hf.format(layer=i) == hf_name)
      a, b = (tree.get(adapters, f"{path}/{k}") for k in "ab")
      a, b = (a[layer], b[layer]) if path.startswith("layers") else (a, b)
      np.testing.assert_array_equal(module.lora_A["default"].weight.detach().numpy(), a.T)
      np.testing.assert_array_equal(module.lora_B["default"].weight.detach().numpy(), b.T)
      merged.get_parameter(hf_name).data += torch.from_numpy((scale * a @ b).T.copy())
  assert seen == sum(3 if p.startswith("layers") else 1 for p in paths)
  after = logits(theirs)  # what it computes is W + scale A B, and not W: the two differ by far more than float32's error
  error, effect = (float(np.abs(after - other).max()) for other in (logits(merged), before))
  assert error < 1e-6 and effect > 1000 * error


def test_the_merged_export_is_what_peft_merges(base, tmp_path):
  from peft import PeftModel
  from transformers import AutoModelForCausalLM
  source, cfg, model = base
  adapters = random_adapters(cfg, ALL)
  peft.write_peft(tmp_path / "adapter", adapters, cfg, rank=4, alpha=16.0)
  leaves = merge.merged(((path, read) for path, _, _, read in load.leaf_reads(source, cfg)), adapters, lora.scaling(4, 16.0))
  hf.write_hf(tmp_path / "merged", cfg, leaves, dtype="float32")
  attached = PeftModel.from_pretrained(model, tmp_path / "adapter")
  unmerged = logits(attached)
  theirs = attached.merge_and_unload().state_dict()
  ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
  for name, tensor in ours.state_dict().items():
    np.testing.assert_allclose(tensor.numpy(), theirs[name].numpy(), atol=1e-6, err_msg=name)
  assert np.abs(logits(ours) - unmerged).max() < 1e-4


def test_what_we_write_we_read(base, tmp_path):
  source, cfg, _ = base
  adapters = random_adapters(cfg, [*ALL[3:5], "lm_head/kernel"])
  peft.write_peft(tmp_path / "adapter", adapters, cfg, rank=4, alpha=3.0, dropout=0.25, rslora=True, base=source.identity,
                  nf4={"targets": "q_proj", "double_quant": True}, end_of_turn_ids=[7])
  back, settings = peft.read_peft(tmp_path / "adapter", cfg)
  assert settings == {"rank": 4, "alpha": 3.0, "dropout": 0.25, "rslora": True, "base": source.identity,
                      "nf4": {"targets": "q_proj", "double_quant": True}, "end_of_turn_ids": [7]}
  wanted, found = dict(tree.flatten(adapters)), dict(tree.flatten(back))
  assert wanted.keys() == found.keys()
  for path in wanted:
    np.testing.assert_array_equal(wanted[path], found[path])


def test_what_peft_writes_we_read(base, tmp_path):
  import torch
  from peft import LoraConfig, get_peft_model
  source, cfg, model = base
  theirs = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
  with torch.no_grad():
    for name, parameter in theirs.named_parameters():
      if "lora" in name:
        parameter.copy_(torch.randn(parameter.shape))
  theirs.save_pretrained(tmp_path / "theirs")
  adapters, settings = peft.read_peft(tmp_path / "theirs", cfg)
  assert sorted(lora.kernel_paths(adapters)) == ["layers/mlp/down_proj/kernel", "layers/self_attn/q_proj/kernel"]
  assert (settings["rank"], settings["alpha"], settings["rslora"]) == (4, 8.0, False)
  module = theirs.base_model.model.model.layers[2].mlp.down_proj
  ours = adapters["layers"]["mlp"]["down_proj"]["kernel"]["b"][2]
  np.testing.assert_array_equal(ours, module.lora_B["default"].weight.detach().numpy().T)


@pytest.fixture
def adapter(base, tmp_path):
  cfg = base[1]
  return peft.write_peft(tmp_path / "adapter", random_adapters(cfg, ALL[:1]), cfg, rank=4, alpha=8.0), cfg


@pytest.mark.parametrize("change, words", [
    ({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "bias all"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"r": 8}, "lora_A.weight has shape \\(4, 64\\); wanted shape \\(8, 64\\)"), ({"r": None}, "r None"),
])
def test_other_adapters_are_refused(adapter, change, words):
  directory, cfg = adapter
  config = json.loads((directory / "adapter_config.json").read_text())
  (directory / "adapter_config.json").write_text(json.dumps(config | change))
  with pytest.raises(UserError, match=words):
    peft.read_peft(directory, cfg)


def test_an_adapter_of_another_model_is_refused(adapter):
  directory, cfg = adapter
  deeper = ModelConfig.from_hf(cfg.to_hf() | {"num_hidden_layers": 4})
  with pytest.raises(UserError, match="layers.3.self_attn.q_proj.lora_A.weight is missing"):
    peft.read_peft(directory, deeper)
  shallower = ModelConfig.from_hf(cfg.to_hf() | {"num_hidden_layers": 2})
  with pytest.raises(UserError, match="layers.2.self_attn.q_proj.lora_A.weight, which is no LoRA matrix"):
    peft.read_peft(directory, shallower)
  (directory / "adapter_model.safetensors").unlink()
  with pytest.raises(UserError, match="no adapter_model.safetensors"):
    peft.read_peft(directory, cfg)


def test_a_merge_loses_no_adapter(base):
  source, cfg, _ = base
  leaves = [(path, read) for path, _, _, read in load.leaf_reads(source, cfg)]
  with pytest.raises(UserError, match="'layers/self_attn/q_proj/kernel' and the base has not"):
    list(merge.merged([leaf for leaf in leaves if "q_proj" not in leaf[0]], random_adapters(cfg, ALL), 1.0))
  wider = ModelConfig.from_hf(cfg.to_hf() | {"hidden_size": 128, "head_dim": 16})
  with pytest.raises(UserError, match="for a kernel \\(128, 64\\), the base has \\(64, 64\\)"):
    dict(merge.merged(leaves, random_adapters(wider, ALL[:1]), 1.0))["layers/self_attn/q_proj/kernel"](0)


def test_nf4_leaves_are_exported_dequantised(base, tmp_path):
  from jaxsft.transforms import nf4
  source, cfg, _ = base
  params = load.load_params(source, cfg)
  kernel = params["layers"]["self_attn"]["q_proj"]["kernel"]
  import jax
  quantised = [nf4.quantise(layer) for layer in kernel]
  params["layers"]["self_attn"]["q_proj"]["kernel"] = jax.tree.map(lambda *xs: np.stack(xs), *quantised)
  adapters = random_adapters(cfg, ALL[:1])
  hf.write_hf(tmp_path / "out", cfg, merge.merged(merge.tree_leaves(params), adapters, 2.0), dtype="float32")
  back = open_source(tmp_path / "out")
  for layer in range(3):
    pair = {k: adapters["layers"]["self_attn"]["q_proj"]["kernel"][k][layer] for k in "ab"}
    wanted = np.asarray(nf4.dequantise(quantised[layer])) + 2.0 * pair["a"] @ pair["b"]
    np.testing.assert_allclose(back.read(f"model.layers.{layer}.self_attn.q_proj.weight"), wanted.T, atol=1e-5)
  np.testing.assert_array_equal(back.read("model.norm.weight"), source.read("model.norm.weight"))
