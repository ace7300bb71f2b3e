"""Records -> tokenised examples in flat arrays, with a report of everything that was kept, repaired and dropped.

  tokens  [N] int32   all examples one after the other          offsets [E+1] int64   where each begins
  weights [N] uint8   1 where trained                           origin  [E] int32     record number in the source

`prepare` is a pure function of the records and the settings: worker processes only change how fast it is.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import pathlib
from collections import Counter

import numpy as np

from jaxsft.data.document import encode_document
from jaxsft.data.formats import Conversation, Drop, canonicalise
from jaxsft.data.order import hashed
from jaxsft.data.records import Records, read_records
from jaxsft.data.schemas import FOUND_BY, PLAIN
from jaxsft.data.template import Refused, Template
from jaxsft.data.tokenise import encode_many
from jaxsft.data.worker import follow_parent
from jaxsft.errors import UserError

CHUNK = 512        # records that one call of a worker takes
LONG_ROWS = ("drop", "truncate", "error")


class Examples:
  """Tokenised examples by number: examples[i] -> {"tokens" int32 [T], "weights" float32 [T]}; where(i) -> "file:line"."""

  def __init__(self, tokens_N, weights_N, offsets_E, origin_E, records: Records | None = None, report: dict | None = None):
    self.tokens, self.weights, self.offsets, self.origin = tokens_N, weights_N, offsets_E, origin_E
    self.records, self.report, self.folder = records, report or {}, ""

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    part = slice(self.offsets[index], self.offsets[index + 1])
    return {"tokens": np.asarray(self.tokens[part]), "weights": np.asarray(self.weights[part], np.float32)}

  @property
  def lengths(self) -> np.ndarray:
    return np.diff(self.offsets)

  def where(self, index: int) -> str:
    """File and line of the record behind example `index`."""
    return self.records.where(int(self.origin[index])) if self.records is not None else f"record {self.origin[index]}"

  def spill(self, folder: str) -> None:
    """Writes the flat arrays under `folder`: from then on a pickle of this object is a path, and processes share the pages."""
    for name in ("tokens", "weights", "offsets", "origin"):
      np.save(pathlib.Path(folder) / f"{name}.npy", getattr(self, name))
    self.folder = folder

  def __reduce__(self):
    if self.folder:
      return _mapped, (self.folder,)
    return Examples, (self.tokens, self.weights, self.offsets, self.origin)


def _mapped(folder: str) -> Examples:
  return Examples(*(np.load(pathlib.Path(folder) / f"{name}.npy", mmap_mode="r") for name in ("tokens", "weights", "offsets", "origin")))


@dataclasses.dataclass(frozen=True)
class _Settings:
  """What turns records into examples; goes to each worker once."""
  template: Template
  tokenizer: object
  format: str
  train_on: str
  length: int
  long_rows: str


def select(data, seed: int, which: str) -> tuple[Records, list[int], str]:
  """The records of "train" or "eval", the numbers of those that belong to it, and the knob of their path.

  Without eval.path, `eval_share` of the training records is held out: those whose content's hash with the seed is smallest, so that the
  split depends neither on the order nor on the other records, and equal records stay on one side.
  """
  if which == "eval" and data.eval.path:
    records = read_records(data.eval, "data.eval.path")
    return records, list(range(len(records))), "data.eval.path"
  if not 0 <= data.eval_share < 1:
    raise UserError(f"eval_share is {data.eval_share}", wanted="a share in [0, 1)", knob="data.eval_share")
  records = read_records(data.train, "data.train.path")
  if data.eval.path or not data.eval_share:
    return records, list(range(len(records))) if which == "train" else [], "data.train.path"
  keys = hashed(np.array([_content_key(records[i]) for i in range(len(records))], np.uint64), seed)
  cut = np.sort(keys)[max(1, round(data.eval_share * len(keys))) - 1]
  chosen = np.flatnonzero(keys <= cut if which == "eval" else keys > cut)
  if not len(chosen):
    raise UserError(f"eval_share {data.eval_share} of {len(records)} records leaves none to train on", wanted="a smaller share",
                    knob="data.eval_share")
  return records, chosen.tolist(), "data.train.path"


def _content_key(record) -> int:
  if isinstance(record, dict) and ("oasst_thread" in record or "oasst_drop" in record):           # the threads of a tree share turns: they stay together
    record = record.get("message_tree_id") or record
  return int.from_bytes(hashlib.blake2b(json.dumps(record, sort_keys=True, default=str).encode(), digest_size=8).digest(), "little")


def prepare(data, seed: int, tokenizer, template: Template, which: str = "train") -> Examples:
  """Tokenised examples of "train" or "eval" (no examples at all when there is no evaluation set), `report` included.

  Raises UserError: what `read_records` raises; no record kept, or none with a token to train; a row longer than data.length with
  long_rows "error".
  """
  results, records, source, knob, settings = outcomes(data, seed, tokenizer, template, which)
  return _collect(results, records, source, knob, settings, which)


def outcomes(data, seed: int, tokenizer, template: Template, which: str = "train"):
  """(what became of each record, the records, their source, its knob, the settings): everything `prepare` knows before it counts.

  Raises UserError: what `read_records` raises; with policy "strict", the first record that would be dropped.
  """
  if data.long_rows not in LONG_ROWS:
    raise UserError(f"unknown long_rows {data.long_rows!r}", wanted=", ".join(LONG_ROWS), knob="data.long_rows")
  records, chosen, knob = select(data, seed, which)
  source = data.eval if knob == "data.eval.path" else data.train
  settings = _Settings(template, tokenizer, source.format, data.train_on, data.length, data.long_rows)
  chunks = [chosen[i:i + CHUNK] for i in range(0, len(chosen), CHUNK)]
  results = [item for part in _map(settings, [[(i, records[i]) for i in chunk] for chunk in chunks], data.workers) for item in part]
  if getattr(source, "policy", "drop") == "strict":
    _refuse_drops(results, records, knob)
  return results, records, source, knob, settings


LONG_CODES = ("too_long", "truncated_to_nothing")       # data.long_rows says what becomes of these


def _refuse_drops(results: list[_Outcome], records: Records, knob: str) -> None:
  refused = [r for r in results if r.drop and r.drop not in LONG_CODES]
  if refused:
    raise UserError(f"{records.where(refused[0].index)} cannot be trained on ({refused[0].drop}), {len(refused)} such records in all",
                    wanted="records in a known format with an answer, or policy drop", knob=f"{knob.removesuffix('path')}policy")


def _map(settings, chunks, workers: int):
  """`_chunk` of every chunk, in order; in worker processes when there is more than one chunk for each to do."""
  if workers <= 0 or len(chunks) < 2:
    return [_chunk(settings, chunk) for chunk in chunks]
  context = multiprocessing.get_context("spawn")       # a fork of a process that runs jax may hang
  with concurrent.futures.ProcessPoolExecutor(min(workers, len(chunks)), context, _start_worker, (settings,)) as pool:
    return list(pool.map(_chunk_in_worker, chunks))


_worker: list[_Settings] = []      # the settings of this worker process, set once when it starts


def _start_worker(settings) -> None:
  follow_parent()
  _worker[:] = [settings]


def _chunk_in_worker(chunk):
  return _chunk(_worker[0], chunk)


@dataclasses.dataclass
class _Outcome:
  """What became of one record: tokens and weights, or the code of its drop."""
  index: int
  schema: str
  repairs: tuple[str, ...] = ()
  drop: str = ""
  full_length: int = 0
  tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
  weights: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint8))


def _chunk(settings: _Settings, chunk) -> list[_Outcome]:
  found = [(index, canonicalise(record, settings.format)) for index, record in chunk]
  kept = [c for _, c in found if isinstance(c, Conversation) and c.schema not in PLAIN]
  encoded = iter(encode_many(kept, settings.template, settings.tokenizer, settings.train_on))
  out = []
  for index, c in found:
    if isinstance(c, Drop):
      out.append(_Outcome(index, c.schema, drop=c.code))
    elif c.schema not in PLAIN:
      out.append(_outcome(index, c, next(encoded), settings))
    elif settings.train_on != "all":         # it has no answer: the whole of it is trained, or nothing
      out.append(_Outcome(index, c.schema, c.reasons, drop="text_needs_train_on_all"))
    else:
      out.append(_outcome(index, c, encode_document(c.messages[0]["content"], settings.template, settings.tokenizer), settings))
  return out


def _outcome(index: int, conversation: Conversation, example, settings: _Settings) -> _Outcome:
  out = _Outcome(index, conversation.schema, conversation.reasons)
  if isinstance(example, Refused):
    out.drop = example.kind
    return out
  tokens_T, weights_T = example["tokens"], example["weights"]
  out.full_length = len(tokens_T)
  if out.full_length > settings.length and settings.long_rows == "drop":
    out.drop = "too_long"
    return out
  tokens_T, weights_T = tokens_T[:settings.length], weights_T[:settings.length]
  if not weights_T[1:].any():              # the first token of a row is never a target
    out.drop = "truncated_to_nothing" if out.full_length > settings.length else "nothing_trained"
    return out
  out.tokens, out.weights = tokens_T, weights_T.astype(np.uint8)
  return out


def _collect(results: list[_Outcome], records: Records, source, knob: str, settings: _Settings, which: str) -> Examples:
  kept = [r for r in results if not r.drop]
  long = [r for r in results if r.full_length > settings.length]
  if long and settings.long_rows == "error":
    first = long[0]
    raise UserError(f"{records.where(first.index)} has {first.full_length} tokens, {len(long)} records are longer than {settings.length}",
                    wanted="shorter records, or data.long_rows=drop or truncate", knob="data.length")
  report = _report(results, kept, long, records, source, knob, settings)
  if results and not kept:
    why = ", ".join(f"{code} {drop['count']} (first at {drop['first']})" for code, drop in report["drops"].items())
    only_long = report["drops"].keys() <= set(LONG_CODES)
    raise UserError(f"none of the {len(results)} {which} records of {source.path} can be trained on: {why}",
                    wanted=f"records of at most {settings.length} tokens" if only_long else "records with an answer, in a known format",
                    knob="data.length or data.long_rows" if only_long else knob)
  tokens_N = np.concatenate([np.zeros(0, np.int32), *(r.tokens for r in kept)])
  weights_N = np.concatenate([np.zeros(0, np.uint8), *(r.weights for r in kept)])
  offsets_E = np.cumsum([0, *(len(r.tokens) for r in kept)], dtype=np.int64)
  return Examples(tokens_N, weights_N, offsets_E, np.array([r.index for r in kept], np.int32), records, report)


def _report(results, kept, long, records: Records, source, knob: str, settings: _Settings) -> dict:
  """Counts for the preflight table, JSON-able."""
  drops: dict[str, dict] = {}
  for r in results:
    if r.drop:
      entry = drops.setdefault(r.drop, {"count": 0, "first": records.where(r.index)})
      entry["count"] += 1
  lengths, supervised = [len(r.tokens) for r in kept], [int(r.weights[1:].sum()) for r in kept]
  template = settings.template
  bos = [int((r.tokens == template.bos_token_id).sum()) for r in kept] if template.bos else []
  ends = sum(int(((r.tokens == template.end_of_turn_id) & (r.weights > 0)).sum()) for r in kept)
  schemas = Counter(r.schema for r in results if r.schema)
  ends += sum(r.schema in PLAIN and r.full_length <= settings.length for r in kept)       # the end of a text
  why = f"{knob.removesuffix('path')}format={source.format}"
  if source.format == "auto":
    why += "".join(f", {name} by its fields ({FOUND_BY[name]})" for name in schemas) + (", A MIXTURE OF SCHEMAS" if len(schemas) > 1 else "")
  return {
      "source": source.path, "records": len(results), "kept": len(kept), "drops": drops,
      "repairs": dict(Counter(code for r in results for code in r.repairs)),
      "format": dict(schemas),
      "format_why": why,
      "long_rows": settings.long_rows, "longer_than_row": len(long), "truncated": sum(r.full_length > settings.length for r in kept),
      "template": template.name, "end_of_turn": template.end_of_turn, "end_of_turn_trained": ends,
      "tokens": sum(lengths), "tokens_per_example": _spread(lengths), "supervised_tokens": sum(supervised),
      "supervised_per_example": _spread(supervised), "bos_per_example": _spread(bos),
  }


def _spread(values) -> dict[str, float]:
  return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)} if values else {"min": 0, "mean": 0.0, "max": 0}
