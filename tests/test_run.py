"""A run as a user meets it: what lies in DIR, how it stops, and that it goes on to the bit."""

import contextlib
import json
import os
import pty
import shutil
import signal
import struct
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from runs import TESTS, assert_same_run, flags, leaves, numbers, record, run, signalled, start, steps

from jaxsft import base as bases
from jaxsft import main, train
from jaxsft.evaluation import Evaluation
from jaxsft.transforms import tree as trees
from jaxsft.workdir import Workdir

LAST = 4
LOGGED = {"step", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "tokens_per_second", "step_seconds"}


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
  """straight(mode) -> (workdir, what it said) of an undisturbed run, made once."""
  done = {}

  def make(mode):
    if mode not in done:
      workdir = tmp_path_factory.mktemp("straight") / mode
      code, said = run(flags(data, workdir, mode))
      assert code == 0, said
      done[mode] = workdir, said
    return done[mode]
  return make


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
  """The workdir of a QLoRA run that was stopped after step 2; copy it before use."""
  workdir = tmp_path_factory.mktemp("stopped") / "run"
  with signalled(signal.SIGTERM, at=2):
    code, said = run(flags(data, workdir))
  assert code == 75, said
  return workdir


# What lies in DIR

def test_the_folder_holds_what_the_contract_names(straight, data):
  workdir, _ = straight("qlora")
  assert json.loads((workdir / "config.json").read_text())["lora.rank"] == 4
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
  assert all(line.keys() >= LOGGED for line in lines[1:]) and all(line["tokens"] > line["supervised_tokens"] > 0 for line in lines[1:])
  assert ["eval_loss" in line for line in lines] == [True, False, True, False, True]
  assert all(line["tokens_per_second"] == pytest.approx(line["tokens"] / line["step_seconds"]) for line in lines[1:])
  assert steps(workdir) == [2, 4]
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["train_loss_first"] == lines[1]["loss"] and summary["train_loss_last"] == lines[4]["loss"]
  assert summary["eval_loss_before"] == lines[0]["eval_loss"] and summary["eval_loss_after"] == lines[4]["eval_loss"]
  assert summary["tokens_per_second"] > 0 and summary["peak_rss_bytes"] > 1e7 and summary["wall_seconds"] > 0
  left = {path.name for path in workdir.iterdir()}
  assert left == {".lock", "config.json", "preflight.json", "metrics.jsonl", "tensorboard", "checkpoints", "tokenizer", "summary.json"}


def test_preflight_says_what_is_trained_on_what(straight):
  facts = json.loads((straight("qlora")[0] / "preflight.json").read_text())
  assert facts["data"]["records"] == facts["data"]["kept"] == 60 and facts["data"]["drops"] == {}
  assert facts["packed_equals_unpacked"]["checked"] and facts["packed_equals_unpacked"]["examples"] >= 2
  assert facts["template"]["end_of_turn_trained"] == 60 and facts["first_batch"]["rows_without_supervision"] == 0
  assert facts["parameters"]["trainable"]["parameters"] > 0 and facts["parameters"]["quantised"]["parameters"] > 0
  assert all(found == 7 for found in facts["rules"].values()) and len(facts["rules"]) == 2
  assert LAST * 16 % facts["packing"]["rows_per_epoch"] and 2 * 16 % facts["packing"]["rows_per_epoch"]      # the tests below stop inside an epoch
  assert facts["packing"]["examples_per_row"]["mean"] > 1.5


def test_tensorboard_reads_the_same_losses(straight):
  from tensorboardX.proto import event_pb2
  workdir, _ = straight("qlora")
  file, = (workdir / "tensorboard").iterdir()
  raw, events = file.read_bytes(), []
  while raw:                                     # TFRecord: length, its checksum, bytes, their checksum
    length, = struct.unpack("<Q", raw[:8])
    events.append(event_pb2.Event.FromString(raw[12:12 + length]))
    raw = raw[16 + length:]
  found = {event.step: value.simple_value for event in events for value in event.summary.value if value.tag == "loss"}
  assert found == {line["step"]: pytest.approx(line["loss"]) for line in numbers(workdir) if "loss" in line}


# What the user sees

def test_plain_lines_where_there_is_no_terminal(straight):
  said = straight("qlora")[1]
  assert "\x1b" not in said and "\r" not in said
  told = said[said.index("step 0/4"):].splitlines()
  assert [line.split()[1] for line in told[:5]] == ["0/4", "1/4", "2/4", "3/4", "4/4"]
  assert "loss" in told[1] and "tok/s" in told[1] and "eta" in told[2] and "eval" in told[4] and told[5].startswith("done: 4 steps")
  table = said[:said.index("step 0/4")]
  assert max(map(len, table.splitlines())) <= 100
  assert "drops none" in table and "mode QLoRA rank 4" in table and "{" not in table and "kB" in table


