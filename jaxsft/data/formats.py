"""Raw record -> canonical Conversation, or Drop with a code: which schema, which role, what is repaired and what is given up.

A conversation is a list of {role, content, reasoning_content?, tool_calls?, name?, tool_call_id?, trained?}: role system | user | assistant |
tool; at most one system message, first; then user first and assistant last. `trained` stands on assistant messages alone, and only where it
is False. `reasons` names each repair.

Schemas (schemas.py), tried in this order when format is "auto" (the name on the left is also what `format=` accepts):

  oasst              an OpenAssistant tree, or its flat rows: taken apart by trees.py before it comes here, a thread a record; oasst_best: only
                     the best-ranked answers
  messages           messages | conversations: [{role, content} | {from, value} | strings that alternate, user first | {question, answer}]
  sharegpt           the same (the two differ in spelling only, and either is read under both names); `system` beside the turns
  strings            data: [strings that alternate, user first]
  alpaca             instruction (+ input | context), output | response | instances[0]; system     user = instruction, or instruction + "\\n" +
                     input; history: [[user, assistant], ...] before it; an instruction "Human: ... Assistant:" is a dialogue (BELLE multi-turn)
  flan               inputs, targets | inputs_pretokenized, targets_pretokenized                as FLAN, P3
  prompt_completion  prompt, completion | response | answer: strings, or lists of messages (then only the completion is trained)
  cot                question, answer, rationale                                         answer = rationale + "\\nThe answer is " + answer + "."
  question_answer    question, answer | response | std_answer; system_prompt             as GSM8K, OpenOrca
  preference         chosen, rejected (+ prompt): the chosen side, its last answer trained; "\\n\\nHuman: ... \\n\\nAssistant: ..." texts are taken apart
  coig_exam          textbox_q_instruction, textbox_q_context, textbox_question, textbox_answer, textbox_answer_analysis
  document           a .txt file (records.py);  text: the field `text`, only when format says so. Trained whole with train_on=all, else dropped

A message may say trained | train: true|false or weight: 0|1. On an assistant message it is honoured; joined messages are trained only if both
were. On another role "trained: true" drops the record (`trained_not_assistant`): no template closes such a turn with a token of the model's
own. Any other value drops it (`bad_weight`): a weight between is no weight here.

A content that is no string: a list of text parts is joined (`joined_parts`), a number is written out (`number_content`), what a tool returned
becomes JSON (`json_content`); anything else is no text, and becomes the empty string (`content_not_text`). A null is the empty string, as it
is on the wire beside tool calls. A field whose value is null counts as absent. A dialogue in one text is split (`split_dialogue`), a
"<|endoftext|>" at the end of a completion is cut (`end_marker_cut`).

Our choices where the reference table is silent: a system message later than index 0 drops the record (`system_not_first`); so does a tool
message that follows no assistant turn (`tool_without_call`), a function_call whose value is not JSON (`bad_tool_call`) and an alpaca history
that holds no pairs (`bad_history`).
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from jaxsft.data.schemas import NAMED_ONLY, PLAIN, ROLES, SCHEMAS, Dropped, first
from jaxsft.errors import UserError, nearest

__all__ = ["ROLES", "Conversation", "Drop", "Message", "canonicalise", "plain_message", "tools_of"]

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Canonical messages, the reasons of the repairs made, the schema found and the tools the record offers (JSON schemas) or None.

  `parts`: instruction and input of an alpaca record that has both, which the last user message joins; position.py may set them another way.
  """
  messages: list[Message]
  reasons: tuple[str, ...] = ()
  schema: str = ""
  tools: list[dict] | None = None
  parts: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Drop:
  """A record given up, and why."""
  code: str
  schema: str = ""


def canonicalise(record: dict, format: str = "auto") -> Conversation | Drop:
  """The conversation of one raw record. Rules and order: specs/data.md section 2. Raises UserError for an unknown format only."""
  readers = SCHEMAS | NAMED_ONLY
  if format != "auto" and format not in readers:
    raise UserError(f"unknown format {format!r} (did you mean {nearest(format, readers)[0]!r}?)",
                    wanted=f"auto, {', '.join(readers)}", knob="data.train.format")
  reasons: dict[str, None] = {}
  schema = ""
  try:
    for schema in SCHEMAS if format == "auto" else (format,):
      reasons.clear()
      turns = readers[schema](record, reasons)
      if turns is not None:
        break
    else:
      return Drop("unknown_schema")
    messages = _repair([plain_message(turn, reasons) for turn in turns], reasons, plain=schema in PLAIN)
    asked = next((turn["parts"] for turn in turns if "parts" in turn), None) if schema == "alpaca" else None
    parts = None if asked is None else (_clean(asked[0], reasons), _clean(asked[1], reasons))
    return Conversation(messages, tuple(reasons), schema, tools_of(record), parts)
  except Dropped as drop:
    return Drop(str(drop), schema)


# ---------------------------------------------------------------- one raw turn -> one canonical message

