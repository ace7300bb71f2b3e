"""Hugging Face directories: read, written back to the bit, and every broken one refused with file and tensor named."""

import json
import os
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest

from jaxsft.convert import hf, load, merge, shards
from jaxsft.convert.source import open_source
from jaxsft.errors import UserError
from jaxsft.models import families
from jaxsft.models.config import ModelConfig
from jaxsft.transforms import tree

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def opened(directory):
  source = open_source(directory)
  return source, ModelConfig.from_hf(source.config)


def same_bits(a, b):
  return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, shard, config", [
    ("llama", "5GB", {}), ("llama", "100KB", {"tie_word_embeddings": True}), ("llama", "100KB", {"attention_bias": True, "mlp_bias": True}),
    ("llama", "5GB", {"head_dim": 32}), ("qwen2", "100KB", {}), ("qwen2", "5GB", {"tie_word_embeddings": True}),
])
def test_round_trip_is_bit_identical(hf_dir, state, tmp_path, dtype, kind, shard, config):
  """Lessons row 12: HF -> tree -> HF loses nothing, tied or not, single or sharded, in each dtype; transformers loads the result."""
  from transformers import AutoModelForCausalLM
  directory, model = hf_dir(kind, dtype, shard, **config)
  assert (directory / "model.safetensors.index.json").exists() == (shard == "100KB")
  source, cfg = opened(directory)
  params = load.load_params(source, cfg)
  assert {p: leaf.shape for p, leaf in tree.flatten(params)} == families.shapes(cfg)
  hf.write_hf(tmp_path / "out", cfg, merge.tree_leaves(params), dtype=dtype, max_shard_bytes=100_000 if shard == "100KB" else 1 << 40)
  assert (tmp_path / "out/model.safetensors.index.json").exists() == (shard == "100KB")
  assert shard == "5GB" or max(file.stat().st_size for file in (tmp_path / "out").glob("model-*.safetensors")) < 110_000
  back = open_source(tmp_path / "out")
  assert sorted(back.names()) == sorted(source.names()) and len(source.names()) > 20
  assert all(same_bits(back.read(name), source.read(name)) and source.read(name).dtype == DTYPES[dtype] for name in source.names())
  again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
  wanted, found = state(model), state(again)
  assert wanted.keys() == found.keys() and all(same_bits(wanted[k], found[k]) for k in wanted)


def test_orientation_and_layers(hf_dir, state):
  directory, model = hf_dir()
  params, theirs = load.load_params(*opened(directory)), state(model)
  for layer in range(3):
    for path, name in (("self_attn/k_proj", "self_attn.k_proj"), ("mlp/down_proj", "mlp.down_proj")):
      ours = tree.get(params, f"layers/{path}/kernel")[layer]
      np.testing.assert_array_equal(ours, theirs[f"model.layers.{layer}.{name}.weight"].T)
  np.testing.assert_array_equal(params["lm_head"]["kernel"], theirs["lm_head.weight"].T)
  np.testing.assert_array_equal(params["embed_tokens"]["embedding"], theirs["model.embed_tokens.weight"])


def test_stack_casts(hf_dir):
  params = load.load_params(*opened(hf_dir(dtype="bfloat16")[0]), load.stack(np.float32))
  assert {leaf.dtype for _, leaf in tree.flatten(params)} == {np.dtype(np.float32)}


def test_make_leaf_sees_one_layer_at_a_time(hf_dir):
  source, cfg = opened(hf_dir()[0])
  seen = {}

  def make_leaf(path, shape, layers, read):
    assert read(layers and 1).shape == shape
    seen[path] = (layers, *shape) if layers else shape
  load.load_params(source, cfg, make_leaf)
  assert seen == families.shapes(cfg)


@pytest.mark.parametrize("dtype, bound", [("bfloat16", 2 ** -8), ("float16", 2 ** -10)])
def test_export_rounds_to_nearest(hf_dir, tmp_path, dtype, bound):
  source, cfg = opened(hf_dir()[0])
  leaves = ((path, read) for path, _, _, read in load.leaf_reads(source, cfg))
  back = open_source(hf.write_hf(tmp_path / "out", cfg, leaves, dtype=dtype))
  for name in source.names():
    assert same_bits(back.read(name), source.read(name).astype(DTYPES[dtype]))
    np.testing.assert_allclose(back.read(name).astype(np.float32), source.read(name), rtol=bound, atol=1e-6)
  assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype


