"""ModelConfig: both spellings of RoPE, unknown keys kept, what is not supported refused by name."""

import json

import pytest

from jaxsft.errors import UserError
from jaxsft.models import families
from jaxsft.models.config import ModelConfig

PLAIN = dict(model_type="llama", vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


@pytest.mark.parametrize("spelling", [
    dict(rope_theta=5e5, rope_scaling=LLAMA3 | {"rope_type": "llama3"}),
    dict(rope_theta=5e5, rope_scaling=LLAMA3 | {"type": "llama3"}),
    dict(rope_parameters=LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}),
    dict(rope_parameters=LLAMA3 | {"rope_type": "llama3"}, rope_theta=5e5),
])
def test_every_spelling_of_rope_is_the_same_config(spelling):
  cfg = ModelConfig.from_hf(PLAIN | spelling)
  assert cfg.rope_parameters == LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}
  assert cfg == ModelConfig.from_hf(PLAIN | dict(rope_theta=5e5, rope_scaling=LLAMA3 | {"rope_type": "llama3"}))
  assert hash(cfg) == hash(ModelConfig.from_hf(cfg.to_hf()))


@pytest.mark.parametrize("rope", [{"rope_theta": 7e4}, {"rope_theta": 7e4, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 7e4}},
                                  {"rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}}])
def test_rope_theta_alone(rope):
  cfg = ModelConfig.from_hf(PLAIN | rope)
  assert (cfg.rope_theta, cfg.rope_scaling) == (7e4, None)


def test_linear_scaling_and_defaults():
  cfg = ModelConfig.from_hf(PLAIN | {"rope_scaling": {"type": "linear", "factor": 2.0}})
  assert cfg.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
  assert (cfg.num_key_value_heads, cfg.head_dim, cfg.tie_word_embeddings, cfg.max_position_embeddings) == (4, 16, False, 2048)


@pytest.mark.parametrize("rope", [dict(rope_theta=5e5, rope_scaling=LLAMA3 | {"rope_type": "llama3"}), dict(rope_theta=123.0),
                                  dict(rope_scaling={"type": "linear", "factor": 4.0})])
def test_transformers_reads_what_we_write(rope):
  from transformers import LlamaConfig
  cfg = ModelConfig.from_hf(PLAIN | rope)
  out = json.loads(json.dumps(cfg.to_hf()))
  theirs = LlamaConfig(**out)
  old = {k: v for k, v in out.items() if k != "rope_parameters"}  # all that transformers 4 looks at
  assert ModelConfig.from_hf(old) == cfg == ModelConfig.from_hf({k: v for k, v in out.items() if k not in ("rope_theta", "rope_scaling")})
  assert theirs.rope_parameters == cfg.rope_parameters
  assert (theirs.head_dim, theirs.num_key_value_heads, theirs.vocab_size, theirs.rms_norm_eps) == (16, 4, 96, 1e-6)
  assert ModelConfig.from_hf(theirs.to_dict()) == cfg


def test_unknown_keys_survive_and_known_ones_are_kept():
  source = PLAIN | {"my_note": {"a": [1, 2]}, "pretraining_tp": 4, "eos_token_id": [5, 6], "pad_token_id": None, "attention_bias": True}
  out = ModelConfig.from_hf(source).to_hf()
  assert out["my_note"] == {"a": [1, 2]} and out["pretraining_tp"] == 4
  assert (out["eos_token_id"], out["attention_bias"], out["architectures"]) == ([5, 6], True, ["LlamaForCausalLM"])
  json.dumps(out)


def test_biases_by_family():
  names = {n.path for n in families.leaves(ModelConfig.from_hf(PLAIN | {"model_type": "qwen2"}))}
  assert {p for p in names if p.endswith("bias")} == {f"layers/self_attn/{x}_proj/bias" for x in "qkv"}
  names = {n.path for n in families.leaves(ModelConfig.from_hf(PLAIN | {"attention_bias": True, "mlp_bias": True}))}
  assert len([p for p in names if p.endswith("bias")]) == 7
  assert not any(p.endswith("bias") for p in families.shapes(ModelConfig.from_hf(PLAIN)))


def kinds_of(**values):
  return [(kind.window, kind.rope) for kind in ModelConfig.from_hf(PLAIN | {"num_key_value_heads": 4} | values).layer_kinds]


def test_what_each_layer_sees():
  """As the configuration_*.py of transformers: a window where a family slides, and which rotation."""
  full, slides = (None, "full"), (7, "full")
  assert kinds_of(sliding_window=7, use_sliding_window=True) == [full] * 3                           # llama knows no window
  assert kinds_of(model_type="mistral", sliding_window=7) == [slides] * 3
  assert kinds_of(model_type="mistral", sliding_window=None) == kinds_of(model_type="phi3") == [full] * 3
  assert kinds_of(model_type="mistral")[0][0] == 4096                                                # left out: the family's default
  assert kinds_of(model_type="qwen2", sliding_window=7, max_window_layers=1) == [full] * 3           # use_sliding_window says no
  assert kinds_of(model_type="qwen2", sliding_window=7, max_window_layers=1, use_sliding_window=True) == [full, slides, slides]
  assert kinds_of(model_type="gemma2", sliding_window=7) == [slides, full, slides]
  assert kinds_of(model_type="gemma3_text", sliding_window=7, num_hidden_layers=7) == [(7, "local")] * 5 + [full] + [(7, "local")]
  assert kinds_of(model_type="gemma3_text", sliding_window=7, layer_types=["full_attention"] * 3) == [full] * 3
  assert kinds_of(model_type="smollm3", num_hidden_layers=5) == [full] * 3 + [(None, None), full]
  assert kinds_of(model_type="smollm3", no_rope_layers=[0, 1, 1], use_sliding_window=True, sliding_window=7) == [(7, None), full, full]


def test_scans_walk_runs_and_periods():
  from jaxsft.models.kinds import scans
  walk = lambda text: [(start, "".join(kinds), repeats) for start, kinds, repeats in scans(text)]
  assert walk("f" * 30) == [(0, "f", 30)]
  assert walk("ffffssss") == [(0, "f", 4), (4, "s", 4)]
  assert walk("sf" * 13) == [(0, "sf", 13)]
  assert walk("lllllglllllgll") == [(0, "lllllg", 2), (12, "l", 2)]
  assert walk("sfsfs") == [(0, "sf", 2), (4, "s", 1)]
  assert walk("abc") == [(0, "a", 1), (1, "b", 1), (2, "c", 1)]


def test_shapes_and_tied_head():
  shapes = families.shapes(ModelConfig.from_hf(PLAIN | {"num_key_value_heads": 2}))
  assert shapes["layers/self_attn/k_proj/kernel"] == (3, 64, 32) and shapes["layers/mlp/down_proj/kernel"] == (3, 160, 64)
  assert shapes["embed_tokens/embedding"] == (96, 64) and shapes["lm_head/kernel"] == (64, 96) and shapes["norm/scale"] == (64,)
  assert "lm_head/kernel" not in families.shapes(ModelConfig.from_hf(PLAIN | {"tie_word_embeddings": True}))


@pytest.mark.parametrize("change, words", [
    ({"model_type": "gpt_neox"}, ["gpt_neox", "gemma2, gemma3_text, llama, mistral, phi3, qwen2, qwen3, smollm3"]),
    ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "silu"]),
    ({"rope_scaling": {"rope_type": "xpos", "factor": 4.0}}, ["xpos", "default, linear, llama3, yarn, dynamic, longrope"]),
    ({"rope_scaling": {"rope_type": "yarn"}}, ["yarn", "without factor"]),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["llama3", "low_freq_factor"]),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["rope type", "same for all layers"]),
    ({"vocab_size": None}, ["vocab_size", "whole number"]),
    ({"num_hidden_layers": "3"}, ["num_hidden_layers", "'3'"]),
    ({"num_key_value_heads": 3}, ["4 query heads", "3 key/value heads"]),
    ({"model_type": "mistral", "sliding_window": 0}, ["windows [0]", "sliding_window"]),
    ({"model_type": "smollm3", "no_rope_layers": [1]}, ["3 layers", "layer_types"]),
    ({"model_type": "qwen3", "layer_types": ["full_attention"]}, ["1 layers", "wanted 3"]),
    ({"model_type": "gemma2", "hidden_activation": "relu"}, ["hidden_activation 'relu'", "gelu_pytorch_tanh"]),
    ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, ["use_bidirectional_attention", "causal"]),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, ["bitsandbytes", "nf4.targets"]),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, ["bitsandbytes fp4", "nf4"]),       # their default
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}}, ["bitsandbytes fp4", "nf4"]),
    ({"quantization_config": {"load_in_8bit": True}}, ["bitsandbytes 8 bits", "nf4"]),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["gptq", "unquantised"]),
    ({"quantization_config": {"quant_method": "awq"}}, ["awq", "unquantised"]),
])
def test_unsupported_is_named(change, words):
  with pytest.raises(UserError) as error:
    ModelConfig.from_hf(PLAIN | change, "m/config.json")
  assert "m/config.json" in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("named", [{"quant_method": "bitsandbytes"}, {}])
def test_nf4_of_bitsandbytes_is_read_and_not_written(named):
  quantised = named | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
  cfg = ModelConfig.from_hf(PLAIN | {"quantization_config": quantised, "pretraining_tp": 1})
  assert cfg == ModelConfig.from_hf(PLAIN)
  assert "quantization_config" not in cfg.to_hf() and cfg.to_hf()["pretraining_tp"] == 1
