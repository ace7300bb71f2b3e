"""A model in Orbax: written from any Source, and read back as one; a fully trained run's checkpoint reads the same way.

  DIR/checkpoints/STEP/   the leaves by path, and `meta` (run_meta's keys): what a checkpoint of this stack holds anyway
  DIR/config.json ...     beside a converted model: config.json, tokenizer, generation_config.json as in a Hugging Face directory
"""

from __future__ import annotations

import hashlib
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxsft.convert.directory import whole_directory, write_json
from jaxsft.convert.hf import EXPORT_DTYPES, generation_config_of, hf_entries, load_tokenizer, write_tokenizer
from jaxsft.convert.source import Source, open_source
from jaxsft.errors import UserError
from jaxsft.models import families
from jaxsft.models.config import ModelConfig

TRAINED = "trainable."  # in front of the leaves that a run trained (TrainState's field)


def run_meta(cfg: ModelConfig, source: Source | None = None, *, tokenizer: str = "", chat_template: str | None = None, end_of_turn_ids=(),
             lora: dict[str, Any] | None = None, nf4: dict[str, Any] | None = None, witness: dict[str, Any] | None = None) -> dict[str, Any]:
  """What a checkpoint's meta must say so that convert can export it: JSON-able.

  source: the base (None: random weights). tokenizer: its path when it is not the base's. chat_template, end_of_turn_ids: as trained.
  lora: rank, alpha, dropout, rslora of an adapter run; nf4: targets, double_quant where the base was quantised. witness: data/witness.py's row.
  """
  return {"model": cfg.to_hf(), "base": source.identity if source else {}, "generation_config": source.generation_config if source else {},
          "tokenizer": tokenizer, "chat_template": chat_template, "end_of_turn_ids": [int(i) for i in end_of_turn_ids],
          "lora": dict(lora or {}), "nf4": dict(nf4 or {}), "witness": dict(witness or {})}


def open_checkpoints(directory):
  """Checkpoints of DIR, read-only. UserError when there is no whole one."""
  from jaxsft.checkpoint import Checkpoints
  path = pathlib.Path(directory)
  if not (path / "checkpoints").is_dir():
    raise UserError(f"{path} has no checkpoints", wanted="the workdir of a run, or a converted model")
  checkpoints = Checkpoints(path / "checkpoints", read_only=True)
  if not checkpoints.steps():
    raise UserError(f"{path} has no whole checkpoint yet", wanted="a run that has saved once", knob="checkpoint.every lower")
  return checkpoints


def choose_step(checkpoints, step: int | None, directory) -> int:
  """`step`, or the newest. UserError names those there are."""
  steps = checkpoints.steps()
  if step is not None and step not in steps:
    raise UserError(f"{directory} has no checkpoint of step {step}", wanted=f"one of {', '.join(map(str, steps))}", knob="--step")
  return steps[-1] if step is None else step