def test_float16_overflow_is_refused(hf_dir, tmp_path):
  source, cfg = opened(hf_dir()[0])
  leaves = [(path, lambda layer, read=read: np.float32(1e6) * read(layer)) for path, _, _, read in load.leaf_reads(source, cfg)]
  with pytest.raises(UserError, match="float16's range.*--dtype=bfloat16"):
    hf.write_hf(tmp_path / "out", cfg, leaves, dtype="float16")
  assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_generation_config_lists_every_end(hf_dir, tmp_path):
  """Lessons row 6: the end-of-turn that was trained, and the model's own, all stop generation."""
  source, cfg = opened(hf_dir(eos_token_id=2)[0])
  leaves = ((path, read) for path, _, _, read in load.leaf_reads(source, cfg))
  out = hf.write_hf(tmp_path / "out", cfg, leaves, generation_config={"temperature": 0.5, "eos_token_id": [2, 7]}, end_of_turn_ids=[9])
  found = json.loads((out / "generation_config.json").read_text())
  assert found["eos_token_id"] == [9, 2, 7] and found["temperature"] == 0.5
  from transformers import AutoModelForCausalLM
  assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == [9, 2, 7]


def test_the_output_is_all_or_nothing(hf_dir, tmp_path):
  source, cfg = opened(hf_dir()[0])
  leaves = [(path, read) for path, _, _, read in load.leaf_reads(source, cfg)]
  with pytest.raises(ValueError, match="were not written: model.layers.0.self_attn.q_proj.weight"):
    hf.write_hf(tmp_path / "out", cfg, [leaf for leaf in leaves if "q_proj" not in leaf[0]])
  assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
  (tmp_path / "out").mkdir(); (tmp_path / "out/mine.txt").write_text("keep")
  with pytest.raises(UserError, match="out is there already"):
    hf.write_hf(tmp_path / "out", cfg, leaves)
  assert (tmp_path / "out/mine.txt").read_text() == "keep"
  with pytest.raises(UserError, match="holds something that is no export"):
    hf.write_hf(tmp_path / "out", cfg, leaves, overwrite=True)
  (tmp_path / "out/config.json").write_text("{}")
  hf.write_hf(tmp_path / "out", cfg, leaves, overwrite=True)
  assert not (tmp_path / "out/mine.txt").exists() and not list(tmp_path.glob(".out*"))


def test_a_small_disk_is_refused_before_and_during(hf_dir, tmp_path, monkeypatch):
  """Lessons row 16."""
  import errno
  import shutil as real
  source, cfg = opened(hf_dir()[0])
  leaves = [(path, read) for path, _, _, read in load.leaf_reads(source, cfg)]
  usage = real.disk_usage(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="1,000 bytes free"):
      hf.write_hf(tmp_path / "out", cfg, leaves)

  def full(self, name, array):
    raise OSError(errno.ENOSPC, "No space left on device")
  monkeypatch.setattr(shards.ShardWriter, "write", full)
  with pytest.raises(UserError, match="disk of .*out is full"):
    hf.write_hf(tmp_path / "out", cfg, leaves)
  assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_identity_tells_other_weights_and_not_another_place(hf_dir, tmp_path):
  directory, model = hf_dir()
  first = open_source(directory).identity
  shutil.copytree(directory, tmp_path / "copy")
  second = open_source(tmp_path / "copy").identity
  assert first["sha256"] == second["sha256"] and first["path"] != second["path"]
  model.model.norm.weight.data += 0.5
  model.save_pretrained(tmp_path / "copy")
  assert open_source(tmp_path / "copy").identity["sha256"] != first["sha256"]


# ---- what is broken

def cut(file, keep):
  os.truncate(file, keep)


def edit_json(file, change):
  value = json.loads(file.read_text())
  change(value)
  file.write_text(json.dumps(value))


def edit_header(file, change):
  raw = file.read_bytes()
  length = struct.unpack("<Q", raw[:8])[0]
  header = json.loads(raw[8:8 + length])
  change(header)
  text = json.dumps(header).encode()
  file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length:])


def copy_key(old, new):
  return lambda value: value.update({new: value[old]})


