"""convert, render and tokenize: JSON lines in, JSON lines out, for other programs to drive. What they print is a contract.

  convert   a raw record                    -> {"messages": [{"role", "content", "train", ...}], "reasons": [...], "schema", "tools"?} | {"error": CODE}
  render    {"messages": [...], "tools"?}   -> {"text", "spans": [[start, end], ...]} | {"error": KIND}        offsets in characters, of trained text
  tokenize  the same                        -> {"tokens": [...], "weights": [...]} | {"error": KIND}

One line of output for each line of input, in order, with two exceptions of convert: a message tree gives a line for each thread, and the flat
rows of trees give theirs at the end. "train" is a bool on every message; other keys (tool_calls, tool_call_id, name, reasoning_content) stay.
render and tokenize repair nothing: a conversation that a template refuses is refused. A line that is no JSON ends the run with exit 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from jaxsft.data import trees
from jaxsft.data.formats import Conversation, Drop, Message, canonicalise, plain_message, tools_of
from jaxsft.data.records import Source, raw_records
from jaxsft.data.schemas import PLAIN, Dropped
from jaxsft.data.template import Refused, get_template, named_template
from jaxsft.data.tokenise import encode
from jaxsft.data.tokenizer import load_tokenizer
from jaxsft.errors import UserError


def converted(record, format: str = "auto") -> dict[str, Any]:
  """One line of convert's output for one record that is no tree."""
  if not isinstance(record, dict):
    return {"error": "unknown_schema"}
  found = canonicalise(record, format)
  if isinstance(found, Drop):
    return {"error": found.code}
  if found.schema in PLAIN:
    return {"error": "plain_text"}
  tools = {"tools": found.tools} if found.tools else {}
  return {"messages": [_public(message) for message in found.messages], "reasons": list(found.reasons), "schema": found.schema} | tools


def _public(message: Message) -> dict[str, Any]:
  rest = {key: value for key, value in message.items() if key not in ("role", "content", "trained")}
  return {"role": message["role"], "content": message["content"], "train": message["role"] == "assistant" and message.get("trained", True)} | rest


def as_is(record) -> Conversation | Drop:
  """The messages of one line as canonical ones, nothing left out and nothing joined; Drop when they cannot be read."""
  turns = record.get("messages") if isinstance(record, dict) else None
  if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
    return Drop("unknown_schema")
  reasons: dict[str, None] = {}
  try:
    return Conversation([plain_message(turn, reasons) for turn in turns], tuple(reasons), "messages", tools_of(record))
  except Dropped as drop:
    return Drop(str(drop))


def rendered(record, template, add_generation_prompt: bool = False) -> dict[str, Any]:
  """One line of render's output."""
  found = as_is(record)
  if isinstance(found, Drop):
    return {"error": found.code}
  try:
    out = template.render(found.messages, add_generation_prompt=add_generation_prompt, tools=found.tools)
  except Refused as refused:
    return {"error": refused.kind}
  return {"text": out.text, "spans": [list(span) for span in out.spans]}


def tokenized(record, template, tokenizer, max_length: int = 0, train_on: str = "assistant") -> dict[str, Any]:
  """One line of tokenize's output; max_length 0: no limit, else what is over it is cut off at the end."""
  found = as_is(record)
  if isinstance(found, Drop):
    return {"error": found.code}
  try:
    example = encode(found, template, tokenizer, train_on)
  except Refused as refused:
    return {"error": refused.kind}
  end = max_length or None
  return {"tokens": example["tokens"][:end].tolist(), "weights": example["weights"][:end].astype(int).tolist()}


def _input(path: str) -> Iterator[Any]:
  """The records of a file in any container, or of standard input line by line."""
  if path != "-":
    yield from raw_records(Source(path), 0, "--input").rows
    return
  for number, line in enumerate(sys.stdin.buffer, 1):
    try:
      text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
      if text:
        yield json.loads(text)
    except (ValueError, RecursionError) as error:
      raise UserError(f"standard input:{number}: broken JSON ({getattr(error, 'msg', error)})", wanted="one JSON object a line", knob="--input") from None


def _convert(arguments) -> Iterator[dict[str, Any]]:
  canonicalise({}, arguments.format)                       # an unknown format is told before anything is read
  flat: list[dict] = []
  takes_trees = arguments.format in trees.FORMATS
  for record in _input(arguments.input):
    if takes_trees and isinstance(record, dict) and trees.is_row(record):
      flat.append(record)
    elif takes_trees and isinstance(record, dict) and trees.is_tree(record):
      yield from (converted(thread, arguments.format) for thread, _ in trees.expand([record], arguments.format))
    else:
      yield converted(record, arguments.format)
  yield from (converted(thread, arguments.format) for thread, _ in trees.expand(flat, arguments.format))


def _render(arguments) -> Iterator[dict[str, Any]]:
  if arguments.tokenizer:
    template = get_template(arguments.template, load_tokenizer(arguments.tokenizer, knob="--tokenizer"))
  elif arguments.template == "tokenizer":
    raise UserError("the tokenizer's own template needs a tokenizer", wanted="a directory, a GGUF file or a hub id", knob="--tokenizer")
  else:
    template = named_template(arguments.template)
  yield from (rendered(record, template, arguments.add_generation_prompt) for record in _input(arguments.input))


def _tokenize(arguments) -> Iterator[dict[str, Any]]:
  tokenizer = load_tokenizer(arguments.tokenizer, knob="--tokenizer")
  template = get_template(arguments.template, tokenizer)
  if arguments.max_length < 0:
    raise UserError(f"--max-length is {arguments.max_length}", wanted="0 (no limit) or more", knob="--max-length")
  yield from (tokenized(record, template, tokenizer, arguments.max_length, arguments.train_on) for record in _input(arguments.input))


COMMANDS = {"convert": _convert, "render": _render, "tokenize": _tokenize}


def parser(command: str) -> argparse.ArgumentParser:
  about = {"convert": "Raw records to canonical conversations.", "render": "Conversations to text and the places of what is trained.",
           "tokenize": "Conversations to tokens and weights."}
  out = argparse.ArgumentParser(prog=f"python -m jaxsft.data {command}", description=f"{about[command]} Records in, JSON lines out.")
  out.add_argument("--input", default="-", help="records: a file in any container; -, the default, is JSON lines on standard input")
  if command == "convert":
    out.add_argument("--format", default="auto", help="auto, or the name of a schema")
    return out
  out.add_argument("--template", default="tokenizer", help="name of a template; tokenizer, the default, is the tokenizer's own")
  out.add_argument("--tokenizer", default="", required=command == "tokenize", help="directory, GGUF file or hub id; bytes is built in")
  if command == "render":
    out.add_argument("--add-generation-prompt", action="store_true", help="end with what the model's answer begins with")
  else:
    out.add_argument("--max-length", type=int, default=0, help="tokens that are kept of each line; 0: all")
    out.add_argument("--train_on", "--train-on", default="assistant", help="assistant, last or all")
  return out


def main(command: str, argv) -> int:
  """Exit code: 0, or 2 for the user's mistake, told in one line on standard error."""
  arguments = parser(command).parse_args(argv)
  try:
    for line in COMMANDS[command](arguments):
      print(json.dumps(line), flush=True)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except BrokenPipeError:               # `| head` has read enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  return 0
