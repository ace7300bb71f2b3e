"""What the commands that look at records share: the flags that name them, and the way an answer or a mistake is told."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from jaxsft.errors import UserError


def add_record_flags(parser: argparse.ArgumentParser) -> None:
  """--config and what takes the place of its data part; each is None where it is not given."""
  parser.add_argument("--config", help="experiment file, FILE[:argument]; its data part gives the defaults of what follows")
  parser.add_argument("--path", "--input", dest="path", help="records: file, directory, glob, hub id; - is standard input (JSON lines)")
  parser.add_argument("--format", help="auto, or the name of a schema")
  parser.add_argument("--tokenizer", help="directory, GGUF file or hub id; bytes is built in")
  parser.add_argument("--template", help="tokenizer (its own), or the name of one, such as chatml")
  parser.add_argument("--train_on", help="assistant, last or all")
  parser.add_argument("--position", help="pre, post or double: where an instruction with an input stands")
  parser.add_argument("--length", type=int, help="tokens of a row")
  parser.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")


def answer(arguments, run: Callable, show: Callable) -> int:
  """Prints run(arguments), by `show` or as JSON. Exit code: 0, or 2 for the user's mistake, told in one line on standard error."""
  try:
    found = run(arguments)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  if arguments.json:
    print(json.dumps(found))
  else:
    show(found)
  return 0
