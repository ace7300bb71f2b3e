"""Loading and writing hold a layer, not a model: traced allocations, and the resident set of a process of its own."""

import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from jaxsft.convert import hf, load
from jaxsft.convert.source import open_source
from jaxsft.models.config import ModelConfig

CFG = ModelConfig.from_hf(dict(model_type="llama", vocab_size=2000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,
                               num_attention_heads=8, tie_word_embeddings=True))
LEAF = 1024 * 2816 * 4            # the largest array of one layer, float32
MODEL = 8 * (4 * 1024 * 1024 + 3 * 1024 * 2816) * 4 + 2000 * 1024 * 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  rng = np.random.default_rng(0)

  def leaves():
    from jaxsft.models import families
    for path, shape in families.shapes(CFG).items():
      one = shape[1:] if path.startswith("layers") else shape
      yield path, lambda layer, one=one: rng.standard_normal(one, dtype=np.float32)
  return hf.write_hf(tmp_path_factory.mktemp("mid") / "model", CFG, leaves(), dtype="float32")


def peak(function) -> int:
  tracemalloc.start()
  try:
    function()
    return tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize("dtype, size", [(None, 4), (np.float16, 2)])
def test_stacking_needs_the_result_and_a_layer(directory, dtype, size):
  found = peak(lambda: load.load_params(open_source(directory), CFG, load.stack(dtype)))
  assert MODEL * size / 4 * 0.99 < found < MODEL * size / 4 + 1.5 * LEAF


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_writing_needs_a_layer(directory, tmp_path, dtype):
  source = open_source(directory)
  leaves = ((path, read) for path, _, _, read in load.leaf_reads(source, CFG))
  assert peak(lambda: hf.write_hf(tmp_path / "out", CFG, leaves, dtype=dtype)) < 2.5 * LEAF


def test_reading_copies_nothing_and_minds_alignment(tmp_path, directory):
  from jaxsft.convert import shards
  array = open_source(directory).read("model.layers.0.mlp.up_proj.weight")
  base = array
  while getattr(base, "base", None) is not None and not isinstance(base, np.memmap):
    base = base.base
  assert isinstance(base, np.memmap) and not array.flags.writeable
  header = b'{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}  '
  for padding in range(4):  # old writers did not pad their headers
    text = header + b" " * padding
    (tmp_path / "odd.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + np.arange(3, dtype="<f4").tobytes())
    found = shards.read_tensor(shards.read_header(tmp_path / "odd.safetensors")["x"])
    np.testing.assert_array_equal(found, [0, 1, 2])
    assert found.flags.aligned


PROGRAM = """
import json, sys
from jaxsft.convert import load
from jaxsft.convert.source import open_source
from jaxsft.models.config import ModelConfig

def status(key):
  return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

source = open_source(sys.argv[1])
cfg = ModelConfig.from_hf(source.config)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
load.load_params(source, cfg, lambda path, shape, layers, read: [float(read(l).sum()) for l in (range(layers) if layers else [None])])
print(json.dumps(status("VmHWM") - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_mapped_files_do_not_pile_up(directory):
  """Mapped pages count as resident memory: they must go with the array they belong to."""
  done = subprocess.run([sys.executable, "-c", PROGRAM, str(directory)], capture_output=True, text=True, check=True)
  grown = json.loads(done.stdout.splitlines()[-1])
  assert grown < 3 * LEAF < MODEL / 10
