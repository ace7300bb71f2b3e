"""Which schema a record has: record -> raw turns. Tried in the order of SCHEMAS when the format is "auto".

Each reader gets the record and a dict for the reasons of what it had to do, and gives a list of raw turns (dicts with role | from and
content | value), or None when the record is another schema's. `Dropped` leaves with a code. What the turns hold is judged in formats.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

Turn = dict[str, Any]
Reasons = dict[str, None]
Reader = Callable[[dict, Reasons], "list[Turn] | None"]

ROLES = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "function_call": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "ipython": "tool",
}
END_MARKER = "<|endoftext|>"
_SPEAKER = re.compile(r"(?:^|\n+)(Human|Assistant):[ \t]?")


class Dropped(Exception):
  """Leaves a record's canonicalisation with a code."""


def first(record, *names):
  """The value of the first of `names` that the record has; a null counts as absent."""
  return next((record[name] for name in names if record.get(name) is not None), None)


def dialogue(text: str, reasons: Reasons) -> list[Turn] | None:
  """Turns of a text "Human: ... Assistant: ..." (hh-rlhf, BELLE's multi-turn set), each speaker at the start of a line; None when `text` is none.

  A text that ends with "Assistant:" waits for the answer: its last turn is left out.
  """
  parts = _SPEAKER.split(text.replace("\r\n", "\n"))
  if len(parts) < 3 or parts[0].strip() or parts[1] != "Human":
    return None
  reasons["split_dialogue"] = None
  turns = [{"role": {"Human": "user", "Assistant": "assistant"}[who], "content": said} for who, said in zip(parts[1::2], parts[2::2])]
  return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip() else turns


def turns_of(value) -> list[Turn] | None:
  """Raw turns of a list of message dicts, or of plain strings that alternate."""
  if not isinstance(value, list | tuple):
    return None
  if all(isinstance(item, str) for item in value):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(value)]
  return list(value) if all(isinstance(item, dict) for item in value) else None


def _messages(record, reasons) -> list[Turn] | None:
  if (rounds := _rounds(record)) is not None:
    return rounds
  for name in ("messages", "conversations", "conversation"):
    if (turns := turns_of(_parsed_list(record.get(name)))) is not None:
      return _with_system(record, turns)
  return None


def _parsed_list(value):
  """A list that stands in a table as JSON text."""
  if isinstance(value, str) and value.lstrip().startswith("["):
    try:
      return json.loads(value)
    except (ValueError, RecursionError):
      return None
  return value


def _rounds(record) -> list[Turn] | None:
  """COIG: conversations [{question, answer}], with an instruction for the whole that goes in front of the first question."""
  value = record.get("conversations")
  if isinstance(value, dict) and all(isinstance(value.get(name), list | tuple) for name in ("question", "answer")):
    value = [{"question": q, "answer": a} for q, a in zip(value["question"], value["answer"])]     # as `datasets` lays out such a list
  if not isinstance(value, list | tuple) or not value or not all(isinstance(item, dict) and _all(item, "question", "answer") for item in value):
    return None
  turns = [turn for item in value for turn in _pair(item["question"], item["answer"])]
  if isinstance(record.get("instruction"), str) and record["instruction"].strip() and isinstance(turns[0]["content"], str):
    turns[0]["content"] = f"{record['instruction']}\n{turns[0]['content']}"
  return turns


def _with_system(record, turns) -> list[Turn]:
  """A system prompt that stands beside the turns goes in front of them, unless they begin with one."""
  system = first(record, "system", "system_prompt")
  if system is None or system == "" or (turns and ROLES.get(str(first(turns[0], "role", "from"))) == "system"):
    return turns
  return [{"role": "system", "content": system}, *turns]


def _strings(record, reasons) -> list[Turn] | None:
  value = record.get("data")
  return turns_of(value) if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value) else None


def _alpaca(record, reasons) -> list[Turn] | None:
  if record.get("instruction") is None:
    return None
  instances = record.get("instances")
  inner = instances[0] if isinstance(instances, list) and instances and isinstance(instances[0], dict) else record
  user, more = record["instruction"], first(inner, "input", "context")
  before = dialogue(user, {}) if isinstance(user, str) and user.rstrip().endswith("Assistant:") else None
  if before:
    reasons["split_dialogue"] = None
    return _with_system(record, [*before, {"role": "assistant", "content": first(inner, "output", "response")}])
  question, answer = _pair(user, first(inner, "output", "response"))
  if more is not None and str(more).strip() and isinstance(user, str):
    parts = (user, more if isinstance(more, str) else json.dumps(more, ensure_ascii=False))
    question = question | {"content": "\n".join(parts), "parts": parts}
  return _with_system(record, [*_history(record), question, answer])


def _history(record) -> list[Turn]:
  history = first(record, "history") or []
  if not isinstance(history, list | tuple) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
    raise Dropped("bad_history")
  return [turn for pair in history for turn in _pair(*pair)]


def _flan(record, reasons) -> list[Turn] | None:
  for prompt, answer in (("inputs", "targets"), ("inputs_pretokenized", "targets_pretokenized")):      # where both stand (P3), the first are ids
    if _all(record, prompt, answer) and isinstance(record[prompt], str):
      return _pair(record[prompt], _without_marker(record[answer], reasons))
  return None


