"""Any model at rest made ready to answer: a run's workdir, a peft or Hugging Face directory, a GGUF file, a hub id."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import psutil
from ml_collections import ConfigDict

from jaxsft import base as bases
from jaxsft import sharding
from jaxsft.convert import orbax
from jaxsft.convert.adapter import Adapter, is_adapter, open_adapter
from jaxsft.convert.load import check_tokenizer
from jaxsft.convert.source import open_source
from jaxsft.data.template import Refused, Template, get_template
from jaxsft.data.tokenise import encode_prompt
from jaxsft.errors import UserError
from jaxsft.generate import Generator, make_generator, prepare, stop_ids
from jaxsft.models import families
from jaxsft.models.config import ModelConfig
from jaxsft.transforms import lora


class Model(NamedTuple):
  """Weights on the device, and all that turns messages into tokens and says where an answer ends."""
  cfg: ModelConfig
  params: Any
  tokenizer: Any
  template: Template
  stop_ids: tuple[int, ...]
  generator: Generator

  def encode(self, messages) -> list[int]:
    """Ids of a conversation with the generation prompt. Errors: UserError where the template does not render it."""
    try:
      return encode_prompt(messages, self.template, self.tokenizer)
    except Refused as refused:
      raise UserError(f"the chat template refuses this conversation ({refused})", wanted="roles and contents that it renders") from None


def open_model(path: str, *, step: int | None = None, base: str = "", template: str = "tokenizer", dtype: str = "",
               exact: bool = False) -> Model:
  """The model at `path` on the first device.

  step: which checkpoint of a run (None: the newest). base: where an adapter's base lies now. template: "tokenizer" is the one that the run
  trained with, else the model's own; or a named one. dtype of weights and products, default float32 on a CPU and bfloat16 elsewhere.
  A QLoRA run's weights are dequantised and merged once when memory allows (`generate.prepare`: faster, and equal to rounding); `exact`
  computes as training did. Errors: UserError for what is no model, has no tokenizer or no chat template, and for a base that is another.
  """
  place = pathlib.Path(path).expanduser()
  adapter = open_adapter(place, step, base) if place.is_dir() and is_adapter(place) else None
  if base and adapter is None:
    raise UserError(f"{path} is no adapter", wanted="no --base, or the workdir of an adapter run", knob="--base")
  source = adapter.base if adapter else _whole_model(path, place, step)
  cfg = adapter.cfg if adapter else ModelConfig.from_hf(source.config, path)
  tokenizer = (adapter or source).tokenizer()
  check_tokenizer(tokenizer, cfg)
  trained = (adapter or source).chat_template
  if trained is not None:
    tokenizer.chat_template = trained
  run = adapter.meta if adapter else getattr(source, "meta", {})
  template_ = get_template(template, tokenizer, run.get("position", "pre"))
  ends = adapter.end_of_turn_ids if adapter else getattr(source, "meta", {}).get("end_of_turn_ids", ())
  dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  params = _params(cfg, source, adapter, tokenizer, dtype, exact)
  return Model(cfg, params, tokenizer, template_, stop_ids(template_, source, cfg, tokenizer, tuple(ends)), make_generator(cfg, dtype))


def _whole_model(path, place, step):
  if (place / "checkpoints").is_dir():
    return orbax.OrbaxSource(place, step)
  if step is not None:
    raise UserError(f"{path} has no checkpoints", wanted="no --step, or the workdir of a run", knob="--step")
  return open_source(path)


def _params(cfg, source, adapter: Adapter | None, tokenizer, dtype, exact):
  quantised = dict(adapter.nf4) if adapter else {}
  c = ConfigDict(dict(seed=0, model=dict(base_dtype=dtype), nf4=quantised or dict(targets="", double_quant=True)))
  mesh = sharding.make_mesh(ConfigDict(dict(data=1, fsdp=1, tensor=1)), jax.devices()[:1])
  params = bases.load(c, bases.Base(cfg, source, tokenizer), mesh)
  if adapter is None:
    return params
  params = lora.attach(params, sharding.place(adapter.adapters, mesh), adapter.scale)
  return prepare(params, dtype) if quantised and not exact and _fits(cfg, dtype) else params


def _fits(cfg, dtype) -> bool:
  """Whether the plain weights fit beside the quantised ones, with a tenth to spare."""
  needed = 1.1 * sum(np.prod(shape) for shape in families.shapes(cfg).values()) * jax.numpy.dtype(dtype).itemsize
  device = jax.devices()[0]
  if device.platform == "cpu":
    return bool(needed < psutil.virtual_memory().available)
  stats = device.memory_stats() or {}
  return bool(needed < stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0))
