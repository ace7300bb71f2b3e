"""Hugging Face model directories: read lazily, written leaf by leaf and all or nothing."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from jaxsft.convert import bitsandbytes, shards
from jaxsft.convert.directory import read_json, whole_directory, write_json
from jaxsft.convert.source import Source
from jaxsft.errors import UserError
from jaxsft.models import families
from jaxsft.models.config import ModelConfig

EXPORT_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
SHARD_BYTES = 5_000_000_000
Read = Callable[[int | None], np.ndarray]


class HFSource(Source):
  """A directory with config.json and safetensors, bitsandbytes' NF4 among them. `name` is what the user called it, `revision` the hub's commit."""

  def __init__(self, path: pathlib.Path, name: str = "", revision: str = ""):
    self.path = path
    self.config = read_json(path / "config.json", required=True)
    self.generation_config = read_json(path / "generation_config.json")
    self.tensors = _find_tensors(path)
    self.quantised, self._parts = bitsandbytes.find(self.tensors)
    self.nf4 = {name: weight.double for name, weight in self.quantised.items()}
    self.chat_template = chat_template_of(path)
    self.identity = {"path": name or str(path), "revision": revision, "sha256": shards.fingerprint(self.tensors)}

  def names(self) -> list[str]:
    return [name for name in self.tensors if name not in self._parts]

  def _tensor(self, name):
    if name not in self.tensors:
      raise UserError(f"{self.path} has no tensor {name}", wanted="the model that its config.json describes",
                      knob="model.path to a whole model")
    return self.tensors[name]

  def shape(self, name: str) -> tuple[int, ...]:
    return self.quantised[name].shape if name in self.quantised else self._tensor(name).shape

  @property
  def stored_bytes(self) -> int:
    return sum(tensor.end - tensor.start for tensor in self.tensors.values())

  def where(self, name: str) -> str:
    return str(self._tensor(name).file)

  def read(self, name: str) -> np.ndarray:
    return bitsandbytes.dequantised(self.quantised[name]) if name in self.quantised else shards.read_tensor(self._tensor(name))

  def read_nf4(self, name: str):
    return bitsandbytes.stored(self.quantised[name])

  def tokenizer(self):
    return load_tokenizer(self.path)


def load_tokenizer(path: pathlib.Path):
  """The fast tokenizer of a directory, from local files alone, or of a hub id. UserError when there is none or it does not load."""
  from transformers import AutoTokenizer
  found = [n for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json") if (path / n).is_file()]
  if path.exists() and not found:
    raise UserError(f"{path} has no tokenizer", wanted="tokenizer.json or tokenizer.model in it", knob="data.tokenizer")
  try:
    tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=path.exists(), trust_remote_code=False)
  except Exception as error:  # the loaders raise whatever the broken file makes them raise
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(f"the tokenizer {path} does not load ({reason})", wanted="a tokenizer that transformers reads",
                    knob="data.tokenizer") from None
  if not tokenizer.is_fast:
    raise UserError(f"the tokenizer {path} is a slow one", wanted="one with character offsets (tokenizer.json)", knob="data.tokenizer")
  return tokenizer


def _find_tensors(path: pathlib.Path) -> dict[str, shards.Tensor]:
  """{name: Tensor} of model.safetensors or of the files that its index names."""
  index = path / "model.safetensors.index.json"
  if (path / "model.safetensors").is_file():
    return shards.read_header(path / "model.safetensors")
  if index.is_file():
    return _sharded(path, index)
  others = sorted(p.name for p in path.glob("*.safetensors")) or sorted(p.name for p in path.glob("*.bin"))
  seen = f"only {', '.join(others[:3])}" if others else "no weights"
  raise UserError(f"{path} has {seen}", wanted="model.safetensors, or model.safetensors.index.json and its files", knob="model.path")


def _sharded(path, index):
  where = read_json(index).get("weight_map")
  if not isinstance(where, dict):
    raise UserError(f"{index} has no weight_map", wanted="a whole file", knob="model.path to a whole copy")
  files = {}
  for name in sorted(set(where.values())):
    if not (path / name).is_file():
      raise UserError(f"{path} lacks {name}, which {index.name} names", wanted=f"all {len(set(where.values()))} files",
                      knob="model.path to a whole copy")
    files[name] = shards.read_header(path / name)
  lost = [name for name, file in where.items() if name not in files[file]]
  if lost:
    raise UserError(f"{path / where[lost[0]]} lacks tensor {lost[0]}, which {index.name} puts there", wanted="a whole file",
                    knob="model.path to a whole copy")
  return {name: files[file][name] for name, file in where.items()}


def chat_template_of(path: pathlib.Path) -> str | None:
  """chat_template.jinja, else the template in tokenizer_config.json (the one named "default" of several)."""
  if (path / "chat_template.jinja").is_file():
    return (path / "chat_template.jinja").read_text(encoding="utf-8")
  template = read_json(path / "tokenizer_config.json").get("chat_template")
  if isinstance(template, list):
    template = {t["name"]: t["template"] for t in template}.get("default")
  return template


def write_hf(out_dir, cfg: ModelConfig, leaves: Iterable[tuple[str, Read]], tokenizer=None, *, dtype: str = "bfloat16",
             overwrite: bool = False, check: Callable[[pathlib.Path], Any] | None = None, **contents) -> pathlib.Path:
  """Writes a model directory that transformers loads; gives its path. It appears whole or not at all: `check` may still refuse it.

  The rest is `write_into`'s. Errors: UserError when out_dir is taken and overwrite is off, when the disk is too small.
  """
  if dtype not in EXPORT_DTYPES:
    raise UserError(f"dtype {dtype!r}", wanted=f"one of {', '.join(EXPORT_DTYPES)}", knob="--dtype")
  with whole_directory(out_dir, overwrite, _bytes_needed(cfg, EXPORT_DTYPES[dtype]), check) as partial:
    write_into(partial, cfg, leaves, tokenizer, dtype=dtype, **contents)
  return pathlib.Path(out_dir)


def write_into(directory: pathlib.Path, cfg: ModelConfig, leaves: Iterable[tuple[str, Read]], tokenizer=None, *, dtype: str = "bfloat16",
               chat_template: str | None = None, generation_config: dict[str, Any] | None = None, end_of_turn_ids: Iterable[int] = (),
               max_shard_bytes: int = SHARD_BYTES) -> None:
  """Writes a model's files into a directory that exists.

  leaves: (path, read) in any order; read(layer) gives that layer's array, read(None) an unstacked leaf, both in OUR orientation.
  chat_template: the template that was trained (None: the tokenizer's own). end_of_turn_ids go into generation_config's eos_token_id beside
  those of the model. Memory: one layer of one leaf. Errors: UserError when float16 overflows.
  """
  write_json(directory / "config.json", cfg.to_hf() | {"dtype": dtype, "torch_dtype": dtype})
  _write_weights(directory, cfg, leaves, EXPORT_DTYPES[dtype], max_shard_bytes)
  if tokenizer is not None:
    write_tokenizer(directory, tokenizer, chat_template)
  write_json(directory / "generation_config.json", generation_config_of(cfg, tokenizer, generation_config or {}, end_of_turn_ids))


def _write_weights(directory, cfg, leaves, dtype, limit):
  table = {n.path: n for n in families.leaves(cfg)}
  entries = [(hf, shape) for hf, _, _, shape in hf_entries(cfg)]
  writer = shards.ShardWriter(directory, entries, dtype, limit)
  try:
    for path, read in leaves:
      name = table[path]
      for layer in range(cfg.num_hidden_layers) if name.stacked else (None,):
        array = read(layer)
        writer.write(name.hf.format(layer=layer), array.T if name.transpose else array)
    writer.close()
  finally:
    writer.abandon()


def hf_entries(cfg: ModelConfig) -> Iterator[tuple[str, families.Name, int | None, tuple[int, ...]]]:
  """(HF name, Name, layer or None, HF shape) of every tensor, layer after layer as the forward pass meets them."""
  size = families.sizes(cfg)
  names = list(families.leaves(cfg))
  stacked = [i for i, n in enumerate(names) if n.stacked]
  first, last = stacked[0], stacked[-1] + 1
  order: list[tuple[families.Name, int | None]] = [(n, None) for n in names[:first]]
  order += [(n, layer) for layer in range(cfg.num_hidden_layers) for n in names[first:last]]
  order += [(n, None) for n in names[last:]]
  for name, layer in order:
    shape = tuple(size[d] for d in name.dims)
    yield name.hf.format(layer=layer), name, layer, shape[::-1] if name.transpose else shape


def _bytes_needed(cfg, dtype):
  return sum(int(np.prod(shape)) for *_, shape in hf_entries(cfg)) * dtype.itemsize + 50_000_000  # and the tokenizer's files


def write_tokenizer(directory: pathlib.Path, tokenizer, chat_template: str | None = None) -> None:
  """The tokenizer's files, with `chat_template` in place of its own, readable by transformers 4 and 5 alike."""
  own = tokenizer.chat_template
  try:
    tokenizer.chat_template = own if chat_template is None else chat_template
    tokenizer.save_pretrained(str(directory))
    template = tokenizer.chat_template
  finally:
    tokenizer.chat_template = own
  settings = read_json(directory / "tokenizer_config.json")
  if settings.get("tokenizer_class") == "TokenizersBackend":  # a name that only transformers 5 knows
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
  if isinstance(template, str):  # beside chat_template.jinja, for readers that look only here
    settings["chat_template"] = template
  write_json(directory / "tokenizer_config.json", settings)
  spm = pathlib.Path(str(tokenizer.name_or_path)) / "tokenizer.model"
  if spm.is_file() and not (directory / "tokenizer.model").exists():
    shutil.copy(spm, directory / "tokenizer.model")


def _end_ids(cfg, tokenizer, generation, extra):
  """Every id that ends a turn, first the ones trained here: in order, each once."""
  groups = [tuple(extra), generation.get("eos_token_id"), cfg.eos_token_id, getattr(tokenizer, "eos_token_id", None)]
  flat = [i for g in groups if g is not None for i in (g if isinstance(g, (list, tuple)) else (g,))]
  return list(dict.fromkeys(int(i) for i in flat))


def generation_config_of(cfg, tokenizer, base, end_of_turn_ids) -> dict[str, Any]:
  """generation_config.json: the source's own, its eos_token_id every id that ends a turn."""
  stops = _end_ids(cfg, tokenizer, base, end_of_turn_ids)
  out = {"bos_token_id": cfg.bos_token_id, "pad_token_id": cfg.pad_token_id} | base
  return {k: v for k, v in out.items() if v is not None} | ({"eos_token_id": stops} if stops else {})
