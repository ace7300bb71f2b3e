"""How the run tests start jaxsft.main: its flags, the records, the numbers and arrays that a run leaves."""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jaxsft import main, train
from jaxsft.checkpoint import Checkpoints

TESTS = pathlib.Path(__file__).resolve().parent
TIMES = ("tokens_per_second", "step_seconds")       # what two equal runs do not share


def record(number: int) -> dict:
  """One conversation of some 30 bytes, its length by its number."""
  return {"messages": [{"role": "user", "content": f"{number}+{number % 3}?"}, {"role": "assistant", "content": f"{number + number % 3}" + "!" * (number % 9)}]}


def write_records(path: pathlib.Path, numbers) -> pathlib.Path:
  path.write_text("".join(json.dumps(record(number)) + "\n" for number in numbers))
  return path


def flags(data: pathlib.Path, workdir, mode="qlora", **over) -> list[str]:
  """Of the tiny run; `over` takes config keys with "__" for the dot."""
  return [f"--config={TESTS / 'run_config.py'}:data={data / 'train.jsonl'},eval={data / 'eval.jsonl'},mode={mode}", f"--workdir={workdir}",
          *(f"--config.{key.replace('__', '.')}={value}" for key, value in over.items())]


def run(argv) -> tuple[int, str]:
  """Exit code and standard error of a run in this process, as when that is no terminal."""
  with contextlib.redirect_stderr(io.StringIO()) as said:
    code = main.main(argv)
  return code, said.getvalue()


@contextlib.contextmanager
def signalled(number, at: int):
  """This process sends itself a signal while step `at` is on its way."""
  one = train.Loop._one

  def send_and_go_on(self, step):
    if step == at:
      os.kill(os.getpid(), number)
    one(self, step)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train.Loop, "_one", send_and_go_on)
    yield


def start(argv, program=("-m", "jaxsft.main")) -> subprocess.Popen:
  """A run in a process of its own, with this one's compilation cache and devices."""
  env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(TESTS.parent), str(TESTS)]))
  return subprocess.Popen([sys.executable, *program, *argv], cwd=TESTS.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def numbers(workdir: pathlib.Path) -> list[dict]:
  """metrics.jsonl without what a clock says."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def steps(workdir: pathlib.Path) -> list[int]:
  """The whole checkpoints on disk."""
  return Checkpoints(workdir / "checkpoints", read_only=True).steps()


def leaves(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """Everything that a checkpoint holds: parameters, moments, keys."""
  return Checkpoints(workdir / "checkpoints", read_only=True).read(step)[0]


def assert_same_run(one: pathlib.Path, other: pathlib.Path, step: int):
  """Every number logged and every array of the last checkpoint, to the bit."""
  assert numbers(one) == numbers(other)
  first, second = leaves(one, step), leaves(other, step)
  assert first.keys() == second.keys() and len(first) > 20
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name, strict=True)
