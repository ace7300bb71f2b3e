"""What a run will do, checked on real rows before the first step: one table on the terminal, the same as preflight.json."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import jax
import numpy as np

from jaxsft import sharding
from jaxsft.batch import FIELDS, ROW_IDS, next_token_targets, padding_row
from jaxsft.errors import UserError, size
from jaxsft.metrics import console
from jaxsft.transforms import lora
from jaxsft.transforms import tree as trees
from jaxsft.transforms.nf4 import NF4Array

PACKED_LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 1e-2}     # relative; the compute type's own rounding


def parameters(trainable, frozen) -> dict:
  """Counts and bytes by group; bytes_a_device is what the fullest device holds."""
  groups = {"trainable": [leaf for _, leaf in trees.flatten(trainable)],
            "frozen": [leaf for _, leaf in trees.flatten(frozen) if not isinstance(leaf, NF4Array)],
            "quantised": [leaf for _, leaf in trees.flatten(frozen) if isinstance(leaf, NF4Array)]}
  return {name: {"parameters": int(sum(np.prod(leaf.shape) for leaf in leaves)), "bytes": int(sum(leaf.nbytes for leaf in leaves)),
                 "bytes_a_device": sharding.bytes_a_device(leaves)} for name, leaves in groups.items()}


def rule_matches(c, trainable, frozen) -> dict:
  """How many leaves each rule of the config caught (a rule that catches none has raised before)."""
  paths = [path for path, _ in trees.flatten(frozen)]
  found = {}
  if c.lora.rank:
    found[f"lora.targets {c.lora.targets}"] = len(lora.kernel_paths(trainable))
  if c.nf4.targets:
    found[f"nf4.targets {c.nf4.targets}"] = sum(isinstance(leaf, NF4Array) for _, leaf in trees.flatten(frozen))
  if c.freeze:
    found[f"freeze {c.freeze}"] = sum(bool(re.search(c.freeze, path)) for path in paths)
  if c.optim.weight_decay:
    found[f"optim.no_decay {c.optim.no_decay}"] = sum(bool(c.optim.no_decay and re.search(c.optim.no_decay, path)) for path, _ in trees.flatten(trainable))
  return found


def unpacked(batch, row: int, pad_id: int = 0) -> Iterator[dict]:
  """Batches of the same shape whose rows are the segments of one packed row, each alone.

    tokens      a b c d e .    ->    a b c . . .
    segment_ids 1 1 1 2 2 0          d e . . . .      positions restart by themselves: they always did
  """
  rows, length = batch["tokens"].shape
  segments = range(1, batch["segment_ids"][row].max() + 1)
  for start in range(0, len(segments), rows):
    out = {name: np.stack([padding_row(length, pad_id)[name]] * rows) for name in FIELDS} | {ROW_IDS: batch[ROW_IDS]}
    for place, segment in enumerate(segments[start:start + rows]):
      where = batch["segment_ids"][row] == segment
      for name in FIELDS:
        out[name][place, :where.sum()] = batch[name][row][where] if name != "segment_ids" else 1
    yield out


def alone(batch, row: int) -> dict:
  """The batch with every row but one turned to padding."""
  keep = (np.arange(len(batch["tokens"])) == row)[:, None]
  return batch | {"weights": batch["weights"] * keep}


def check_packing(c, evaluate, batch) -> dict:
  """One packed row's loss against its rows alone. Errors: UserError when attention leaks from one example into another."""
  counts = batch["segment_ids"].max(-1)
  several = np.flatnonzero(counts > 1)
  if not len(several):
    return {"checked": False, "why": "no row of the first batch holds several examples"}
  row = int(several[counts[several].argmin()])         # the one that is done soonest
  packed, count = evaluate(alone(batch, row))
  separate, count_separate = map(sum, zip(*map(evaluate, unpacked(batch, row))))
  difference = abs(packed - separate) / max(abs(separate), 1e-9)
  if count != count_separate or not difference < PACKED_LOSS_TOLERANCE[c.model.dtype]:
    raise UserError(f"a packed row's loss is {packed:.6f} over {count:.0f} tokens, its examples alone give {separate:.6f} over {count_separate:.0f}",
                    wanted="the same", knob="data.pack=false, and report this")
  return {"checked": True, "examples": int(counts[row]), "relative_difference": float(difference)}


