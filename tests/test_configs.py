"""Every file of configs/ loads without jax, is sound, and the 7B ones build; messages of config.py name the nearest key and what it takes."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from configs import common
from jaxsft import config, train
from jaxsft.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(path.name for path in (ROOT / "configs").glob("*.py") if path.name not in ("common.py", "__init__.py"))
SEVEN_B = ("full_7b.py", "lora_7b.py", "qlora_7b.py")


def load(name, argument=""):
  return config.load(f"{ROOT}/configs/{name}{argument and ':' + argument}")


def test_every_config_loads_and_is_sound_without_jax():
  """In a process of its own: a launcher reads configs where no jax is installed."""
  program = ("import json, sys\nfrom jaxsft import config\nfor name in sys.argv[1:]:\n  for tail in ('data=FILE', 'smoke=true'):\n"
             "    config.validate(config.load(f'configs/{name}:{tail}'))\n"
             "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))")
  done = subprocess.run([sys.executable, "-c", program, *FILES], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stderr
  assert not {"jax", "jaxlib", "flax", "torch", "transformers", "numpy"} & set(json.loads(done.stdout))
  assert set(SEVEN_B) <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_config_is_locked_and_has_the_keys_of_the_base(name):
  c = load(name)
  assert config.flatten(c).keys() == config.flatten(common.base()).keys()
  with pytest.raises((AttributeError, KeyError), match="locked"):
    c.optim.learning_rat = 1.0


@pytest.mark.parametrize("name", FILES)
def test_the_header_says_how_to_run_it(name):
  head = (ROOT / "configs" / name).read_text().split('"""')[1]
  assert f"--config=configs/{name}" in head and "hardware" in head and "HEADER" not in head


@pytest.mark.parametrize("name, rank, quantised", [("full_7b.py", 0, False), ("lora_7b.py", 16, False), ("qlora_7b.py", 16, True)])
def test_the_7b_configs_are_what_the_design_says(name, rank, quantised):
  c = load(name, "data=FILE")
  assert (c.lora.rank, bool(c.nf4.targets), c.data.length, c.batch_size) == (rank, quantised, 2048, 1)
  assert c.nf4.double_quant and c.lora.targets == common.ALL_LINEAR and c.model.dtype == "bfloat16"
  assert c.optim.learning_rate == (2e-4 if rank else 1e-5)
  assert c.model.base_dtype == ("bfloat16" if rank else "float32") and c.optim.state == "float32"


@pytest.mark.parametrize("name", SEVEN_B)
def test_the_7b_configs_build_in_their_smoke_form(name, monkeypatch):
  monkeypatch.chdir(ROOT)
  c = load(name, "smoke=true")
  c.batch_size = 16                                              # tests simulate eight devices
  parts = train.build(c)
  try:
    assert parts.base.cfg.hidden_size == 64 and parts.steps == c.steps and next(parts.stream)["tokens"].shape == (c.batch_size, c.data.length)
  finally:
    parts.stream.close()


def test_the_argument_fills_in_and_what_it_does_not_know_is_refused():
  c = load("qlora_7b.py", "model=DIR,data=a=b.jsonl,eval=E")
  assert (c.model.path, c.data.train.path, c.data.eval.path) == ("DIR", "a=b.jsonl", "E")
  with pytest.raises(UserError, match=r"config argument 'modell' is unknown; wanted one of .*model.*; set --config=FILE:name=value"):
    load("qlora_7b.py", "modell=DIR")
  with pytest.raises(UserError, match=r"config argument smoke='ture' is no truth value; wanted true or false"):
    load("qlora_7b.py", "smoke=ture")
  assert load("qlora_7b.py", "smoke=true,data=mine.jsonl").data.train.path == "mine.jsonl"


def refused(function, *args):
  with pytest.raises(UserError) as error:
    function(*args)
  assert "\n" not in str(error.value)
  return str(error.value)


