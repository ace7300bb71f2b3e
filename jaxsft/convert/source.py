"""Where a model comes from: a Hugging Face directory, a GGUF file or a hub id, all read through one Source."""

from __future__ import annotations

import abc
import os
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsft.errors import UserError

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

  from jaxsft.transforms.nf4 import NF4Array

WEIGHTS = "*.safetensors"
HUB_FILES = [WEIGHTS, "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]  # no pickles
HUB_SKIPPED = ["*/*", "consolidated*", "pytorch_model*", "*.bin", "*.pth"]            # other formats of the same weights


class Source(abc.ABC):
  """A model at rest. Names, shapes and orientation are Hugging Face's whatever the format."""
  path: pathlib.Path           # the directory or file itself
  config: dict[str, Any]       # in config.json's form
  identity: dict[str, str]     # {"path", "revision", "sha256"}: the hash is cheap (shards.fingerprint) and does not depend on the path
  generation_config: dict[str, Any]
  chat_template: str | None
  nf4: Mapping[str, bool] = MappingProxyType({})     # tensors that are held in NF4, and whether doubly quantised

  @abc.abstractmethod
  def names(self) -> list[str]:
    """Every tensor's name."""

  @abc.abstractmethod
  def shape(self, name: str) -> tuple[int, ...]:
    """One tensor's shape, without reading it. UserError when it is not there."""

  @property
  @abc.abstractmethod
  def stored_bytes(self) -> int:
    """Bytes of all tensors at rest, as they are read."""

  @abc.abstractmethod
  def where(self, name: str) -> str:
    """The file a tensor lies in, for messages."""

  @abc.abstractmethod
  def read(self, name: str) -> np.ndarray:
    """One tensor in the file's dtype (bfloat16 is ml_dtypes'), mapped, not copied, where that is possible; what is quantised in float32.

    Errors: UserError when it is absent.
    """

  def read_nf4(self, name: str) -> NF4Array:
    """A tensor of `nf4` as the kernel [in, out] it is in OUR orientation, codes and scales to the bit as they lie in the file."""
    raise KeyError(name)

  @abc.abstractmethod
  def tokenizer(self) -> PreTrainedTokenizerFast:
    """The model's own tokenizer, chat template included. UserError when there is none."""


def open_source(path: str | os.PathLike[str], revision: str = "") -> Source:
  """The model at `path`: an HF directory, a .gguf file, a hub id ("org/name", fetched once, never a pickle), or what is in Orbax.

  Errors: UserError for a path that is none of these.
  """
  from jaxsft.convert.gguf import GGUFSource, is_gguf
  from jaxsft.convert.hf import HFSource
  text = os.fspath(path)
  local = pathlib.Path(text).expanduser()
  if not text:
    raise UserError("no model is named", wanted="a model directory, a .gguf file or a hub id", knob="model.path")
  if revision and local.exists() and not (local / "checkpoints").is_dir():
    raise UserError(f"{text} lies here and has no revision {revision!r}", wanted="a hub id, or no revision", knob="model.revision or --revision")
  if local.exists():                   # noted in full: a run's base, and peft's, must be found from any folder
    local = local.absolute()
    text = str(local)
  if (local / "checkpoints").is_dir():
    from jaxsft.convert.orbax import OrbaxSource
    return OrbaxSource(local, name=text)
  if local.is_dir():
    return HFSource(local, name=text)
  if local.is_file():
    if is_gguf(local):
      return GGUFSource(local, name=text)
    raise UserError(f"{text} is a file, and no GGUF", wanted="a model directory, a .gguf file or a hub id", knob="model.path")
  if not _looks_like_hub_id(text):
    raise UserError(f"{text} does not exist", wanted="a model directory, a .gguf file or a hub id", knob="model.path")
  directory = _download(text, revision)
  return HFSource(directory, name=text, revision=directory.name)


def _looks_like_hub_id(text: str) -> bool:
  parts = text.split("/")
  return len(parts) in (1, 2) and all(parts) and not text.startswith((".", "~")) and not text.endswith(".gguf") and "\\" not in text


def _download(name: str, revision: str) -> pathlib.Path:
  """The hub's snapshot in the hub's own cache; the folder is named after the commit.

  The small files come first: a model that is not supported is refused before its weights travel, which then come from that very commit.
  Errors: UserError for what the hub does not give, and as ModelConfig.from_hf.
  """
  from jaxsft.convert.directory import read_json
  from jaxsft.models.config import ModelConfig
  first = _snapshot(name, revision, [pattern for pattern in HUB_FILES if pattern != WEIGHTS])
  ModelConfig.from_hf(read_json(first / "config.json", required=True), f"{name}/config.json")
  return _snapshot(name, first.name, HUB_FILES)


def _snapshot(name, revision, patterns) -> pathlib.Path:
  import huggingface_hub
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns, ignore_patterns=HUB_SKIPPED))
  except Exception as error:  # the client's errors have no common root: offline, unknown, gated, disk
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(f"{name}{f' at {revision}' if revision else ''} is no directory here, and the hub did not give it ({type(error).__name__}: {reason})",
                    wanted="a model directory, a .gguf file or a hub id that this machine can reach", knob="model.path or model.revision") from None
