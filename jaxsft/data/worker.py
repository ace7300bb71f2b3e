"""What a worker process of ours does when it starts."""

from __future__ import annotations

import multiprocessing
import os
import threading


def follow_parent() -> None:
  """Ends this process when the one that started it dies, even by SIGKILL: workers wait for ever on queues that nobody fills, memory held."""
  if (parent := multiprocessing.parent_process()) is not None:
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent) -> None:
  parent.join()
  os._exit(1)
