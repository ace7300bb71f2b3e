"""The import law: who may know whom. Read with ast, so that a lazy import inside a function counts too."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAW = {  # a module takes the first entry that its name begins with; what it may import of jaxsft, by prefix
    "data/tokenizer": ("convert.source", "errors", "data"),            # lazily: a GGUF's own tokenizer
    "data/show": ("config", "errors", "data"), "data/stats": ("config", "errors", "data"),
    "data": ("batch", "errors", "data"),
    "batch": (), "errors": (), "kernels": ("kernels",), "config": ("errors",), "metrics": ("errors", "workdir"),
    "models": ("batch", "errors", "kernels", "models", "transforms.tree"),
    "losses": ("batch", "kernels"),
    "transforms": ("batch", "errors", "kernels", "losses", "transforms"),
    "optim": ("errors", "transforms.tree", "adamw8bit", "watch"), "adamw8bit": ("transforms.tree",), "watch": ("transforms.tree",), "step": ("optim", "watch"),
    "sharding": ("errors",), "checkpoint": ("errors", "workdir"), "workdir": ("config", "errors"),
    "methods/registry": ("errors", "methods"),
    "methods": ("batch", "errors", "losses", "step", "transforms", "generate", "rewards"),       # never each other
    "convert": ("batch", "errors", "models", "transforms", "kernels", "sharding", "checkpoint", "convert", "data.template", "data.tokenise"),
    "arithmetic": ("convert", "errors", "models", "sharding", "transforms"),
    "generate": ("errors", "models", "kernels", "transforms"),
}
WHOLE = {"main", "train", "chat", "base", "evaluation", "preflight", "inference", "stop"}        # what wires the rest together
FORBIDDEN = {"torch", "torchvision", "tensorflow", "keras", "bitsandbytes", "peft"}
NUMPY_SIDE = ("data", "batch", "errors", "config")
FILES = sorted((ROOT / "jaxsft").rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT / "jaxsft").as_posix())


def imports(path):
  """Every module that a file names in an import, `from a import b` as a.b, wherever it stands."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path):
  return path.relative_to(ROOT / "jaxsft").with_suffix("").as_posix().removesuffix("__init__").removesuffix("/")


def law_of(name):
  """The most particular entry of LAW for a module; None for what wires."""
  entries = [entry for entry in LAW if name == entry or name.startswith(entry + "/")]
  return LAW[max(entries, key=len)] if entries else None


def begins(name, prefixes):
  return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@each_file
def test_the_import_law(path):
  law, ours = law_of(name_of(path)), [name.removeprefix("jaxsft.") for name in imports(path) if name.startswith("jaxsft.")]
  if law is None:
    assert name_of(path).split("/")[0] in {"", *WHOLE}, f"{name_of(path)} has no entry in LAW: say what it may import"
  else:
    assert [name for name in ours if not begins(name, law)] == []
  assert name_of(path) in ("main", "chat", "eval/__main__") or not any(begins(name, ("train", "main")) for name in ours)


@each_file
def test_no_torch_and_no_tensorflow(path):
  assert [name for name in imports(path) if begins(name, FORBIDDEN)] == []


@each_file
def test_the_host_side_never_imports_jax(path):
  if name_of(path).split("/")[0] in NUMPY_SIDE:
    lazy = ("jax.numpy",) if name_of(path) == "batch" else ()          # batch.py, when its caller already holds jax arrays
    assert [name for name in imports(path) if begins(name, ("jax", "jaxlib", "flax", "optax", "orbax")) and name not in lazy] == []


def test_nothing_imports_the_edges():
  """configs, launch, tests, benchmarks and demo stand on the package, never the other way round."""
  for path in FILES:
    assert not [name for name in imports(path) if begins(name, ("configs", "launch", "tests", "benchmarks", "demo"))], path


@each_file
def test_files_have_at_most_400_lines_and_functions_60(path):
  text = path.read_text()
  assert text.count("\n") <= 400
  functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
  assert [f"{node.name}: {node.end_lineno - node.lineno + 1} lines" for node in functions if node.end_lineno - node.lineno >= 60] == []


def test_no_file_is_a_drawer_for_everything():
  assert [path for path in FILES if path.stem in ("utils", "util", "helpers", "helper", "misc", "common")] == []


def test_the_core_installs_without_torch_or_tensorflow():
  """Lessons row 21: extras are extras, and CI's versions are those of the constraints file."""
  import tomllib
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  name = lambda requirement: re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")
  assert not {name(one) for one in project["dependencies"]} & {"torch", "tensorflow", "keras", "vllm", "peft", "bitsandbytes", "wandb", "lm-eval"}
  pinned = {name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
  assert {name(one) for group in (project["dependencies"], *(project["optional-dependencies"][extra] for extra in ("test", "eval"))) for one in group} <= pinned | {"torch"}


def test_everything_imports_where_torch_is_not_installed():
  code = ("import sys\nfor name in ('torch', 'tensorflow', 'peft', 'bitsandbytes', 'wandb'): sys.modules[name] = None\n"
          "import jaxsft.train, jaxsft.chat, jaxsft.inference, jaxsft.convert.__main__, jaxsft.data.show, jaxsft.convert.gguf_tokenizer\n"
          "from jaxsft.data.tokenizer import load_tokenizer\nprint(len(load_tokenizer('bytes')))")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0 and done.stdout.strip() == "259", done.stderr[-2000:]


def test_the_loop_names_no_method():
  """train.py never names a method."""
  methods = {path.stem for path in (ROOT / "jaxsft" / "methods").glob("*.py")} - {"registry", "__init__"}
  words = {node.value for node in ast.walk(ast.parse((ROOT / "jaxsft" / "train.py").read_text())) if isinstance(node, ast.Constant)}
  assert methods and not methods & words
  assert len((ROOT / "jaxsft" / "train.py").read_text().splitlines()) <= 250
