"""What every test shares: eight simulated devices, float32 products, and the folder of shared data."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "jaxsft-test-compilations"))    # tests compile the same programs
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """Real data and tokenizers, laid beside the repository; a test that needs them FAILS without them: no proof is skipped."""
  path = pathlib.Path(os.environ.get("JAXSFT_SHARED", ROOT.parent / "shared"))
  if not path.is_dir():
    pytest.fail(f"{path} is missing: these tests need the shared data; set JAXSFT_SHARED to the folder that holds data/ and golden/")
  return path


@pytest.fixture(scope="session")
def golden():
  """Reader of one golden file: golden("packing") -> dict."""
  import json
  return lambda name: json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def demo_dir():
  """The demo's model as a Hugging Face directory, in the repository's cache (fetched on the first use)."""
  from jaxsft.convert import demo_model
  return demo_model.fetch(ROOT / ".cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Folder with train.jsonl and eval.jsonl of the tiny runs (tests/runs.py)."""
  from runs import write_records
  folder = tmp_path_factory.mktemp("records")
  write_records(folder / "train.jsonl", range(60))
  write_records(folder / "eval.jsonl", range(100, 110))
  return folder
