"""ModelConfig: the shape and constants of a decoder, with the names and meaning of Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from jaxsft.errors import UserError
from jaxsft.models.families import FAMILIES
from jaxsft.models.kinds import Kind
from jaxsft.models.rope import ROPE_TYPES

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
  partial_rotary_factor: float = 1.0          # the share of a head that turns
  rope_local_base_freq: float = 10000.0       # theta of sliding layers, where a family gives them their own
  attn_logit_softcapping: float | None = None
  final_logit_softcapping: float | None = None
  query_pre_attn_scalar: float | None = None  # attention's scale is its inverse root; None: head_dim's
  layer_kinds: tuple[Kind, ...] = ()          # what each layer sees; () is full attention everywhere
  bos_token_id: TokenIds = None
  eos_token_id: TokenIds = None
  pad_token_id: TokenIds = None
  extra: str = dataclasses.field(default="{}", compare=False, repr=False)  # JSON of the keys of the source that are not above

  def __post_init__(self):
    if not self.layer_kinds:
      object.__setattr__(self, "layer_kinds", (Kind(),) * self.num_hidden_layers)

  @property
  def rope_parameters(self) -> dict[str, Any]:
    """{"rope_type", "rope_theta", and what the type needs}, as transformers 5 spells it."""
    return {"rope_type": "default"} | {k: list(v) if isinstance(v, tuple) else v for k, v in self.rope_scaling or ()} | {"rope_theta": self.rope_theta}

  @classmethod
  def from_hf(cls, config: dict[str, Any], name: str = "config.json") -> ModelConfig:
    """Reads a parsed config.json; `name` stands in the messages. UserError for what is missing, unsupported or does not fit."""
    family = _family(config, name)
    values = {**family.defaults, **{k: v for k, v in config.items() if v is not None or k in _NULL_MEANS_OFF}}
    _refuse(values, family, name)
    rest: dict[str, Any] = _read_rope(values, name) | {k: _token_ids(values.get(k)) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    rest |= {k: values[k] for k in _SOFTCAPS if family.softcaps}
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
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        attention_bias=bias,
        attention_out_bias=bias and family.attention_out_bias,
        mlp_bias=bool(values.get("mlp_bias", False)) and family.mlp_bias,
        max_position_embeddings=_whole(values, "max_position_embeddings", name),
        initializer_range=float(values.get("initializer_range", 0.02)),
        query_pre_attn_scalar=values.get("query_pre_attn_scalar"),
        layer_kinds=_layer_kinds(family, values, name),
        extra=json.dumps({k: v for k, v in config.items() if k not in _KNOWN}),
        **rest)
    if heads % cfg.num_key_value_heads or ("head_dim" not in values and width % heads):
      raise UserError(f"{name} has hidden_size {width}, {heads} query heads and {cfg.num_key_value_heads} key/value heads",
                      wanted="numbers that divide")
    return cfg

  def to_hf(self) -> dict[str, Any]:
    """config.json as a dict: the source's unknown keys, then ours. RoPE is written in both spellings (transformers 4 and 5)."""
    family = FAMILIES[self.model_type]
    out = json.loads(self.extra) | {"architectures": [family.architecture], family.activation_key: family.activation}
    for field in dataclasses.fields(self):
      if field.name not in _WRITTEN_APART and not (field.name in _SOME_FAMILIES and field.name not in family.defaults):
        value = getattr(self, field.name)
        out[field.name] = list(value) if isinstance(value, tuple) else value
    if family.attention_bias is None:
      out["attention_bias"] = self.attention_bias
    if family.mlp_bias:
      out["mlp_bias"] = self.mlp_bias
    scaling = {k: v for k, v in self.rope_parameters.items() if k != "rope_theta"}
    if self.partial_rotary_factor != 1.0:
      out["partial_rotary_factor"] = scaling["partial_rotary_factor"] = self.partial_rotary_factor
    out["rope_scaling"] = scaling if self.rope_scaling else None
    whole = scaling | {"rope_theta": self.rope_theta}
    local = {"rope_type": "default", "rope_theta": self.rope_local_base_freq}
    out["rope_parameters"] = {"full_attention": whole, "sliding_attention": local} if family.defaults.get("two_ropes") else whole
    return out


_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_NULL_MEANS_OFF = ("sliding_window", "bos_token_id", "eos_token_id", "pad_token_id", *_SOFTCAPS)      # of other keys a null means the family's default
_SOME_FAMILIES = (*_SOFTCAPS, "query_pre_attn_scalar", "rope_local_base_freq")
# layer_kinds is read from keys that stay in `extra`: sliding_window, layer_types, no_rope_layers ...
_WRITTEN_APART = ("extra", "rope_scaling", "attention_out_bias", "attention_bias", "mlp_bias", "layer_kinds", "partial_rotary_factor")
_KNOWN = {f.name for f in dataclasses.fields(ModelConfig)} - {"extra", "attention_out_bias", "layer_kinds"} | {"rope_parameters"}
_KNOWN |= {"quantization_config"}       # of the files, not of the model: what is written out is not quantised


