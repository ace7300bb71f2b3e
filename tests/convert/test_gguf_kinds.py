"""K-quants and the qwen architectures: blocks built and taken apart here by ggml's layout, whole files against transformers' own reading of them."""

import gguf as ggml
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.convert import load
from jaxsft.convert.source import open_source
from jaxsft.models import decoder
from jaxsft.models.config import ModelConfig

D, F, V, LAYERS, HEADS, KEYS, HEAD = 256, 512, 96, 2, 2, 1, 128         # 128: what transformers takes for every qwen3
PARTS = {"Q4_K": (("d", "<f2", 1), ("dmin", "<f2", 1), ("scales", "u1", 12), ("qs", "u1", 128)),
         "Q5_K": (("d", "<f2", 1), ("dmin", "<f2", 1), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)),
         "Q6_K": (("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2", 1))}


def random_blocks(kind, rows, columns, rng):
  """[rows, bytes] of random K-blocks whose values have a mean near 0 and a deviation near 0.05."""
  count = rows * columns // 256
  step = {"Q4_K": 1.5e-4, "Q5_K": 7.5e-5, "Q6_K": 4e-5}[kind]
  block = np.zeros(count, [(name, dtype, size) if size > 1 else (name, dtype) for name, dtype, size in PARTS[kind]])
  for name, dtype, size in PARTS[kind]:
    if name == "d":
      block[name] = step * rng.uniform(0.5, 1.5, count)
    elif name == "dmin":
      block[name] = block["d"] * (7.5 if kind == "Q4_K" else 15.5)
    else:
      block[name] = rng.integers(0, 256, (count, size), np.uint8).view(dtype)
  return block.view(np.uint8).reshape(rows, -1)


def plain_values(kind, raw):
  """ggml-quants.c's dequantize_row_q*_K, written out element by element: [rows, bytes] -> float32 [rows, columns]."""
  fields = np.dtype([(name, dtype, size) if size > 1 else (name, dtype) for name, dtype, size in PARTS[kind]])
  blocks = np.ascontiguousarray(raw).reshape(-1, fields.itemsize).view(fields)[:, 0]
  values = np.stack([_six(block) if kind == "Q6_K" else _four_or_five(block, kind == "Q5_K") for block in blocks])
  return values.reshape(len(raw), -1)


def _scale_and_min(j, q):
  if j < 4:
    return int(q[j]) & 63, int(q[j + 4]) & 63
  return (int(q[j + 4]) & 15) | (int(q[j - 4]) >> 6) << 4, (int(q[j + 4]) >> 4) | (int(q[j]) >> 6) << 4


