"""python -m jaxsft.chat MODEL: talk to a model, or ask it once with --prompt.

MODEL is a run's workdir (adapters or a whole model), a Hugging Face or peft directory, a converted model, a .gguf file or a hub id. The
prompt is rendered by the template that the run trained with, else by the model's own.

In a conversation: /reset forgets it, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer. With --prompt the answer alone is on standard
output; control characters in it are shown as \\x1b and so on (--json gives it as it is). The JSON object of --json, the last line of
standard output: prompt, answer, tokens (how many the answer has), stopped (false: cut by a limit), seconds (without loading).

Exit codes: 0; 2 your mistake, in one line on standard error; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
import unicodedata
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxsft.errors import UserError

SLOTS = 1024              # room of a conversation before programs are compiled again
KNOBS = {"model.path": "MODEL", "data.template": "--template", "data.tokenizer": "MODEL", "max_new_tokens": "--max-new-tokens",
         "top_p": "--top-p", "temperature": "--temperature"}
HINT = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


class Reply(NamedTuple):
  """An answer. interrupted: by Ctrl-C. left_out: older messages of the conversation for which there was no room any more."""
  text: str
  tokens: int
  stopped: bool
  interrupted: bool
  left_out: int


class TextStream:
  """Tokens in, text out as it becomes certain: a character whose bytes are not all there yet is held back.

    tokens  "Hi", " ", <0xF0> <0x9F>, <0x98> <0x80>      written  "Hi", " ", "", the emoji
  """

  def __init__(self, tokenizer, write: Callable[[str], Any]):
    self._tokenizer, self._write, self._written = tokenizer, write, ""
    self._ids: list[int] = []

  def feed(self, tokens: list[int]):
    """Decodes all tokens so far (SentencePiece's blanks depend on what is before) and writes what is new and certain."""
    self._ids += tokens
    text = self._decode().rstrip("\ufffd")
    if text.startswith(self._written) and text != self._written:
      self._write(text[len(self._written):])
      self._written = text

  def finish(self) -> str:
    """Writes what was held back; gives the whole text."""
    text = self._decode()
    if rest := text[len(self._written):]:
      self._write(rest)
    return text

  def _decode(self) -> str:
    return self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def visible(text: str) -> str:
  """`text` for a terminal: control characters escaped but line breaks, tabs, and the blanks and joiners that scripts and emoji need."""
  from jaxsft.data.show import escaped
  return "".join(c if c in "\n\t\u200c\u200d" or unicodedata.category(c) == "Zs" else escaped(c) for c in text)


class Session:
  """A conversation. `model` is inference.Model; `settings` are keyword arguments of Generator.sample; `write` takes text as it comes."""

  def __init__(self, model, settings: dict[str, Any], system: str | None = None, write: Callable[[str], Any] = lambda text: None):
    self._model, self._settings, self._write = model, settings, write
    self._system = [] if system is None else [{"role": "system", "content": system}]
    self.messages: list[dict[str, str]] = []
    self._asked = 0

  def reset(self):
    """Forgets everything but the system message."""
    self.messages = []

  def ask(self, text: str) -> Reply:
    """The model's answer to one more message. What was interrupted stays in the conversation as far as it got.

    Errors: UserError when the message alone is longer than the model's context.
    """
    user = {"role": "user", "content": text}
    before = len(self.messages)
    prompt = self._encode(user)
    left_out = before - len(self.messages)
    settings = self._settings | {"seed": self._settings.get("seed", 0) + self._asked}      # the same question again is another draw
    self._asked += 1
    stream, count = TextStream(self._model.tokenizer, self._write), 0

    def on_tokens(index, tokens):
      nonlocal count
      count += len(tokens)
      stream.feed(tokens)
    try:
      answer, = self._model.generator.sample(self._model.params, [prompt], stop_ids=self._model.stop_ids, on_tokens=on_tokens, **settings)
      stopped, interrupted = answer.stopped, False
    except KeyboardInterrupt:
      stopped, interrupted = False, True
    reply = Reply(stream.finish(), count, stopped, interrupted, left_out)
    if reply.text:
      self.messages += [user, {"role": "assistant", "content": reply.text}]
    return reply

  def _encode(self, user) -> list[int]:
    """The conversation's ids; its oldest turns are left out when there would be no room for an answer."""
    limit = self._model.cfg.max_position_embeddings
    room = limit - min(self._settings["max_new_tokens"], limit // 4)
    while True:
      prompt = self._model.encode([*self._system, *self.messages, user])
      if len(prompt) <= room:
        return prompt
      if not self.messages:
        if len(prompt) <= limit:
          return prompt
        raise UserError(f"this message makes a prompt of {len(prompt)} tokens", wanted=f"at most the model's {limit} positions")
      self.messages = self.messages[2:]


def parser() -> argparse.ArgumentParser:
  out = argparse.ArgumentParser(prog="python -m jaxsft.chat", description="Talk to a model.", epilog=HINT)
  out.add_argument("model", metavar="MODEL", help="workdir of a run, HF or peft directory, converted model, .gguf file or hub id")
  out.add_argument("--prompt", help="ask once and leave; - reads the prompt from standard input")
  out.add_argument("--system", help="a system message")
  out.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token (default %(default)s)")
  out.add_argument("--top-p", type=float, default=0.95, help="draw from the likeliest that reach this probability (default %(default)s)")
  out.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default %(default)s)")
  out.add_argument("--step", type=int, help="which checkpoint of a run; default the newest")
  out.add_argument("--base", default="", help="where an adapter's base lies now, when it was moved")
  out.add_argument("--template", default="tokenizer", help="a named chat template instead of the model's own (chatml, llama2, vicuna, ...)")
  out.add_argument("--dtype", default="", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
  out.add_argument("--exact", action="store_true", help="compute on NF4 weights and a separate adapter as in training: less memory, slower")
  out.add_argument("--seed", type=int, default=0, help="of the draws (default %(default)s)")
  out.add_argument("--json", action="store_true", help="with --prompt: one JSON object as the last line of standard output")
  return out


def main(argv=None) -> int:
  args = parser().parse_args(argv)
  for stream in (sys.stdout, sys.stdin):
    if hasattr(stream, "reconfigure"):      # no letter of a model's or a user's may end the session
      stream.reconfigure(errors="backslashreplace" if stream is sys.stdout else "replace")
  try:
    return _one_shot(args) if args.prompt is not None else _conversation(args)
  except UserError as error:
    print(f"error: {_with_flags(str(error))}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 130


def _with_flags(message: str) -> str:
  """A message with this binary's names for the knobs."""
  head, found, knob = message.rpartition("; set ")
  return message if not found else head + found + re.sub("|".join(map(re.escape, KNOBS)), lambda match: KNOBS[match.group()], knob)


def _open(args, write) -> Session:
  from jaxsft.generate import check_settings
  from jaxsft.inference import open_model
  check_settings(args.max_new_tokens, args.temperature, top_p=args.top_p)
  model = open_model(args.model, step=args.step, base=args.base, template=args.template, dtype=args.dtype, exact=args.exact)
  settings = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
  if args.prompt is None:
    settings["least_slots"] = min(SLOTS, model.cfg.max_position_embeddings)
  return Session(model, settings, args.system and _whole_text(args.system), write)


def _whole_text(text: str) -> str:
  """An argument with bytes that are no UTF-8 replaced."""
  return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _say(text: str):
  print(visible(text), end="", flush=True)


def _one_shot(args) -> int:
  prompt = sys.stdin.read().rstrip("\n") if args.prompt == "-" else _whole_text(args.prompt)
  session = _open(args, (lambda text: None) if args.json else _say)
  start = time.monotonic()
  reply = session.ask(prompt)
  seconds = round(time.monotonic() - start, 3)
  if args.json:
    print(json.dumps({"prompt": prompt, "answer": reply.text, "tokens": reply.tokens, "stopped": reply.stopped, "seconds": seconds}))
  else:
    print()
  return 130 if reply.interrupted else 0


def _conversation(args) -> int:
  if args.json:
    raise UserError("--json goes with one question", wanted="--prompt=TEXT", knob="--prompt")
  session = _open(args, _say)
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (input() then edits lines and remembers them)
  print(HINT, file=sys.stderr)
  while True:
    try:
      line = input("> " if sys.stdin.isatty() else "").strip()
      if line == "/quit":
        return 0
      _turn(session, line)
    except EOFError:
      print(file=sys.stderr)
      return 0
    except KeyboardInterrupt:
      print(f"\n{HINT}", file=sys.stderr)


def _turn(session, line):
  """One line of the user's: a command, or a message that is answered."""
  if line == "/reset":
    session.reset()
    print("the conversation is forgotten", file=sys.stderr)
  elif re.fullmatch(r"/\w+", line):
    print(f"{line} is no command: {HINT}", file=sys.stderr)
  elif line:
    try:
      reply = session.ask(line)
    except UserError as error:
      print(f"error: {_with_flags(str(error))}", file=sys.stderr)
      return
    print(" [stopped]" if reply.interrupted else "", flush=True)
    if reply.left_out:
      print(f"(no room any more for the {reply.left_out} oldest messages)", file=sys.stderr)


if __name__ == "__main__":
  sys.exit(main())
