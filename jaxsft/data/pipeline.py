"""The only file that wires grain: tokenised examples -> an endless stream of batches whose state is one integer.

Row r of the stream is random access (order.py), so everything else is arithmetic: batch b holds rows [b B, (b + 1) B), host h of H takes
rows
[h B / H, (h + 1) B / H) of it, and a stream restored at any batch goes on as if it had never stopped, with any number of hosts and workers.

  examples --Epochs--> row r --MapDataset--> [B_local, T] batches --(worker processes)--> next(stream)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import signal
import tempfile
from multiprocessing import resource_tracker
from typing import Any

import grain
import numpy as np
from absl import flags

from jaxsft.batch import FIELDS, ROW_IDS, padding_row
from jaxsft.data.examples import Examples, prepare, select
from jaxsft.data.formats import Conversation, Message, canonicalise
from jaxsft.data.order import Epochs
from jaxsft.data.pack import assemble, pack_in_groups
from jaxsft.data.position import positioned
from jaxsft.data.schemas import PLAIN
from jaxsft.data.template import Template
from jaxsft.data.worker import follow_parent
from jaxsft.errors import UserError

ENDLESS = 2**31 - 1       # rows: row_ids are int32


class RowSource:
  """This host's rows of the endless stream, by local number, for grain.MapDataset.source."""

  def __init__(self, examples: Examples, epochs: Epochs, pad_id: int, batch_size: int, host: int, hosts: int):
    self.examples, self.epochs, self.pad_id = examples, epochs, pad_id
    self.batch_size, self.host, self.hosts = batch_size, host, hosts

  def __setstate__(self, state) -> None:
    self.__dict__.update(state)
    follow_parent()                           # only a worker process gets its source by pickle

  def __len__(self) -> int:
    return ENDLESS // self.hosts

  def __getitem__(self, index: int) -> dict[str, Any]:
    local = self.batch_size // self.hosts
    batch, place = divmod(index, local)
    return self.row(batch * self.batch_size + self.host * local + place)

  def row(self, number: int) -> dict[str, Any]:
    """Row `number` of the global stream: batch.FIELDS [T] and its row_ids."""
    row = assemble([self.examples[i] for i in self.epochs.row(number)], self.epochs.row_length, self.pad_id)
    return row | {ROW_IDS: np.int32(number)}


