"""bitsandbytes' own 4-bit checkpoints, saved by transformers: read to the bit, computed as it computes, refused where they are something else."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import runs
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from jaxsft import base as bases
from jaxsft import sharding
from jaxsft.convert import load
from jaxsft.convert.__main__ import main
from jaxsft.convert.source import open_source
from jaxsft.errors import UserError
from jaxsft.models import decoder, families
from jaxsft.models.config import ModelConfig
from jaxsft.transforms import nf4
from jaxsft.transforms import tree as trees

ALL_LINEAR = r"(q|k|v|o|gate|up|down)_proj/kernel$"
SIZES = dict(vocab_size=96, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
KERNEL = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """saved(double, dtype, ...) -> (directory, the quantised torch model), each made once."""
  made = {}

  def make(double=True, dtype="float32", vocab_size=96, **over):
    import torch
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
    key = (double, dtype, vocab_size, *sorted((name, str(value)) for name, value in over.items()))
    if key in made:
      return made[key]
    root = tmp_path_factory.mktemp("bnb")
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": vocab_size}, initializer_range=0.1))
    plain.save_pretrained(root / "plain")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.float32,
                                   **{"bnb_4bit_quant_type": "nf4"} | over)
    model = LlamaForCausalLM.from_pretrained(root / "plain", quantization_config=quantised, dtype=getattr(torch, dtype))
    model.save_pretrained(root / "nf4")
    made[key] = root / "nf4", model
    return made[key]
  return make


def settings(targets=ALL_LINEAR, double=True, dtype="float32"):
  return ConfigDict(dict(seed=0, model=dict(base_dtype=dtype), nf4=dict(targets=targets, double_quant=double)))


def loaded(directory, c, devices=1, **mesh):
  """(cfg, parameter tree on a mesh) as a run loads it."""
  source = open_source(directory)
  cfg = ModelConfig.from_hf(source.config)
  where = sharding.make_mesh(ConfigDict(dict(data=1, fsdp=1, tensor=1) | mesh), jax.devices()[:devices])
  return cfg, bases.load(c, bases.Base(cfg, source, None), where)


def kernels(cfg, tree):
  """(HF name, layer, stacked leaf) of every projection."""
  for name in families.leaves(cfg):
    if name.path.endswith("_proj/kernel"):
      for layer in range(cfg.num_hidden_layers):
        yield name.hf.format(layer=layer), layer, trees.get(tree, name.path)


def module_of(model, name):
  return model.get_submodule(name.removesuffix(".weight"))


def dequantised(model, name):
  """bitsandbytes' own values [out, in], float32."""
  import bitsandbytes.functional as functional
  weight = module_of(model, name).weight
  return functional.dequantize_4bit(weight.data, weight.quant_state).float().numpy()


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("double", [False, True])
def test_codes_and_scales_are_the_files_own_to_the_bit(saved, double, mesh):
  """Against the tensors that bitsandbytes holds in memory, through a run's own load, on one device and on four; no leaf is quantised anew."""
  directory, model = saved(double)
  cfg, tree = loaded(directory, settings(double=double), int(np.prod(list(mesh.values()) or [1])), **mesh)
  seen = 0
  for name, layer, leaf in kernels(cfg, tree):
    weight, (outs, ins) = module_of(model, name).weight, open_source(directory).shape(name)
    packed = weight.data.numpy().reshape(-1)
    one = jax.tree.map(lambda x, layer=layer: x[layer], leaf)
    np.testing.assert_array_equal(one.codes, np.stack([packed >> 4, packed & 15], -1).reshape(outs, ins).T)
    np.testing.assert_array_equal(one.scales, weight.quant_state.absmax.numpy().reshape(outs, ins // 64).T)
    if double:
      np.testing.assert_array_equal(one.absmax2, weight.quant_state.state2.absmax.numpy())
      assert np.asarray(one.offset) == weight.quant_state.offset.numpy() and one.absmax2.size == -(-outs * ins // 64 // 256)
    else:
      assert one.absmax2 is None and one.offset is None
    np.testing.assert_array_equal(nf4.dequantise(one), dequantised(model, name).T)
    seen += 1
  assert seen == 21 and isinstance(tree["lm_head"]["kernel"], jax.Array)


def test_several_blocks_of_scales_keep_their_order(saved):
  """A kernel with more than 256 scales in two blocks, the second a part: an order by columns would swap them."""
  directory, _ = saved(True)
  source = open_source(directory)
  held = load_file(directory / "model.safetensors")
  assert held[f"{KERNEL}.nested_absmax"].shape == (2,) and held[f"{KERNEL}.absmax"].shape == (384,)
  w = source.read_nf4(KERNEL)
  flat = nf4.DYNAMIC8[held[f"{KERNEL}.absmax"]] * np.repeat(held[f"{KERNEL}.nested_absmax"], 256)[:384] + np.asarray(w.offset)
  np.testing.assert_array_equal(nf4.absmax(w), flat.reshape(128, 3).T)


@pytest.mark.parametrize("storage, dtype", [("uint8", "float32"), ("uint8", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float32")])
def test_plain_reading_gives_bitsandbytes_values(saved, storage, dtype):
  """Whatever type carries the bytes (FSDP stores bfloat16), and rounded to the model's dtype as bitsandbytes rounds."""
  import torch
  directory, model = saved(True, dtype, **({"bnb_4bit_quant_storage": getattr(torch, storage)} if storage != "uint8" else {}))
  source = open_source(directory)
  assert sorted(source.names()) == sorted(name for name, _ in model.named_parameters())
  for name in source.nf4:
    found = source.read(name)
    assert found.dtype == np.float32 and found.shape == source.shape(name)
    rounded = found.astype({"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]).astype(np.float32)
    np.testing.assert_array_equal(rounded, dequantised(model, name), err_msg=name)
  assert len(source.nf4) == 21 and set(source.nf4.values()) == {True}


def dense(model):
  """The torch model with bitsandbytes' own values where it holds codes (its 4-bit products on a CPU are bfloat16's, and repack the weights)."""
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM
  values = {name: torch.tensor(dequantised(model, name)) if parameter.dtype == torch.uint8 else parameter for name, parameter in model.named_parameters()}
  plain = LlamaForCausalLM(LlamaConfig(**SIZES))
  plain.load_state_dict(values)
  return plain.eval()


def logits(cfg, params):
  tokens = jnp.arange(20)[None] * 3 % 96
  batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.arange(20)[None]}
  return np.asarray(decoder.logits(cfg, params, decoder.make_forward(cfg)(params, batch)[0], precision="highest"))


@pytest.mark.parametrize("targets", [ALL_LINEAR, "", "down_proj/kernel$"])
@pytest.mark.parametrize("double", [False, True])
def test_logits_equal_bitsandbytes(saved, double, targets):
  """The model on the stored codes, on dequantised kernels and on some of each, against transformers on dequantised weights."""
  import torch
  directory, model = saved(double)
  with torch.no_grad():
    theirs = dense(model)(torch.arange(20)[None] * 3 % 96).logits[0].numpy()
  cfg, tree = loaded(directory, settings(targets, double))
  with jax.default_matmul_precision("highest"):
    ours = logits(cfg, tree)
  assert np.abs(theirs).max() > 1
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_what_is_not_named_is_dequantised_with_a_note(saved, capsys):
  directory, model = saved(True)
  _, tree = loaded(directory, settings(""))
  assert "21 weights" in (said := capsys.readouterr().err) and "are dequantised" in said
  assert not any(isinstance(leaf, nf4.NF4Array) for _, leaf in trees.flatten(tree))
  np.testing.assert_array_equal(tree["layers"]["mlp"]["down_proj"]["kernel"][1], dequantised(model, KERNEL).T)
  _, tree = loaded(directory, settings("(q|k)_proj/kernel"))
  assert "15 weights" in capsys.readouterr().err
  assert {path for path, leaf in trees.flatten(tree) if isinstance(leaf, nf4.NF4Array)} == {f"layers/self_attn/{x}_proj/kernel" for x in "qk"}
  loaded(directory, settings())
  assert capsys.readouterr().err == ""


def test_the_files_double_quantisation_wins_and_is_said(saved, capsys):
  _, tree = loaded(saved(False)[0], settings(double=True))
  assert "without double quantisation" in capsys.readouterr().err
  assert tree["layers"]["mlp"]["down_proj"]["kernel"].absmax2 is None


def test_skipped_modules(saved, capsys):
  """llm_int8_skip_modules leaves whole modules, or one layer's, in 16 bits: read as they are, and quantised here only where nf4.targets says so."""
  directory, model = saved(False, llm_int8_skip_modules=["lm_head", "o_proj", "model.layers.2.mlp"])
  source = open_source(directory)
  cfg = ModelConfig.from_hf(source.config)
  assert len(source.nf4) == 21 - 3 - 3 and "model.layers.2.mlp.up_proj.weight" not in source.nf4
  np.testing.assert_array_equal(source.read("model.layers.0.self_attn.o_proj.weight"), module_of(model, "model.layers.0.self_attn.o_proj.weight").weight.detach())
  cfg, tree = loaded(directory, settings("(q|k|v|gate|up|down)_proj/kernel", double=True))
  assert "3 weights" in (said := capsys.readouterr().err) and "are quantised" in said
  up, o = tree["layers"]["mlp"]["up_proj"]["kernel"], tree["layers"]["self_attn"]["o_proj"]["kernel"]
  plain = source.read("model.layers.2.mlp.up_proj.weight").T
  own = nf4.quantise(jnp.asarray(plain), double_quant=False)          # as the other layers are, not as the config asks
  np.testing.assert_array_equal(up.codes[2], own.codes)
  np.testing.assert_array_equal(up.codes[1], source.read_nf4("model.layers.1.mlp.up_proj.weight").codes)
  np.testing.assert_array_equal(o[0], source.read("model.layers.0.self_attn.o_proj.weight").T)


def test_an_export_is_plain(saved, tmp_path, capsys):
  """python -m jaxsft.convert drops quantization_config, and transformers loads what it wrote with the very values."""
  from transformers import AutoModelForCausalLM
  directory, model = saved(True)
  assert main([str(directory), str(tmp_path / "out"), "--dtype=float32"]) == 0
  assert "21 weights" in capsys.readouterr().err
  config = json.loads((tmp_path / "out/config.json").read_text())
  assert "quantization_config" not in config and config["dtype"] == "float32"
  theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  assert not hasattr(theirs, "hf_quantizer")
  np.testing.assert_array_equal(module_of(theirs, KERNEL).weight.detach().numpy(), dequantised(model, KERNEL))


def test_a_merge_adds_to_the_stored_codes(saved, tmp_path):
  """A merge of a QLoRA run over such a base: what the codes stand for plus the adapter; nothing is quantised a second time on the way."""
  from jaxsft.convert import adapter as adapters
  from jaxsft.convert import orbax
  directory, model = saved(True)
  source = open_source(directory)
  cfg = ModelConfig.from_hf(source.config)
  a, b = np.full((3, 192, 2), 0.01, np.float32), np.full((3, 2, 128), 0.02, np.float32)
  tree = {"layers": {"mlp": {"down_proj": {"kernel": {"a": a, "b": b}}}}}
  lora = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "rslora": False}
  quantised = {"targets": ALL_LINEAR, "double_quant": True}
  meta = orbax.run_meta(cfg, source, lora=lora, nf4=quantised)
  assert "quantization_config" not in meta["model"]
  trained = adapters.Adapter(tmp_path, tree, cfg, source.identity, "", lora, quantised, meta)
  for weights in ("nf4", "original"):
    read = dict(trained.merged_leaves(weights))
    np.testing.assert_allclose(read["layers/mlp/down_proj/kernel"](1), dequantised(model, KERNEL).T + 2 * a[1] @ b[1], rtol=0, atol=1e-7)
    np.testing.assert_array_equal(read["layers/mlp/up_proj/kernel"](1), dequantised(model, KERNEL.replace("down", "up")).T)


def test_a_qlora_run_on_such_a_file_and_its_merge(saved, tmp_path, capsys):
  """Through the binaries: two steps on the stored codes, then one merged directory: what they stand for plus what was learned."""
  from jaxsft.convert.adapter import open_adapter
  directory, model = saved(False, vocab_size=320)
  data = runs.write_records(tmp_path / "train.jsonl", range(64)).parent
  runs.write_records(tmp_path / "eval.jsonl", range(64, 80))
  code, said = runs.run(runs.flags(data, tmp_path / "run", model__path=directory, steps=2, nf4__double_quant="false", data__tokenizer="bytes"))
  assert code == 0, said
  assert "note:" not in said
  assert main([str(tmp_path / "run"), str(tmp_path / "merged"), "--merge", "--dtype=float32", "--json"]) == 0
  drift = json.loads(capsys.readouterr().out.splitlines()[-1])["drift"]
  trained = open_adapter(tmp_path / "run")
  pair = trained.adapters["layers"]["mlp"]["down_proj"]["kernel"]
  learned = trained.scale * pair["a"][1] @ pair["b"][1]
  assert np.abs(learned).max() > 1e-4 and drift["max_abs"] < 1e-3
  merged = open_source(tmp_path / "merged")
  assert not merged.nf4
  np.testing.assert_allclose(merged.read(KERNEL), dequantised(model, KERNEL) + learned.T, rtol=0, atol=1e-6)


def test_identity_tells_other_codes(saved, tmp_path):
  directory, _ = saved(True)
  shutil.copytree(directory, tmp_path / "other")
  assert open_source(tmp_path / "other").identity["sha256"] == open_source(directory).identity["sha256"]
  change(tmp_path / "other", lambda held: held[KERNEL].__iadd__(1))
  assert open_source(tmp_path / "other").identity["sha256"] != open_source(directory).identity["sha256"]


def change(directory, edit):
  """`edit` applied to the dict of all tensors of a copy."""
  held = load_file(directory / "model.safetensors")
  edit(held)
  save_file(held, directory / "model.safetensors", {"format": "pt"})


def restate(**over):
  """An edit that changes the JSON object of one weight."""
  def edit(held):
    key = f"{KERNEL}.quant_state.bitsandbytes__nf4"
    held[key] = np.frombuffer(json.dumps(json.loads(held[key].tobytes()) | over).encode(), np.uint8)
  return edit


@pytest.mark.parametrize("edit, words", [
    (restate(blocksize=128), ["down_proj.weight has blocksize 128", "wanted 64"]),
    (restate(nested_blocksize=512), ["has nested_blocksize 512", "wanted 256"]),
    (restate(shape=[128, 256]), ["weight has 12288 bytes", "16384"]),
    (restate(quant_type="fp4"), ["quant_type 'fp4'", "nf4"]),
    (lambda held: held.pop(f"{KERNEL}.nested_quant_map"), ["lacks its nested_quant_map"]),
    (lambda held: held.pop(f"{KERNEL}.absmax"), ["lacks its absmax"]),
    (lambda held: held.pop(KERNEL), [f"has no {KERNEL}"]),
    (lambda held: held[f"{KERNEL}.quant_map"].__isub__(0.1), ["quant_map of its own"]),
    (lambda held: held.update({f"{KERNEL}.quant_state.bitsandbytes__nf4": np.zeros(5, np.uint8)}), ["no quantisation state"]),
])
def test_what_does_not_fit_is_named(saved, tmp_path, edit, words):
  shutil.copytree(saved(True)[0], tmp_path / "odd")
  change(tmp_path / "odd", edit)
  with pytest.raises(UserError) as error:
    open_source(tmp_path / "odd")
  assert "model.safetensors" in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


def test_fp4_is_refused_twice(saved):
  """By the config before a tensor is looked at, and by the tensors where a config does not say."""
  directory, _ = saved(False, bnb_4bit_quant_type="fp4")
  with pytest.raises(UserError, match=r"down_proj.weight is quantised as fp4; wanted nf4.*nf4\.targets"):
    open_source(directory)
  with pytest.raises(UserError, match="bitsandbytes fp4"):
    ModelConfig.from_hf(json.loads((directory / "config.json").read_text()))


def test_blocks_over_row_ends_are_dequantised_or_refused(tmp_path):
  """96 inputs: bitsandbytes' blocks of 64 run on into the next row. Values come out; codes as they lie have no place in an NF4Array."""
  import bitsandbytes.functional as functional
  import torch

  from jaxsft.convert import bitsandbytes as reader
  from jaxsft.convert import shards
  weight = torch.randn(33, 96, generator=torch.Generator().manual_seed(0))
  packed, state = functional.quantize_4bit(weight.reshape(-1), quant_type="nf4", blocksize=64, compress_statistics=True)
  wanted = functional.dequantize_4bit(packed, state).reshape(33, 96).numpy()          # flat: 0.50.2 takes wrong scales for such rows on a CPU
  state.shape = weight.shape
  parts = {f"x.weight.{name}": value.numpy() for name, value in state.as_dict(packed=True).items()}
  save_file({"x.weight": packed.numpy()} | parts, tmp_path / "odd.safetensors")
  found, names = reader.find(shards.read_header(tmp_path / "odd.safetensors"))
  assert names == set(parts)
  np.testing.assert_array_equal(reader.dequantised(found["x.weight"]), wanted)
  with pytest.raises(UserError, match=r"blocks run over row ends; wanted inputs that are a multiple of 64; set nf4\.targets without it"):
    reader.stored(found["x.weight"])


def test_reads_of_other_files_quantise_here():
  kernel = np.random.default_rng(0).standard_normal((128, 64)).astype(np.float32)
  read = load.Read(lambda layer: kernel)
  for double in (False, True):
    jax.tree.map(np.testing.assert_array_equal, read.as_nf4(None, double), nf4.quantise(jnp.asarray(kernel), double))
