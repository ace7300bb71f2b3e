"""GGUF files of the llama, qwen2 and qwen3 architectures as a Source: dequantised a tensor at a time, with Hugging Face's names and row order."""

from __future__ import annotations

import hashlib
import pathlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxsft.convert.source import Source
from jaxsft.errors import UserError


class Architecture(NamedTuple):
  """What GGUF's general.architecture says of a file."""
  model_class: str
  permuted: bool = False      # rows of q and k lie as llama.cpp's older rotation pairs them


ARCHITECTURES = {"llama": Architecture("LlamaForCausalLM", permuted=True), "qwen2": Architecture("Qwen2ForCausalLM"),
                 "qwen3": Architecture("Qwen3ForCausalLM")}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1's scaling, worked out; a constant, not a parameter
TESTED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


def is_gguf(path: pathlib.Path) -> bool:
  """Whether the file begins with GGUF's magic."""
  with open(path, "rb") as f:
    return f.read(4) == b"GGUF"


def hf_name(name: str) -> str:
  """Hugging Face's name of a GGUF tensor; the name itself when it has none."""
  parts = name.split(".")
  if len(parts) == 4 and parts[0] == "blk" and parts[2] in BLOCK_NAMES:
    return f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}.{parts[3]}"
  if len(parts) == 2 and parts[0] in TOP_NAMES:
    return f"{TOP_NAMES[parts[0]]}.{parts[1]}"
  return name


class GGUFSource(Source):
  """One .gguf file. `fields` are its metadata as Python values."""

  def __init__(self, path: pathlib.Path, name: str = ""):
    import gguf
    self.path = path
    try:
      reader = gguf.GGUFReader(path)
      self.fields = {k: f.contents() for k, f in reader.fields.items()}
    except Exception as error:  # the parser meets arbitrary bytes: any error of its own means a broken file
      raise UserError(f"{path} is no readable GGUF file ({type(error).__name__}: {error})", wanted="a whole file",
                      knob="model.path to a whole copy") from None
    self.architecture = str(self.fields.get("general.architecture"))
    experts = self.fields.get(f"{self.architecture}.expert_count")
    if self.architecture not in ARCHITECTURES or experts:
      raise UserError(f"{path} has architecture {self.architecture!r}{' with experts' * bool(experts)}", wanted=', '.join(ARCHITECTURES),
                      knob="model.path to such a file, or to the model's Hugging Face directory")
    self.tensors = {hf_name(t.name): t for t in reader.tensors if t.name != ROPE_FACTORS}
    factors = next((t.data for t in reader.tensors if t.name == ROPE_FACTORS), None)
    self.config = _config(self, factors)
    self.chat_template = self.fields.get("tokenizer.chat_template")
    self.generation_config = _generation_config(self.fields)
    self.identity = {"path": name or str(path), "revision": "", "sha256": self._fingerprint(reader.data_offset)}

  def _fingerprint(self, header: int) -> str:
    """sha256 of everything before the weights, of the file's size, and of 256 bytes of every tensor."""
    with open(self.path, "rb") as f:
      digest = hashlib.sha256(f.read(header))
    digest.update(str(self.path.stat().st_size).encode())
    for t in self.tensors.values():
      raw = t.data.reshape(-1).view(np.uint8)
      middle = max(0, (raw.size - 256) // 2)
      digest.update(raw[middle:middle + 256].tobytes())
    return digest.hexdigest()

  def names(self) -> list[str]:
    return list(self.tensors)

  def _tensor(self, name):
    if name not in self.tensors:
      raise UserError(f"{self.path} has no tensor for {name}", wanted=f"a whole {self.architecture} model", knob="model.path to a whole model")
    return self.tensors[name]

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(int(n) for n in self._tensor(name).shape[::-1])

  @property
  def stored_bytes(self) -> int:
    return sum(int(tensor.n_bytes) for tensor in self.tensors.values())

  def where(self, name: str) -> str:
    return str(self.path)

  def read(self, name: str) -> np.ndarray:
    """float32, float16 and bfloat16 as they are, block formats dequantised to float32; rows of q and k in Hugging Face's order."""
    array = _dequantise(self._tensor(name), self.path)
    if not ARCHITECTURES[self.architecture].permuted:
      return array
    for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
      if f".{projection}." in name:
        return unpermute(array, self.config[heads])
    return array

  def tokenizer(self):
    from jaxsft.convert.gguf_tokenizer import build
    return build(self.fields, self.path)


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
  """q or k (weight [HK, D] or bias [HK]) from GGUF's row order to Hugging Face's.

  GGUF pairs the two halves of a rotation row by row, (0, K/2, 1, K/2 + 1, ...) within each head; Hugging Face keeps the halves apart.
  Source: `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py, undone.
  """
  return array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _dequantise(tensor, path) -> np.ndarray:
  import gguf
  kind = tensor.tensor_type.name
  if kind in ("F32", "F16"):
    return tensor.data
  if kind == "BF16":
    return tensor.data.view(ml_dtypes.bfloat16)
  try:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
  except NotImplementedError:
    raise UserError(f"{path} stores {tensor.name} as {kind}", wanted=f"one of {', '.join(TESTED)}",
                    knob="model.path to such a file") from None


def _config(source: GGUFSource, factors) -> dict[str, Any]:
  """config.json of the model."""
  fields, kind = source.fields, source.architecture

  def get(key, default=None):
    value = fields.get(f"{kind}.{key}", default)
    if value is None:
      raise UserError(f"{source.path} has no {kind}.{key}", wanted="a whole GGUF header", knob="model.path to a whole copy")
    return value

  heads, width = get("attention.head_count"), get("embedding_length")
  head_dim = int(fields.get(f"{kind}.attention.key_length") or width // heads)
  if (turned := fields.get(f"{kind}.rope.dimension_count", head_dim)) != head_dim:
    raise UserError(f"{source.path} rotates {turned} of {head_dim} dimensions", wanted="all of them")
  return {
      "architectures": [ARCHITECTURES[kind].model_class], "model_type": kind, "hidden_act": "silu",
      "vocab_size": source.shape("model.embed_tokens.weight")[0],
      "hidden_size": width, "intermediate_size": get("feed_forward_length"), "num_hidden_layers": get("block_count"),
      "num_attention_heads": heads, "num_key_value_heads": get("attention.head_count_kv", heads), "head_dim": head_dim,
      "max_position_embeddings": get("context_length"),
      "rms_norm_eps": _short(get("attention.layer_norm_rms_epsilon")),
      "rope_theta": _short(fields.get(f"{kind}.rope.freq_base", 10000.0)),
      "rope_scaling": _rope_scaling(source, factors, head_dim),
      "tie_word_embeddings": "lm_head.weight" not in source.tensors,
      "attention_bias": "model.layers.0.self_attn.q_proj.bias" in source.tensors,
      "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in source.tensors,
      **{f"{k}_token_id": fields.get(f"tokenizer.ggml.{v}_token_id") for k, v in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))},
  }