def test_a_bar_on_a_terminal(data, tmp_path, monkeypatch):
  lead, follow = pty.openpty()
  seen = bytearray()

  def read():
    with contextlib.suppress(OSError):           # Linux: the other end is closed
      while part := os.read(lead, 4096):
        seen.extend(part)
  reader = threading.Thread(target=read)
  reader.start()
  with open(follow, "w") as terminal:
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert main.main(flags(data, tmp_path / "run")) == 0
  reader.join()
  text = seen.decode()
  assert "\x1b[" in text and "compiling" in text and "4/4" in text and "loss" in text and "tok/s" in text
  assert text.count("\x1b[?25l") == text.count("\x1b[?25h")      # the cursor is back
  assert "step 1/4" not in text and "done: 4 steps" in text


# Again in the same folder

def test_the_same_command_after_the_end_does_nothing(straight, data):
  workdir, _ = straight("qlora")
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"}
  code, said = run(flags(data, workdir))
  assert code == 0 and said.splitlines() == [f"step 4 is done already: nothing is left to do in {workdir}"]
  assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"}


def test_another_config_in_the_same_folder_is_refused(straight, data):
  workdir, _ = straight("qlora")
  code, said = run(flags(data, workdir, seed=3, optim__learning_rate=0.5))
  assert code == 2 and len(said.splitlines()) == 1
  assert "optim.learning_rate: 0.01 -> 0.5; seed: 0 -> 3" in said and "--workdir" in said


def test_a_second_run_at_the_same_time_is_refused(straight, data):
  from jaxsft import config
  workdir, _ = straight("qlora")
  argv = flags(data, workdir)
  held = Workdir(workdir, config.load(argv[0].removeprefix("--config=")))
  try:
    code, said = run(argv)
  finally:
    held.close()
  assert code == 2 and "in use by another run" in said and len(said.splitlines()) == 1


def test_other_records_under_the_same_path_are_refused(stopped, data, tmp_path):
  shutil.copytree(stopped, tmp_path / "run")
  before = (data / "train.jsonl").read_text()
  try:
    (data / "train.jsonl").write_text(before + json.dumps(record(61)) + "\n")
    code, said = run(flags(data, tmp_path / "run"))
  finally:
    (data / "train.jsonl").write_text(before)
  assert code == 2 and "the training data is not what step 2" in said and len(said.splitlines()) == 1


# Stopped, and on to the bit

@pytest.mark.parametrize("mode,workers", [("qlora", 0), ("full", 2)])
def test_two_steps_a_kill_and_two_more_equal_four(straight, data, tmp_path, mode, workers):
  argv = flags(data, tmp_path / "run", mode, data__workers=workers)
  killed = start(["SIGKILL", "3", "2", *argv], (str(TESTS / "stopped_run.py"),))
  out, err = killed.communicate(timeout=300)
  assert killed.returncode == -signal.SIGKILL, err
  assert steps(tmp_path / "run") == [2] and numbers(tmp_path / "run")[-1]["step"] == 3
  children = [int(pid) for pid in out.split()]
  assert bool(children) == bool(workers)
  deadline = time.monotonic() + 20
  while any(map(psutil.pid_exists, children)) and time.monotonic() < deadline:
    time.sleep(0.1)
  assert not any(map(psutil.pid_exists, children)), "a killed run leaves its workers behind"
  code, said = run(argv)
  assert code == 0, said
  assert "resumed from" in said and said.count("step 3/4") == 1
  assert_same_run(tmp_path / "run", straight(mode)[0], LAST)
  assert not (tmp_path / "run" / ".scratch").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(straight, data, tmp_path, number, capfd):
  handler = signal.getsignal(number)
  with signalled(number, at=3):
    code, said = run(flags(data, tmp_path))
  assert code == 75 and signal.getsignal(number) == handler
  assert f"{number.name}: finishing this step, then saving" in capfd.readouterr().err
  stopped_at = steps(tmp_path)[-1]
  assert stopped_at == 3 and said.splitlines()[-1] == f"{number.name}: saved step 3 of 4; the same command goes on from there"
  assert not (tmp_path / "summary.json").exists()
  code, said = run(flags(data, tmp_path))
  assert code == 0, said
  assert_same_run(tmp_path, straight("qlora")[0], LAST)


def test_a_signal_during_an_evaluation_is_not_called_saved_before_it_is(data, tmp_path, monkeypatch):
  evaluate = train.Loop._evaluate

  def signal_first(self, number):
    if number == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    evaluate(self, number)
  monkeypatch.setattr(train.Loop, "_evaluate", signal_first)
  code, said = run(flags(data, tmp_path, checkpoint__every=100))
  assert code == 75 and said.splitlines()[-1].startswith("SIGTERM: saved step 3 of 4") and steps(tmp_path) == [3]


