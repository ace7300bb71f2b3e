"""Records through the whole pipe, every token with its weight: what is trained is coloured, control characters are escaped.

`trace` follows one record to its tokens, `packed` lays the traced records into rows as training would.
"""

from __future__ import annotations

import argparse

import numpy as np

from jaxsft import config
from jaxsft.data.command import add_record_flags, answer
from jaxsft.data.formats import Drop, canonicalise
from jaxsft.data.pack import assemble, pack_in_groups
from jaxsft.data.records import Source, read_records
from jaxsft.data.template import Refused, get_template
from jaxsft.data.tokenise import encode
from jaxsft.data.tokenizer import load_tokenizer
from jaxsft.errors import UserError


def trace(record: dict, where: str, template, tokenizer, format: str = "auto", train_on: str = "assistant", length: int = 0) -> dict:
  """What becomes of one record, JSON-able.

  Keys: where, schema, drop ("" when kept), repairs, messages, text, tokens [{id, text, weight}], supervised, longer_than_row. A dropped
  record has no tokens.
  """
  out = {"where": where, "schema": "", "drop": "", "repairs": [], "messages": [], "text": "", "tokens": [], "supervised": 0,
         "longer_than_row": False}
  conversation = canonicalise(record, format)
  if isinstance(conversation, Drop):
    return out | {"drop": conversation.code, "schema": conversation.schema}
  out |= {"schema": conversation.schema, "repairs": list(conversation.reasons), "messages": conversation.messages}
  try:
    rendered = template.render(template.messages(conversation), tools=conversation.tools)
    example = encode(conversation, template, tokenizer, train_on)
  except Refused as refused:
    return out | {"drop": refused.kind}
  tokens = [{"id": int(i), "text": tokenizer.decode([i]), "weight": int(w)} for i, w in zip(example["tokens"], example["weights"])]
  return out | {"text": rendered.text, "tokens": tokens, "supervised": int(example["weights"][1:].sum()),
                "longer_than_row": 0 < length < len(tokens)}


def packed(traced: list[dict], length: int) -> list[dict]:
  """The rows of `length` tokens that the traced records fill, JSON-able; those that were dropped or are too long are in none.

  A row: {length, filled, padding, segments: [{where, segment, first, last, positions: [first, last], trained}]}, read off the very arrays
  [T] that training gets.
  """
  fitting = [t for t in traced if t["tokens"] and len(t["tokens"]) <= length]
  examples = [{"tokens": np.array([token["id"] for token in t["tokens"]], np.int32),
               "weights": np.array([token["weight"] for token in t["tokens"]], np.float32)} for t in fitting]
  rows = []
  for members in pack_in_groups(np.array([len(e["tokens"]) for e in examples], np.int64), length) if examples else []:
    row = assemble([examples[i] for i in members], length, 0)
    segments = []
    for segment, i in enumerate(members, 1):
      places = np.flatnonzero(row["segment_ids"] == segment)
      segments.append({"where": fitting[i]["where"], "segment": segment, "first": int(places[0]), "last": int(places[-1]),
                       "positions": [int(row["positions"][places[0]]), int(row["positions"][places[-1]])], "trained": int(row["weights"][places].sum())})
    filled = int((row["segment_ids"] > 0).sum())
    rows.append({"length": length, "filled": filled, "padding": length - filled, "segments": segments})
  return rows


