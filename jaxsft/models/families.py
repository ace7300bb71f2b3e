"""Families of the one decoder, each a table entry: its names in Hugging Face's files, read in both directions, its defaults and its traits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxsft.models import kinds


class Name(NamedTuple):
  """One leaf: our path, HF's name, and its shape in OUR orientation as dimension letters (see `dims`)."""
  path: str      # keys joined by "/"; under "layers/" the leaf has a leading L axis that `dims` leaves out
  hf: str        # "{layer}" where the layer's number stands
  dims: tuple[str, ...]
  transpose: bool = False   # HF keeps linear weights [out, in]; ours are [in, out]
  when: str = ""            # the flag of ModelConfig that this leaf needs; "!flag" needs it false

  @property
  def stacked(self) -> bool:
    return self.path.startswith("layers/")


@dataclasses.dataclass(frozen=True)
class Family:
  """What sets a model_type apart. `attention_bias` None: config.json says."""
  architecture: str
  names: tuple[Name, ...]
  attention_bias: bool | None = False
  attention_out_bias: bool = True   # o_proj has a bias where q, k and v have one
  mlp_bias: bool = False            # config.json's mlp_bias is read
  activation: str = "silu"
  activation_key: str = "hidden_act"
  qk_norm: bool = False             # q and k of each head are normed before the rotation
  sandwich: bool = False            # attention and MLP are normed on both sides
  unit_offset: bool = False         # norms multiply by 1 + scale
  scaled_embedding: bool = False    # by sqrt(hidden_size)
  softcaps: bool = False            # attn_logit_softcapping and final_logit_softcapping are read
  fused: bool = False               # q, k, v in one kernel; gate, up in one
  kinds: Callable[[dict[str, Any], int], tuple[kinds.Kind, ...]] = kinds.uniform
  defaults: MappingProxyType[str, Any] | dict[str, Any] = dataclasses.field(default_factory=dict)   # of transformers: its files leave them out


def _linear(path, dims, bias=""):
  hf = f"model.layers.{{layer}}.{path.replace('/', '.')}"
  kernel = Name(f"layers/{path}/kernel", f"{hf}.weight", dims, transpose=True)
  return (kernel, Name(f"layers/{path}/bias", f"{hf}.bias", dims[1:], when=bias)) if bias else (kernel,)


def _norm(path, dim="D"):
  return Name(f"layers/{path}/scale", f"model.layers.{{layer}}.{path.replace('/', '.')}.weight", (dim,))


def _names(attention, norms=("post_attention_layernorm",), qk_norm=False, mlp=None):
  """The table of a family: its projections and norms between embedding and head."""
  return (
      Name("embed_tokens/embedding", "model.embed_tokens.weight", ("V", "D")),
      _norm("input_layernorm"),
      *attention,
      *_linear("self_attn/o_proj", ("HK", "D"), "attention_out_bias"),
      *((_norm("self_attn/q_norm", "K"), _norm("self_attn/k_norm", "K")) if qk_norm else ()),
      *map(_norm, norms),
      *(mlp or (*_linear("mlp/gate_proj", ("D", "F"), "mlp_bias"), *_linear("mlp/up_proj", ("D", "F"), "mlp_bias"))),
      *_linear("mlp/down_proj", ("F", "D"), "mlp_bias"),
      Name("norm/scale", "model.norm.weight", ("D",)),
      Name("lm_head/kernel", "lm_head.weight", ("D", "V"), transpose=True, when="!tie_word_embeddings"))


SPLIT = (*_linear("self_attn/q_proj", ("D", "HK"), "attention_bias"), *_linear("self_attn/k_proj", ("D", "NK"), "attention_bias"),
         *_linear("self_attn/v_proj", ("D", "NK"), "attention_bias"))
SANDWICH = ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
LLAMA = _names(SPLIT)
QWEN = dict(max_position_embeddings=32768, max_window_layers=28, sliding_window=4096)
GEMMA = dict(head_dim=256, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True, query_pre_attn_scalar=256, sliding_window=4096,
             hidden_activation="gelu_pytorch_tanh", pad_token_id=0, eos_token_id=1, bos_token_id=2)