def test_a_file_that_is_no_config_is_refused(tmp_path):
  assert "'nowhere.py' does not exist; wanted a Python file with get_config(arg); set --config" in refused(config.load, "nowhere.py")
  (tmp_path / "empty.py").write_text("x = 1\n")
  assert "empty.py is no config (AttributeError" in refused(config.load, str(tmp_path / "empty.py"))
  (tmp_path / "broken.py").write_text("def get_config(:\n")
  assert "broken.py is no config (SyntaxError" in refused(config.load, str(tmp_path / "broken.py"))
  for body, words in (("  raise RuntimeError('no GPU today')", "is no config (RuntimeError: no GPU today"), ("  open('nowhere')", "is no config (FileNotFoundError"),
                      ("  return None", "get_config gave NoneType")):
    (tmp_path / "raises.py").write_text(f"def get_config(arg=None):\n{body}\n")
    assert words in refused(config.load, str(tmp_path / "raises.py"))
  (tmp_path / "noarg.py").write_text("def get_config():\n  pass\n")
  assert "noarg.py is no config (TypeError" in refused(config.load, str(tmp_path / "noarg.py"))
  (tmp_path / "typo.py").write_text("from configs import common\ndef get_config(arg=None):\n  c = common.base()\n  c.lora.rnk = 8\n  return c\n")
  assert "typo.py" in refused(config.load, str(tmp_path / "typo.py")) and "rnk" in refused(config.load, str(tmp_path / "typo.py"))   # lessons row 23
  (tmp_path / "list.txt").write_text("x")
  assert "list.txt' is no Python file" in refused(config.load, str(tmp_path / "list.txt"))
  (tmp_path / "few.py").write_text("from ml_collections import ConfigDict\ndef get_config(arg=None):\n  return ConfigDict(dict(seed=0))\n")
  assert "the config lacks batch_size, checkpoint.every" in refused(config.validate, config.load(str(tmp_path / "few.py")))


@pytest.mark.parametrize("key, nearest", [("optim.learning_rat", "optim.learning_rate"), ("learning_rate", "optim.learning_rate"), ("lora.dropuot", "lora.dropout"),
                                          ("batchsize", "batch_size"), ("model.pth", "model.path"), ("data.max_length", "data.length")])
def test_an_unknown_key_names_the_nearest(key, nearest):
  assert refused(config.override, load("lora_7b.py"), key, "1") == f"config key {key!r} is unknown; wanted {nearest!r} (nearest); set --config.{nearest}=..."


@pytest.mark.parametrize("key, text, value", [
    ("optim.learning_rate", "1e-3", 1e-3), ("optim.learning_rate", "1", 1.0), ("batch_size", "16", 16), ("data.pack", "false", False), ("data.pack", "True", True),
    ("model.path", "123", "123"), ("lora.targets", "(q|v)_proj", "(q|v)_proj"), ("sample.prompts", "['a', 'b']", ("a", "b")), ("sample.prompts", "Hello, you", ("Hello, you",)),
    ("data.train.path", "x.jsonl", "x.jsonl"), ("optim.warmup", "10", 10.0)])
def test_an_override_takes_the_type_of_the_value_it_replaces(key, text, value):
  c = load("lora_7b.py")
  config.override(c, key, text)
  got = config.flatten(c)[key]
  assert got == value and type(got) is type(value)


@pytest.mark.parametrize("key, text, kind", [("batch_size", "1.5", "int"), ("batch_size", "true", "int"), ("optim.learning_rate", "fast", "float"),
                                             ("data.pack", "1", "bool"), ("data.pack", "maybe", "bool"), ("steps", "[1]", "int")])
def test_a_value_of_another_type_is_refused(key, text, kind):
  message = refused(config.override, load("lora_7b.py"), key, text)
  assert f"--config.{key}={text} is no" in message and f"set --config.{key}" in message


