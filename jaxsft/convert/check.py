"""What an exported directory does with a conversation, against what training did with it."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from jaxsft.convert.directory import read_json
from jaxsft.errors import UserError


def check_export(directory, template, messages, tokens: Sequence[int] | None = None) -> str:
  """Renders `messages` with the exported chat template and compares with the training template's text; gives the exported text.

  template: what data/template.py makes (render, end_of_turn, bos, bos_id). tokens: the training row's ids, compared as well when given.
  The end-of-turn must be one token, and generation must stop on it (in a model's directory, not an adapter's).
  Errors: UserError that shows where the two part.
  """
  from jaxsft.convert.hf import load_tokenizer
  path = pathlib.Path(directory)
  tokenizer = load_tokenizer(path)
  if not tokenizer.chat_template:
    raise UserError(f"{path} has no chat template", wanted=f"the template that was trained, {template.name!r}")
  exported = tokenizer.apply_chat_template(messages, tokenize=False)
  trained = template.render(messages).text
  # a BOS that training puts in front of the tokens is written by the exported template, with the blank that SentencePiece would add
  fronts = ("",) if getattr(template, "bos_id", None) is None else (template.bos, template.bos + " ")
  if exported not in [front + trained for front in fronts]:
    _complain(path, "text", fronts[0] + trained, exported, template)
  if tokens is not None:
    found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    if list(found) != [int(t) for t in tokens]:
      _complain(path, "tokens", [int(t) for t in tokens], list(found), template)
  _check_stop(path, tokenizer, template)
  return exported


def _complain(path, what, wanted, found, template):
  at = next((i for i, (a, b) in enumerate(zip(wanted, found)) if a != b), min(len(wanted), len(found)))
  raise UserError(f"{path} gives other {what} than training did, from {at} on: {found[at:at + 30]!r} for {wanted[at:at + 30]!r}",
                  wanted=f"the template that was trained, {template.name!r}")


def _check_stop(path, tokenizer, template):
  ids = tokenizer(template.end_of_turn, add_special_tokens=False).input_ids
  stops = read_json(path / "generation_config.json").get("eos_token_id", [])
  stops = stops if isinstance(stops, list) else [stops]
  if len(ids) != 1 or ((path / "config.json").is_file() and ids[0] not in stops):
    raise UserError(f"{path} does not stop at the end-of-turn {template.end_of_turn!r} (ids {ids}, eos_token_id {stops})",
                    wanted="that one token in generation_config.json")
