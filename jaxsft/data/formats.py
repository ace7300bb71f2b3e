"""Raw record -> canonical Conversation, or Drop with a code: which schema, which role, what is repaired and what is given up.

A conversation is a list of {role, content, tool_calls?, trained?}: role system | user | assistant | tool; at most one system message,
first; then user first and assistant last. `trained` stands on assistant messages alone, and only where it is False. `reasons` names each
repair.

Schemas, tried in this order when format is "auto" (the name on the left is also what `format=` accepts):

  messages           messages | conversations: [{role, content} | {from, value} | strings that alternate, user first]
  sharegpt           the same (the two differ in spelling only, and either is read under both names)
  strings            data: [strings that alternate, user first]
  alpaca             instruction (+ input), output | response | instances[0]; system     user = instruction, or instruction + "\\n" + input;
                     history: [[user, assistant], ...] before it
  flan               inputs, targets
  prompt_completion  prompt, completion | response | answer: strings, or lists of messages (then only the completion is trained)
  question_answer    question, answer                                                    as GSM8K

A message may say trained: true|false or weight: 0|1. On an assistant message it is honoured; joined messages are trained only if both were.
On another role "trained: true" drops the record (`trained_not_assistant`): no template closes such a turn with a token of the model's own.
Any other value drops it (`bad_weight`): a weight between is no weight here.

A content that is no string: a list of text parts is joined (`joined_parts`), a number is written out (`number_content`), what a tool returned
becomes JSON (`json_content`); anything else is no text, and becomes the empty string (`content_not_text`). A null is the empty string, as it
is on the wire beside tool calls. A field whose value is null counts as absent. reasoning_content is left out (`reasoning_dropped`).

Our choices where the reference table is silent: a system message later than index 0 drops the record (`system_not_first`); so does a tool
message that follows no assistant turn (`tool_without_call`) and a function_call whose value is not JSON (`bad_tool_call`).
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from jaxsft.errors import UserError, nearest

ROLES = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "function_call": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "ipython": "tool",
}
Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Canonical messages, the reasons of the repairs made, the schema found and the tools the record offers (JSON schemas) or None."""
  messages: list[Message]
  reasons: tuple[str, ...] = ()
  schema: str = ""
  tools: list[dict] | None = None


@dataclasses.dataclass(frozen=True)
class Drop:
  """A record given up, and why."""
  code: str
  schema: str = ""


class _Dropped(Exception):
  """Leaves a record's canonicalisation with a code."""


def canonicalise(record: dict, format: str = "auto") -> Conversation | Drop:
  """The conversation of one raw record. Rules and order: specs/data.md section 2. Raises UserError for an unknown format only."""
  if format != "auto" and format not in SCHEMAS:
    raise UserError(f"unknown format {format!r} (did you mean {nearest(format, SCHEMAS)[0]!r}?)",
                    wanted=f"auto, {', '.join(SCHEMAS)}", knob="data.train.format")
  for schema in SCHEMAS if format == "auto" else (format,):
    turns = SCHEMAS[schema](record)
    if turns is not None:
      break
  else:
    return Drop("unknown_schema")
  reasons: dict[str, None] = {}
  try:
    messages = _repair([_message(turn, reasons) for turn in turns], reasons)
    return Conversation(messages, tuple(reasons), schema, _tools(record))
  except _Dropped as drop:
    return Drop(str(drop), schema)


# ---------------------------------------------------------------- schemas: record -> list of raw turns, or None when it is another schema

def _turns(value) -> list[dict] | None:
  """Raw turns of a list of message dicts, or of plain strings that alternate."""
  if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(value)]
  if isinstance(value, list | tuple) and all(isinstance(item, dict) for item in value):
    return list(value)
  return None


def _messages(record) -> list[dict] | None:
  for name in ("messages", "conversations"):
    if (turns := _turns(record.get(name))) is not None:
      return turns
  return None


def _strings(record) -> list[dict] | None:
  value = record.get("data")
  return _turns(value) if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value) else None


def _alpaca(record) -> list[dict] | None:
  if record.get("instruction") is None:
    return None
  instances = record.get("instances")
  inner = instances[0] if isinstance(instances, list) and instances and isinstance(instances[0], dict) else record
  user, more = record["instruction"], inner.get("input")
  if more is not None and str(more).strip() and isinstance(user, str):
    user = f"{user}\n{more if isinstance(more, str) else json.dumps(more, ensure_ascii=False)}"
  history = record.get("history") or []
  before = [turn for pair in history for turn in _pair(*pair)] if all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history) else []
  return [{"role": "system", "content": record.get("system")}, *before, *_pair(user, _first(inner, "output", "response"))]


def _flan(record) -> list[dict] | None:
  return _pair(record["inputs"], record["targets"]) if _all(record, "inputs", "targets") else None


