"""The order of everything, as a pure function of (seed, epoch): no generator state, no host, no worker, no library version in it."""

from __future__ import annotations

import threading

import numpy as np

from jaxsft.data.pack import pack_in_groups


def hashed(keys_N: np.ndarray, *salts: int) -> np.ndarray:
  """uint64 [N] of well mixed bits from uint64 keys and salts (splitmix64's finaliser, Steele et al. 2014)."""
  mixed_N = np.asarray(keys_N, np.uint64)
  with np.errstate(over="ignore"):
    for salt in (*salts, 0):
      mixed_N = mixed_N + np.uint64((salt * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
      mixed_N = (mixed_N ^ (mixed_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
      mixed_N = (mixed_N ^ (mixed_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
      mixed_N = mixed_N ^ (mixed_N >> np.uint64(31))
  return mixed_N


def permutation(count: int, *salts: int) -> np.ndarray:
  """A permutation of range(count) drawn by `salts` alone."""
  return np.argsort(hashed(np.arange(count, dtype=np.uint64), *salts), kind="stable")


class Epochs:
  """Rows of an endless stream of epochs, by number: epochs.row(r) -> the examples that share row r.

  Each epoch permutes the examples, packs them (best fit decreasing in groups) and permutes the rows, so every example comes once an
  epoch, and epochs may differ in their number of rows. The plan of epoch e needs nothing of the others; row r needs the counts of the
  epochs before it.
  """

  def __init__(self, lengths_E, row_length: int, seed: int, pack: bool = True):
    self.lengths, self.row_length, self.seed, self.pack = np.asarray(lengths_E), row_length, seed, pack
    self._first = [0]                           # row number at which each epoch begins
    self._plans: dict[int, list[np.ndarray]] = {}
    self._lock = threading.Lock()

  def __getstate__(self):
    return (self.lengths, self.row_length, self.seed, self.pack)

  def __setstate__(self, state):
    self.__init__(*state)                       # type: ignore[misc]

  def plan(self, epoch: int) -> list[np.ndarray]:
    """The rows of `epoch`, each an array of example numbers."""
    if epoch not in self._plans:
      order_E = permutation(len(self.lengths), self.seed, epoch, 1)
      rows = pack_in_groups(self.lengths[order_E], self.row_length) if self.pack else [[i] for i in range(len(order_E))]
      shuffled = [order_E[np.asarray(rows[i])] for i in permutation(len(rows), self.seed, epoch, 2)]
      self._plans = {e: p for e, p in self._plans.items() if e == epoch - 1} | {epoch: shuffled}
    return self._plans[epoch]

  def first_row(self, epoch: int) -> int:
    """Number of rows before `epoch`."""
    with self._lock:
      return self._first_row(epoch)

  def _first_row(self, epoch: int) -> int:
    while len(self._first) <= epoch:
      self._first.append(self._first[-1] + len(self.plan(len(self._first) - 1)))
    return self._first[epoch]

  def row(self, number: int) -> np.ndarray:
    """Example numbers of row `number` of the endless stream."""
    with self._lock:
      epoch = max(0, int(np.searchsorted(self._first, number, side="right")) - 1)
      while number >= self._first_row(epoch + 1):
        epoch += 1
      return self.plan(epoch)[number - self._first[epoch]]
