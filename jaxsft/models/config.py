"""ModelConfig: the shape and constants of a decoder, with the names and meaning of Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from jaxsft.errors import UserError
from jaxsft.models.families import FAMILIES

ROPE_TYPES = {  # the settings each type must have, beside rope_theta
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
TokenIds = int | tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """One decoder. Hashable, so that it can be a static argument; `extra` takes no part in equality."""
  model_type: str
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rope_theta: float = 10000.0
  rope_scaling: tuple[tuple[str, Any], ...] | None = None  # sorted items; None is rope type "default"
  rms_norm_eps: float = 1e-6
  tie_word_embeddings: bool = False
  attention_bias: bool = False      # of q, k and v
  attention_out_bias: bool = False  # of o
  mlp_bias: bool = False
  max_position_embeddings: int = 2048
  initializer_range: float = 0.02
  bos_token_id: TokenIds = None
  eos_token_id: TokenIds = None
  pad_token_id: TokenIds = None
  extra: str = dataclasses.field(default="{}", compare=False, repr=False)  # JSON of the keys of the source that are not above

  @property
  def rope_parameters(self) -> dict[str, Any]:
    """{"rope_type", "rope_theta", and what the type needs}, as transformers 5 spells it."""
    return {"rope_type": "default"} | dict(self.rope_scaling or ()) | {"rope_theta": self.rope_theta}

  @classmethod
  def from_hf(cls, config: dict[str, Any], name: str = "config.json") -> ModelConfig:
    """Reads a parsed config.json; `name` stands in the messages. UserError for what is missing, unsupported or does not fit."""
    family = _family(config, name)
    values = {**family.defaults, **{k: v for k, v in config.items() if v is not None}}
    _refuse(values, name)
    theta, scaling = _read_rope(values, name)
    heads = _whole(values, "num_attention_heads", name)
    width = _whole(values, "hidden_size", name)
    bias = bool(values.get("attention_bias")) if family.attention_bias is None else family.attention_bias
    cfg = cls(
        model_type=values["model_type"],
        vocab_size=_whole(values, "vocab_size", name),
        hidden_size=width,
        intermediate_size=_whole(values, "intermediate_size", name),
        num_hidden_layers=_whole(values, "num_hidden_layers", name),
        num_attention_heads=heads,
        num_key_value_heads=_whole(values, "num_key_value_heads", name, heads),
        head_dim=_whole(values, "head_dim", name, width // heads),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        attention_bias=bias,
        attention_out_bias=bias and family.attention_out_bias,
        mlp_bias=bool(values.get("mlp_bias", False)) and family.mlp_bias,
        max_position_embeddings=_whole(values, "max_position_embeddings", name),
        initializer_range=float(values.get("initializer_range", 0.02)),
        extra=json.dumps({k: v for k, v in config.items() if k not in _KNOWN}),
        **{k: _token_ids(values.get(k)) for k in ("bos_token_id", "eos_token_id", "pad_token_id")})
    if heads % cfg.num_key_value_heads or ("head_dim" not in values and width % heads):
      raise UserError(f"{name} has hidden_size {width}, {heads} query heads and {cfg.num_key_value_heads} key/value heads",
                      wanted="numbers that divide")
    return cfg

  def to_hf(self) -> dict[str, Any]:
    """config.json as a dict: the source's unknown keys, then ours. RoPE is written in both spellings (transformers 4 and 5)."""
    family = FAMILIES[self.model_type]
    out = json.loads(self.extra) | {"architectures": [family.architecture], "hidden_act": "silu"}
    for field in dataclasses.fields(self):
      if field.name not in ("extra", "rope_scaling", "attention_out_bias", "attention_bias", "mlp_bias"):
        value = getattr(self, field.name)
        out[field.name] = list(value) if isinstance(value, tuple) else value
    if family.attention_bias is None:
      out["attention_bias"] = self.attention_bias
    if family.mlp_bias:
      out["mlp_bias"] = self.mlp_bias
    out["rope_scaling"] = dict(self.rope_scaling) if self.rope_scaling else None
    out["rope_parameters"] = self.rope_parameters
    return out


_KNOWN = {f.name for f in dataclasses.fields(ModelConfig)} - {"extra", "attention_out_bias"} | {"rope_parameters"}


def _family(config, name):
  model_type = config.get("model_type")
  if model_type not in FAMILIES:
    raise UserError(f"{name} has model_type {model_type!r}", wanted=f"one of {', '.join(sorted(FAMILIES))}",
                    knob="model.path to such a model")
  return FAMILIES[model_type]


def _refuse(values, name):
  """What this decoder would silently compute wrongly."""
  if values.get("hidden_act", "silu") not in ("silu", "swish"):
    raise UserError(f"{name} has hidden_act {values['hidden_act']!r}", wanted="silu")
  if values.get("use_sliding_window"):
    raise UserError(f"{name} has use_sliding_window true", wanted="full attention",
                    knob="use_sliding_window to false in it, if rows are shorter than the window")
  if values.get("quantization_config"):
    method = values["quantization_config"].get("quant_method", "unknown")
    raise UserError(f"{name} says its weights are quantised ({method})", wanted="float32, float16 or bfloat16 weights",
                    knob="model.path to the unquantised model and nf4.targets to quantise here")


def _whole(values, key, name, default=None):
  value = values.get(key)
  value = default if value is None else value
  if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
    raise UserError(f"{name} has {key} {value!r}", wanted="a whole number above 0")
  return value


def _read_rope(values, name):
  """(theta, sorted items of the scaling or None) from transformers 5's rope_parameters or from rope_theta + rope_scaling."""
  settings = dict(values.get("rope_parameters") or {}) | dict(values.get("rope_scaling") or {})
  settings.setdefault("rope_theta", values.get("rope_theta") or 10000.0)
  theta = settings.pop("rope_theta")
  old_name = settings.pop("type", None)
  kind = settings.pop("rope_type", None) or old_name or "default"
  partial = (settings.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0) != 1.0
  nested = any(isinstance(v, dict) for v in settings.values())  # one setting a layer type: other families
  if kind not in ROPE_TYPES or not isinstance(theta, (int, float)) or nested or partial:
    raise UserError(f"{name} has rope type {kind!r} with {settings}",
                    wanted=f"one of {', '.join(ROPE_TYPES)}, the same for all layers and for the whole head")
  if kind == "default":
    return float(theta), None
  missing = [key for key in ROPE_TYPES[kind] if not isinstance(settings.get(key), (int, float))]
  if missing:
    raise UserError(f"{name} has rope type {kind!r} without {', '.join(missing)}", wanted=", ".join(ROPE_TYPES[kind]))
  return float(theta), tuple(sorted((settings | {"rope_type": kind}).items()))


def _token_ids(value) -> TokenIds:
  return tuple(value) if isinstance(value, (list, tuple)) else value