def _prompt_completion(record) -> list[dict] | None:
  prompt, completion = record.get("prompt"), _first(record, "completion", "response", "answer")
  if isinstance(prompt, str) and isinstance(completion, str):
    return _pair(prompt, completion)
  before = _turns(prompt) if not isinstance(prompt, str) else [{"role": "user", "content": prompt}]
  after = _turns(completion) if not isinstance(completion, str) else [{"role": "assistant", "content": completion}]
  if before is None or after is None:
    return None
  return [turn | ({"trained": False} if _is_assistant(turn) else {}) for turn in before] + after


def _question_answer(record) -> list[dict] | None:
  return _pair(record["question"], record["answer"]) if _all(record, "question", "answer") else None


def _all(record, *names) -> bool:
  return all(record.get(name) is not None for name in names)


def _pair(user, assistant) -> list[dict]:
  return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _first(record, *names):
  return next((record[name] for name in names if record.get(name) is not None), None)


def _is_assistant(turn) -> bool:
  return ROLES.get(str(_first(turn, "role", "from"))) == "assistant"


SCHEMAS = {
    "messages": _messages, "sharegpt": _messages, "strings": _strings, "alpaca": _alpaca, "flan": _flan,
    "prompt_completion": _prompt_completion, "question_answer": _question_answer,
}


# ---------------------------------------------------------------- one raw turn -> one canonical message

def _message(turn: dict, reasons) -> Message:
  name = _first(turn, "role", "from")
  role = ROLES.get(name) if isinstance(name, str) else None
  if role is None:
    raise _Dropped("unknown_role")
  content = _first(turn, "content", "value")
  message: Message = {"role": role, "content": _text(content, role, reasons)}
  if role == "tool":
    message |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
  if turn.get("reasoning_content"):
    reasons["reasoning_dropped"] = None
  calls = _parsed(content) if name == "function_call" else turn.get("tool_calls")
  if role == "assistant" and calls:
    message["tool_calls"] = [_call(call, reasons) for call in (calls if isinstance(calls, list | tuple) else [calls])]
    if name == "function_call":
      message["content"] = ""
  trained = _flag(_first(turn, "trained", "weight"))
  if trained and role != "assistant":
    raise _Dropped("trained_not_assistant")
  if trained is False and role == "assistant":
    message["trained"] = False
  return message


FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


def _flag(value) -> bool | None:
  """Whether a message is trained, as far as it says so."""
  if value is not None and str(value).strip().lower() not in FLAGS:
    raise _Dropped("bad_weight")
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
    raise _Dropped("bad_tool_call") from None


def _call(call, reasons) -> dict:
  """{"type": "function", "function": {name, arguments}}: the arguments as an object, whatever the wire held."""
  if not isinstance(call, dict):
    raise _Dropped("bad_tool_call")
  inner = call["function"] if isinstance(call.get("function"), dict) else call
  if not isinstance(inner.get("name"), str):
    raise _Dropped("bad_tool_call")
  function = _clean_all(inner, reasons)
  if isinstance(function.get("arguments"), str):
    function["arguments"] = _parsed(function["arguments"])
  rest = {key: value for key, value in call.items() if inner is not call and key not in ("type", "function") and value is not None}
  return {"type": "function", "function": function} | rest


def _clean_all(value, reasons):
  if isinstance(value, str):
    return _clean(value, reasons)
  if isinstance(value, dict):
    return {key: _clean_all(item, reasons) for key, item in value.items()}
  return [_clean_all(item, reasons) for item in value] if isinstance(value, list | tuple) else value


def _tools(record) -> list[dict] | None:
  """The record's tool definitions, a list or its JSON text, each wrapped as {"type": "function", "function": ...}."""
  tools = record.get("tools")
  if isinstance(tools, str):
    tools = _parsed(tools) if tools.strip() else None
  if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
    return None
  return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


# ---------------------------------------------------------------- repairs, in the order of the specification

def _repair(messages: list[Message], reasons) -> list[Message]:
  messages = _joined(_without_blanks(messages, reasons), reasons)
  if any(message["role"] == "system" for message in messages[1:]):
    raise _Dropped("system_not_first")
  head = messages[:1] if messages and messages[0]["role"] == "system" else []
  body = messages[len(head):]
  first = next((i for i, message in enumerate(body) if message["role"] == "user"), len(body))
  last = max((i for i, message in enumerate(body) if message["role"] == "assistant" and i >= first), default=-1)
  if last < 0:
    raise _Dropped("no_assistant")
  if first > 0:
    reasons["dropped_leading_non_user"] = None
  if last < len(body) - 1:
    reasons["dropped_trailing_non_assistant"] = None
  body = body[first:last + 1]
  if any(message["role"] == "tool" and before["role"] not in ("assistant", "tool") for before, message in zip(body, body[1:])):
    raise _Dropped("tool_without_call")
  return head + body


def _without_blanks(messages, reasons) -> list[Message]:
  kept = []
  for message in messages:
    if message["content"].strip() or message.get("tool_calls") or message["role"] == "tool":
      kept.append(message)
    elif message["role"] == "user":
      raise _Dropped("empty_user")
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
      out[-1] = {"role": message["role"], "content": before["content"] + "\n\n" + message["content"]} | untrained
      reasons["merged_same_role"] = None
    else:
      out.append(message)
  return out