def _four_or_five(block, five):
  out, d, least = np.zeros(256, np.float32), np.float32(block["d"]), np.float32(block["dmin"])
  for part in range(8):                                           # 32 values each; two parts share 32 bytes, low nibbles first
    scale, low = _scale_and_min(part, block["scales"])
    for i in range(32):
      byte = int(block["qs"][part // 2 * 32 + i])
      q = byte >> 4 if part % 2 else byte & 15
      q += 16 * (int(block["qh"][i]) >> part & 1) if five else 0
      out[part * 32 + i] = d * np.float32(scale) * np.float32(q) - least * np.float32(low)
  return out


def _six(block):
  out, d = np.zeros(256, np.float32), np.float32(block["d"])
  for half in range(2):
    for i in range(32):
      low, high = block["ql"][half * 64:], int(block["qh"][half * 32 + i])
      quarter = (int(low[i]) & 15, int(low[i + 32]) & 15, int(low[i]) >> 4, int(low[i + 32]) >> 4)
      for k in range(4):
        q = (quarter[k] | (high >> 2 * k & 3) << 4) - 32
        out[half * 128 + k * 32 + i] = d * np.float32(block["scales"][half * 8 + i // 16 + 2 * k]) * np.float32(q)
  return out


@pytest.mark.parametrize("kind", PARTS)
def test_the_package_dequantises_as_ggml_lays_it_out(kind):
  raw = random_blocks(kind, 3, 512, np.random.default_rng(0))
  found = ggml.dequantize(raw, ggml.GGMLQuantizationType[kind])
  wanted = plain_values(kind, raw)
  assert wanted.shape == (3, 512) and 0.02 < wanted.std() < 0.2 and abs(wanted.mean()) < 0.03
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-7)


def tensors(architecture):
  """(GGUF name, HF name, HF shape, kind in a Q4_K_M mixture), written out."""
  yield "token_embd.weight", "model.embed_tokens.weight", (V, D), "Q6_K"
  yield "output_norm.weight", "model.norm.weight", (D,), "F32"
  yield "output.weight", "lm_head.weight", (V, D), "Q6_K"
  for i in range(LAYERS):
    for ours, theirs, shape, kind in (("attn_q", "self_attn.q_proj", (HEADS * HEAD, D), "Q4_K"), ("attn_k", "self_attn.k_proj", (KEYS * HEAD, D), "Q4_K"),
                                      ("attn_v", "self_attn.v_proj", (KEYS * HEAD, D), "Q6_K"), ("attn_output", "self_attn.o_proj", (D, HEADS * HEAD), "Q5_K"),
                                      ("ffn_gate", "mlp.gate_proj", (F, D), "Q4_K"), ("ffn_up", "mlp.up_proj", (F, D), "Q5_K"),
                                      ("ffn_down", "mlp.down_proj", (D, F), "Q6_K")):
      yield f"blk.{i}.{ours}.weight", f"model.layers.{i}.{theirs}.weight", shape, kind
      if architecture == "qwen2" and ours in ("attn_q", "attn_k", "attn_v"):
        yield f"blk.{i}.{ours}.bias", f"model.layers.{i}.{theirs}.bias", shape[:1], "F32"
    if architecture == "qwen3":
      yield f"blk.{i}.attn_q_norm.weight", f"model.layers.{i}.self_attn.q_norm.weight", (HEAD,), "F32"
      yield f"blk.{i}.attn_k_norm.weight", f"model.layers.{i}.self_attn.k_norm.weight", (HEAD,), "F32"
    yield f"blk.{i}.attn_norm.weight", f"model.layers.{i}.input_layernorm.weight", (D,), "F32"
    yield f"blk.{i}.ffn_norm.weight", f"model.layers.{i}.post_attention_layernorm.weight", (D,), "F32"


def permute(raw, heads):
  """llama.cpp's order of the rows of q and k; a row of blocks moves as one."""
  return raw.reshape(heads, 2, raw.shape[0] // heads // 2, *raw.shape[1:]).swapaxes(1, 2).reshape(raw.shape)


@pytest.fixture
def written(tmp_path):
  """written(architecture) -> (path, {HF name: float32 that it should read as}): K-blocks in every matrix, biases and norms random."""
  def make(architecture):
    path = tmp_path / f"{architecture}.gguf"
    writer = ggml.GGUFWriter(path, architecture)
    writer.add_context_length(512); writer.add_embedding_length(D); writer.add_block_count(LAYERS); writer.add_feed_forward_length(F)
    writer.add_head_count(HEADS); writer.add_head_count_kv(KEYS); writer.add_layer_norm_rms_eps(1e-5); writer.add_rope_freq_base(5e4)
    writer.add_vocab_size(V)
    if architecture != "qwen2":                                   # llama.cpp's converter writes neither for qwen2
      writer.add_rope_dimension_count(HEAD); writer.add_key_length(HEAD)
    rng, expected = np.random.default_rng(0), {}
    for name, hf, shape, kind in tensors(architecture):
      raw = random_blocks(kind, *shape, rng) if kind != "F32" else (rng.standard_normal(shape) * 0.1 + ("norm" in name)).astype(np.float32)
      expected[hf] = raw if kind == "F32" else plain_values(kind, raw)
      heads = {"attn_q": HEADS, "attn_k": KEYS}.get(name.split(".")[-2]) if architecture == "llama" else None
      writer.add_tensor(name, permute(raw, heads) if heads else raw, raw_dtype=ggml.GGMLQuantizationType[kind])
    writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
    return path, expected
  return make


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_files_of_k_blocks_read_in_place_and_compute_as_in_transformers(written, architecture):
  import torch
  from transformers import AutoModelForCausalLM, GgufConfig
  path, expected = written(architecture)
  source = open_source(path)
  assert sorted(source.names()) == sorted(expected)
  for name, array in expected.items():
    assert source.shape(name) == array.shape
    np.testing.assert_allclose(source.read(name), array, rtol=0, atol=1e-7, err_msg=name)
  cfg = ModelConfig.from_hf(source.config)
  assert (cfg.model_type, cfg.rope_theta, cfg.head_dim, cfg.attention_bias) == (architecture, 5e4, HEAD, architecture == "qwen2")
  params = jax.tree.map(jnp.asarray, load.load_params(source, cfg))
  tokens = jnp.arange(24)[None] * 5 % V
  batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.arange(24)[None]}
  with jax.default_matmul_precision("highest"):
    ours = np.asarray(decoder.logits(cfg, params, decoder.make_forward(cfg)(params, batch)[0], precision="highest"))
  theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32)
  with torch.no_grad():
    wanted = theirs(torch.tensor(np.array(tokens))).logits[0].numpy()
  assert wanted.std() > 0.3
  np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-4)


def test_the_tokenizers_row_length_is_the_architectures_own(written):
  from jaxsft.convert.gguf_tokenizer import build
  fields = open_source(written("qwen2")[0]).fields | {
      "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.merges": []}
  assert build(fields, "x.gguf").model_max_length == 512