def _prompt_completion(record, reasons) -> list[Turn] | None:
  prompt, completion = record.get("prompt"), first(record, "completion", "response", "answer")
  if isinstance(prompt, str) and isinstance(completion, str):
    return _with_system(record, _pair(prompt, _without_marker(completion, reasons)))
  before = turns_of(prompt) if not isinstance(prompt, str) else [{"role": "user", "content": prompt}]
  after = turns_of(completion) if not isinstance(completion, str) else [{"role": "assistant", "content": completion}]
  if before is None or after is None:
    return None
  return _with_system(record, [_untrained(turn) for turn in before] + after)


def _without_marker(answer, reasons: Reasons):
  """The end marker that older sets wrote at the end of each completion for their own tokenizer is no part of the answer."""
  if isinstance(answer, str) and answer.rstrip().endswith(END_MARKER):
    reasons["end_marker_cut"] = None
    return answer.rstrip().removesuffix(END_MARKER)
  return answer


def _chain_of_thought(record, reasons) -> list[Turn] | None:
  if not _all(record, "question", "answer", "rationale"):
    return None
  rationale, answer = str(record["rationale"]).strip(), str(record["answer"]).strip()
  if not answer:
    raise Dropped("no_assistant")
  return _pair(record["question"], f"{rationale}\nThe answer is {answer}." if rationale else answer)


def _exam(record, reasons) -> list[Turn] | None:
  """COIG's exam questions: what is asked in up to three fields, the answer and its explanation."""
  if not _all(record, "textbox_question", "textbox_answer"):
    return None
  asked = [record.get(f"textbox_{name}") for name in ("q_instruction", "q_context", "question")]
  answer = [record.get(f"textbox_{name}") for name in ("answer", "answer_analysis")]
  return _pair(*("\n".join(part for part in parts if isinstance(part, str) and part.strip()) for parts in (asked, answer)))


def _question_answer(record, reasons) -> list[Turn] | None:
  answer = first(record, "answer", "response", "std_answer")
  return _with_system(record, _pair(record["question"], answer)) if record.get("question") is not None and answer is not None else None


def _preference(record, reasons) -> list[Turn] | None:
  """The chosen side; only its last answer was judged, so only that one is trained."""
  if not _all(record, "chosen", "rejected"):
    return None
  turns = side_turns(record.get("prompt"), record["chosen"], reasons)
  if turns is None:
    return None
  last = max((i for i, turn in enumerate(turns) if _is_assistant(turn)), default=-1)
  return [turn if i == last else _untrained(turn) for i, turn in enumerate(turns)]


def side_turns(prompt, answer, reasons: Reasons) -> list[Turn] | None:
  """Raw turns of one side of a preference pair: `answer` a text, a dialogue in one text, an answer's message(s), or a whole conversation."""
  whole = dialogue(answer, reasons) if isinstance(answer, str) else turns_of([answer] if isinstance(answer, dict) else answer)
  if whole and ROLES.get(str(first(whole[0], "role", "from"))) in ("user", "system"):
    return whole
  after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else whole
  before = (dialogue(prompt, reasons) or [{"role": "user", "content": prompt}]) if isinstance(prompt, str) else turns_of(prompt)
  return None if before is None or after is None else [*before, *after]


def _thread(record, reasons) -> list[Turn] | None:
  """What trees.py made of an OpenAssistant tree: one thread a record, or the code of its drop."""
  if isinstance(record.get("oasst_drop"), str):
    raise Dropped(record["oasst_drop"])
  thread = record.get("oasst_thread")
  return list(thread) if isinstance(thread, list) and all(isinstance(turn, dict) for turn in thread) else None


def _document(record, reasons) -> list[Turn] | None:
  """A plain text, under the key that records.py gives a .txt file; it has no roles and is trained whole or not at all."""
  text = record.get("document")
  return [{"role": "user", "content": text}] if isinstance(text, str) else None


def _text(record, reasons) -> list[Turn] | None:
  return _document({"document": first(record, "text", "document")}, reasons)


def _all(record, *names) -> bool:
  return all(record.get(name) is not None for name in names)


def _pair(user, assistant) -> list[Turn]:
  return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _untrained(turn: Turn) -> Turn:
  return turn | ({"trained": False} if _is_assistant(turn) else {})


def _is_assistant(turn) -> bool:
  return ROLES.get(str(first(turn, "role", "from"))) == "assistant"


SCHEMAS: dict[str, Reader] = {
    "oasst": _thread, "messages": _messages, "sharegpt": _messages, "strings": _strings, "alpaca": _alpaca, "flan": _flan,
    "prompt_completion": _prompt_completion, "cot": _chain_of_thought, "question_answer": _question_answer, "preference": _preference, "coig_exam": _exam,
    "document": _document,
}
NAMED_ONLY: dict[str, Reader] = {"text": _text, "oasst_best": _thread}   # never guessed: a field "text" stands beside many a conversation
PLAIN = ("document", "text")
FOUND_BY = {           # what a record of the schema is known by, for people
    "oasst": "a tree of replies, or rows with message_id and parent_id", "messages": "messages or conversations holds turns",
    "strings": "data holds strings that alternate", "alpaca": "instruction", "flan": "inputs and targets", "prompt_completion": "prompt and completion",
    "cot": "question, answer and rationale", "question_answer": "question and answer", "preference": "chosen and rejected",
    "coig_exam": "textbox_question", "document": "a text file",
}
