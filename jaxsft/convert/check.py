"""What an exported directory does with a conversation, against what training did with it."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from jaxsft.convert.directory import read_json
from jaxsft.errors import UserError


def check_export(directory, row: Mapping[str, Any], name: str = "") -> str:
  """Renders a training row with the exported tokenizer and chat template and compares text and tokens; gives the exported text.

  row: what data/witness.py keeps (template, messages, tools, text, tokens, bos, end_of_turn); tokens may be the beginning of the row's.
  name: what the messages call the directory, when it has not got its own yet.
  The end-of-turn must be one token, and generation must stop on it (in a model's directory, not an adapter's).
  Errors: UserError that shows where the two part.
  """
  from jaxsft.convert.hf import load_tokenizer
  path = pathlib.Path(directory)
  tokenizer = load_tokenizer(path)
  shown = name or str(path)
  if not tokenizer.chat_template:
    raise UserError(f"{shown} has no chat template", wanted=f"the template that was trained, {row['template']!r}")
  exported = tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False)
  # a BOS that training puts in front of the tokens is written by the exported template, with the blank that SentencePiece would add
  fronts = (row["bos"], row["bos"] + " ") if row["bos"] else ("",)
  if exported not in [front + row["text"] for front in fronts]:
    _complain(shown, "text", fronts[0] + row["text"], exported, row)
  found = list(tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=True, return_dict=False))
  if found[:len(row["tokens"])] != list(row["tokens"]):
    _complain(shown, "tokens", row["tokens"], found, row)
  _check_stop(path, shown, tokenizer, row["end_of_turn"])
  return exported


def _complain(name, what, wanted, found, row):
  at = next((i for i, (a, b) in enumerate(zip(wanted, found)) if a != b), min(len(wanted), len(found)))
  raise UserError(f"{name} gives other {what} than training did, from {at} on: {found[at:at + 30]!r} for {wanted[at:at + 30]!r}",
                  wanted=f"the template that was trained, {row['template']!r}")


def _check_stop(path, name, tokenizer, end_of_turn):
  ids = tokenizer(end_of_turn, add_special_tokens=False).input_ids
  stops = read_json(path / "generation_config.json").get("eos_token_id", [])
  stops = stops if isinstance(stops, list) else [stops]
  if len(ids) != 1 or ((path / "config.json").is_file() and ids[0] not in stops):
    raise UserError(f"{name} does not stop at the end-of-turn {end_of_turn!r} (ids {ids}, eos_token_id {stops})",
                    wanted="that one token in generation_config.json")