class OrbaxSource(Source):
  """The parameters in a checkpoint. Held in host memory whole, once; leaves that a run froze are read from its base."""

  def __init__(self, directory, step: int | None = None, name: str = ""):
    self.path = pathlib.Path(directory)
    checkpoints = open_checkpoints(self.path)
    try:
      self.step = choose_step(checkpoints, step, directory)
      leaves, self.meta = checkpoints.read(self.step, _prefix(self.path, checkpoints.meta(self.step)))
    finally:
      checkpoints.close()
    self.config, self.generation_config = self.meta["model"], self.meta["generation_config"]
    self.chat_template = self.meta["chat_template"]
    self.cfg = ModelConfig.from_hf(self.config, f"{directory}'s checkpoint")
    self.leaves = {path.removeprefix(TRAINED).replace(".", "/"): np.asarray(leaf) for path, leaf in leaves.items()}
    self.entries = {hf: (n, layer) for hf, n, layer, _ in hf_entries(self.cfg)}
    frozen = [n.path for n in families.leaves(self.cfg) if n.path not in self.leaves]
    self.base = open_base(self.meta["base"], directory) if frozen else None
    self.identity = {"path": name or str(directory), "revision": str(self.step), "sha256": self._fingerprint()}

  def _fingerprint(self) -> str:
    digest = hashlib.sha256(self.base.identity["sha256"].encode() if self.base else b"")
    for path in sorted(self.leaves):
      leaf = self.leaves[path]
      flat = leaf.reshape(-1)
      digest.update(repr((path, str(leaf.dtype), leaf.shape)).encode() + flat[flat.size // 2:flat.size // 2 + 128].tobytes())
    return digest.hexdigest()

  def names(self) -> list[str]:
    return [hf for hf, (n, _) in self.entries.items() if n.path in self.leaves or (self.base and hf in self.base.names())]

  def shape(self, name: str) -> tuple[int, ...]:
    return self.read(name).shape

  @property
  def stored_bytes(self) -> int:
    return sum(leaf.nbytes for leaf in self.leaves.values()) + (self.base.stored_bytes if self.base else 0)

  def where(self, name: str) -> str:
    return f"{self.path}, step {self.step}"

  def read(self, name: str) -> np.ndarray:
    entry, layer = self.entries.get(name, (None, None))
    if entry is None or (entry.path not in self.leaves and self.base is None):
      raise UserError(f"{self.path} has no tensor {name}", wanted="a checkpoint of the whole model", knob="--step")
    if entry.path not in self.leaves:
      assert self.base is not None
      return self.base.read(name)
    array = self.leaves[entry.path] if layer is None else self.leaves[entry.path][layer]
    return array.T if entry.transpose else array

  def tokenizer(self):
    return run_tokenizer(self.path, self.meta)


def _prefix(path, meta):
  if meta.get("lora"):
    raise UserError(f"{path} holds adapters, no whole model", wanted="a merged model", knob="python -m jaxsft.convert with --merge first")
  return TRAINED if not meta.get("converted") else ""


def open_base(identity: dict[str, str], directory) -> Source:
  """The base that a run started from, refused when it is another by its hash."""
  if not identity:
    raise UserError(f"{directory} started from random weights", wanted="a run with a base model")
  revision = identity.get("revision", "")
  path = pathlib.Path(identity["path"]).expanduser()
  source = OrbaxSource(path, int(revision)) if (path / "checkpoints").is_dir() else open_source(identity["path"], revision)
  check_same_base(source, identity, directory)
  return source


def check_same_base(source: Source, identity: dict[str, str], directory, knob: str = "--base") -> None:
  """UserError when `source` is not the base that `identity` names."""
  if identity.get("sha256") not in (None, "", source.identity["sha256"]):
    raise UserError(f"{source.path} is not the base of {directory}: its hash is {source.identity['sha256'][:12]}",
                    wanted=f"the base with hash {identity['sha256'][:12]} ({identity.get('path')})", knob=knob)


def keep_tokenizer(workdir: pathlib.Path, tokenizer, chat_template: str) -> None:
  """DIR/tokenizer, once: the very tokenizer and template that a run trains with, so that chat and exports need nothing else.

  Without a config.json the folder is nobody's yet: what a refused start left there is made again.
  """
  if not (workdir / "config.json").exists():
    shutil.rmtree(workdir / "tokenizer", ignore_errors=True)
  if not (workdir / "tokenizer").is_dir():
    partial = workdir / ".tokenizer"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write_tokenizer(partial, tokenizer, chat_template)
    partial.rename(workdir / "tokenizer")


def run_tokenizer(directory: pathlib.Path, meta: dict[str, Any]):
  """The tokenizer that a run kept in DIR/tokenizer, else the one it names, else its base's; of a converted model, the one beside it."""
  if (directory / "tokenizer").is_dir():
    return load_tokenizer(directory / "tokenizer")
  if meta.get("converted"):
    return load_tokenizer(directory)
  name = meta["tokenizer"]
  if not name:
    return open_base(meta["base"], directory).tokenizer()
  path = pathlib.Path(name).expanduser()
  if "/" not in name and not path.exists():  # a built-in one, such as "bytes": asking the hub would only take a minute
    raise UserError(f"{directory} trained with the built-in tokenizer {name!r} and kept no copy", wanted=f"{directory}/tokenizer")
  return open_source(name).tokenizer() if name.endswith(".gguf") else load_tokenizer(path)


def write_orbax(out_dir, cfg: ModelConfig, leaves, tokenizer=None, *, dtype: str = "bfloat16", meta: dict[str, Any],
                overwrite: bool = False, check: Callable[[pathlib.Path], Any] | None = None) -> pathlib.Path:
  """Writes a converted model: leaves as in `hf.write_hf`, meta from `run_meta`. Memory: the whole model once, on the host.

  Errors: UserError when out_dir is taken or the disk is too small.
  """
  from jaxsft.checkpoint import Checkpoints
  from jaxsft.convert.load import stack
  from jaxsft.transforms import tree
  kind = EXPORT_DTYPES[dtype]
  shapes = families.shapes(cfg)
  stacked = {n.path: n.stacked for n in families.leaves(cfg)}
  needed = int(sum(np.prod(shape) for shape in shapes.values()) * kind.itemsize * 1.1) + 50_000_000
  with whole_directory(out_dir, overwrite, needed, check) as partial:
    make = stack(kind)
    arrays = {path: make(path, shapes[path][1:] if stacked[path] else shapes[path], shapes[path][0] if stacked[path] else None, read)
              for path, read in leaves}
    checkpoints = Checkpoints(partial / "checkpoints", keep_best=False)
    checkpoints.save(0, tree.unflatten(arrays), {}, meta | {"converted": True})
    checkpoints.wait()
    checkpoints.close()
    write_json(partial / "config.json", cfg.to_hf() | {"dtype": dtype, "torch_dtype": dtype})
    write_json(partial / "generation_config.json", generation_config_of(cfg, tokenizer, meta["generation_config"], meta["end_of_turn_ids"]))
    if tokenizer is not None:
      write_tokenizer(partial, tokenizer, meta["chat_template"])
  return pathlib.Path(out_dir)