def check_rows(report: dict, batch) -> dict:
  """Facts of one real batch that must hold. Errors: UserError where nothing would be learned, or an end-of-turn never."""
  weights = next_token_targets(batch)[1]
  if not weights.sum():
    raise UserError("the first batch has no supervised token", wanted="answers inside the rows", knob="data.length or data.train_on")
  if not report["end_of_turn_trained"]:
    raise UserError(f"no end-of-turn ({report['end_of_turn']!r}) is trained: the model would never stop", wanted="a template that ends each answer",
                    knob="data.template")
  supervised = weights.sum(-1)
  return {"supervised_tokens_a_row": {"min": float(supervised.min()), "mean": float(supervised.mean())},
          "supervised_share": float(weights.mean()), "rows_without_supervision": int((supervised == 0).sum())}


def device_facts(mesh) -> dict:
  """Platform, devices and mesh."""
  device = mesh.devices.flat[0]
  return {"platform": device.platform, "kind": device.device_kind, "count": mesh.size, "mesh": dict(mesh.shape), "hosts": jax.process_count()}


def check(parts, state, frozen, evaluation, restored: int) -> dict:
  """All of it, JSON-able: what preflight.json holds and the table shows. `parts` is train.Parts.

  Errors: UserError for whatever would make the run learn nothing, or the wrong thing.
  """
  c, stream = parts.c, parts.stream
  report, batch = stream.report, stream.peek()
  some = lambda *names: {name: report[name] for name in names}
  part = {name: value[:len(value) // c.micro_batches] for name, value in batch.items()}
  return {
      "device": device_facts(parts.mesh), "model": model_facts(c, parts.base), "steps": parts.steps, "resumed_from": restored,
      "data": some("source", "records", "kept", "drops", "repairs", "format", "format_why", "truncated", "longer_than_row"),
      "tokens": some("tokens", "supervised_tokens", "tokens_per_example", "supervised_per_example", "bos_per_example"),
      "template": some("template", "end_of_turn", "end_of_turn_trained"),
      "packing": some("pack", "row_length", "rows_per_epoch", "packing_efficiency", "padding_share", "examples_per_row"),
      "evaluation": {"rows": evaluation.rows},
      "first_batch": check_rows(report, batch),
      "packed_equals_unpacked": check_packing(c, lambda batch: evaluation.sums(state, frozen, batch)["loss"], part),
      "parameters": parameters(state.trainable, frozen),
      "state_bytes_a_device": {"optimiser": sharding.bytes_a_device(state.opt), "aux": sharding.bytes_a_device(state.aux)},
      "rules": rule_matches(c, state.trainable, frozen)}


def model_facts(c, base) -> dict:
  """What is trained, and how."""
  cfg = base.cfg
  return {"path": c.model.path or "random weights", "family": cfg.model_type, "layers": cfg.num_hidden_layers, "width": cfg.hidden_size,
          "vocabulary": cfg.vocab_size, "compute": c.model.dtype, "method": c.method.name,
          "mode": ("QLoRA" if c.nf4.targets else "LoRA") + f" rank {c.lora.rank}" if c.lora.rank else "full"}


WIDTH = 100           # columns of the table where no terminal says how many there are
LABELS = {"state_bytes_a_device": "training state", "packed_equals_unpacked": "packed = unpacked", "rules": "rules, leaves found"}


def print_table(facts: dict):
  """The whole as one table on standard error."""
  from rich.table import Table
  table = Table(title="preflight", show_header=False, title_justify="left")
  for name, value in facts.items():
    table.add_row(LABELS.get(name, _label(name)), _cell(name, value))
  console(None if sys.stderr.isatty() else WIDTH).print(table, markup=False, highlight=False)


def _cell(name: str, value) -> str:
  """Plain values of a dict flow in one text; a dict inside it, and each rule, has a line of its own."""
  if not isinstance(value, dict):
    return _text(name, value)
  inner = [key for key, item in value.items() if name == "rules" or (isinstance(item, dict) and item)]
  plain = {key: item for key, item in value.items() if key not in inner}
  return "\n".join(([_text(name, plain)] if plain or not inner else []) + [f"{_label(key)}: {_text(key, value[key])}" for key in inner])


def _label(name: str) -> str:
  return name if " " in name or "." in name else name.replace("_", " ")


def _text(name: str, value) -> str:
  """A value for people: bytes and shares with their units, dicts as "key value, key value", nothing as "none"."""
  if isinstance(value, dict):
    return ", ".join(f"{_label(key)} {_text(f'{name} {key}', item)}" for key, item in value.items()) or "none"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, (int, float)) and "bytes" in name:
    return size(value)
  if isinstance(value, float):
    return f"{value:.1%}" if name.endswith(("share", "efficiency")) else f"{value:.4g}"
  return f"{value:,}" if isinstance(value, int) else str(value)
