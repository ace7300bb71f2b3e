"""Preference pairs: {prompt, chosen, rejected} -> two rows that share the prompt, trained on the answer alone."""

from __future__ import annotations

import numpy as np

from jaxsft.data.formats import Conversation, Drop, canonicalise
from jaxsft.data.pack import assemble
from jaxsft.data.template import Template
from jaxsft.data.tokenise import encode


def encode_pair(record: dict, template: Template, tokenizer, length: int, pad_id: int = 0) -> dict[str, dict[str, np.ndarray]] | Drop:
  """{"chosen": row, "rejected": row}, each batch.FIELDS [T] of `length` tokens; Drop when a side is no conversation or does not fit.

  `prompt`, `chosen`, `rejected` are strings or lists of messages; a side that begins with a user or system message is a whole conversation,
  prompt included. Raises template.Refused as `tokenise.encode` does.
  """
  rows = {}
  for side in ("chosen", "rejected"):
    conversation = _conversation(record.get("prompt"), record.get(side))
    if isinstance(conversation, Drop):
      return conversation
    example = encode(_last_only(conversation), template, tokenizer)
    if len(example["tokens"]) > length:
      return Drop("too_long", conversation.schema)
    rows[side] = assemble([example], length, pad_id)
  return rows


def _conversation(prompt, answer) -> Conversation | Drop:
  if isinstance(answer, list):
    whole = canonicalise({"messages": answer}, "messages")
    if isinstance(whole, Conversation) and "dropped_leading_non_user" not in whole.reasons:
      return whole
  return canonicalise({"prompt": prompt, "completion": answer}, "prompt_completion")


def _last_only(conversation: Conversation) -> Conversation:
  """The answer under judgement is the last turn: every earlier assistant turn belongs to the prompt, which both sides share."""
  *before, last = conversation.messages
  earlier = [m | {"trained": False} if m["role"] == "assistant" else m for m in before]
  return Conversation([*earlier, last], conversation.reasons, conversation.schema, conversation.tools)
