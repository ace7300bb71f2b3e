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


def test_shapes_and_tied_head():
  shapes = families.shapes(ModelConfig.from_hf(PLAIN | {"num_key_value_heads": 2}))
  assert shapes["layers/self_attn/k_proj/kernel"] == (3, 64, 32) and shapes["layers/mlp/down_proj/kernel"] == (3, 160, 64)
  assert shapes["embed_tokens/embedding"] == (96, 64) and shapes["lm_head/kernel"] == (64, 96) and shapes["norm/scale"] == (64,)
  assert "lm_head/kernel" not in families.shapes(ModelConfig.from_hf(PLAIN | {"tie_word_embeddings": True}))


@pytest.mark.parametrize("change, words", [
    ({"model_type": "gpt_neox"}, ["gpt_neox", "llama, qwen2"]),
    ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "silu"]),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["yarn", "default, linear, llama3"]),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["llama3", "low_freq_factor"]),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["rope type", "same for all layers"]),
    ({"partial_rotary_factor": 0.5}, ["rope type", "whole head"]),
    ({"vocab_size": None}, ["vocab_size", "whole number"]),
    ({"num_hidden_layers": "3"}, ["num_hidden_layers", "'3'"]),
    ({"num_key_value_heads": 3}, ["4 query heads", "3 key/value heads"]),
    ({"use_sliding_window": True}, ["use_sliding_window"]),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, ["bitsandbytes", "nf4.targets"]),
])
def test_unsupported_is_named(change, words):
  with pytest.raises(UserError) as error:
    ModelConfig.from_hf(PLAIN | change, "m/config.json")
  assert "m/config.json" in str(error.value) and all(word in str(error.value) for word in words), str(error.value)