BROKEN = {
    "truncated": (lambda d: cut(d / "model.safetensors", 300_000), ["model.safetensors", "ends at byte 300,000", "tensor"]),
    "cut inside the header": (lambda d: cut(d / "model.safetensors", 100), ["model.safetensors", "100 bytes", "announce a header"]),
    "empty file": (lambda d: cut(d / "model.safetensors", 0), ["model.safetensors", "0 bytes"]),
    "garbage": (lambda d: (d / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"not json at all!" * 40),
                ["header that is not safetensors"]),
    "zip in its place": (lambda d: (d / "model.safetensors").write_bytes(b"PK\3\4" * 1000), ["announce a header"]),
    "header is a list": (lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]"), ["header that is not safetensors"]),
    "wrong size in the header": (lambda d: edit_header(d / "model.safetensors", lambda h: h["model.norm.weight"].update(shape=[63])),
                                 ["model.norm.weight", "in 256 bytes"]),
    "missing tensor": (lambda d: edit_header(d / "model.safetensors", lambda h: h.pop("model.layers.1.mlp.up_proj.weight")),
                       ["lacks 1 of 30 tensors", "model.layers.1.mlp.up_proj.weight"]),
    "missing head": (lambda d: edit_header(d / "model.safetensors", lambda h: h.pop("lm_head.weight")),
                     ["lm_head.weight", "tie_word_embeddings"]),
    "extra tensor": (lambda d: edit_header(d / "model.safetensors",
                                           copy_key("model.norm.weight", "model.layers.0.self_attn.q_norm.weight")),
                     ["1 tensors are no part of this llama", "model.layers.0.self_attn.q_norm.weight"]),
    "wrong shape": (lambda d: edit_json(d / "config.json", lambda c: c.update(intermediate_size=161)),
                    ["model.safetensors", "mlp.gate_proj.weight", "(160, 64)", "(161, 64)", "intermediate_size"]),
    "wrong vocabulary": (lambda d: edit_json(d / "config.json", lambda c: c.update(vocab_size=97)),
                         ["embed_tokens", "(97, 64)", "vocab_size"]),
    "fewer layers": (lambda d: edit_json(d / "config.json", lambda c: c.update(num_hidden_layers=2)),
                     ["9 tensors", "layers.2", "2 layers"]),
    "more layers": (lambda d: edit_json(d / "config.json", lambda c: c.update(num_hidden_layers=4)), ["lacks 9 of 39", "layers.3"]),
    "no config": (lambda d: (d / "config.json").unlink(), ["no config.json", "model directory"]),
    "broken config": (lambda d: (d / "config.json").write_text("{"), ["config.json is no JSON"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["no weights", "model.safetensors.index.json"]),
    "pickles only": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), ["only pytorch_model.bin"]),
    "unknown dtype": (lambda d: edit_header(d / "model.safetensors", lambda h: h["lm_head.weight"].update(dtype="F8_E4M3")),
                      ["F8_E4M3", "BF16"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_named(hf_dir, case):
  directory = hf_dir()[0]
  breaking, words = BROKEN[case]
  breaking(directory)
  with pytest.raises(UserError) as error:
    load.load_params(*opened(directory))
  assert all(word in str(error.value) for word in words), str(error.value)
  assert "\n" not in str(error.value) and ("wanted" in str(error.value))


def test_a_broken_shard_is_named(hf_dir):
  directory = hf_dir(shard="100KB")[0]
  second = sorted(directory.glob("model-*.safetensors"))[1]
  raw = second.read_bytes()
  cut(second, len(raw) - 1)
  with pytest.raises(UserError, match=f"{second.name} ends at byte"):
    open_source(directory)
  second.unlink()
  with pytest.raises(UserError, match=f"lacks {second.name}, which model.safetensors.index.json names"):
    open_source(directory)
  second.write_bytes(raw)
  edit_json(directory / "model.safetensors.index.json", lambda i: i["weight_map"].update({"model.norm.weight": second.name}))
  with pytest.raises(UserError, match=f"{second.name} lacks tensor model.norm.weight"):
    open_source(directory)


def test_biases_that_the_config_does_not_know(hf_dir):
  directory = hf_dir(attention_bias=True)[0]
  edit_json(directory / "config.json", lambda c: c.update(attention_bias=False))
  with pytest.raises(UserError, match="12 tensors are no part of this llama.*attention_bias"):
    load.load_params(*opened(directory))


def test_a_tied_model_that_stores_its_head(hf_dir, state):
  """A stored copy is dropped; another head under a tied config would be lost: refused."""
  directory, model = hf_dir()
  edit_json(directory / "config.json", lambda c: c.update(tie_word_embeddings=True))
  with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight.*tie_word_embeddings"):
    load.load_params(*opened(directory))
  model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
  model.save_pretrained(directory)
  edit_json(directory / "config.json", lambda c: c.update(tie_word_embeddings=True))
  assert "lm_head" not in load.load_params(*opened(directory))


@pytest.mark.parametrize("path, words", [
    ("", ["no model is named"]), ("/no/such/place", ["/no/such/place does not exist", "model.path"]), ("./model", ["does not exist"]),
    ("model.gguf", ["does not exist"]), ("a/b/c", ["does not exist"]),
])
def test_a_path_that_is_nothing(path, words):
  with pytest.raises(UserError) as error:
    open_source(path)
  assert all(word in str(error.value) for word in words)


HUB = ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.model", "chat_template.jinja", "vocab.txt",
       "pytorch_model.bin", "training_args.bin", "x.pkl", "original/consolidated.00.pth", "consolidated.safetensors", "onnx/model.onnx",
       "onnx/model.safetensors", "README.md", "model.Q4_0.gguf", "flax_model.msgpack", "tf_model.h5", "modeling_odd.py"]


@pytest.fixture
def hub(monkeypatch):
  """hub(directory) -> the calls of snapshot_download so far, [(name, revision, files that its patterns let through)]."""
  import huggingface_hub
  asked = []

  def serve(directory):
    def snapshot(name, revision, allow_patterns, ignore_patterns):
      asked.append((name, revision, list(huggingface_hub.utils.filter_repo_objects(HUB, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))))
      return str(directory)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked
  return serve


@pytest.mark.parametrize("revision", ["", "v1.0"])
def test_a_hub_id_is_fetched_without_pickles_at_its_revision(hf_dir, hub, revision):
  """Small files first, then the weights of the commit that these came from, even if the branch has moved meanwhile; no code, no pickle, no other format."""
  directory = hf_dir()[0]
  asked = hub(directory)
  source = open_source("org/name", revision)
  small = ["config.json", "model.safetensors.index.json", "tokenizer.model", "chat_template.jinja", "vocab.txt"]
  assert [call[:2] for call in asked] == [("org/name", revision or None), ("org/name", directory.name)]
  assert asked[0][2] == small and sorted(asked[1][2]) == sorted([*small, "model-00001-of-00001.safetensors"])
  assert source.identity["path"] == "org/name" and source.identity["revision"] == directory.name


def test_the_config_names_the_revision(hf_dir, hub):
  """model.revision reaches the hub, and the identity that a run keeps opens the same commit again."""
  from configs import common
  from jaxsft import base as bases
  directory = hf_dir(vocab_size=259)[0]
  asked = hub(directory)
  c = common.lora(common.base())
  c.model.path, c.model.revision, c.data.tokenizer = "org/name", "v2", "bytes"
  identity = bases.open_base(c).source.identity
  assert asked[0][1] == "v2" and identity["revision"] == directory.name
  from jaxsft.convert import orbax
  orbax.open_base(identity, "run")
  assert asked[2][1] == directory.name


def test_what_is_not_supported_is_refused_before_its_weights_travel(hf_dir, hub):
  directory = hf_dir()[0]
  config = json.loads((directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
  asked = hub(directory)
  with pytest.raises(UserError, match="org/name/config.json has model_type 'mamba'"):
    open_source("org/name")
  assert len(asked) == 1 and not any(name.endswith(".safetensors") for name in asked[0][2])


def test_a_hub_that_gives_nothing_is_one_line(monkeypatch):
  """The real client, offline as every test is; and one that names a revision that is not there."""
  import huggingface_hub
  with pytest.raises(UserError, match="org/name at v9 is no directory here, and the hub did not give it .*model.path or model.revision") as error:
    open_source("org/name", "v9")
  assert "\n" not in str(error.value) and error.value.__cause__ is None

  def unknown(*args, **kwargs):
    raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the hub\nsecond line")
  monkeypatch.setattr(huggingface_hub, "snapshot_download", unknown)
  with pytest.raises(UserError, match="cannot reach the hub") as error:
    open_source("org/name")
  assert "second line" not in str(error.value)


def test_a_tokenizer_beyond_the_embedding(hf_dir, shared):
  cfg = opened(hf_dir()[0])[1]
  tokenizer = hf.load_tokenizer(shared / "data/tokenizers/qwen2.5")
  with pytest.raises(UserError, match="id 151664, .*embedding has 96 rows"):
    load.check_tokenizer(tokenizer, cfg)


def test_a_directory_without_tokenizer(hf_dir):
  with pytest.raises(UserError, match="has no tokenizer.*data.tokenizer"):
    open_source(hf_dir()[0]).tokenizer()


def test_a_broken_tokenizer(hf_dir):
  directory = hf_dir()[0]
  (directory / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match="the tokenizer .* does not load"):
    open_source(directory).tokenizer()
