"""Text and spans -> tokens and weights, in one pass: the loss bit is set where the token is made.

The rule: a token is trained if it holds at least one character of a trained span, that is if it ENDS past the start of the span and
starts before its end. So a token that merges the blank before an answer with the answer's first letters is trained. The last trained
token of every span is the end-of-turn, checked for each row. A BOS is put in front exactly when the family has one and the render wrote
none; one that got in twice is an error. Control strings inside contents are encoded as text (as transformers' sanitize_control_tokens
does); rows without any are one joint encoding.

train_on: "assistant" trains every assistant turn, "last" the last one alone, "all" every token of the row; an assistant message that says
train: false is trained in none of them.
"""

from __future__ import annotations

import numpy as np

from jaxsft.data.formats import Conversation
from jaxsft.data.template import Refused, Rendered, Template, is_trained
from jaxsft.errors import UserError

Example = dict[str, np.ndarray]
TRAIN_ON = ("assistant", "last", "all")


def encode(conversation: Conversation, template: Template, tokenizer, train_on: str = "assistant") -> Example:
  """tokens int32 [T] and weights float32 [T] (0 or 1) of one conversation.

  Raises Refused where the template does not render it; UserError where an end-of-turn is not the last trained token of its turn.
  """
  example = encode_many([conversation], template, tokenizer, train_on)[0]
  if isinstance(example, Refused):
    raise example
  return example


def encode_many(conversations, template: Template, tokenizer, train_on: str = "assistant") -> list[Example | Refused]:
  """`encode` of each conversation, refusals in their place; the tokenizer's own threads share the work."""
  if train_on not in TRAIN_ON:
    raise UserError(f"unknown train_on {train_on!r}", wanted=", ".join(TRAIN_ON), knob="data.train_on")
  rendered = [_render(conversation, template, train_on) for conversation in conversations]
  texts = [r for r in rendered if isinstance(r, Rendered)]
  encoded = iter(tokenise(texts, tokenizer))
  return [r if isinstance(r, Refused) else _example(r, *next(encoded), template, train_on) for r in rendered]


def encode_prompt(messages, template: Template, tokenizer, tools=None) -> list[int]:
  """Ids of `messages` with the generation prompt, BOS included: what the model sees before it answers."""
  rendered = template.render(messages, add_generation_prompt=True, tools=tools)
  ids, _ = tokenise([rendered], tokenizer)[0]
  return ids if template.bos_id is None else [template.bos_id, *ids]


def _render(conversation, template, train_on) -> Rendered | Refused:
  messages = template.messages(conversation)
  if train_on == "last":
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    messages = [m | {"train": is_trained(m) and i == last} if m["role"] == "assistant" else m for i, m in enumerate(messages)]
  try:
    return template.render(messages, tools=conversation.tools)
  except Refused as refused:
    return refused


def _example(rendered: Rendered, ids, offsets, template: Template, train_on: str) -> Example:
  ids_T, starts_T, ends_T = np.asarray(ids, np.int32), *np.asarray(offsets, np.int64).reshape(-1, 2).T
  trained_T = np.full(len(ids_T), train_on == "all")
  for start, end in rendered.untrained:
    trained_T &= ~_inside(starts_T, ends_T, start, end)
  for start, end in rendered.spans:
    inside_T = _inside(starts_T, ends_T, start, end)
    if not inside_T.any() or ids_T[np.flatnonzero(inside_T)[-1]] != template.end_of_turn_id:
      raise UserError(f"template {template.name}: the last trained token of an assistant turn is not {template.end_of_turn!r}",
                      wanted="a template and a tokenizer that fit each other", knob="data.template")
    trained_T |= inside_T
  if template.bos_id is not None:
    ids_T, trained_T = np.concatenate([[template.bos_id], ids_T]).astype(np.int32), np.concatenate([[False], trained_T])
  _check_bos(rendered, ids_T, template)
  return {"tokens": ids_T, "weights": trained_T.astype(np.float32)}


def _inside(starts_T, ends_T, start: int, end: int):
  """Which tokens hold a character of the span; an empty token at its place counts."""
  return (starts_T < end) & ((ends_T > start) | ((ends_T == starts_T) & (starts_T >= start)))


def _check_bos(rendered: Rendered, ids_T, template: Template) -> None:
  """As many BOS as the render wrote (one; one a pair in llama2), or the one in front."""
  if not template.bos:
    return
  bos_id = template.bos_id if template.bos_id is not None else template.bos_token_id
  written = rendered.text.count(template.bos) - sum(rendered.text[a:b] == template.bos for a, b in rendered.protected)
  twice = template.bos_id is not None and written and template.bos != template.end_of_turn
  wanted = 1 if twice else written + (template.bos_id is not None)
  found = int((ids_T == bos_id).sum())
  if found != wanted:
    raise UserError(f"template {template.name}: a row holds {found} BOS tokens ({template.bos!r}) where {wanted} belong",
                    wanted="a template that writes the BOS once, or not at all", knob="data.template")


def tokenise(rendered: list[Rendered], tokenizer) -> list[tuple[list[int], list[tuple[int, int]]]]:
  """Ids and character offsets of each text, with no special token added and protected stretches encoded as text."""
  whole = [r.text for r in rendered if not r.protected]
  if whole:
    batch = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    done = iter(zip(batch.input_ids, batch.offset_mapping))
  return [_in_pieces(r, tokenizer) if r.protected else next(done) for r in rendered]


def _in_pieces(rendered: Rendered, tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
  """One text cut at its protected stretches; each stretch encoded with the control tokens switched off."""
  ids, offsets, at = [], [], 0
  for start, end in [*rendered.protected, (len(rendered.text), len(rendered.text))]:
    for first, last, as_text in ((at, start, False), (start, end, True)):
      if first < last:
        more, places = _piece(rendered.text[first:last], tokenizer, as_text, first > 0)
        ids += more
        offsets += [(a + first, b + first) for a, b in places]
    at = end
  return ids, offsets


def _piece(text: str, tokenizer, as_text: bool, inner: bool) -> tuple[list[int], list[tuple[int, int]]]:
  """Ids and offsets of a piece. Inside a text it is encoded after a line break, or SentencePiece would put a blank in front of it."""
  lead = "\n" if inner else ""
  out = tokenizer(lead + text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=as_text, verbose=False)
  kept = [(i, (a - len(lead), b - len(lead))) for i, (a, b) in zip(out.input_ids, out.offset_mapping) if b > len(lead) or not lead]
  if kept and kept[0][1][0] < 0:         # the line break merged with the text: encode it alone
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=as_text, verbose=False)
    kept = list(zip(out.input_ids, out.offset_mapping))
  if as_text and tokenizer.convert_tokens_to_ids(text) in [i for i, _ in kept]:
    # the vocabulary makes the control token from plain text, or it cannot be switched off: break the string after its first character
    head, tail = (_piece(part, tokenizer, False, True) for part in (text[:1], text[1:]))
    return head[0] + tail[0], head[1] + [(a + 1, b + 1) for a, b in tail[1]]
  return [i for i, _ in kept], [place for _, place in kept]