GEMMA_TRAITS: dict[str, Any] = dict(attention_bias=None, activation="gelu_pytorch_tanh", activation_key="hidden_activation", sandwich=True, unit_offset=True,
                                    scaled_embedding=True, kinds=kinds.alternating)

FAMILIES = {
    "llama": Family("LlamaForCausalLM", LLAMA, attention_bias=None, mlp_bias=True, defaults={"max_position_embeddings": 2048}),
    "mistral": Family("MistralForCausalLM", LLAMA, kinds=kinds.all_sliding,
                      defaults=dict(max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096)),
    "qwen2": Family("Qwen2ForCausalLM", LLAMA, attention_bias=True, attention_out_bias=False, kinds=kinds.last_sliding, defaults=QWEN),
    "qwen3": Family("Qwen3ForCausalLM", _names(SPLIT, qk_norm=True), attention_bias=None, qk_norm=True, kinds=kinds.last_sliding,
                    defaults=QWEN | dict(head_dim=128)),
    "smollm3": Family("SmolLM3ForCausalLM", LLAMA, attention_bias=None, mlp_bias=True, kinds=kinds.some_without_rope,
                      defaults=dict(max_position_embeddings=32768, num_key_value_heads=4, tie_word_embeddings=True, no_rope_layer_interval=4,
                                    rope_theta=2e6, pad_token_id=128004, bos_token_id=128000, eos_token_id=128001)),
    "gemma2": Family("Gemma2ForCausalLM", _names(SPLIT, SANDWICH), softcaps=True, **GEMMA_TRAITS,
                     defaults=GEMMA | dict(max_position_embeddings=8192, final_logit_softcapping=30.0, attn_logit_softcapping=50.0,
                                           sliding_window_pattern=2, two_ropes=False)),
    "gemma3_text": Family("Gemma3ForCausalLM", _names(SPLIT, SANDWICH, qk_norm=True), qk_norm=True, **GEMMA_TRAITS,
                          defaults=GEMMA | dict(max_position_embeddings=131072, sliding_window_pattern=6, two_ropes=True, rope_theta=1e6,
                                                rope_local_base_freq=1e4)),
    "phi3": Family("Phi3ForCausalLM", _names(_linear("self_attn/qkv_proj", ("D", "QKV")), mlp=_linear("mlp/gate_up_proj", ("D", "GU"))), fused=True,
                   kinds=kinds.all_sliding, defaults=dict(max_position_embeddings=4096, original_max_position_embeddings=4096, rms_norm_eps=1e-5,
                                                          bos_token_id=1, eos_token_id=32000, pad_token_id=32000)),
}


def leaves(cfg) -> Iterator[Name]:
  """The names of the leaves that a model of this ModelConfig has, in the order of the forward pass."""
  for name in FAMILIES[cfg.model_type].names:
    flag = name.when.lstrip("!")
    if not flag or getattr(cfg, flag) != name.when.startswith("!"):
      yield name


def sizes(cfg) -> dict[str, int]:
  """The dimension letters of `Name.dims` as numbers: V vocabulary, D width, K head size, HK and NK the query and key/value heads' widths, F hidden,
  QKV and GU the fused ones."""
  queries, keys = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
  return dict(V=cfg.vocab_size, D=cfg.hidden_size, K=cfg.head_dim, HK=queries, NK=keys, F=cfg.intermediate_size, QKV=queries + 2 * keys,
              GU=2 * cfg.intermediate_size)


def shapes(cfg) -> dict[str, tuple[int, ...]]:
  """{path: full shape}, the leading L of stacked leaves included."""
  size, layers = sizes(cfg), (cfg.num_hidden_layers,)
  return {n.path: (layers if n.stacked else ()) + tuple(size[d] for d in n.dims) for n in leaves(cfg)}