@pytest.mark.parametrize("key", config.CHOICES)
def test_every_choice_is_refused_outside_its_list_and_taken_inside(key):
  c = load("full_7b.py", "data=FILE")
  c.optim.schedule = "constant"                # which schedule_free insists on
  for value in config.CHOICES[key]:
    config.override(c, key, value)
    config.validate(c)
  config.override(c, key, config.CHOICES[key][0] + "x")
  message = refused(config.validate, c)
  assert message.startswith(f"{key} is '{config.CHOICES[key][0]}x'; wanted {' | '.join(config.CHOICES[key])}") and message.endswith(f"set {key}")


@pytest.mark.parametrize("changes, words", [
    ({"batch_size": 6, "micro_batches": 4}, "batch_size 6 does not divide into 4 micro-batches"),
    ({"micro_batches": 0}, "micro_batches is 0"), ({"loss_chunk": 0}, "loss_chunk is 0"), ({"data.length": -1}, "data.length is -1"),
    ({"steps": 0}, "steps is 0 and epochs is 0.0; wanted exactly one"), ({"epochs": 1.0}, "exactly one of them above 0"),
    ({"lora.rank": 0}, "full fine-tuning of an NF4 base: 4-bit codes have no gradient"), ({"freeze": "embed"}, "freeze"),
    ({"optim.state": "bfloat16_stochastic"}, "optim.state"), ({"model.path": ""}, "no model is named"), ({"data.train.path": ""}, "no training data is named"),
    ({"lora.targets": "(q_proj"}, "is no regular expression"), ({"lora.dropout": 1.0}, "lora.dropout is 1.0"), ({"lora.rank": -1}, "lora.rank is -1"),
    ({"optim.learning_rate": -1.0}, "optim.learning_rate is -1.0"), ({"optim.decay": 7.0}, "optim.decay is 7.0"),
    ({"steps": 10 ** 12}, "1000000000000 steps of 1 rows; wanted fewer"), ({"model.base_dtype": "int8"}, "model.base_dtype is 'int8'"),
    ({"optim.warmup": 1000.0}, "the peak learning rate is never reached"), ({"seed": 2 ** 40}, "seed is 1099511627776; wanted 0 to 2147483647"),
    ({"sample.prompts": (1, "a")}, "sample.prompts holds 1; wanted texts"), ({"model.dtype": "float16"}, "model.dtype is 'float16'")])
def test_what_cannot_work_is_refused_with_the_reason(changes, words):
  c = load("qlora_7b.py", "data=FILE")
  config.validate(c)
  for key, value in changes.items():
    config.override(c, key, str(value))
  assert words in refused(config.validate, c)


def test_the_saved_json_is_stable_and_names_what_differs():
  first, second = load("qlora_7b.py", "data=FILE"), load("qlora_7b.py", "data=FILE")
  assert config.to_json(first) == config.to_json(second) and json.loads(config.to_json(first))["lora.rank"] == 16
  config.override(second, "lora.rank", "8")
  config.override(second, "sample.prompts", "['a']")
  assert config.differences(config.to_json(first), second) == ["lora.rank: 16 -> 8", "sample.prompts: [] -> ['a']"]
  assert config.differences(config.to_json(second), second) == []
  assert config.differences("[]", second) == config.differences("3", second) == config.differences("{", second) == ["config.json is none of ours"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qlora_7b.py", "lora_7b.py", "full_7b.py", "demo.py", "gsm8k.py"])
def test_the_smoke_form_runs_in_under_a_minute(name, tmp_path):
  """As a person runs it, in a process of its own with one device; the limit is README's."""
  environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
  started = time.monotonic()
  done = subprocess.run([sys.executable, "-m", "jaxsft.main", f"--config=configs/{name}:smoke=true", f"--workdir={tmp_path / 'run'}"], cwd=ROOT,
                        env=environment, capture_output=True, text=True)
  print(f"{name}: {time.monotonic() - started:.0f} s")
  assert done.returncode == 0 and (tmp_path / "run/summary.json").is_file(), done.stderr[-2000:]
  assert time.monotonic() - started < 60
