"""The form of what the mails are made of. The two halves are wordings_train.py and wordings_held_out.py.

Nothing is shared by the halves: tests/test_demo_data.py asserts that names, things, sentences and the order of a mail's parts
are disjoint, and that no sentence which carries the request has a run of four words in common with one of the other half.
"""

from __future__ import annotations

from typing import NamedTuple


class Material(NamedTuple):
  """One half. Sentences and layouts are templates: {item} in a sentence; {hello} {ask} {chat} {bye} {name} {order} in a layout."""
  first: tuple[str, ...]
  last: tuple[str, ...]
  items: tuple[str, ...]
  hello: tuple[str, ...]
  bye: tuple[str, ...]
  chat: tuple[str, ...]                # idle talk: other people's names, other numbers, no request
  layouts: tuple[str, ...]
  ask: dict[str, tuple[str, ...]]      # request -> the sentences that carry it


def words(text: str) -> tuple[str, ...]:
  return tuple(text.split())


def lines(text: str) -> tuple[str, ...]:
  return tuple(line.strip() for line in text.strip().splitlines())
