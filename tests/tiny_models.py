"""Tiny random models as transformers saves them, and our parameters of the same files."""

import jax
import jax.numpy as jnp

from jaxsft.convert import load
from jaxsft.convert.source import open_source
from jaxsft.models.config import ModelConfig

SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=259,
             max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=None)


def save_tiny(directory, kind="llama", tokenizer=None, seed=0, **config):
  """The torch model that is now in `directory`: every parameter random, norms and biases included, so that greedy answers wander."""
  import torch
  import transformers
  torch.manual_seed(seed)
  classes = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM), "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM)}
  config_class, model_class = classes[kind]
  model = model_class(config_class(**SIZES | config)).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      parameter.copy_(1 + 0.1 * torch.randn_like(parameter) if "norm" in name else 0.3 * torch.randn_like(parameter))
  model.save_pretrained(directory)
  if tokenizer is not None:
    tokenizer.save_pretrained(directory)
  return model


def open_tiny(directory):
  """(ModelConfig, params) of a directory."""
  source = open_source(directory)
  cfg = ModelConfig.from_hf(source.config)
  return cfg, jax.tree.map(jnp.asarray, load.load_params(source, cfg))


def greedy(model, prompt, count, stops=()):
  """transformers' greedy answer to one prompt, without the stop token."""
  import torch
  out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False, max_new_tokens=count,
                       eos_token_id=list(stops) or None, pad_token_id=0)[0, len(prompt):].tolist()
  return out[:-1] if out and out[-1] in stops else out
