"""A run that is killed again and again, whatever it is doing, ends as if nobody had touched it."""

import pathlib
import random
import tempfile
import time

import pytest
from runs import assert_same_run, flags, start, steps, write_records

ROUNDS, LAST = 20, 100


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
  """At the width of SmolLM2, with worker processes, a checkpoint every step: half the kills fall into the start, half into steps and saves."""
  write_records(tmp_path / "train.jsonl", range(300))
  write_records(tmp_path / "eval.jsonl", range(500, 510))
  over = dict(steps=LAST, batch_size=8, micro_batches=1, data__workers=2, checkpoint__every=1, eval__every=5, data__length=128)
  command = lambda name: flags(tmp_path, tmp_path / name, "qlora,wide=true", **over)
  before = litter()
  undisturbed = start(command("straight"))
  _, err = undisturbed.communicate(timeout=1200)
  assert undisturbed.returncode == 0, err
  rng, reached = random.Random(0), []
  for number in range(ROUNDS):
    kill(start(command("killed")), number % 2 == 1, rng)
    made = tmp_path / "killed" / "checkpoints"
    reached.append(max([int(path.name) for path in made.iterdir() if path.name.isdigit()], default=0) if made.is_dir() else 0)
    assert not made.is_dir() or len(list(made.iterdir())) <= 5, sorted(path.name for path in made.iterdir())       # 2 newest, best, one to go, one on its way
  assert reached == sorted(reached), reached
  assert 0 < reached[-1] < LAST, f"the kills have tried nothing: the run stood at {reached}"
  last = start(command("killed"))
  _, err = last.communicate(timeout=1200)
  assert last.returncode == 0, err
  assert_same_run(tmp_path / "killed", tmp_path / "straight", LAST)
  assert steps(tmp_path / "killed") == steps(tmp_path / "straight")
  names = lambda name: sorted(path.name for path in (tmp_path / name).rglob("*") if "tensorboard" not in path.parts and path.parent.name != "d")
  assert names("killed") == names("straight")
  assert litter() <= before, "a killed run leaves files behind"


def kill(process, stepping: bool, rng):
  """SIGKILL within some seconds of the start, or of the first step of this start."""
  if stepping:
    for line in process.stderr:
      if line.startswith("step"):
        break
  time.sleep(rng.uniform(0, 2.5 if stepping else 10))
  process.kill()
  process.communicate(timeout=60)           # its pipes close when its workers are gone too


def litter() -> set[pathlib.Path]:
  """What a run may lay down outside DIR: folders of worker processes, shared memory."""
  shared_memory = pathlib.Path("/dev/shm")
  return set(pathlib.Path(tempfile.gettempdir()).glob("jaxsft-data*")) | (set(shared_memory.iterdir()) if shared_memory.is_dir() else set())
