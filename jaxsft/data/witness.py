"""One training row kept with a run, so that whatever is exported can be held against what was trained."""

from __future__ import annotations

from typing import Any

from jaxsft.data.examples import Examples
from jaxsft.data.formats import Conversation, canonicalise
from jaxsft.data.schemas import PLAIN
from jaxsft.data.template import Template

LOOKED_AT = 64     # examples among which the shortest is taken: the row travels in every checkpoint's meta


def witness(examples: Examples, template: Template, format: str = "auto") -> dict[str, Any]:
  """The row that `convert.check.check_export` renders again, JSON-able; {} where no row renders the same way twice.

  Rows with control strings in their contents are passed over (a serving stack tokenises those as control tokens, training as text), and
  so is every row of a template that writes the date.
  """
  if "strftime_now" in template.chat_template:
    return {}
  for index in sorted(range(min(len(examples), LOOKED_AT)), key=lambda i: examples.lengths[i]):
    conversation = canonicalise(examples.records[int(examples.origin[index])], format) if examples.records is not None else None
    if isinstance(conversation, Conversation) and conversation.schema not in PLAIN and (found := witness_of(conversation, template, examples[index]["tokens"])):
      return found
  return {}


def witness_of(conversation: Conversation, template: Template, tokens_T) -> dict[str, Any]:
  """`witness` of one conversation and its tokens (which may be truncated); {} with control strings in a content."""
  messages = template.messages(conversation)
  rendered = template.render(messages, tools=conversation.tools)
  if rendered.protected:
    return {}
  return {"template": template.name, "messages": messages, "tools": conversation.tools, "text": rendered.text,
          "tokens": [int(token) for token in tokens_T], "bos": template.bos if template.bos_id is not None else "",
          "end_of_turn": template.end_of_turn}
