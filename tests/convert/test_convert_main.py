"""python -m jaxsft.convert: every way in and out, on checkpoints written as a run writes them."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsft.checkpoint import Checkpoints
from jaxsft.convert import load, orbax
from jaxsft.convert.__main__ import main
from jaxsft.convert.source import open_source
from jaxsft.models.config import ModelConfig
from jaxsft.step import TrainState
from jaxsft.transforms import lora, nf4, tree

TARGETS = r"(q|v|down)_proj/kernel$"
LORA = {"rank": 4, "alpha": 16.0, "dropout": 0.1, "rslora": False}


def convert(capsys, *arguments):
  """Exit status 0 wanted; gives the JSON report."""
  status = main([*map(str, arguments), "--json"])
  out, err = capsys.readouterr()
  assert status == 0, err
  return json.loads(out.splitlines()[-1])


def refused(capsys, *arguments) -> str:
  """Exit status 2 wanted; gives the one line on stderr."""
  assert main([*map(str, arguments)]) == 2
  out, err = capsys.readouterr()
  assert out == "" and len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
  return err


def same(a, b):
  a, b = open_source(a), open_source(b)
  assert sorted(a.names()) == sorted(b.names())
  return all(a.read(n).dtype == b.read(n).dtype and a.read(n).tobytes() == b.read(n).tobytes() for n in a.names())


def save_run(workdir, trainable, meta, steps=(2,)):
  """Checkpoints as train.py writes them: a whole TrainState, Adam's moments included."""
  checkpoints = Checkpoints(workdir / "checkpoints", keep=5)
  for step in steps:
    grown = jax.tree.map(lambda x, step=step: jnp.asarray(x) + (step - steps[0]), trainable)
    checkpoints.save(step, TrainState(jnp.int32(step), grown, optax.adamw(1e-3).init(grown), (), jnp.zeros(2, jnp.uint32)), {}, meta)
  checkpoints.wait()
  checkpoints.close()
  return workdir


@pytest.fixture
def base(hf_dir, shared):
  """A bfloat16 llama with a tokenizer that fits (Llama 2's, 32,000 ids)."""
  from jaxsft.convert.hf import load_tokenizer, write_tokenizer
  directory, _ = hf_dir(dtype="bfloat16", vocab_size=32000, hidden_size=64, intermediate_size=128)
  write_tokenizer(directory, load_tokenizer(shared / "data/tokenizers/llama2"))
  return directory


@pytest.fixture
def adapter_run(base, tmp_path):
  """adapter_run(quantised) -> (workdir, adapters, source, cfg)."""
  def make(quantised=False, steps=(2,)):
    source = open_source(base)
    cfg = ModelConfig.from_hf(source.config)
    adapters = lora.init_adapters(load.load_params(source, cfg), TARGETS, 4, jax.random.key(0))
    adapters = tree.map_leaves(lambda path, x: jax.random.normal(jax.random.key(len(path)), x.shape) * 0.05, adapters)
    meta = orbax.run_meta(cfg, source, chat_template="{% for m in messages %}{{ m.content }}</s>{% endfor %}", end_of_turn_ids=[2, 13],
                          lora=LORA, nf4={"targets": TARGETS, "double_quant": True} if quantised else None)
    return save_run(tmp_path / "run", adapters, meta, steps), adapters, source, cfg
  return make


def test_to_orbax_and_back_is_bit_identical(base, tmp_path, capsys):
  report = convert(capsys, base, tmp_path / "orbax", "--to=orbax")
  assert report["to"] == "orbax" and report["parameters"] > 4_000_000 and report["bytes"] > 2 * report["parameters"]
  report = convert(capsys, tmp_path / "orbax", tmp_path / "back")
  assert (report["to"], report["step"], report["dtype"], report["drift"]) == ("hf", 0, "bfloat16", None)
  assert same(base, tmp_path / "back") and same(base, tmp_path / "orbax")
  for text in ("Hello  world", "你好 😀"):
    assert open_source(tmp_path / "back").tokenizer()(text).input_ids == open_source(base).tokenizer()(text).input_ids


def test_gguf_to_hf(gguf_file, tmp_path, capsys):
  path, expected = gguf_file("Q4_1", tied=True)
  convert(capsys, path, tmp_path / "out", "--dtype=float32")
  source = open_source(tmp_path / "out")
  assert sorted(source.names()) == sorted(expected)
  assert all(np.array_equal(source.read(name), array) for name, array in expected.items())


