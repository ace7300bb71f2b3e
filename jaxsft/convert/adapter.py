"""A trained adapter, of a run's workdir or a peft directory, with all that a merge or an export of it needs."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxsft.convert import load, merge, orbax, peft
from jaxsft.convert.hf import chat_template_of
from jaxsft.convert.source import Source, open_source
from jaxsft.errors import UserError
from jaxsft.models.config import ModelConfig
from jaxsft.transforms import lora, nf4, tree


@dataclasses.dataclass
class Adapter:
  """adapters: nested dict of float32 `a`, `b`. lora: rank, alpha, dropout, rslora. nf4: targets and double_quant of the base, or empty.

  identity: of the base, which is opened when it is first needed, from `base_path` if that is given; UserError when it is another.
  """
  path: pathlib.Path
  adapters: dict[str, Any]
  cfg: ModelConfig
  identity: dict[str, str]
  base_path: str
  lora: dict[str, Any]
  nf4: dict[str, Any]
  meta: dict[str, Any] = dataclasses.field(default_factory=dict)   # of the run; empty for a peft directory
  chat_template: str | None = None
  end_of_turn_ids: tuple[int, ...] = ()
  step: int | None = None

  @functools.cached_property
  def base(self) -> Source:
    return _base(self.identity, self.base_path, self.path)

  @property
  def scale(self) -> float:
    return lora.scaling(self.lora["rank"], self.lora["alpha"], self.lora["rslora"])

  def tokenizer(self):
    """The run's tokenizer, else the base's."""
    own = self.meta.get("tokenizer") or (self.path / "tokenizer").is_dir()
    return orbax.run_tokenizer(self.path, self.meta) if own else self.base.tokenizer()

  def base_leaves(self, weights: str) -> Iterator[tuple[str, Any]]:
    """(path, read) of the base: "original" as stored, "nf4" as the quantised weights it was trained on stand for."""
    targets = self.nf4.get("targets", "") if weights == "nf4" else ""
    for path, _, _, read in load.leaf_reads(self.base, self.cfg):
      yield path, _through_nf4(read, self.nf4["double_quant"]) if load.wants_nf4(targets, path) else read

  def merged_leaves(self, weights: str) -> merge.Leaves:
    """(path, read) of the merged model, float32 where there is an adapter."""
    load.check_tensors(self.base, self.cfg)
    return merge.merged(self.base_leaves(weights), self.adapters, self.scale)


def _through_nf4(read, double_quant):
  def read_dequantised(layer: int | None) -> np.ndarray:
    return np.asarray(nf4.dequantise(read.as_nf4(layer, double_quant)))
  return read_dequantised


def is_adapter(directory: pathlib.Path) -> bool:
  """Whether a peft directory lies there, or a workdir whose run trained adapters."""
  if (directory / "adapter_config.json").is_file():
    return True
  if not (directory / "checkpoints").is_dir():
    return False
  checkpoints = orbax.open_checkpoints(directory)
  try:
    return bool(checkpoints.meta(checkpoints.steps()[-1]).get("lora"))
  finally:
    checkpoints.close()


def open_adapter(directory, step: int | None = None, base: str = "") -> Adapter:
  """The adapter at `directory`; `base` instead of the path of the base that was noted."""
  path = pathlib.Path(directory)
  if (path / "adapter_config.json").is_file():
    if step is not None:
      raise UserError(f"{path} is a peft directory: it has no checkpoints", wanted="no --step", knob="--step")
    return _from_peft(path, base)
  checkpoints = orbax.open_checkpoints(path)
  try:
    step = orbax.choose_step(checkpoints, step, directory)
    leaves, meta = checkpoints.read(step, orbax.TRAINED)
  finally:
    checkpoints.close()
  adapters = tree.unflatten({name.removeprefix(orbax.TRAINED).replace(".", "/"): np.asarray(leaf) for name, leaf in leaves.items()})
  return Adapter(path, adapters, ModelConfig.from_hf(meta["model"], f"{directory}'s checkpoint"), meta["base"], base, meta["lora"],
                 meta["nf4"], meta, meta["chat_template"], tuple(meta["end_of_turn_ids"]), step)


def _from_peft(path, base):
  settings = peft.read_settings(path)
  source = _base(settings["base"], base, path)
  cfg = ModelConfig.from_hf(source.config, f"{source.path}/config.json")
  adapters, _ = peft.read_peft(path, cfg)
  settings_lora = {key: settings[key] for key in ("rank", "alpha", "dropout", "rslora")}
  return Adapter(path, adapters, cfg, settings["base"], base, settings_lora, settings["nf4"], chat_template=chat_template_of(path),
                 end_of_turn_ids=tuple(settings["end_of_turn_ids"]))


def _base(identity, override, directory) -> Source:
  if not override and not identity.get("path"):
    raise UserError(f"{directory} does not say what its base is (a smoke run's is random: it can be resumed, and no more)", wanted="the base model",
                    knob="--base")
  try:
    source = open_source(override) if override else orbax.open_base(identity, directory)
  except UserError as error:
    raise error.at("--base to where the base lies now") from None
  if override:
    orbax.check_same_base(source, identity, directory)
  return source
