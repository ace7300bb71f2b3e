"""Examples -> rows of a fixed length: which examples share a row, and the row itself with segment ids and restarting positions.

Algorithms give lists of example numbers, one list a row, in placing order; no example is split, none is left out:

  lengths 3 6 2 5 6 4, row 6      bfd, ffd   [6] [6] [5] [4 2] [3]      next_fit   [3] [6] [2] [5] [6] [4]
"""

from __future__ import annotations

import bisect
from collections import deque

import numpy as np

from jaxsft.batch import padding_row
from jaxsft.errors import UserError

GROUP = 1000      # examples that best-fit-decreasing looks at together: .995 full rows on log-normal lengths, and time linear in the set


def pack_rows(lengths, row_length: int, algorithm: str = "bfd") -> list[list[int]]:
  """Rows of example numbers. Empty examples are left out; one longer than the row raises UserError."""
  if (longest := max(lengths, default=0)) > row_length:
    raise UserError(f"an example of {longest} tokens does not fit a row of {row_length}", wanted="shorter examples or longer rows",
                    knob="data.length")
  if algorithm not in ALGORITHMS:
    raise ValueError(f"unknown packing {algorithm!r}; wanted one of {', '.join(ALGORITHMS)}")
  return ALGORITHMS[algorithm](lengths, row_length)


def bfd(lengths, row_length: int) -> list[list[int]]:
  """Best fit decreasing: longest first, each into the fullest row that still holds it; the oldest among equally full ones."""
  rows: list[list[int]] = []
  free: list[int] = []                           # room left over in some row, ascending
  by_room: dict[int, deque[int]] = {}
  for i in _longest_first(lengths):
    length, at = int(lengths[i]), bisect.bisect_left(free, int(lengths[i]))
    if at < len(free):
      room = free[at]
      row = by_room[room].popleft()
      if not by_room[room]:
        del by_room[room], free[at]
    else:
      room, row = row_length, len(rows)
      rows.append([])
    rows[row].append(i)
    if left := room - length:
      if left not in by_room:
        by_room[left] = deque()
        bisect.insort(free, left)
      by_room[left].append(row)
  return rows


def ffd(lengths, row_length: int) -> list[list[int]]:
  """First fit decreasing, quadratic: the reference the tests hold bfd against."""
  rows: list[list[int]] = []
  rooms: list[int] = []
  for i in _longest_first(lengths):
    row = next((r for r, room in enumerate(rooms) if room >= lengths[i]), len(rows))
    if row == len(rows):
      rows.append([])
      rooms.append(row_length)
    rows[row].append(i)
    rooms[row] -= int(lengths[i])
  return rows


def next_fit(lengths, row_length: int) -> list[list[int]]:
  """In the given order: a row is closed as soon as the next example does not fit."""
  rows: list[list[int]] = []
  room = 0
  for i, length in enumerate(lengths):
    if not length:
      continue
    if not rows or length > room:
      rows.append([])
      room = row_length
    rows[-1].append(i)
    room -= int(length)
  return rows


def _longest_first(lengths) -> list[int]:
  order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
  return [int(i) for i in order if lengths[i]]


ALGORITHMS = {"bfd": bfd, "ffd": ffd, "next_fit": next_fit}


def pack_in_groups(lengths, row_length: int, group: int = GROUP) -> list[list[int]]:
  """`bfd` inside consecutive groups of about `group` examples of even size, in the given order."""
  rows = []
  for part in np.array_split(np.arange(len(lengths)), max(1, -(-len(lengths) // group))):
    rows += [[int(part[i]) for i in row] for row in pack_rows([int(lengths[i]) for i in part], row_length)]
  return rows


def assemble(examples, row_length: int, pad_id: int) -> dict[str, np.ndarray]:
  """One row of batch.FIELDS [T] from the examples that share it: segments 1, 2, ..., positions from 0 in each, padding at the end.

    tokens 5 6 7 8 9 pad    segment_ids 1 1 1 2 2 0    positions 0 1 2 0 1 0
  """
  row, at = padding_row(row_length, pad_id), 0
  for segment, example in enumerate(examples, 1):
    end = at + len(example["tokens"])
    if end > row_length:
      raise ValueError(f"{end} tokens in a row of {row_length}")
    row["tokens"][at:end] = example["tokens"]
    row["weights"][at:end] = example["weights"]
    row["segment_ids"][at:end] = segment
    row["positions"][at:end] = np.arange(end - at)
    at = end
  return row
