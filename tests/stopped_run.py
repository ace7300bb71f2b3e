"""A run that gets signals from within at a known moment: python stopped_run.py SIGNALS STEP CHECKPOINT FLAGS...

When the numbers of STEP have been written and CHECKPOINT is whole on disk, the process sends itself SIGNALS ("SIGKILL", "SIGINT,SIGINT"). The ids of its
children are printed before.
"""

import os
import pathlib
import signal
import sys
import time

import psutil

from jaxsft import main, metrics


def stop_at(names: list[str], step: int, checkpoint: pathlib.Path):
  write = metrics.JsonLines.write

  def write_and_stop(self, number, values):
    write(self, number, values)
    if number == step:
      while not checkpoint.is_dir():
        time.sleep(0.01)
      print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
      for name in names:
        os.kill(os.getpid(), getattr(signal, name))
  metrics.JsonLines.write = write_and_stop


if __name__ == "__main__":
  names, step, checkpoint, *argv = sys.argv[1:]
  workdir = next(flag.removeprefix("--workdir=") for flag in argv if flag.startswith("--workdir="))
  stop_at(names.split(","), int(step), pathlib.Path(workdir) / "checkpoints" / checkpoint)
  sys.exit(main.main(argv))
