"""The writers by themselves: what is cut on resume, what is summed up, what a log that is no terminal sees."""

import builtins
import contextlib
import io
import json
import struct
import sys
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from jaxsft import config, metrics, preflight
from jaxsft.errors import UserError


def test_lines_past_the_restored_step_and_a_half_line_are_cut(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(5)) + '{"step": 3, "lo')
  writer = metrics.JsonLines(path, start=2)
  writer.write(3, {"loss": float("nan"), "tokens": 4})
  writer.close()
  assert [line["step"] for line in metrics.read_json_lines(path)] == [0, 1, 2, 3]
  assert metrics.read_json_lines(path)[-1] == {"step": 3, "loss": "nan", "tokens": 4}       # JSON has no NaN
  assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_summary_is_of_the_whole_run_and_of_what_there_is():
  lines = [{"step": 0, "eval_loss": 9.0}, {"step": 1, "loss": 8.0, "tokens_per_second": 1.0}, {"step": 2, "loss": 7.0, "tokens_per_second": 30.0},
           {"step": 3, "loss": 6.0, "eval_loss": 5.0, "tokens_per_second": 20.0}]
  assert metrics.summarise(lines) == {"train_loss_first": 8.0, "train_loss_last": 6.0, "eval_loss_before": 9.0, "eval_loss_after": 5.0,
                                      "tokens_per_second": 25.0}      # the first step compiles
  assert set(metrics.summarise([]).values()) == {None}
  assert metrics.summarise(lines[1:2])["tokens_per_second"] == 1.0


def test_no_escape_codes_in_a_log_whatever_the_environment_says(monkeypatch):
  monkeypatch.setenv("FORCE_COLOR", "1")
  monkeypatch.setenv("COLUMNS", "300")
  with contextlib.redirect_stderr(io.StringIO()) as said:
    preflight.print_table({"data": {"source": "x" * 400, "drops": {}}, "rules": {"lora.targets (q|k)_proj/kernel$": 7}, "steps": 12345})
    terminal = metrics.Terminal(0, 4)
    terminal.write(1, {"loss": 1.0, "tokens_per_second": 1234.5})
    terminal.say("[bold]not markup[/bold]")
    terminal.close()
  text = said.getvalue()
  assert "\x1b" not in text and "[bold]not markup[/bold]" in text and "step 1/4  loss 1.0000  1,234 tok/s" in text
  assert max(map(len, text.splitlines())) <= 100 and "drops none" in text and "12,345" in text and "lora.targets (q|k)_proj/kernel$: 7" in text


@pytest.mark.parametrize("key,value,text", [
    ("bytes", 131_072, "131 kB"), ("bytes_a_device", 3_500_000_000, "3.5 GB"), ("padding_share", 0.0324, "3.2%"), ("mean", 250.24, "250.2"),
    ("records", 100068, "100,068"), ("pack", True, "yes"), ("drops", {}, "none"),
    ("drops", {"too_long": {"count": 2, "first": "a:1"}}, "too long count 2, first a:1")])
def test_values_of_the_table_are_for_people(key, value, text):
  assert preflight._text(key, value) == text


def test_a_value_a_layer_becomes_a_number_a_layer():
  got = metrics.scalars({"loss": np.float32(2.5), "norm/q": np.float32([1, 2]), "step": np.int32(3)})
  assert got == {"loss": 2.5, "norm/q/0": 1.0, "norm/q/1": 2.0, "step": 3.0} and all(type(value) is float for value in got.values())


# Weights & Biases

def log(**over):
  return ConfigDict(common.base().log.to_dict() | dict(tensorboard=False) | over)


def write_three(tmp_path, start, **over):
  writers, _ = metrics.open_writers(log(**over), tmp_path, start, 9, {"optim.name": "adamw"})
  for step in range(start + 1, start + 4):
    for writer in writers:
      writer.write(step, {"loss": 1.0 / step})
  for writer in writers:
    writer.close()


