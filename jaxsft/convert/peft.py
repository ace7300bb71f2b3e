"""LoRA adapters as the directory that `peft` loads, both ways.

  ours   layers/self_attn/q_proj/kernel/{a [L,in,R], b [L,R,out]}
  peft   base_model.model.model.layers.{l}.self_attn.q_proj.lora_A.weight [R,in], .lora_B.weight [out,R], one pair a layer
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxsft.convert import shards
from jaxsft.convert.directory import read_json, whole_directory, write_json
from jaxsft.errors import UserError
from jaxsft.models import families
from jaxsft.models.config import ModelConfig
from jaxsft.transforms import lora, tree

PREFIX = "base_model.model."
NO_LIMIT = 1 << 62
UNSUPPORTED = ("use_dora", "use_qalora", "use_bdlora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication",
               "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config", "layers_to_transform")


def write_peft(out_dir, adapters: dict[str, Any], cfg: ModelConfig, *, rank: int, alpha: float, dropout: float = 0.0,
               rslora: bool = False, base: dict[str, str] | None = None, nf4: dict[str, Any] | None = None, end_of_turn_ids=(),
               tokenizer=None, chat_template: str | None = None, overwrite: bool = False,
               check: Callable[[pathlib.Path], Any] | None = None) -> pathlib.Path:
  """Writes adapter_config.json and adapter_model.safetensors (float32); gives the path. It appears whole or not at all.

  adapters: nested dict with float32 `a` and `b` at each kernel's path. base: the Source's identity; its path is what peft loads the base
  from. nf4 (targets, double_quant of the base it was trained on) and end_of_turn_ids are noted in jaxsft.json, for a later merge.
  tokenizer, chat_template: as trained, laid beside. Errors: UserError when out_dir is taken or the disk is too small.
  """
  pairs = list(_tensors(adapters, cfg))
  with whole_directory(out_dir, overwrite, sum(array.nbytes for _, array in pairs) + 50_000_000, check) as partial:
    writer = shards.ShardWriter(partial, [(n, a.shape) for n, a in pairs], np.dtype(np.float32), NO_LIMIT, stem="adapter_model")
    try:
      for name, array in pairs:
        writer.write(name, array)
      writer.close()
    finally:
      writer.abandon()
    write_json(partial / "adapter_config.json", _settings(adapters, cfg, rank, alpha, dropout, rslora, base or {}))
    write_json(partial / "jaxsft.json", {"base": base or {}, "nf4": nf4 or {}, "end_of_turn_ids": [int(i) for i in end_of_turn_ids]})
    if tokenizer is not None:
      from jaxsft.convert.hf import write_tokenizer
      write_tokenizer(partial, tokenizer, chat_template)
  return pathlib.Path(out_dir)


def _tensors(adapters, cfg):
  """(peft's name, array in peft's orientation) of every matrix: views of the adapters."""
  table = {n.path: n for n in families.leaves(cfg)}
  for path in lora.kernel_paths(adapters):
    name, pair = table[path], tree.get(adapters, path)
    for key, letter in (("a", "A"), ("b", "B")):
      array = np.asarray(pair[key])
      for layer in range(cfg.num_hidden_layers) if name.stacked else (None,):
        module = name.hf.format(layer=layer).removesuffix(".weight")
        yield f"{PREFIX}{module}.lora_{letter}.weight", (array if layer is None else array[layer]).T


def _settings(adapters, cfg, rank, alpha, dropout, rslora, base):
  table = {n.path: n.hf for n in families.leaves(cfg)}
  modules = [table[path].removesuffix(".weight").rsplit(".", 1)[-1] for path in lora.kernel_paths(adapters)]
  return {"peft_type": "LORA", "task_type": "CAUSAL_LM",
          "base_model_name_or_path": base.get("path"), "revision": base.get("revision") or None,
          "r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora,
          "target_modules": sorted(set(modules)), "bias": "none", "fan_in_fan_out": False,
          "init_lora_weights": True, "inference_mode": True}


def read_peft(directory, cfg: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
  """(adapters, settings) of a peft directory: the tree of numpy float32 `a`, `b` stacked over layers, and what `write_peft` was told.

  Errors: UserError for what is no plain LoRA, for a tensor that is missing, misshapen or belongs to no kernel of `cfg`.
  """
  path = pathlib.Path(directory)
  config = read_json(path / "adapter_config.json", required=True)
  _refuse(path, config)
  file = path / "adapter_model.safetensors"
  if not file.is_file():
    raise UserError(f"{path} has no {file.name}", wanted="an adapter in safetensors", knob="the path of a whole adapter")
  tensors = {re.sub(r"\.default(?=\.weight$)", "", name): t for name, t in shards.read_header(file).items()}
  leaves: dict[str, np.ndarray] = {}
  for name in families.leaves(cfg):
    _read_kernel(name, cfg, config["r"], tensors, file, leaves)
  if tensors or not leaves:
    odd = next(iter(tensors), "nothing")
    raise UserError(f"{file} holds {odd}, which is no LoRA matrix of a kernel of this {cfg.model_type}", wanted="an adapter of this model",
                    knob="model.path to the adapter's base")
  return tree.unflatten(leaves), read_settings(path)


def read_settings(directory) -> dict[str, Any]:
  """rank, alpha, dropout, rslora, base, nf4, end_of_turn_ids of a peft directory; `peft` itself notes less."""
  path = pathlib.Path(directory)
  config, notes = read_json(path / "adapter_config.json", required=True), read_json(path / "jaxsft.json")
  _refuse(path, config)
  base = {"path": config.get("base_model_name_or_path") or "", "revision": config.get("revision") or ""}
  return {"rank": config["r"], "alpha": float(config.get("lora_alpha", 8)), "dropout": float(config.get("lora_dropout", 0.0)),
          "rslora": bool(config.get("use_rslora", False)), "base": notes.get("base") or base, "nf4": notes.get("nf4", {}),
          "end_of_turn_ids": notes.get("end_of_turn_ids", [])}


def _refuse(path, config):
  odd = [key for key in UNSUPPORTED if config.get(key)]
  whole = isinstance(config.get("r"), int) and config["r"] > 0
  if config.get("peft_type") != "LORA" or odd or config.get("bias", "none") != "none" or not whole:
    what = ", ".join(odd) or ", ".join(f"{key} {config.get(key)}" for key in ("peft_type", "bias", "r"))
    raise UserError(f"{path} is no plain LoRA adapter ({what})", wanted="LoRA of one rank on every layer, without biases or other extras")


def _read_kernel(name, cfg, rank, tensors, file, leaves):
  """Takes the matrices of one kernel out of `tensors` into `leaves`, when the first of them is there."""
  sizes = families.sizes(cfg)
  layers = range(cfg.num_hidden_layers) if name.stacked else (None,)
  module = name.hf.removesuffix(".weight")
  keys = {(k, layer): f"{PREFIX}{module.format(layer=layer)}.lora_{k.upper()}.weight" for k in "ab" for layer in layers}
  if not name.path.endswith("/kernel") or not any(key in tensors for key in keys.values()):
    return
  shapes = {"a": (rank, sizes[name.dims[0]]), "b": (sizes[name.dims[-1]], rank)}
  for letter in "ab":
    arrays = []
    for layer in layers:
      key = keys[letter, layer]
      found = tensors.pop(key, None)
      if found is None or found.shape != shapes[letter]:
        raise UserError(f"{file}: {key} {'is missing' if found is None else f'has shape {found.shape}'}", wanted=f"shape {shapes[letter]}",
                        knob="model.path to the adapter's base")
      arrays.append(shards.read_tensor(found).T.astype(np.float32))
    leaves[f"{name.path}/{letter}"] = np.stack(arrays) if name.stacked else arrays[0]
