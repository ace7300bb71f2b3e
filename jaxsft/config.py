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
  if not pathlib.Path(path).is_file() or not path.endswith(".py"):
    what = "is no Python file" if pathlib.Path(path).is_file() else "does not exist"
    raise UserError(f"config file {path!r} {what}", wanted="a Python file with get_config(arg)", knob="--config")
  sys.path.insert(0, str(pathlib.Path(path).resolve().parent.parent))       # configs import configs.common
  spec = importlib.util.spec_from_file_location("jaxsft_config", path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(argument or None)
  except (ValueError, KeyError) as error:
    raise UserError(f"{path}: {error}", knob="--config=FILE:name=value,...") from None
  except Exception as error:      # the file is the user's: whatever it raises is told, not traced
    raise UserError(f"{path} is no config ({type(error).__name__}: {error})", wanted="get_config(arg) that fills common.base()", knob="--config") from None
  if not isinstance(config, ConfigDict):
    raise UserError(f"{path}: get_config gave {type(config).__name__}", wanted="the ConfigDict of common.base(), filled", knob="--config")
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
  try:
    old, new = json.loads(saved), json.loads(to_json(config))
  except ValueError:
    old = None
  if not isinstance(old, dict):
    return ["config.json is none of ours"]
  return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]


CHOICES = {
    "model.dtype": ("float32", "bfloat16"),          # float16 would need a scaled loss
    "model.base_dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "xla"), "model.remat": ("full", "dots", "none"),
    "data.train.policy": ("drop", "strict"), "data.eval.policy": ("drop", "strict"),
    "data.train_on": ("assistant", "last", "all"), "data.position": ("pre", "post", "double"),
    "data.long_rows": ("drop", "truncate", "error"),
    "neftune.length": ("segment", "row"), "optim.schedule": ("constant", "linear", "cosine", "wsd"),
    "optim.name": ("adamw", "adafactor", "lion", "muon", "adamw8bit", "schedule_free"),
    "optim.state": ("float32", "bfloat16_stochastic"),
}
AT_LEAST_ONE = ("batch_size", "micro_batches", "data.length", "loss_chunk", "log.every", "checkpoint.keep", "sample.max_new_tokens",
                "optim.spike_window")
NOT_NEGATIVE = ("steps", "epochs", "lora.rank", "neftune.alpha", "data.workers", "data.train.rows", "data.eval.rows", "eval.every", "eval.rows",
                "checkpoint.every", "sample.temperature", "optim.warmup", "optim.decay", "optim.final", "optim.weight_decay", "optim.clip_norm",
                "optim.spike_sigma", "checkpoint.every_minutes")
POSITIVE = ("optim.learning_rate", "optim.eps", "lora.alpha", "method.beta")
SHARES = ("lora.dropout", "data.eval_share", "optim.b1", "optim.b2", "optim.ema")
REGEXES = ("lora.targets", "nf4.targets", "freeze", "optim.no_decay")


def _check_numbers(flat: dict[str, Any]):
  ranges = [(AT_LEAST_ONE, "at least 1", lambda x: x >= 1), (NOT_NEGATIVE, "0 or more", lambda x: 0 <= x < math.inf),
            (POSITIVE, "more than 0", lambda x: 0 < x < math.inf), (SHARES, "0 or more and less than 1", lambda x: 0 <= x < 1)]
  for keys, wanted, good in ranges:
    for key in keys:
      if not good(flat[key]):
        raise UserError(f"{key} is {flat[key]}", wanted=wanted, knob=key)


ROUNDED_STATE = ("adamw", "lion")         # the others keep constants, codes, weights or, Adafactor, next to nothing in their state


def _check_schedule(c: ConfigDict):
  if c.optim.decay > 1:
    raise UserError(f"optim.decay is {c.optim.decay}", wanted="a share of the steps, at most 1", knob="optim.decay")
  if c.steps and c.optim.warmup >= 1 and c.optim.warmup >= c.steps:
    raise UserError(f"optim.warmup is {c.optim.warmup} of {c.steps} steps: the peak learning rate is never reached", wanted="fewer, or a share below 1",
                    knob="optim.warmup or steps")


def _check_optimizer(c: ConfigDict):
  _check_schedule(c)
  if c.optim.state == "bfloat16_stochastic" and c.lora.rank:
    raise UserError("bfloat16 training state with adapters saves nothing worth its noise", wanted="float32", knob="optim.state")
  if c.optim.state == "bfloat16_stochastic" and c.optim.name not in ROUNDED_STATE:
    raise UserError(f"optim.state is bfloat16_stochastic and optim.name {c.optim.name}, whose state is not to be rounded", wanted="float32, or adamw or lion",
                    knob="optim.state or optim.name")
  if c.optim.name == "schedule_free":
    if c.optim.schedule != "constant":
      raise UserError(f"optim.name is schedule_free and optim.schedule {c.optim.schedule}: its average takes the place of a decay", wanted="constant",
                      knob="optim.schedule")
    if c.optim.ema:
      raise UserError("optim.ema is on and schedule_free averages the weights itself", wanted="0", knob="optim.ema")
    if not c.optim.b1:
      raise UserError("optim.b1 is 0 and schedule_free divides by it", wanted="more than 0 (0.9)", knob="optim.b1")
  if c.optim.spike_sigma and c.optim.spike_window < 2:
    raise UserError(f"optim.spike_window is {c.optim.spike_window}: one value has no deviation", wanted="2 or more", knob="optim.spike_window")


def validate(c: ConfigDict):
  """Refuses what cannot work, with the reason, before any array exists. Errors: UserError."""
  flat = flatten(c)
  needed = {*CHOICES, *AT_LEAST_ONE, *NOT_NEGATIVE, *POSITIVE, *SHARES, *REGEXES, "seed", "sample.prompts", "model.path", "data.train.path"}
  if missing := sorted(needed - flat.keys()):
    raise UserError(f"the config lacks {', '.join(missing[:3])}", wanted="common.base(), filled", knob="--config")
  for key, allowed in CHOICES.items():
    if flat[key] not in allowed:
      close = nearest(str(flat[key]), allowed)
      raise UserError(f"{key} is {flat[key]!r}", wanted=f"{' | '.join(allowed)}{f' ({close[0]}?)' if close else ''}", knob=key)
  _check_numbers(flat)
  if max(c.steps, c.steps * c.batch_size) >= 2 ** 31:
    raise UserError(f"{c.steps} steps of {c.batch_size} rows", wanted="fewer than 2147483648 rows in all", knob="steps or batch_size")
  if not 0 <= c.seed < 2 ** 31:
    raise UserError(f"seed is {c.seed}", wanted="0 to 2147483647", knob="seed")
  if not all(isinstance(prompt, str) for prompt in c.sample.prompts):
    raise UserError(f"sample.prompts holds {next(p for p in c.sample.prompts if not isinstance(p, str))!r}", wanted="texts", knob="sample.prompts")
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
  _check_optimizer(c)
  if c.log.wandb and importlib.util.find_spec("wandb") is None:
    raise UserError(f"log.wandb is {c.log.wandb!r} and the package wandb is not installed", wanted="pip install 'jaxsft[wandb]'", knob="log.wandb")
  if not c.model.path and not len(c.model.shape):
    raise UserError("no model is named", wanted="an HF directory, a GGUF file, a hub id, or a model.shape for random weights", knob="model.path")
  if not c.data.train.path:
    raise UserError("no training data is named", wanted="a file, a directory or a hub id", knob="data.train.path")
