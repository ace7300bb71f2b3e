"""Families of the one decoder, each a table entry: its names in Hugging Face's files, read in both directions, and its defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any, NamedTuple


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
  attention_bias: bool | None = None
  attention_out_bias: bool = True   # o_proj has a bias where q, k and v have one
  mlp_bias: bool = True             # config.json's mlp_bias is read
  defaults: MappingProxyType[str, Any] | dict[str, Any] = dataclasses.field(default_factory=dict)


def _linear(path, hf, dims, bias):
  return (Name(f"layers/{path}/kernel", f"model.layers.{{layer}}.{hf}.weight", dims, transpose=True),
          Name(f"layers/{path}/bias", f"model.layers.{{layer}}.{hf}.bias", dims[1:], when=bias))


def _norm(path):
  return Name(f"layers/{path}/scale", f"model.layers.{{layer}}.{path}.weight", ("D",))


LLAMA_NAMES = (
    Name("embed_tokens/embedding", "model.embed_tokens.weight", ("V", "D")),
    _norm("input_layernorm"),
    *_linear("self_attn/q_proj", "self_attn.q_proj", ("D", "HK"), "attention_bias"),
    *_linear("self_attn/k_proj", "self_attn.k_proj", ("D", "NK"), "attention_bias"),
    *_linear("self_attn/v_proj", "self_attn.v_proj", ("D", "NK"), "attention_bias"),
    *_linear("self_attn/o_proj", "self_attn.o_proj", ("HK", "D"), "attention_out_bias"),
    _norm("post_attention_layernorm"),
    *_linear("mlp/gate_proj", "mlp.gate_proj", ("D", "F"), "mlp_bias"),
    *_linear("mlp/up_proj", "mlp.up_proj", ("D", "F"), "mlp_bias"),
    *_linear("mlp/down_proj", "mlp.down_proj", ("F", "D"), "mlp_bias"),
    Name("norm/scale", "model.norm.weight", ("D",)),
    Name("lm_head/kernel", "lm_head.weight", ("D", "V"), transpose=True, when="!tie_word_embeddings"),
)

FAMILIES = {
    "llama": Family("LlamaForCausalLM", LLAMA_NAMES, defaults={"max_position_embeddings": 2048}),
    "qwen2": Family("Qwen2ForCausalLM", LLAMA_NAMES, attention_bias=True, attention_out_bias=False, mlp_bias=False,
                    defaults={"max_position_embeddings": 32768}),
}


def leaves(cfg) -> Iterator[Name]:
  """The names of the leaves that a model of this ModelConfig has, in the order of the forward pass."""
  for name in FAMILIES[cfg.model_type].names:
    flag = name.when.lstrip("!")
    if not flag or getattr(cfg, flag) != name.when.startswith("!"):
      yield name


def sizes(cfg) -> dict[str, int]:
  """The dimension letters of `Name.dims` as numbers: V vocabulary, D width, HK and NK the query and key/value heads' widths, F hidden."""
  return dict(V=cfg.vocab_size, D=cfg.hidden_size, F=cfg.intermediate_size,
              HK=cfg.num_attention_heads * cfg.head_dim, NK=cfg.num_key_value_heads * cfg.head_dim)


def shapes(cfg) -> dict[str, tuple[int, ...]]:
  """{path: full shape}, the leading L of stacked leaves included."""
  size, layers = sizes(cfg), (cfg.num_hidden_layers,)
  return {n.path: (layers if n.stacked else ()) + tuple(size[d] for d in n.dims) for n in leaves(cfg)}
