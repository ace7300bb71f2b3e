"""Preference pairs: {prompt, chosen, rejected} -> two rows that share the prompt, trained on the answer alone."""

from __future__ import annotations

import numpy as np

from jaxsft.data.formats import Conversation, Drop, canonicalise
from jaxsft.data.pack import assemble
from jaxsft.data.schemas import side_turns
from jaxsft.data.template import Template
from jaxsft.data.tokenise import encode


def encode_pair(record: dict, template: Template, tokenizer, length: int, pad_id: int = 0) -> dict[str, dict[str, np.ndarray]] | Drop:
  """{"chosen": row, "rejected": row}, each batch.FIELDS [T] of `length` tokens; Drop when a side is no conversation or does not fit.

  `prompt`, `chosen`, `rejected` are strings or lists of messages; a side that begins with a user or system message, or is a text
  "\\n\\nHuman: ... \\n\\nAssistant: ..." (hh-rlhf), is a whole conversation, prompt included. Both sides must share what stands before their last
  answer, or the record is dropped (`prompts_differ`), and so it is when the two answers are the same (`same_answers`).
  Raises template.Refused as `tokenise.encode` does.
  """
  pair = sides(record)
  if isinstance(pair, Drop):
    return pair
  rows = {}
  for side, conversation in pair.items():
    example = encode(conversation, template, tokenizer)
    if len(example["tokens"]) > length:
      return Drop("too_long", conversation.schema)
    rows[side] = assemble([example], length, pad_id)
  return rows


def sides(record: dict) -> dict[str, Conversation] | Drop:
  """{"chosen": ..., "rejected": ...}, two conversations that differ in their last turn alone, the only one trained."""
  found = {side: _conversation(record, side) for side in ("chosen", "rejected")}
  for conversation in found.values():
    if isinstance(conversation, Drop):
      return conversation
  pair = {side: _last_only(conversation) for side, conversation in found.items() if isinstance(conversation, Conversation)}
  chosen, rejected = (pair[side].messages for side in ("chosen", "rejected"))
  if chosen[:-1] != rejected[:-1]:
    return Drop("prompts_differ", "preference")
  return Drop("same_answers", "preference") if chosen == rejected else pair


def _conversation(record: dict, side: str) -> Conversation | Drop:
  reasons: dict[str, None] = {}
  turns = side_turns(record.get("prompt"), record[side], reasons) if record.get(side) is not None else None
  if turns is None:
    return Drop("unknown_schema")
  found = canonicalise({"messages": turns, "tools": record.get("tools")}, "messages")
  if isinstance(found, Drop):
    return Drop(found.code, "preference")
  return Conversation(found.messages, tuple(reasons) + found.reasons, "preference", found.tools)


def _last_only(conversation: Conversation) -> Conversation:
  """The answer under judgement is the last turn: every earlier assistant turn belongs to the prompt, which both sides share."""
  *before, last = conversation.messages
  earlier = [m | {"trained": False} if m["role"] == "assistant" else m for m in before]
  return Conversation([*earlier, last], conversation.reasons, conversation.schema, conversation.tools)
