"""Safetensors files, a tensor at a time: a lazy reader with messages that name file and tensor, and a writer at planned offsets."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxsft.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # the format's own


class Tensor(NamedTuple):
  """Where one tensor lies: `start` is its first byte in the file."""
  file: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  start: int
  end: int


def read_header(file: pathlib.Path) -> dict[str, Tensor]:
  """{name: Tensor} of one safetensors file, checked against the file's size. UserError for what is truncated or garbage."""
  size = file.stat().st_size
  with open(file, "rb") as f:
    length = int.from_bytes(f.read(8), "little")
    if size < 8 or length > min(HEADER_LIMIT, size - 8):
      raise UserError(f"{file} is {size:,} bytes and its first 8 announce a header of {length:,}",
                      wanted="a whole safetensors file", knob="model.path to a whole copy")
    text = f.read(length)
  try:
    entries = {k: v for k, v in json.loads(text).items() if k != "__metadata__"}
    return {name: _tensor(file, name, entry, 8 + length, size) for name, entry in entries.items()}
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise UserError(f"{file} has a header that is not safetensors' ({type(error).__name__}: {error})",
                    wanted="a whole safetensors file", knob="model.path to a whole copy") from None


def _tensor(file, name, entry, base, size):
  begin, end = entry["data_offsets"]
  shape = tuple(entry["shape"])
  if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape)):
    raise ValueError(f"tensor {name} at {begin, end} of shape {shape}")
  if base + end > size:
    raise UserError(f"{file} ends at byte {size:,}, inside or before tensor {name}, which ends at {base + end:,}",
                    wanted="a whole file", knob="model.path to a whole copy")
  if entry["dtype"] in DTYPES and end - begin != math.prod(shape) * DTYPES[entry["dtype"]].itemsize:
    raise ValueError(f"tensor {name} of shape {shape} and dtype {entry['dtype']} in {end - begin} bytes")
  return Tensor(file, entry["dtype"], shape, base + begin, base + end)


def read_tensor(tensor: Tensor) -> np.ndarray:
  """The tensor as a read-only view of the file, mapped for itself alone: its pages go when the array does."""
  if tensor.dtype not in DTYPES:
    raise UserError(f"{tensor.file} holds dtype {tensor.dtype}", wanted=f"one of {', '.join(DTYPES)}")
  dtype = DTYPES[tensor.dtype]
  if tensor.end == tensor.start:
    return np.zeros(tensor.shape, dtype)
  raw = np.memmap(tensor.file, np.uint8, "r", offset=tensor.start, shape=(tensor.end - tensor.start,))
  if tensor.start % dtype.itemsize:  # old files pad their header to nothing: the view would be unaligned
    raw = raw.copy()
  return np.asarray(raw).view(dtype).reshape(tensor.shape)


def fingerprint(tensors: dict[str, Tensor], extra: bytes = b"") -> str:
  """sha256 over every tensor's name, dtype, shape and 256 bytes from its middle: cheap, and another on other weights."""
  digest = hashlib.sha256(extra)
  for name in sorted(tensors):
    t = tensors[name]
    digest.update(repr((name, t.dtype, t.shape)).encode())
    with open(t.file, "rb") as f:
      f.seek(t.start + max(0, (t.end - t.start - 256) // 2))
      digest.update(f.read(min(256, t.end - t.start)))
  return digest.hexdigest()


class ShardWriter:
  """Writes tensors of known names and shapes, in any order, into one or several safetensors files of one dtype.

  entries: [(name, shape)] in the order they shall lie. `write(name, array)` casts to the dtype; `close()` writes the index and refuses a
  missing tensor. Nothing is held in memory but the tensor being written.
  """

  def __init__(self, directory: pathlib.Path, entries: Iterable[tuple[str, tuple[int, ...]]], dtype: np.dtype, limit: int,
               stem: str = "model"):
    self.directory, self.stem, self.dtype = directory, stem, np.dtype(dtype)
    self.left: dict[str, tuple[IO[bytes], int, tuple[int, ...]]] = {}   # name: file, offset, shape of what is still to come
    self.index: dict[str, str] = {}
    shards = _plan(entries, self.dtype.itemsize, limit)
    self.total = sum(math.prod(shape) for shard in shards for _, shape in shard) * self.dtype.itemsize
    self.files = []
    for i, shard in enumerate(shards):
      name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
      self.files.append(self._open(directory / name, shard))

  def _open(self, path, shard):
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shard:
      size = math.prod(shape) * self.dtype.itemsize
      header[name] = {"dtype": CODES[self.dtype], "shape": list(shape), "data_offsets": [at, at + size]}
      at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = open(path, "wb")
    file.write(len(text).to_bytes(8, "little") + text)
    for name, shape in shard:
      self.left[name] = (file, 8 + len(text) + header[name]["data_offsets"][0], shape)
      self.index[name] = path.name
    return file

  def write(self, name: str, array: np.ndarray) -> None:
    """Puts one tensor in its place. ValueError for a name or shape that was not planned."""
    file, at, shape = self.left.pop(name)
    if array.shape != shape:
      raise ValueError(f"{name} has shape {array.shape}, planned {shape}")
    with np.errstate(over="ignore"):  # told below
      out = np.ascontiguousarray(array.astype(self.dtype, copy=False))
    if self.dtype == np.float16 and not np.isfinite(out).all():
      raise UserError(f"{name} has values beyond float16's range", wanted="a dtype that holds them", knob="--dtype=bfloat16 or float32")
    file.seek(at)
    file.write(out.reshape(-1).view(np.uint8).data)

  def close(self) -> None:
    """Flushes to the disk and writes the index of several files. ValueError when a planned tensor was not written."""
    if self.left:
      raise ValueError(f"{len(self.left)} tensors were not written: {', '.join(list(self.left)[:3])}")
    for file in self.files:
      file.flush()
      os.fsync(file.fileno())
    self.abandon()
    if len(self.files) > 1:
      index = {"metadata": {"total_size": self.total}, "weight_map": self.index}
      (self.directory / f"{self.stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

  def abandon(self) -> None:
    """Closes the files as they are."""
    for file in self.files:
      file.close()


def _plan(entries, itemsize, limit):
  shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
  held = 0
  for name, shape in entries:
    size = math.prod(shape) * itemsize
    if shards[-1] and held + size > limit:
      shards.append([])
      held = 0
    shards[-1].append((name, tuple(shape)))
    held += size
  return shards