def escaped(text: str) -> str:
  """Control characters as \\n, \\x1b and so on, so that nothing in a record can steer the terminal."""
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_trace(traced: dict, console=None) -> None:
  """The trace on the terminal: trained tokens bold green on the rest, tokens told apart by underlining every other one."""
  import rich.console
  import rich.text
  console = console or rich.console.Console()
  head = f"{traced['where']}  schema {traced['schema'] or 'none'}  repairs {', '.join(traced['repairs']) or 'none'}"
  console.print(escaped(head), markup=False, highlight=False)
  if traced["drop"]:
    console.print(f"dropped: {traced['drop']}", style="bold red", markup=False)
    return
  line = rich.text.Text()
  for number, token in enumerate(traced["tokens"]):
    style = ("bold green" if token["weight"] else "dim") + (" underline" if number % 2 else "")
    line.append(escaped(token["text"]), style=style)
    if "\n" in token["text"]:
      line.append("\n")
  console.print(line)
  ids = rich.text.Text()
  for token in traced["tokens"]:
    ids.append(f"{token['id']} ", style="bold green" if token["weight"] else "dim")
  console.print(ids)
  console.print(f"{len(traced['tokens'])} tokens, {traced['supervised']} trained (green)" +
                (", LONGER THAN A ROW" if traced["longer_than_row"] else ""), markup=False, highlight=False)


def print_row(row: dict, console=None) -> None:
  """One packed row: where each record lies in it, and what is left over."""
  import rich.console
  console = console or rich.console.Console()
  console.print(f"row of {row['length']} tokens: {row['filled']} filled, {row['padding']} padding", style="bold", markup=False, highlight=False)
  for s in row["segments"]:
    console.print(escaped(f"  segment {s['segment']}  tokens {s['first']}-{s['last']}  positions {s['positions'][0]}-{s['positions'][1]}  "
                          f"{s['trained']} targets  {s['where']}"), markup=False, highlight=False)


def parser() -> argparse.ArgumentParser:
  out = argparse.ArgumentParser(prog="python -m jaxsft.data [show]", formatter_class=argparse.RawDescriptionHelpFormatter,
                                description="Show records as the model will see them: trained tokens are green.",
                                epilog="other commands: convert, render, tokenize, stats, sets (python -m jaxsft.data COMMAND --help)")
  add_record_flags(out)
  out.add_argument("--index", type=int, default=0, help="the first record to show, from 0")
  out.add_argument("-n", "--count", type=int, help="how many records, and the rows they fill")
  return out


def run(arguments) -> dict:
  """What the flags ask for: the trace of one record, or with -n {"records": [traces], "rows": [packed rows]}. Raises UserError."""
  c = config.load(arguments.config) if arguments.config else None
  given = vars(arguments)

  def value(name, from_config, default):
    return given[name] if given[name] is not None else from_config(c) if c is not None else default

  format = value("format", lambda c: c.data.train.format, "auto")
  source = c.data.train if c is not None and arguments.path is None else Source(arguments.path or "", format)
  tokenizer = load_tokenizer(value("tokenizer", lambda c: c.data.tokenizer or c.model.path, ""), knob="--tokenizer")
  template = get_template(value("template", lambda c: c.data.template, "tokenizer"), tokenizer,
                          value("position", lambda c: c.data.position, "pre"))
  records = read_records(source, "--path")
  if not 0 <= arguments.index < len(records):
    raise UserError(f"there is no record {arguments.index}", wanted=f"0 to {len(records) - 1}", knob="--index")
  if arguments.count is not None and arguments.count < 1:
    raise UserError(f"-n is {arguments.count}", wanted="1 or more", knob="-n")
  train_on, length = value("train_on", lambda c: c.data.train_on, "assistant"), value("length", lambda c: c.data.length, 0)
  chosen = range(arguments.index, min(arguments.index + (arguments.count or 1), len(records)))
  traced = [trace(records[i], records.where(i), template, tokenizer, format, train_on, length) for i in chosen]
  return traced[0] if arguments.count is None else {"records": traced, "rows": packed(traced, length) if length else []}


def print_found(found: dict) -> None:
  """What `run` found, on the terminal."""
  for traced in found.get("records", [found]):
    print_trace(traced)
  for row in found.get("rows", []):
    print_row(row)


def main(argv=None) -> int:
  """Exit code: 0 shown, 2 the user's mistake."""
  return answer(parser().parse_args(argv), run, print_found)
