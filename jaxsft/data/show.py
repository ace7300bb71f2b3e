"""One example through the whole pipe, every token with its weight: what is trained is coloured, control characters are escaped."""

from __future__ import annotations

import argparse
import json
import sys

from jaxsft import config
from jaxsft.data.formats import Drop, canonicalise
from jaxsft.data.records import read_records
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
    rendered = template.render(conversation.messages, tools=conversation.tools)
    example = encode(conversation, template, tokenizer, train_on)
  except Refused as refused:
    return out | {"drop": refused.kind}
  tokens = [{"id": int(i), "text": tokenizer.decode([i]), "weight": int(w)} for i, w in zip(example["tokens"], example["weights"])]
  return out | {"text": rendered.text, "tokens": tokens, "supervised": int(example["weights"][1:].sum()),
                "longer_than_row": 0 < length < len(tokens)}


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
  console.print(f"{len(traced['tokens'])} tokens, {traced['supervised']} trained (green)" +
                (", LONGER THAN A ROW" if traced["longer_than_row"] else ""), markup=False, highlight=False)


def parser() -> argparse.ArgumentParser:
  out = argparse.ArgumentParser(prog="python -m jaxsft.data",
                                description="Show one record as the model will see it: trained tokens are green.")
  out.add_argument("--config", help="experiment file, FILE[:argument]; its data part gives the defaults of what follows")
  out.add_argument("--path", "--input", dest="path", help="records: file, directory, glob, hub id; - is standard input (JSON lines)")
  out.add_argument("--format", help="auto, or the name of a schema")
  out.add_argument("--tokenizer", help="directory, GGUF file or hub id")
  out.add_argument("--template", help="tokenizer, chatml, llama2, llama3, qwen2, qwen2_5 or vicuna")
  out.add_argument("--train_on", help="assistant or all")
  out.add_argument("--length", type=int, help="tokens of a row")
  out.add_argument("--index", type=int, default=0, help="which record, from 0")
  out.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
  return out


class _Source:
  """What read_records asks for, made of flags."""

  def __init__(self, path, split="train", revision="", rows=0):
    self.path, self.split, self.revision, self.rows = path, split, revision, rows


def run(arguments) -> dict:
  """The trace that the flags ask for. Raises UserError."""
  c = config.load(arguments.config) if arguments.config else None
  given = vars(arguments)

  def value(name, from_config, default):
    return given[name] if given[name] is not None else from_config(c) if c is not None else default

  source = c.data.train if c is not None and arguments.path is None else _Source(arguments.path or "")
  tokenizer = load_tokenizer(value("tokenizer", lambda c: c.data.tokenizer or c.model.path, ""), knob="--tokenizer")
  template = get_template(value("template", lambda c: c.data.template, "tokenizer"), tokenizer)
  records = read_records(source, "--path")
  if not 0 <= arguments.index < len(records):
    raise UserError(f"there is no record {arguments.index}", wanted=f"0 to {len(records) - 1}", knob="--index")
  return trace(records[arguments.index], records.where(arguments.index), template, tokenizer,
               value("format", lambda c: c.data.train.format, "auto"),
               value("train_on", lambda c: c.data.train_on, "assistant"), value("length", lambda c: c.data.length, 0))


def main(argv=None) -> int:
  """Exit code: 0 shown, 2 the user's mistake."""
  arguments = parser().parse_args(argv)
  try:
    traced = run(arguments)
  except UserError as error:
    print(error, file=sys.stderr)
    return 2
  if arguments.json:
    print(json.dumps(traced, ensure_ascii=False))
  else:
    print_trace(traced)
  return 0