class Stream:
  """An endless iterator of batches: batch.FIELDS [B_local, T] and row_ids [B_local].

  `state()` is {"row": n}, the first global row not yet taken; `restore` goes there. `report` holds the counts for the preflight table,
  `examples` the tokenised set, `where(row_id)` the files and lines behind a row. `close()` ends the worker processes.
  What worker processes share is laid under `scratch` (None: the system's temporary folder).
  """

  def __init__(self, examples: Examples, length: int, pad_id: int, seed: int, batch_size: int, host: int = 0, hosts: int = 1,
               pack: bool = True, workers: int = 0, scratch: str | None = None):
    _check_batch(batch_size, hosts)
    self.examples, self.epochs = examples, Epochs(examples.lengths, length, seed, pack)
    self.source = RowSource(examples, self.epochs, pad_id, batch_size, host, hosts)
    self.batch_size, self.local_size, self.workers = batch_size, batch_size // hosts, workers
    self.report = examples.report | _row_report(examples, self.epochs.plan(0), length, pack)
    self._batch, self._scratch = 0, scratch
    self._iterator: Any = None
    self._folder: tempfile.TemporaryDirectory | None = None

  @property
  def rows_per_epoch(self) -> int:
    """Rows of the first epoch; `rows(epochs)` is exact for more."""
    return self.epochs.first_row(1)

  def rows(self, epochs: float) -> int:
    """Rows of the first `epochs` epochs, a part of the last one rounded up."""
    whole = int(epochs)
    first, part = self.epochs.first_row(whole), epochs - whole
    return first + (int(np.ceil(part * (self.epochs.first_row(whole + 1) - first))) if part else 0)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with any token or weight: a stream restored over other data would go on somewhere else without a word."""
    digest = hashlib.blake2b(digest_size=16)
    for array in (self.examples.tokens, self.examples.weights, self.examples.offsets):
      digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()

  def check_same(self, fingerprint: str, what: str) -> None:
    """UserError when this is not the data that `what` was trained on."""
    if fingerprint != self.fingerprint:
      raise UserError(f"the training data is not what {what} was trained on", wanted="the same records, or another folder",
                      knob="data.train.path or --workdir")

  def __iter__(self) -> Stream:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    with _interrupts_held() if self._iterator is None and self.workers else contextlib.nullcontext():
      batch = self._take()
    self._batch += 1
    return batch

  def peek(self) -> dict[str, np.ndarray]:
    """The next batch, made in this process and not taken."""
    rows = [self.source[self._batch * self.local_size + place] for place in range(self.local_size)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  def _take(self) -> dict[str, np.ndarray]:
    if self._iterator is None:
      self._iterator = self._open()
    try:
      return next(self._iterator)
    except RuntimeError as error:
      if not self.workers:
        raise
      # a worker was killed (no memory, a signal to the whole group): any process can make any row, so this one goes on
      logging.getLogger("jaxsft").warning("a data worker died (%s); going on without worker processes", str(error).splitlines()[0])
      self._stop()
      self.workers = 0
      self._iterator = self._open()
      return next(self._iterator)

  def state(self) -> dict[str, int]:
    return {"row": self._batch * self.batch_size}

  def restore(self, state: dict[str, int]) -> None:
    """Goes on from `state`, taken with any number of hosts and workers but the same batch_size."""
    if state["row"] % self.batch_size:
      raise UserError(f"the saved stream stands at row {state['row']}, inside a batch of {self.batch_size}", wanted="the same batch size",
                      knob="batch_size")
    self._stop()
    self._batch = state["row"] // self.batch_size

  def where(self, row_id: int) -> list[str]:
    """File and line of each record in global row `row_id`."""
    return [self.examples.where(i) for i in self.epochs.row(row_id)]

  def close(self) -> None:
    """Ends worker processes and removes what was laid down for them."""
    self._stop()
    if self._folder is not None:
      self.examples.folder = ""
      self._folder.cleanup()
      self._folder = None

  def _stop(self) -> None:
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None

  def _open(self):
    if self.workers and self._folder is None:
      self._folder = tempfile.TemporaryDirectory(prefix="jaxsft-data-", dir=self._scratch)
      self.examples.spill(self._folder.name)
    rows = grain.MapDataset.source(self.source).slice(slice(self._batch * self.local_size, None))
    batches = rows.batch(self.local_size, drop_remainder=True).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if not self.workers:
      return iter(batches)
    if not flags.FLAGS.is_parsed():         # grain's workers read absl flags; outside absl.app.run nobody has parsed them
      flags.FLAGS.mark_as_parsed()
    return iter(batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2)))


@contextlib.contextmanager
def _interrupts_held():
  """Blocks SIGINT: worker processes that start inside inherit it. Ctrl-C is for the process that saves, which gets it at the end."""
  resource_tracker.ensure_running()         # its own start would lift the block
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _check_batch(batch_size: int, hosts: int) -> None:
  if batch_size < 1 or batch_size % hosts:
    raise UserError(f"a batch of {batch_size} rows does not divide over {hosts} hosts", wanted=f"a multiple of {hosts}", knob="batch_size")


def pad_id(tokenizer) -> int:
  """What fills a row: never looked at, masked by length; still an id that the embedding has."""
  return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def make_stream(data, seed: int, tokenizer, template: Template, batch_size: int, host: int = 0, hosts: int = 1,
                which: str = "train", scratch: str | None = None) -> Stream:
  """The stream of `which` ("train" or "eval"); `data` is the config's data part, `batch_size` counts the rows of all hosts.

  Raises UserError for whatever is wrong with the source, the format, the template or the sizes.
  """
  examples = prepare(data, seed, tokenizer, template, which)
  if not len(examples):
    raise UserError(f"there is no {which} set", wanted="a path or a share of the training set", knob="data.eval.path or data.eval_share")
  return Stream(examples, data.length, pad_id(tokenizer), seed, batch_size, host, hosts, data.pack, data.workers, scratch)


class EvalBatches(list):
  """Batches of one evaluation, fixed in shape; `report` and `examples` as of a Stream."""
  report: dict
  examples: Examples


def make_eval_batches(data, seed: int, tokenizer, template: Template, batch_size: int, host: int = 0, hosts: int = 1,
                      rows: int = 0) -> EvalBatches:
  """Every row of the evaluation set once, in the source's order, [] when there is none; the last batch is filled up with padding rows.

  `rows` limits the rows (0: all); which ones depends on the seed. Row ids count from 0, padding rows included, and every host gets the same number of batches.
  """
  _check_batch(batch_size, hosts)
  examples, pad = prepare(data, seed, tokenizer, template, "eval"), pad_id(tokenizer)
  plan = pack_in_groups(examples.lengths, data.length) if data.pack else [[i] for i in range(len(examples))]
  if rows and rows < len(plan):                # by chance, not the first: packing puts the longest examples there
    plan = [plan[i] for i in sorted(np.random.default_rng(seed).permutation(len(plan))[:rows])]
  local, batches = batch_size // hosts, EvalBatches()
  for start in range(0, len(plan), batch_size):
    mine = range(start + host * local, start + (host + 1) * local)
    made = [assemble([examples[i] for i in plan[n]], data.length, pad) if n < len(plan) else padding_row(data.length, pad) for n in mine]
    batches.append({name: np.stack([row[name] for row in made]) for name in FIELDS} | {ROW_IDS: np.array(mine, np.int32)})
  batches.examples = examples
  batches.report = examples.report | (_row_report(examples, plan, data.length, data.pack) if plan else {})
  return batches


def eval_conversations(data, seed: int, limit: int = 0) -> list[list[Message]]:
  """Canonical messages of the held-out records that have a conversation, in order, the first `limit` of them (0: all)."""
  records, chosen, knob = select(data, seed, "eval")
  source = data.eval if knob == "data.eval.path" else data.train
  found: list[list[Message]] = []
  for index in chosen:
    conversation = canonicalise(records[index], source.format)
    if isinstance(conversation, Conversation) and conversation.schema not in PLAIN:
      found.append(positioned(conversation.messages, conversation.parts, data.position))
    if limit and len(found) == limit:
      break
  return found


def _row_report(examples: Examples, plan, length: int, pack: bool) -> dict:
  """Counts over the rows of one epoch."""
  targets_E = np.add.reduceat(examples.weights, examples.offsets[:-1], dtype=np.int64) - examples.weights[examples.offsets[:-1]]
  supervised = [int(targets_E[np.asarray(row)].sum()) for row in plan]
  tokens = sum(int(examples.lengths[np.asarray(row)].sum()) for row in plan)
  return {
      "pack": pack, "row_length": length, "rows_per_epoch": len(plan),
      "packing_efficiency": tokens / (len(plan) * length), "padding_share": 1 - tokens / (len(plan) * length),
      "supervised_per_row": {"min": min(supervised), "mean": sum(supervised) / len(supervised), "max": max(supervised)},
      "examples_per_row": {"mean": sum(len(row) for row in plan) / len(plan), "max": max(len(row) for row in plan)},
  }