def plain_message(turn: dict, reasons) -> Message:
  """One raw turn as a canonical message; what had to be done to it is added to `reasons`. Raises schemas.Dropped."""
  name = first(turn, "role", "from")
  role = ROLES.get(name) if isinstance(name, str) else None
  if role is None:
    raise Dropped("unknown_role")
  content = first(turn, "content", "value")
  message: Message = {"role": role, "content": _text(content, role, reasons)}
  if role == "tool":
    message |= {key: _clean(turn[key], reasons) for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
  if role == "assistant" and (thought := _text(first(turn, "reasoning_content", "reasoning"), role, reasons)):
    message["reasoning_content"] = thought
  calls = _parsed(content) if name == "function_call" else turn.get("tool_calls")
  if role == "assistant" and calls:
    message["tool_calls"] = [_call(call, reasons) for call in (calls if isinstance(calls, list | tuple) else [calls])]
    if name == "function_call":
      message["content"] = ""
  trained = _flag(first(turn, "trained", "train", "weight"))
  if trained and role != "assistant":
    raise Dropped("trained_not_assistant")
  if trained is False and role == "assistant":
    message["trained"] = False
  return message


FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


def _flag(value) -> bool | None:
  """Whether a message is trained, as far as it says so."""
  if value is not None and str(value).strip().lower() not in FLAGS:
    raise Dropped("bad_weight")
  return None if value is None else FLAGS[str(value).strip().lower()]


def _text(content, role: str, reasons) -> str:
  """The content as text; what had to be done to it is in `reasons`."""
  if content is None or isinstance(content, str):
    return _clean(content or "", reasons)
  parts = [part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None for part in content] if isinstance(content, list) else []
  if parts and all(isinstance(part, str) for part in parts):
    how, text = "joined_parts", "".join(map(str, parts))
  elif isinstance(content, int | float) and not isinstance(content, bool):
    how, text = "number_content", str(content)
  elif role == "tool":
    how, text = "json_content", json.dumps(content, ensure_ascii=False)
  else:
    how, text = "content_not_text", ""
  reasons[how] = None
  return _clean(text, reasons)


def _clean(text: str, reasons) -> str:
  """Lone UTF-16 surrogates become U+FFFD: neither a fast tokenizer nor UTF-8 can hold them."""
  fixed = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
  if fixed != text and "\ufffd" in fixed:
    reasons["replaced_surrogate"] = None
  return fixed


def _parsed(text):
  try:
    return json.loads(text)
  except (TypeError, ValueError, RecursionError):
    raise Dropped("bad_tool_call") from None


def _call(call, reasons) -> dict:
  """{"type": "function", "function": {name, arguments}}: the arguments as an object, whatever the wire held."""
  if not isinstance(call, dict):
    raise Dropped("bad_tool_call")
  inner = call["function"] if isinstance(call.get("function"), dict) else call
  if not isinstance(inner.get("name"), str):
    raise Dropped("bad_tool_call")
  function = _clean_all(inner, reasons)
  if isinstance(function.get("arguments"), str):
    function["arguments"] = _parsed(function["arguments"])
  rest = {key: value for key, value in call.items() if inner is not call and key not in ("type", "function") and value is not None}
  return {"type": "function", "function": function} | rest


def _clean_all(value, reasons):
  if isinstance(value, str):
    return _clean(value, reasons)
  if isinstance(value, dict):
    return {_clean(key, reasons) if isinstance(key, str) else key: _clean_all(item, reasons) for key, item in value.items()}
  return [_clean_all(item, reasons) for item in value] if isinstance(value, list | tuple) else value


def tools_of(record) -> list[dict] | None:
  """The record's tool definitions, a list or its JSON text, each wrapped as {"type": "function", "function": ...}."""
  tools = record.get("tools")
  if isinstance(tools, str):
    tools = _parsed(tools) if tools.strip() else None
  if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
    return None
  return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


# ---------------------------------------------------------------- repairs, in the order of the specification

def _repair(messages: list[Message], reasons, plain: bool = False) -> list[Message]:
  if plain:                                  # a text, not a conversation: as it is
    if not messages[0]["content"].strip():
      raise Dropped("empty_text")
    return messages
  messages = _joined(_without_blanks(messages, reasons), reasons)
  if any(message["role"] == "system" for message in messages[1:]):
    raise Dropped("system_not_first")
  head = messages[:1] if messages and messages[0]["role"] == "system" else []
  body = messages[len(head):]
  first = next((i for i, message in enumerate(body) if message["role"] == "user"), len(body))
  last = max((i for i, message in enumerate(body) if message["role"] == "assistant" and i >= first), default=-1)
  if last < 0:
    raise Dropped("no_assistant")
  if first > 0:
    reasons["dropped_leading_non_user"] = None
  if last < len(body) - 1:
    reasons["dropped_trailing_non_assistant"] = None
  body = body[first:last + 1]
  if any(message["role"] == "tool" and before["role"] not in ("assistant", "tool") for before, message in zip(body, body[1:])):
    raise Dropped("tool_without_call")
  return head + body


def _without_blanks(messages, reasons) -> list[Message]:
  kept = []
  for message in messages:
    if message["content"].strip() or message.get("tool_calls") or message["role"] == "tool":
      kept.append(message)
    elif message["role"] == "user":
      raise Dropped("empty_user")
    elif message["role"] == "assistant":
      reasons["empty_assistant_cut"] = None
      break
  return kept


def _joined(messages, reasons) -> list[Message]:
  out: list[Message] = []
  for message in messages:
    before = out[-1] if out else None
    plain = before is not None and message["role"] != "tool" and not message.get("tool_calls") and not before.get("tool_calls")
    if before is not None and plain and before["role"] == message["role"]:
      untrained = {"trained": False} if "trained" in before or "trained" in message else {}
      thoughts = [m["reasoning_content"] for m in (before, message) if "reasoning_content" in m]
      thought = {"reasoning_content": "\n\n".join(thoughts)} if thoughts else {}
      out[-1] = {"role": message["role"], "content": before["content"] + "\n\n" + message["content"]} | thought | untrained
      reasons["merged_same_role"] = None
    else:
      out.append(message)
  return out
