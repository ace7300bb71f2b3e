"""A user's mistake is one line on standard error that says what was found, what was wanted and which knob, and exit 2. Each test is one mistake."""

import json
import os
import re
import shutil
import signal
import subprocess

import pytest
from runs import flags, leaves, record, run, signalled, start, steps

from jaxsft import checkpoint, main


@pytest.fixture
def mistake(data, tmp_path, capfd):
  """mistake(*parts, **config) runs the tiny config with these keys and asserts one line on standard error that holds every part."""
  def check(*parts, workdir=None, argv=None, **over):
    code = main.main(argv or flags(data, workdir or tmp_path / "run", **over))
    out, err = capfd.readouterr()
    assert (code, out) == (2, ""), err
    told = [line for line in err.splitlines() if not line.startswith(("memory by arithmetic: ", "  "))]
    assert len(told) == 1 and told[0].startswith("error: "), err
    for part in parts:
      assert str(part) in err, f"{part!r} is not in {err!r}"
    assert not (tmp_path / "run" / "config.json").exists(), "the folder is not free for the mended command"
  return check


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A tiny Llama as transformers saves one, tokenizer included."""
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM

  from jaxsft.data.tokenizer import load_tokenizer
  directory = tmp_path_factory.mktemp("model") / "llama"
  torch.manual_seed(0)
  LlamaForCausalLM(LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                               num_key_value_heads=1)).save_pretrained(directory)
  load_tokenizer("bytes").save_pretrained(directory)
  return directory


# The command

def test_unknown_key_names_the_nearest(mistake):
  mistake("config key 'optim.leraning_rate' is unknown", "optim.learning_rate", **{"optim.leraning_rate": 1})
  mistake("config key 'lerning_rate' is unknown", "optim.learning_rate", lerning_rate=1)


def test_unknown_flag(mistake, data, tmp_path):
  mistake("flag '--wrokdir=x' is unknown", "--workdir=DIR", argv=[*flags(data, tmp_path / "run"), "--wrokdir=x"])
  mistake("no --workdir", argv=flags(data, tmp_path / "run")[:1])


def test_config_file_and_its_argument(mistake, tmp_path):
  mistake("config file 'configs/none.py' does not exist", "--config", argv=["--config=configs/none.py", f"--workdir={tmp_path / 'run'}"])
  mistake("argument 'smok' is unknown", "smoke", argv=["--config=configs/qlora_7b.py:smok=true", f"--workdir={tmp_path / 'run'}"])


@pytest.mark.parametrize("key,value,parts", [
    ("steps", "many", ["whole number"]), ("steps", -1, ["0 or more"]), ("lora__rank", -3, ["0 or more"]), ("lora__dropout", 1.5, ["less than 1"]),
    ("optim__learning_rate", 0, ["more than 0"]), ("optim__learning_rate", "1e999", ["more than 0"]), ("eval__every", -1, ["0 or more"]),
    ("log__every", 0, ["at least 1"]), ("data__pack", "maybe", ["true or false"]), ("optim__schedule", "cosin", ["cosine"]),
    ("model__remat", "ful", ["full"]), ("optim__no_decay", "(norm", ["no regular expression"])])
def test_values_out_of_range(mistake, key, value, parts):
  mistake(f"{key.replace('__', '.')}", *parts, **{key: value})


def test_steps_and_epochs_exclude_each_other(mistake):
  mistake("steps is 4 and epochs is 1.0", "exactly one", "set steps or epochs", epochs=1.0)
  mistake("steps is 0 and epochs is 0.0", "exactly one", steps=0)


def test_nf4_without_an_adapter(mistake):
  mistake("full fine-tuning of an NF4 base", "lora.rank or nf4.targets", lora__rank=0)


def test_freeze_with_an_adapter(mistake):
  mistake("freeze is set and so is lora.rank", freeze="embed")


def test_rows_longer_than_the_model(mistake):
  mistake("data.length is 100000 and the model knows", "positions", "data.length", data__length=100000)


def test_a_folder_whose_checkpoints_are_a_file(data, tmp_path, capfd):
  (tmp_path / "run").mkdir()
  (tmp_path / "run/checkpoints").write_text("x")
  assert main.main(flags(data, tmp_path / "run")) == 2
  assert "checkpoints is a file; wanted a folder" in capfd.readouterr().err


def test_batch_that_does_not_divide(mistake):
  mistake("batch_size 15 does not divide into 2 micro-batches", "batch_size or micro_batches", batch_size=15)
  mistake("batch_size 20 does not divide into 2 micro-batches over 8 devices", "a multiple of 16", batch_size=20)
  mistake("mesh data=3 fsdp=1 tensor=1 does not fit 8 devices", "mesh.data", mesh__data=3)


def test_methods(mistake):
  mistake("method.name is 'sftt'", "sft", method__name="sftt")
  mistake("method dpo trains on pairs", "method.name", method__name="dpo")


# The folder

def test_a_workdir_that_cannot_be_written(mistake, tmp_path):
  (tmp_path / "file").write_text("")
  mistake("cannot be written", "--workdir", workdir=tmp_path / "file")
  mistake("cannot be written", "--workdir", workdir="/proc/none")


def test_a_mistake_leaves_the_folder_to_the_mended_command(mistake, data, tmp_path, capfd):
  mistake("unknown format 'alpacca'", data__train__format="alpacca")
  assert main.main(flags(data, tmp_path / "run")) == 0


# The model

def test_missing_model(mistake):
  mistake("/nowhere/model does not exist", "model directory", "model.path", model__path="/nowhere/model")


def test_no_model(mistake, monkeypatch):
  from jaxsft import config
  load = config.load

  def without_shape(reference):
    c = load(reference)
    with c.unlocked():
      c.model.shape = type(c)()
    return c
  monkeypatch.setattr(config, "load", without_shape)
  mistake("no model is named", "model.path")


def broken_copy(model, tmp_path, name="broken"):
  return shutil.copytree(model, tmp_path / name)


def test_truncated_safetensors(mistake, model, tmp_path):
  weights = broken_copy(model, tmp_path) / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-1000])
  mistake(weights, "ends at byte", model__path=weights.parent)


def test_corrupt_safetensors(mistake, model, tmp_path):
  weights = broken_copy(model, tmp_path) / "model.safetensors"
  raw = weights.read_bytes()
  weights.write_bytes(raw[:8] + b"\x00" * 64 + raw[72:])
  mistake(weights, "header", model__path=weights.parent)


def test_missing_tensor(mistake, model, tmp_path):
  config = broken_copy(model, tmp_path) / "config.json"
  config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
  mistake("model.layers.2.", model__path=config.parent)


def test_tokenizer_with_ids_beyond_the_embedding(mistake, model, tmp_path):
  tokenizer = broken_copy(model, tmp_path) / "tokenizer.json"
  plain = json.loads(tokenizer.read_text())
  plain["added_tokens"].append({"id": 400, "content": "<|far|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True})
  plain["model"]["vocab"]["<|far|>"] = 400
  tokenizer.write_text(json.dumps(plain))
  mistake("400", "320", model__path=tokenizer.parent, data__tokenizer="")


def test_a_target_that_matches_nothing(mistake):
  mistake("lora.targets='query_proj' matches no parameter", "nearest", "q_proj", lora__targets="query_proj")
  mistake("nf4.targets='mlp/gate/kernel' matches no parameter", "layers/mlp/gate_proj/kernel", nf4__targets="mlp/gate/kernel")
  mistake("lora.targets='(q' is no regular expression", "lora.targets", lora__targets="(q")


def test_the_base_of_another_run(model, data, tmp_path, capfd):
  """Adapters go on over the weights that they began with, or not at all."""
  import safetensors.numpy
  base = broken_copy(model, tmp_path)
  argv = flags(data, tmp_path / "run", model__path=base, data__tokenizer="")
  assert main.main(argv) == 0
  (tmp_path / "run" / "summary.json").unlink()
  tensors = safetensors.numpy.load_file(base / "model.safetensors")
  safetensors.numpy.save_file({name: tensor * 2 for name, tensor in tensors.items()}, base / "model.safetensors", {"format": "pt"})
  capfd.readouterr()
  assert main.main(argv) == 2
  err = capfd.readouterr().err
  assert "is not the base of" in err and err.count("\n") == 1


# The records

@pytest.mark.parametrize("text,parts", [
    ("", ["is empty", "at least one record"]),
    (json.dumps(record(1)) + '\n{"messages": [\n', ["bad.jsonl:2: broken JSON", "one JSON object a line"]),
    ('[1, 2]\n', ["bad.jsonl:1: the record is a list"]),
    (json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n", ["none of the 1 train records", "no_assistant 1", "bad.jsonl:1", "with an answer"]),
    (json.dumps({"some": "thing"}) + "\n", ["none of the 1 train records", "bad.jsonl:1"])])
def test_records(mistake, tmp_path, text, parts):
  (tmp_path / "bad.jsonl").write_text(text)
  mistake(*parts, "data.train.path", data__train__path=tmp_path / "bad.jsonl")


def test_records_without_an_answer_among_others_are_counted(data, tmp_path):
  lines = [json.dumps(record(number)) for number in range(40)] + [json.dumps({"messages": [{"role": "user", "content": "a"}]})] * 3
  (tmp_path / "some.jsonl").write_text("\n".join(lines))
  assert main.main(flags(data, tmp_path / "run", data__train__path=tmp_path / "some.jsonl")) == 0
  facts = json.loads((tmp_path / "run" / "preflight.json").read_text())["data"]
  assert (facts["records"], facts["kept"], facts["drops"]) == (43, 40, {"no_assistant": {"count": 3, "first": "some.jsonl:41"}})


def test_no_data(mistake):
  mistake("no training data is named", "data.train.path", data__train__path="")
  mistake("/nowhere.jsonl does not exist", "data.train.path", data__train__path="/nowhere.jsonl")
  mistake("/nowhere.jsonl does not exist", "data.eval.path", data__eval__path="/nowhere.jsonl")


def test_rows_that_are_too_short_for_every_record(mistake):
  mistake("too_long 60", data__length=8)


def test_unknown_template_and_format(mistake):
  mistake("unknown template 'chatlm'", "chatml", "data.template", data__template="chatlm")
  mistake("unknown format 'alpacca'", "alpaca", "data.train.format", data__train__format="alpacca")


def test_a_template_without_end_of_turn(mistake, model, tmp_path):
  from jaxsft.data.tokenizer import load_tokenizer
  tokenizer = load_tokenizer("bytes")
  tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
  tokenizer.save_pretrained(tmp_path / "tokenizer")
  mistake("end-of-turn", "data.template", data__tokenizer=tmp_path / "tokenizer")


def test_one_line_in_a_process_of_its_own(model, data, tmp_path):
  """Nothing that a library prints while it starts or ends stands beside the message."""
  weights = broken_copy(model, tmp_path) / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-1000])
  out, err = (process := start(flags(data, tmp_path / "run", model__path=weights.parent))).communicate(timeout=300)
  assert process.returncode == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err


# The disk

def test_a_disk_too_small_is_told_before_the_save(data, tmp_path, monkeypatch, capfd):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=20_000))
  assert main.main(flags(data, tmp_path / "run")) == 2
  err = capfd.readouterr().err.splitlines()
  assert re.fullmatch(r"error: .*/run/checkpoints has 20 kB free and a checkpoint takes [\d.]+ kB .*; wanted free disk space; set --workdir .*", err[-1])
  assert not any("Traceback" in line for line in err)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
from jaxsft.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_fills_during_a_save_leaves_the_checkpoint_before(data, tmp_path):
  """The write itself fails, in Orbax's background thread: no file may grow past 8 kB (what a full disk does, wherever the tests run)."""
  argv = flags(data, tmp_path / "run")
  with signalled(signal.SIGTERM, at=2):
    assert run(argv)[0] == 75
  full = start(argv, ("-c", LIMITED))
  _, err = full.communicate(timeout=300)
  assert full.returncode == 2 and "Traceback" not in err, err
  last = err.splitlines()[-1]
  assert re.fullmatch(r"error: the disk of .* is full: .* \(earlier checkpoints are whole\); wanted free disk space; set --workdir .*", last)
  assert sum(line.startswith("error") for line in err.splitlines()) == 1
  assert steps(tmp_path / "run") == [2] and len(leaves(tmp_path / "run", 2)) > 20
  assert run(argv)[0] == 0 and steps(tmp_path / "run") == [2, 4]


def test_a_real_full_disk(data, tmp_path):
  """The same on a small file system, where root may mount one: all of DIR is on it, metrics and TensorBoard too."""
  disk = tmp_path / "disk"
  disk.mkdir()
  if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True).returncode:
    pytest.skip("needs root and mount; the test above fills the disk by a limit")
  try:
    process = start(flags(data, disk / "run", checkpoint__every=1, checkpoint__keep=9))
    _, err = process.communicate(timeout=300)
    kept = steps(disk / "run")
    assert process.returncode == 2 and "Traceback" not in err and err.splitlines()[-1].startswith("error: "), err
    assert "free disk space" in err.splitlines()[-1] and kept and leaves(disk / "run", kept[-1])
  finally:
    subprocess.run(["umount", disk], check=True)