@pytest.mark.parametrize("freeze", ["", "embed_tokens"])
def test_a_full_run(base, tmp_path, capsys, freeze):
  """What was trained comes from the checkpoint, what was frozen from the base."""
  source = open_source(base)
  cfg = ModelConfig.from_hf(source.config)
  trained = tree.map_leaves(lambda path, x: jnp.asarray(x, jnp.float32) + 1, load.load_params(source, cfg))
  if freeze:
    trained, _ = tree.split(trained, lambda path: freeze not in path)
  run = save_run(tmp_path / "run", trained, orbax.run_meta(cfg, source, chat_template="X", end_of_turn_ids=[13]))
  convert(capsys, run, tmp_path / "out", "--dtype=float32")
  out = open_source(tmp_path / "out")
  for name in source.names():
    added = 0 if freeze and freeze in name else 1
    np.testing.assert_array_equal(out.read(name), source.read(name).astype(np.float32) + added, err_msg=name)
  assert out.generation_config["eos_token_id"] == [13, 2] and out.chat_template == "X"
  assert same(run, tmp_path / "out") or freeze  # open_source reads a full run's workdir as it stands


def test_an_adapter_run_to_peft(adapter_run, tmp_path, capsys, base):
  from peft import PeftModel
  from transformers import AutoModelForCausalLM
  run, adapters, source, _ = adapter_run()
  report = convert(capsys, run, tmp_path / "adapter")
  assert (report["to"], report["step"], report["dtype"]) == ("peft", 2, "float32")
  theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
  module = theirs.base_model.model.model.layers[1].mlp.down_proj
  ours = adapters["layers"]["mlp"]["down_proj"]["kernel"]["a"][1]
  np.testing.assert_array_equal(module.lora_A["default"].weight.detach().numpy(), ours.T)
  assert module.scaling["default"] == 4.0
  assert open_source(base).identity["sha256"] == json.loads((tmp_path / "adapter/jaxsft.json").read_text())["base"]["sha256"]
  merged = convert(capsys, tmp_path / "adapter", tmp_path / "from_peft", "--merge")
  convert(capsys, run, tmp_path / "from_run", "--merge")
  assert same(tmp_path / "from_peft", tmp_path / "from_run") and merged["base_weights"] == "original"
  for name in ("from_peft", "from_run"):
    found = open_source(tmp_path / name)
    assert found.generation_config["eos_token_id"][:2] == [2, 13] and found.chat_template.startswith("{% for m in messages %}")


@pytest.mark.parametrize("weights", ["nf4", "original"])
def test_a_qlora_merge(adapter_run, tmp_path, capsys, weights):
  """Lessons row 11: merged into what it was trained on by default."""
  run, adapters, source, cfg = adapter_run(quantised=True)
  report = convert(capsys, run, tmp_path / "out", "--merge", *([] if weights == "nf4" else ["--base-weights=original"]))
  assert report["base_weights"] == weights
  out = open_source(tmp_path / "out")
  for path, name in (("self_attn/q_proj", "self_attn.q_proj"), ("mlp/down_proj", "mlp.down_proj")):
    pair = adapters["layers"][path.split("/")[0]][path.split("/")[1]]["kernel"]
    for layer in range(3):
      kernel = source.read(f"model.layers.{layer}.{name}.weight").T.astype(np.float32)
      kernel = np.asarray(nf4.dequantise(nf4.quantise(kernel))) if weights == "nf4" else kernel
      wanted = kernel + 4.0 * np.asarray(pair["a"][layer]) @ np.asarray(pair["b"][layer])
      np.testing.assert_allclose(out.read(f"model.layers.{layer}.{name}.weight").astype(np.float32), wanted.T, rtol=2 ** -8, atol=1e-6)
  untouched = "model.layers.0.self_attn.k_proj.weight"
  np.testing.assert_array_equal(out.read(untouched), source.read(untouched))


def test_drift_is_rounding_alone_in_float32(adapter_run, tmp_path, capsys):
  run = adapter_run(quantised=True)[0]
  drift = {dtype: convert(capsys, run, tmp_path / dtype, "--merge", f"--dtype={dtype}")["drift"] for dtype in ("float32", "bfloat16")}
  other = convert(capsys, run, tmp_path / "other", "--merge", "--base-weights=original")["drift"]
  assert drift["float32"]["max_abs"] < 1e-6                                        # measured 1.5e-7
  assert 10 * drift["float32"]["max_abs"] < drift["bfloat16"]["max_abs"] < other["max_abs"] / 3    # 4.1e-4, 1.9e-2
  assert -1e-12 < drift["float32"]["kl"] < drift["bfloat16"]["kl"] < other["kl"] and drift["bfloat16"]["top1_agreement"] == 1.0
  assert convert(capsys, run, tmp_path / "no", "--merge", "--no-drift")["drift"] is None


def test_a_run_without_a_base_still_gives_its_adapter(tmp_path, capsys, shared):
  """A smoke run on random weights: the tokenizer is the one it kept; a merge has nothing to merge into."""
  from jaxsft.convert.hf import load_tokenizer, write_tokenizer
  cfg = ModelConfig.from_hf(dict(model_type="llama", vocab_size=32000, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                                 num_attention_heads=4))
  adapters = {"layers": {"mlp": {"up_proj": {"kernel": {"a": jnp.ones((1, 64, 4)), "b": jnp.ones((1, 4, 128))}}}}}
  run = save_run(tmp_path / "run", adapters, orbax.run_meta(cfg, tokenizer="bytes", chat_template="X", lora=LORA))
  assert main([str(run), str(tmp_path / "bare")]) == 0
  assert "note: no tokenizer is written" in (err := capsys.readouterr().err) and "built-in tokenizer 'bytes'" in err
  (run / "tokenizer").mkdir()
  write_tokenizer(run / "tokenizer", load_tokenizer(shared / "data/tokenizers/llama2"))
  convert(capsys, run, tmp_path / "out")
  assert (tmp_path / "out/chat_template.jinja").read_text() == "X" and (tmp_path / "out/tokenizer.json").is_file()
  assert "does not say what its base is" in refused(capsys, run, tmp_path / "merged", "--merge")