def _family(config, name):
  model_type = config.get("model_type")
  if model_type not in FAMILIES:
    raise UserError(f"{name} has model_type {model_type!r}", wanted=f"one of {', '.join(sorted(FAMILIES))}",
                    knob="model.path to such a model")
  return FAMILIES[model_type]


def _refuse(values, family, name):
  """What this decoder would silently compute wrongly."""
  activation = values.get(family.activation_key, family.activation)
  if activation != family.activation and {activation, family.activation} != {"silu", "swish"}:
    raise UserError(f"{name} has {family.activation_key} {activation!r}", wanted=family.activation)
  if values.get("use_bidirectional_attention"):
    raise UserError(f"{name} has use_bidirectional_attention true", wanted="a causal model", knob="model.path to such a model")
  if quantised := values.get("quantization_config"):
    _refuse_quantised(quantised, name)


def _refuse_quantised(settings, name):
  """All but bitsandbytes' NF4, which convert/bitsandbytes.py reads as it is."""
  eight, four = (settings.get(key) or settings.get(f"_{key}") for key in ("load_in_8bit", "load_in_4bit"))
  method = settings.get("quant_method") or ("bitsandbytes" if four or eight else "unknown")       # transformers 4.30 left the method out
  kind = settings.get("bnb_4bit_quant_type", "fp4") if four else "8 bits" if eight else ""
  if method != "bitsandbytes" or kind != "nf4":
    raise UserError(f"{name} says its weights are quantised ({' '.join(filter(None, (method, kind)))})",
                    wanted="float32, float16 or bfloat16 weights, or bitsandbytes' nf4",
                    knob="model.path to the unquantised model and nf4.targets to quantise here")


def _whole(values, key, name, default=None):
  value = values.get(key)
  value = default if value is None else value
  if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
    raise UserError(f"{name} has {key} {value!r}", wanted="a whole number above 0")
  return value


def _layer_kinds(family, values, name):
  layers = _whole(values, "num_hidden_layers", name)
  try:
    found = family.kinds(values, layers)
  except (IndexError, KeyError, TypeError) as error:
    raise UserError(f"{name} does not say what each of its {layers} layers sees ({error!r})", wanted="layer_types, or what its family makes them of") from None
  windows = {kind.window for kind in found} - {None}
  if len(found) != layers or any(not isinstance(window, int) or window < 1 for window in windows):
    raise UserError(f"{name} describes {len(found)} layers with windows {sorted(windows, key=str)}", wanted=f"{layers}, and whole numbers above 0",
                    knob="layer_types, sliding_window or no_rope_layers in it")
  return found


def _read_rope(values, name):
  """The RoPE fields of ModelConfig, from transformers 5's rope_parameters or from rope_theta + rope_scaling."""
  given, local = dict(values.get("rope_parameters") or {}), {}
  if values.get("two_ropes") and "full_attention" in given:
    given, local = dict(given["full_attention"]), dict(given.get("sliding_attention") or {})
  settings = given | dict(values.get("rope_scaling") or {})
  theta = settings.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
  old_name = settings.pop("type", None)
  kind = settings.pop("rope_type", None) or old_name or "default"
  if values["model_type"] == "phi3" and kind in ("su", "yarn"):         # older names of the same thing in this family's files
    kind = "longrope"
  partial = settings.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor") or 1.0
  plain = all(item.get("rope_type", "default") == "default" for item in [local])
  nested = any(isinstance(v, dict) for v in settings.values())          # one setting a layer type: other families
  if kind not in ROPE_TYPES or not isinstance(theta, (int, float)) or nested or not plain:
    raise UserError(f"{name} has rope type {kind!r} with {settings}", wanted=f"one of {', '.join(ROPE_TYPES)}, the same for all layers")
  out = {"rope_theta": float(theta), "partial_rotary_factor": float(partial),
         "rope_local_base_freq": float(local.get("rope_theta") or values.get("rope_local_base_freq") or 10000.0)}
  return out if kind == "default" else out | {"rope_scaling": _scaling(settings, kind, values, name)}


def _scaling(settings, kind, values, name):
  """Sorted items of a scaled type, everything it needs inside."""
  if "original_max_position_embeddings" in ROPE_TYPES[kind] and kind != "llama3":
    settings.setdefault("original_max_position_embeddings", values.get("original_max_position_embeddings") or values.get("max_position_embeddings"))
  missing = [key for key in ROPE_TYPES[kind] if not isinstance(settings.get(key), (int, float, list))]
  if missing:
    raise UserError(f"{name} has rope type {kind!r} without {', '.join(missing)}", wanted=", ".join(ROPE_TYPES[kind]))
  frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
  return tuple(sorted((frozen | {"rope_type": kind}).items()))


def _token_ids(value) -> TokenIds:
  return tuple(value) if isinstance(value, (list, tuple)) else value