def leveldb_records(raw):
  """The records of a .wandb file: a header of 7 bytes, then LevelDB's log: blocks of 32 KiB; crc, length, kind (whole, first, middle, last) before each part."""
  place, parts = 7, b""
  while place + 7 <= len(raw):
    if 32768 - place % 32768 < 7:
      place += 32768 - place % 32768
      continue
    length, kind = struct.unpack("<HB", raw[place + 4:place + 7])
    parts += raw[place + 7:place + 7 + length]
    place += 7 + length
    if kind in (1, 4):
      yield parts
      parts = b""


def offline_losses(path, name) -> dict:
  """{step: loss} of every start of the run `name` (a second one in the same second has "-1" behind its name)."""
  from wandb.proto import wandb_internal_pb2
  found = {}
  for file in path.glob(f"wandb/offline-run-*-{name}*/*.wandb"):
    for data in leveldb_records(file.read_bytes()):
      record = wandb_internal_pb2.Record.FromString(data)
      if record.WhichOneof("record_type") == "history":
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        found[items["_step"]] = items["loss"]
  return found


def test_wandb_offline_keeps_the_run_over_a_resume(tmp_path, monkeypatch):
  """The real package, without a network: two starts of one run write under one id, the numbers that metrics.jsonl has."""
  import wandb
  monkeypatch.setenv("WANDB_MODE", "offline")
  write_three(tmp_path, 0, wandb="mine")
  kept = json.loads((tmp_path / "wandb.json").read_text())
  write_three(tmp_path, 3, wandb="mine")
  assert json.loads((tmp_path / "wandb.json").read_text()) == kept and kept["project"] == "mine"
  wandb.teardown()                                     # as at the end of a process: W&B's own process writes what it holds
  assert offline_losses(tmp_path, kept["id"]) == {step: 1.0 / step for step in range(1, 7)}


def test_what_wandb_is_told(tmp_path, monkeypatch):
  """Against a module of our own: project, the id of DIR/wandb.json on both starts, the config, the steps; off: it is not even imported."""
  calls, logged = [], []
  fake = types.ModuleType("wandb")
  fake.Error, fake.Settings = RuntimeError, lambda **over: over
  one_run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finish"))
  fake.init = lambda **over: calls.append(over) or one_run
  monkeypatch.setitem(sys.modules, "wandb", fake)
  write_three(tmp_path, 0)
  assert not calls and not (tmp_path / "wandb.json").exists()
  write_three(tmp_path, 0, wandb="p")
  write_three(tmp_path, 3, wandb="p")
  assert [call["id"] for call in calls] == [json.loads((tmp_path / "wandb.json").read_text())["id"]] * 2
  assert all(call["project"] == "p" and call["resume"] == "allow" and call["config"] == {"optim.name": "adamw"} for call in calls)
  assert [entry if entry == "finish" else entry[0] for entry in logged] == [1, 2, 3, "finish", 4, 5, 6, "finish"]

  def refuse(**_):
    raise fake.Error("no key")
  fake.init = refuse
  with pytest.raises(UserError, match=r"W&B refuses the run \(no key\); wanted wandb login, or WANDB_MODE=offline; set log.wandb"):
    write_three(tmp_path, 6, wandb="p")


def test_a_missing_wandb_is_one_line_before_anything_else(monkeypatch, tmp_path):
  c = common.smoke(common.full(common.base()))
  c.log.wandb = "p"
  config.validate(c)
  monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: None)
  words = r"log.wandb is 'p' and the package wandb is not installed; wanted pip install 'jaxsft\[wandb\]'; set log.wandb"
  with pytest.raises(UserError, match=words):
    config.validate(c)
  real = builtins.__import__
  monkeypatch.delitem(sys.modules, "wandb", raising=False)
  monkeypatch.setattr(builtins, "__import__", lambda name, *rest: (_ for _ in ()).throw(ImportError(name)) if name == "wandb" else real(name, *rest))
  with pytest.raises(UserError, match=words):
    metrics.Wandb(tmp_path, "p", {})