def test_step_chooses_and_the_newest_is_the_default(adapter_run, tmp_path, capsys):
  run = adapter_run(steps=(2, 4))[0]
  assert convert(capsys, run, tmp_path / "newest")["step"] == 4
  assert convert(capsys, run, tmp_path / "older", "--step=2")["step"] == 2
  a, b = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("newest", "older"))
  assert a != b
  assert "no checkpoint of step 3; wanted one of 2, 4; set --step" in refused(capsys, run, tmp_path / "x", "--step=3")


def test_another_base_is_refused(adapter_run, base, tmp_path, capsys, hf_dir):
  run = adapter_run()[0]
  base.rename(tmp_path / "moved")
  assert "set --base to where the base lies now" in refused(capsys, run, tmp_path / "out", "--merge")
  report = convert(capsys, run, tmp_path / "out", "--merge", f"--base={tmp_path / 'moved'}")
  assert report["base_weights"] == "original"
  other, model = hf_dir(dtype="bfloat16", vocab_size=32000, hidden_size=64, intermediate_size=128)
  model.model.layers[0].mlp.up_proj.weight.data += 1
  model.save_pretrained(other)
  assert "is not the base of" in refused(capsys, run, tmp_path / "again", "--merge", f"--base={other}")


def test_what_does_not_go_together_is_said(adapter_run, base, tmp_path, capsys):
  run = adapter_run()[0]
  assert "holds adapters, and --to=hf needs --merge" in refused(capsys, run, tmp_path / "x", "--to=hf")
  assert "--to=peft excludes --merge" in refused(capsys, run, tmp_path / "x", "--to=peft", "--merge")
  assert "was not trained on an NF4 base" in refused(capsys, run, tmp_path / "x", "--merge", "--base-weights=nf4")
  assert "is no adapter" in refused(capsys, base, tmp_path / "x", "--merge")
  assert "is no adapter" in refused(capsys, base, tmp_path / "x", "--to=peft")
  assert "is there already" in refused(capsys, base, run)
  assert "no/such does not exist" in refused(capsys, "/no/such", tmp_path / "x")
  (tmp_path / "empty/checkpoints").mkdir(parents=True)
  assert "no whole checkpoint yet" in refused(capsys, tmp_path / "empty", tmp_path / "x")
  with pytest.raises(orbax.UserError, match="holds adapters, no whole model.*--merge first"):
    open_source(run)
  assert not (tmp_path / "x").exists()


def test_only_an_export_is_ever_replaced(adapter_run, base, tmp_path, capsys):
  """--overwrite on a run, on a folder above it or on anything else that somebody keeps would be the end of it."""
  run = adapter_run()[0]
  (run / "metrics.jsonl").write_text("{}\n")
  (run / "config.json").write_text("{}")
  (tmp_path / "notes").mkdir()
  (tmp_path / "notes/precious.txt").write_text("x")
  for place in (run, tmp_path, tmp_path / "notes", tmp_path / "notes/precious.txt", "/"):
    before = sorted(tmp_path.rglob("*"))
    assert "holds something that is no export" in refused(capsys, run, place, "--overwrite")
    assert sorted(tmp_path.rglob("*")) == before
  assert "cannot be made" in refused(capsys, run, tmp_path / "notes/precious.txt/x")
  for _ in range(2):
    convert(capsys, run, tmp_path / "out", "--overwrite")
  assert (tmp_path / "out/adapter_config.json").is_file()


def test_flags_that_mean_nothing_here_are_refused(adapter_run, base, tmp_path, capsys):
  run = adapter_run()[0]
  convert(capsys, run, tmp_path / "peft")
  assert "has no checkpoints" in refused(capsys, tmp_path / "peft", tmp_path / "x", "--merge", "--step=77")
  assert "has no checkpoints" in refused(capsys, base, tmp_path / "x", "--step=77")
  assert "has no revision 'v1'" in refused(capsys, base, tmp_path / "x", "--revision=v1")


def test_a_smaller_disk_is_refused_first(base, tmp_path, capsys, monkeypatch):
  import shutil
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
  for to in ("hf", "orbax"):
    assert "10,000,000 bytes free" in refused(capsys, base, tmp_path / "x", f"--to={to}")


def test_help_needs_no_jax():
  code = "import sys; from jaxsft.convert.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint('jax' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert "--base-weights" in done.stdout and done.stdout.splitlines()[-1] == "False"
