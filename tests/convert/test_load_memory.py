"""Loading and writing hold a layer, not a model: traced allocations, and the resident set of a process of its own."""

import json
import os
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


@pytest.mark.parametrize("double", [True, False])
def test_merging_needs_a_layer_and_the_adapters(directory, tmp_path, double):
  """Lessons row 16: base + adapter through NF4, leaf by leaf on the host."""
  import jax

  from jaxsft.convert.adapter import Adapter
  from jaxsft.transforms import lora
  source = open_source(directory)
  targets = r"(q|k|v|o|gate|up|down)_proj/kernel$"
  from jaxsft.models import families
  shapes = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in families.shapes(CFG).items()}
  from jaxsft.transforms import tree
  adapters = jax.tree.map(lambda x: np.full(x.shape, 0.01, np.float32), lora.init_adapters(tree.unflatten(shapes), targets, 4, jax.random.key(0)))
  adapter = Adapter(tmp_path, adapters, CFG, source.identity, str(directory), {"rank": 4, "alpha": 8.0, "dropout": 0.0, "rslora": False},
                    {"targets": targets, "double_quant": double})
  found = peak(lambda: hf.write_hf(tmp_path / "out", CFG, adapter.merged_leaves("nf4"), dtype="bfloat16"))
  assert found < 8 * LEAF < MODEL / 3          # one layer's leaf as float32, codes, scales and their product


RESIDENT = """
import json, sys
import jax
from ml_collections import ConfigDict
from jaxsft import base as bases, sharding
from jaxsft.convert.source import open_source
from jaxsft.models.config import ModelConfig

def status(key):
  return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def load(directory):
  source = open_source(directory)
  c = ConfigDict(dict(seed=0, model=dict(base_dtype="bfloat16"), nf4=dict(targets="_proj/kernel$", double_quant=True), optim=dict(state="float32")))
  mesh = sharding.make_mesh(ConfigDict(dict(data=1, fsdp=1, tensor=1)))
  return jax.block_until_ready(bases.load(c, bases.Base(ModelConfig.from_hf(source.config), source, None), mesh))

load(sys.argv[1])                       # everything is compiled
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
params = load(sys.argv[1])
print(json.dumps(dict(grown=status("VmHWM") - before, held=sum(x.nbytes for x in jax.tree.leaves(params)))))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_base_goes_straight_into_nf4(directory):
  """Peak host memory of loading stays near a layer over the result: the file is 3 times as large as what is kept of it."""
  env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", RESIDENT, str(directory)], capture_output=True, text=True, check=True, env=env)
  found = json.loads(done.stdout.splitlines()[-1])
  assert found["grown"] < found["held"] + 8 * LEAF < MODEL * 0.75, found


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