def _short(value: float) -> float:
  """The shortest decimal that is the same float32: GGUF's 9.999999747378752e-06 is config.json's 1e-05."""
  return float(str(np.float32(value)))


def _rope_scaling(source: GGUFSource, factors, head_dim: int):
  rope = {key.removeprefix(f"{source.architecture}.rope."): value for key, value in source.fields.items()}
  kind = rope.get("scaling.type", "none")
  if factors is not None:
    theta = _short(rope.get("freq_base", 10000.0))
    return llama3_scaling(np.asarray(factors), theta, head_dim, source.path)
  if kind == "none":
    return None
  if kind != "linear":
    raise UserError(f"{source.path} has rope scaling {kind!r}", wanted="none, linear or Llama 3's", knob="model.path to such a file")
  return {"rope_type": "linear", "factor": float(rope["scaling.factor"])}


def llama3_scaling(factors: np.ndarray, theta: float, head_dim: int, path) -> dict[str, Any]:
  """The llama3 settings whose factors these are; GGUF keeps only the factors [K/2]. All Llama 3.x share all but `factor`.

  Errors: UserError when no such settings give these factors.
  """
  factor = float(factors.max())
  settings = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}
  wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
  smooth = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0, 1)
  expected = 1 / ((1 - smooth) / factor + smooth)
  if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
    raise UserError(f"{path} has rope_freqs that are not Llama 3's", wanted="low 1, high 4, original length 8192",
                    knob="model.path to the model's Hugging Face directory")
  return settings


def _generation_config(fields) -> dict[str, Any]:
  """End-of-sequence, end-of-turn and end-of-message ids, as far as the file names them."""
  ids = [fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
  out = {"bos_token_id": fields.get("tokenizer.ggml.bos_token_id"), "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
         "eos_token_id": list(dict.fromkeys(i for i in ids if i is not None)) or None}
  return {k: v for k, v in out.items() if v is not None}
