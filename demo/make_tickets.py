"""Writes demo/tickets_train.jsonl and demo/tickets_eval.jsonl: support mails and their JSON tickets. python -m demo.make_tickets

Seeded and pure: the same files on every machine, byte for byte. The mails are made of wordings_train.py and wordings_held_out.py.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .material import Material
from .wordings_held_out import HELD_OUT
from .wordings_train import TRAIN

HERE = Path(__file__).parent
SYSTEM = "Reply with a JSON ticket: customer, order, request."
SEED = 20
ROWS = dict(train=400, eval=100)


def ticket(customer: str, order: int, request: str) -> str:
  """The one right answer: one line, keys in this order, json.dumps' own spacing."""
  return json.dumps(dict(customer=customer, order=order, request=request), ensure_ascii=False)


def endless(rng: random.Random, things) -> Iterator[Any]:
  """All things in a fresh random order, again and again: each is used equally often, which independent draws would not give."""
  while True:
    yield from rng.sample(list(things), len(things))


def order_numbers(rng: random.Random, odd: bool) -> Iterator[int]:
  """Distinct numbers of four and five digits. Training has those with an even digit sum, the held-out set the odd ones."""
  seen: set[int] = set()
  while True:
    number = rng.randrange(1000, 10000) if rng.random() < 0.5 else rng.randrange(10000, 100000)
    if sum(map(int, str(number))) % 2 == odd and number not in seen:
      seen.add(number)
      yield number


def sentence(template: str, item: str) -> str:
  """The template with the thing in it, and "an" where it wants one."""
  return (template.replace(" a {item}", " an {item}") if item[0] in "aeiou" else template).format(item=item)


def mail(layout: str, ask: str, item: str, **parts) -> str:
  return layout.format(ask=sentence(ask, item), **parts)


def rows(material: Material, count: int, split: str) -> Iterator[dict]:
  """`count` records {"id", "messages": [system, user, assistant]} of one half of the material."""
  rng = random.Random(f"{SEED}/{split}")
  asks = {request: endless(rng, sentences) for request, sentences in material.ask.items()}
  draw = {part: endless(rng, getattr(material, part)) for part in ("first", "last", "items", "hello", "bye", "chat", "layouts")}
  requests, orders = endless(rng, material.ask), order_numbers(rng, odd=split == "eval")
  for i in range(count):
    request, order = next(requests), next(orders)
    name = f"{next(draw['first'])} {next(draw['last'])}"
    text = mail(next(draw["layouts"]), next(asks[request]), name=name, order=order,
                item=next(draw["items"]), hello=next(draw["hello"]), bye=next(draw["bye"]), chat=next(draw["chat"]))
    turns = (("system", SYSTEM), ("user", text), ("assistant", ticket(name, order, request)))
    yield dict(id=f"{split}-{i:03d}", messages=[dict(role=role, content=content) for role, content in turns])


def text_of(split: str) -> str:
  """The whole file of a split, "train" or "eval", as JSON lines."""
  material = TRAIN if split == "train" else HELD_OUT
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(material, ROWS[split], split))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=Path, default=HERE, help="directory for the two files (default: beside this script)")
  out = parser.parse_args().out
  for split in ROWS:
    path = out / f"tickets_{split}.jsonl"
    path.write_text(text_of(split), encoding="utf-8")
    print(f"{path}: {ROWS[split]} conversations")


if __name__ == "__main__":
  main()
