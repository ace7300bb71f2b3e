"""GGUF files: each type read as gguf dequantises it, q and k back in Hugging Face's order, what is odd refused."""

import os

import numpy as np
import pytest

from jaxsft.convert import gguf, load
from jaxsft.convert.source import open_source
from jaxsft.errors import UserError
from jaxsft.models.config import ModelConfig

KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied, bias", [(False, False), (True, False), (False, True)])
def test_every_type_reads_as_gguf_dequantises_it(gguf_file, kind, tied, bias):
  path, expected = gguf_file(kind, tied, bias)
  source = open_source(path)
  assert sorted(source.names()) == sorted(expected)
  for name, array in expected.items():
    found = source.read(name)
    assert found.shape == source.shape(name) == array.shape
    np.testing.assert_array_equal(found.astype(np.float32), array, err_msg=name)
  assert source.read("model.layers.0.mlp.up_proj.weight").dtype == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")


@pytest.mark.parametrize("tied", [True, False])
def test_the_config_and_the_tree(gguf_file, tied):
  path, expected = gguf_file("Q8_0", tied, theta=5e5)
  source = open_source(path)
  cfg = ModelConfig.from_hf(source.config)
  assert (cfg.vocab_size, cfg.hidden_size, cfg.num_hidden_layers, cfg.num_attention_heads, cfg.num_key_value_heads) == (96, 64, 2, 4, 2)
  assert (cfg.head_dim, cfg.intermediate_size, cfg.tie_word_embeddings, cfg.rope_theta) == (16, 128, tied, 5e5)
  assert cfg.rms_norm_eps == 1e-5 and cfg.max_position_embeddings == 512
  params = load.load_params(source, cfg)
  np.testing.assert_array_equal(params["layers"]["self_attn"]["k_proj"]["kernel"][1], expected["model.layers.1.self_attn.k_proj.weight"].T)


def test_the_same_weights_as_transformers(gguf_file):
  """transformers un-permutes on its own: equal weights tensor by tensor."""
  from transformers import AutoModelForCausalLM, GgufConfig
  path, _ = gguf_file("Q4_1")
  dense = GgufConfig(dequantize=True)
  theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, quantization_config=dense).state_dict()
  source = open_source(path)
  assert set(theirs) == set(source.names())
  for name in source.names():
    np.testing.assert_array_equal(source.read(name), theirs[name].float().numpy(), err_msg=name)


def test_rope_scaling(gguf_file):
  source = open_source(gguf_file(scaling=4.0)[0])
  assert ModelConfig.from_hf(source.config).rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_told_from_its_factors(gguf_file, factor):
  """Llama 3.x GGUFs keep only the factors; transformers' own formula makes them here."""
  from transformers import LlamaConfig
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
  settings = dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
  config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=16384, rope_parameters=settings | {"rope_theta": 5e5})
  scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
  factors = 1 / 5e5 ** (np.arange(0, 16, 2) / 16) / scaled
  assert factors[0] == 1 and abs(factors[-1] - factor) < 1e-4 and any(1.01 < f < factor - 0.01 for f in factors)
  source = open_source(gguf_file(rope_factors=factors, theta=5e5)[0])
  found = ModelConfig.from_hf(source.config).rope_parameters
  assert found == settings | {"rope_theta": 5e5, "factor": pytest.approx(factor, rel=1e-5)}
  with pytest.raises(UserError, match="rope_freqs that are not Llama 3's"):
    open_source(gguf_file(rope_factors=np.linspace(1, 9, 8), theta=5e5, name="odd.gguf")[0])


def test_unpermute_undoes_permute():
  for heads, width in ((4, 64), (2, 8), (9, 9 * 64)):
    w = np.arange(width * 3).reshape(width, 3)
    permuted = w.reshape(heads, 2, width // heads // 2, 3).swapaxes(1, 2).reshape(w.shape)
    assert not np.array_equal(permuted, w)
    np.testing.assert_array_equal(gguf.unpermute(permuted, heads), w)


def test_other_architectures_and_broken_files_are_named(gguf_file, tmp_path):
  with pytest.raises(UserError, match="architecture 'phi3'; wanted llama, qwen2"):
    open_source(gguf_file(architecture="phi3")[0])
  path, _ = gguf_file(name="cut.gguf")
  size = path.stat().st_size
  for keep in (size - 1000, size // 2, 200, 30, 4):
    os.truncate(path, keep)
    with pytest.raises(UserError, match="cut.gguf is no readable GGUF file.*wanted a whole file"):
      open_source(path)
  (tmp_path / "garbage.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 20)
  with pytest.raises(UserError, match="no readable GGUF"):
    open_source(tmp_path / "garbage.gguf")
  (tmp_path / "other.bin").write_bytes(b"PK\3\4")
  with pytest.raises(UserError, match="other.bin is a file, and no GGUF"):
    open_source(tmp_path / "other.bin")


def test_a_missing_tensor_is_named(gguf_file):
  source = open_source(gguf_file()[0])
  cfg = ModelConfig.from_hf(source.config)
  del source.tensors["model.layers.1.mlp.up_proj.weight"]
  with pytest.raises(UserError, match="lacks 1 of 21 tensors, model.layers.1.mlp.up_proj.weight first"):
    load.load_params(source, cfg)


def test_identity_tells_other_weights(gguf_file):
  path, _ = gguf_file()
  first = open_source(path).identity["sha256"]
  assert first == open_source(path).identity["sha256"]
  raw = bytearray(path.read_bytes())
  at = raw.rindex(np.float32(open_source(path).read("model.layers.0.mlp.up_proj.weight")[64, 0]).tobytes())
  raw[at:at + 4] = b"\0\0\0\0"
  path.write_bytes(bytes(raw))
  assert open_source(path).identity["sha256"] != first
