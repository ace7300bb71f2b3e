"""The decoder against transformers (float32, tiny random weights, 2,304 positions, scaled RoPE) and against itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxsft.models import decoder, families
from jaxsft.models.config import ModelConfig
from jaxsft.transforms import tree as trees

SHAPE = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=4096)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=256)
FAMILIES = {
    "llama": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "llama_tied_scaled": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE, head_dim=24),
    "llama_linear_rope_biases": transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True,
                                                         rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
    "llama_yarn": transformers.LlamaConfig(**SHAPE, rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0,
                                                                        original_max_position_embeddings=512, beta_fast=16.0)),
    "llama_dynamic": transformers.LlamaConfig(**SHAPE | dict(max_position_embeddings=1100), rope_parameters=dict(rope_type="dynamic", rope_theta=1e4,
                                                                                                             factor=2.0)),
    "qwen2": transformers.Qwen2Config(**SHAPE, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "qwen2_sliding": transformers.Qwen2Config(**SHAPE | dict(num_hidden_layers=5), use_sliding_window=True, sliding_window=300, max_window_layers=2),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=512),
    "mistral_v3": transformers.MistralConfig(**SHAPE, sliding_window=None, head_dim=24),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True),
    "smollm3": transformers.SmolLM3Config(**SHAPE | dict(num_hidden_layers=9), pad_token_id=None, bos_token_id=None, eos_token_id=None),
    "gemma2": transformers.Gemma2Config(**SHAPE | dict(num_hidden_layers=5), head_dim=24, sliding_window=256, query_pre_attn_scalar=20),
    "gemma3": transformers.Gemma3TextConfig(**SHAPE | dict(num_hidden_layers=14), head_dim=24, sliding_window=256, query_pre_attn_scalar=20),
    "phi3": transformers.Phi3Config(**SHAPE, pad_token_id=None, sliding_window=1500,
                                    rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    "phi3_longrope": transformers.Phi3Config(**SHAPE, pad_token_id=None, original_max_position_embeddings=1100, rope_parameters=dict(
        rope_type="longrope", rope_theta=1e4, short_factor=[1.0 + 0.1 * i for i in range(8)], long_factor=[2.0 + i for i in range(8)])),
}


def both(config):
  """transformers' model with random weights (biases and norms too) and our tree of the same numbers."""
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      rest = float("norm" in name and not config.model_type.startswith("gemma"))      # Gemma multiplies by 1 + its scales
      parameter.copy_(rest + 0.1 * torch.randn_like(parameter))
  return model, ModelConfig.from_hf(config.to_dict())


def our_params(model, cfg):
  state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
  read = lambda name, layer: state[name.hf.format(layer=layer)].T if name.transpose else state[name.hf.format(layer=layer)]
  return trees.unflatten({name.path: jnp.asarray(np.stack([read(name, layer) for layer in range(cfg.num_hidden_layers)]) if name.stacked else read(name, 0))
                          for name in families.leaves(cfg)})


def logits_of(cfg, params, batch, **options):
  hidden = jax.jit(decoder.make_forward(cfg, **options))(params, batch)
  return np.asarray(decoder.logits(cfg, params, hidden))


def row(tokens, segments=None):
  tokens = np.atleast_2d(tokens)
  segments = np.ones_like(tokens) if segments is None else np.atleast_2d(segments)
  starts = np.concatenate([np.ones((len(tokens), 1), bool), segments[:, 1:] != segments[:, :-1]], 1)
  index = np.arange(tokens.shape[1])[None]
  return {"tokens": tokens, "segment_ids": segments, "positions": index - np.maximum.accumulate(np.where(starts, index, 0), 1)}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_over_2304_positions_padded_and_packed(family):
  model, cfg = both(FAMILIES[family])
  params = our_params(model, cfg)
  tokens = np.random.default_rng(0).integers(0, 97, 2304)
  with torch.no_grad():
    whole = model(torch.tensor(tokens[None])).logits.numpy()
    parts = [model(torch.tensor(tokens[None, start:stop])).logits.numpy() for start, stop in ((0, 1000), (1000, 2200))]
  assert np.abs(logits_of(cfg, params, row(tokens)) - whole).max() < 2e-4
  segments = np.repeat([1, 2, 0], [1000, 1200, 104])
  packed = logits_of(cfg, params, row(tokens, segments))
  assert np.abs(packed[:, :1000] - parts[0]).max() < 2e-4
  assert np.abs(packed[:, 1000:2200] - parts[1]).max() < 2e-4
  assert np.isfinite(packed).all()


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(remat):
  model, cfg = both(FAMILIES["llama"])
  params, batch = our_params(model, cfg), row(np.arange(40) % 97)
  gradient = lambda remat: jax.jit(jax.grad(lambda p: (decoder.make_forward(cfg, remat=remat)(p, batch) ** 2).sum()))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3), gradient("none"), gradient(remat))


def test_the_cache_gives_the_same_hidden_states_for_rows_of_different_length():
  model, cfg = both(FAMILIES["qwen2"])
  params = our_params(model, cfg)
  tokens = np.random.default_rng(1).integers(0, 97, (2, 12))
  whole = np.asarray(jax.jit(decoder.make_forward(cfg))(params, row(tokens)))
  step = jax.jit(decoder.make_cached_forward(cfg))
  lengths = np.array([7, 4])
  prompt = np.where(np.arange(7) < lengths[:, None], tokens[:, :7], 0)
  hidden, cache = step(params, prompt, np.tile(np.arange(7), (2, 1)), decoder.init_cache(cfg, 2, 16))
  for b in range(2):
    np.testing.assert_allclose(hidden[b, :lengths[b]], whole[b, :lengths[b]], atol=1e-5)
  for t in range(5):
    at = (lengths + t)[:, None]
    hidden, cache = step(params, np.take_along_axis(tokens, at, 1), at, cache)
    for b in range(2):
      np.testing.assert_allclose(hidden[b, 0], whole[b, lengths[b] + t], atol=1e-5)
