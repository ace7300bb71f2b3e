"""Configs: FILE[:argument] loaded, --config.key=value applied, checked as a whole before any array exists. ml_collections, no jax."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import pathlib
import re
import sys
from typing import Any

from ml_collections import ConfigDict

from jaxsft.errors import UserError, nearest


def load(reference: str) -> ConfigDict:
  """The locked config of "path/to/file.py[:argument]", its get_config(argument).

  Errors: UserError for a missing file or an argument that the file refuses.
  """
  path, _, argument = reference.partition(":")
  if not pathlib.Path(path).is_file():
    raise UserError(f"config file {path!r} does not exist", wanted="a Python file with get_config(arg)", knob="--config")
  sys.path.insert(0, str(pathlib.Path(path).resolve().parent.parent))       # configs import configs.common
  spec = importlib.util.spec_from_file_location("jaxsft_config", path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(argument or None)
  except (ValueError, KeyError) as error:
    raise UserError(f"{path}: {error}", knob="--config=FILE:name=value,...") from None
  except (AttributeError, SyntaxError, ImportError) as error:
    raise UserError(f"{path} is no config ({type(error).__name__}: {error})", wanted="get_config(arg) that fills common.base()", knob="--config") from None
  config.lock()
  return config


def override(config: ConfigDict, key: str, text: str):
  """Sets one key of a locked config from the command line, in the type of its present value.

  Errors: UserError for an unknown key (the nearest named) or a value of another type.
  """
  flat = flatten(config)
  if key not in flat:
    close = nearest(key, flat) or nearest(key.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in flat])
    hint = next((k for k in flat if close and (k == close[0] or k.rsplit(".", 1)[-1] == close[0])), "one of the keys of configs/common.py")
    raise UserError(f"config key {key!r} is unknown", wanted=f"{hint!r} (nearest)", knob=f"--config.{hint}=...")
  *parents, name = key.split(".")
  node = config
  for parent in parents:
    node = node[parent]
  node[name] = _parse(key, text, node[name])


KINDS = {int: "whole number", float: "number", bool: "truth value (true or false)", tuple: "tuple", ConfigDict: "part that a flag can set: write a config file"}


def _parse(key, text, like):
  if isinstance(like, str):
    return text
  kind = type(like)
  try:
    value = {"true": True, "false": False}.get(text.lower(), None) if kind is bool else ast.literal_eval(text)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
      value = float(value)
    if kind is tuple and isinstance(value, (list, str)):
      value = (value,) if isinstance(value, str) else tuple(value)
  except (ValueError, SyntaxError):
    value = (text,) if kind is tuple else None
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    name = KINDS.get(kind, kind.__name__)
    raise UserError(f"--config.{key}={text} is no {name}", wanted=f"a {name}" + f" such as {like!r}" * (like != ()), knob=f"--config.{key}")
  return value


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
  """{"a.b": value} of every leaf; a free-form dict (model.shape) is one leaf."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    path = f"{prefix}{key}"
    if isinstance(value, ConfigDict) and path != "model.shape":
      flat |= flatten(value, f"{path}.")
    else:
      flat[path] = value
  return flat


def to_json(config: ConfigDict) -> str:
  """Stable JSON text of a config: what a workdir keeps and compares."""
  plain = {key: value.to_dict() if isinstance(value, ConfigDict) else value for key, value in flatten(config).items()}
  return json.dumps(plain, indent=1, sort_keys=True)


def differences(saved: str, config: ConfigDict) -> list[str]:
  """'key: then -> now' for each key in which a saved config differs."""
  old, new = json.loads(saved), json.loads(to_json(config))
  return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]


CHOICES = {
    "model.dtype": ("float32", "bfloat16", "float16"), "model.base_dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "xla"), "model.remat": ("full", "dots", "none"),
    "data.train_on": ("assistant", "all"), "data.long_rows": ("drop", "truncate", "error"),
    "neftune.length": ("segment", "row"), "optim.schedule": ("constant", "linear", "cosine", "wsd"), "optim.name": ("adamw",),
    "optim.state": ("float32", "bfloat16_stochastic"),
}
AT_LEAST_ONE = ("batch_size", "micro_batches", "data.length", "loss_chunk", "log.every", "checkpoint.keep", "sample.max_new_tokens")
NOT_NEGATIVE = ("steps", "epochs", "lora.rank", "neftune.alpha", "data.workers", "data.train.rows", "data.eval.rows", "eval.every", "eval.rows",
                "checkpoint.every", "sample.temperature", "optim.warmup", "optim.decay", "optim.final", "optim.weight_decay", "optim.clip_norm")
POSITIVE = ("optim.learning_rate", "optim.eps", "lora.alpha", "method.beta")
SHARES = ("lora.dropout", "data.eval_share", "optim.b1", "optim.b2")
REGEXES = ("lora.targets", "nf4.targets", "freeze", "optim.no_decay")


def _check_numbers(flat: dict[str, Any]):
  ranges = [(AT_LEAST_ONE, "at least 1", lambda x: x >= 1), (NOT_NEGATIVE, "0 or more", lambda x: 0 <= x < math.inf),
            (POSITIVE, "more than 0", lambda x: 0 < x < math.inf), (SHARES, "0 or more and less than 1", lambda x: 0 <= x < 1)]
  for keys, wanted, good in ranges:
    for key in keys:
      if not good(flat[key]):
        raise UserError(f"{key} is {flat[key]}", wanted=wanted, knob=key)


def validate(c: ConfigDict):
  """Refuses what cannot work, with the reason, before any array exists. Errors: UserError."""
  flat = flatten(c)
  for key, allowed in CHOICES.items():
    if flat[key] not in allowed:
      close = nearest(str(flat[key]), allowed)
      raise UserError(f"{key} is {flat[key]!r}", wanted=f"{' | '.join(allowed)}{f' ({close[0]}?)' if close else ''}", knob=key)
  _check_numbers(flat)
  for key in REGEXES:
    try:
      re.compile(flat[key])
    except re.error as error:
      raise UserError(f"{key}={flat[key]!r} is no regular expression ({error})", knob=key) from None
  if c.batch_size % c.micro_batches:
    raise UserError(f"batch_size {c.batch_size} does not divide into {c.micro_batches} micro-batches", wanted="a multiple", knob="batch_size or micro_batches")
  if bool(c.steps) == bool(c.epochs):
    raise UserError(f"steps is {c.steps} and epochs is {c.epochs}", wanted="exactly one of them above 0", knob="steps or epochs")
  if c.nf4.targets and not c.lora.rank:
    raise UserError("full fine-tuning of an NF4 base: 4-bit codes have no gradient", wanted="an adapter (lora.rank) or no quantisation (nf4.targets='')",
                    knob="lora.rank or nf4.targets")
  if c.freeze and c.lora.rank:
    raise UserError("freeze is set and so is lora.rank: with adapters the whole base rests", wanted="one of them", knob="freeze or lora.rank")
  if c.optim.state == "bfloat16_stochastic" and c.lora.rank:
    raise UserError("bfloat16 training state with adapters saves nothing worth its noise", wanted="float32", knob="optim.state")
  if not c.model.path and not len(c.model.shape):
    raise UserError("no model is named", wanted="an HF directory, a GGUF file, a hub id, or a model.shape for random weights", knob="model.path")
  if not c.data.train.path:
    raise UserError("no training data is named", wanted="a file, a directory or a hub id", knob="data.train.path")