def test_a_run_that_saved_nothing_starts_its_logs_again(data, tmp_path):
  with signalled(signal.SIGTERM, at=1), pytest.MonkeyPatch.context() as patch:
    patch.setattr(train.Loop, "_save", lambda *_: None)
    code, _ = run(flags(data, tmp_path))
  assert code == 75 and steps(tmp_path) == []
  assert run(flags(data, tmp_path))[0] == 0
  assert [line["step"] for line in numbers(tmp_path)] == [0, 1, 2, 3, 4]


def test_a_signal_before_the_first_step_stops_at_once(data, tmp_path, monkeypatch):
  monkeypatch.setattr(bases, "load", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))
  code, said = run(flags(data, tmp_path))
  assert code == 75 and len(said.splitlines()) == 1 and "SIGTERM before the first step" in said


def test_a_second_interrupt_leaves_at_once_and_what_is_on_disk_is_whole(straight, data, tmp_path):
  argv = flags(data, tmp_path / "run")
  left = start(["SIGINT,SIGINT", "3", "2", *argv], (str(TESTS / "stopped_run.py"),))
  _, err = left.communicate(timeout=300)
  assert left.returncode == 1 and "Traceback" not in err
  assert err.splitlines()[-2].startswith("SIGINT: finishing this step") and err.splitlines()[-1].startswith("SIGINT again: leaving at once")
  assert steps(tmp_path / "run") == [2]
  code, said = run(argv)
  assert code == 0, said
  assert_same_run(tmp_path / "run", straight("qlora")[0], LAST)


# Numbers that are none

def test_a_loss_that_is_nan_names_step_and_rows_and_leaves_the_checkpoint(straight, stopped, data, tmp_path, monkeypatch):
  shutil.copytree(stopped, tmp_path / "run")
  one = train.Loop._one

  def poisoned(self, number):
    if number == 3:
      self.frozen = trees.map_leaves(lambda path, leaf: leaf * jnp.nan if path == "norm/scale" else leaf, self.frozen)
    one(self, number)
  with monkeypatch.context() as patch:
    patch.setattr(train.Loop, "_one", poisoned)
    code, said = run(flags(data, tmp_path / "run"))
  last = said.splitlines()[-1]
  assert code == 1 and last.startswith("stopped: step 3: loss nan, gradient norm nan; rows 32 to 47 of the stream (train.jsonl:")
  assert "step 2 is saved and whole" in last and "optim.learning_rate" in last
  assert steps(tmp_path / "run") == [2]
  assert all(np.isfinite(leaf).all() for leaf in leaves(tmp_path / "run", 2).values())
  assert run(flags(data, tmp_path / "run"))[0] == 0
  assert_same_run(tmp_path / "run", straight("qlora")[0], LAST)


def test_parameters_that_are_inf_are_not_saved(stopped, data, tmp_path, monkeypatch):
  shutil.copytree(stopped, tmp_path / "run")
  save = train.Loop._save

  def overflown(self, number, temporary):
    self.state = self.state._replace(trainable=trees.map_leaves(lambda _, leaf: leaf / 0, self.state.trainable))
    save(self, number, temporary)
  monkeypatch.setattr(train.Loop, "_save", overflown)
  code, said = run(flags(data, tmp_path / "run"))
  assert code == 1 and "stopped: step 4: a parameter is NaN or Inf after its update; rows 48 to 63" in said.splitlines()[-1]
  assert steps(tmp_path / "run") == [2]


# What is kept

def test_the_newest_and_the_best_are_kept_over_a_restart(data, tmp_path, monkeypatch):
  losses = iter((9.0, 5.0, 3.0, 4.0, 6.0))         # before the first step, and after each
  monkeypatch.setattr(Evaluation, "run", lambda *_: {"eval_loss": next(losses)})
  argv = flags(data, tmp_path, eval__every=1, checkpoint__every=1, checkpoint__keep=1)
  with signalled(signal.SIGTERM, at=3):
    assert run(argv)[0] == 75
  assert steps(tmp_path) == [2, 3]
  assert run(argv)[0] == 0
  assert steps(tmp_path) == [2, 4]
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]


def test_no_evaluation_set_no_evaluation(data, tmp_path):
  argv = flags(data, tmp_path)
  code, said = run([argv[0].replace(f"eval={data / 'eval.jsonl'}", "eval="), *argv[1:]])
  assert code == 0, said
  assert [line["step"] for line in numbers(tmp_path)] == [1, 2, 3, 4] and "eval " not in said[said.index("step 1/4"):]
  assert json.loads((tmp_path / "summary.json").read_text())["eval_loss_after"] is None
