"""Where the instruction of an alpaca-type record stands: before its input ("pre"), after it ("post") or on both sides ("double").

In a chat template the user turn is instruction + blank line + input, or the other way round; the alpaca template sets them as sections
(named.alpaca). "post" is Post-Instruction (arXiv 2308.12097; specs/data.md 8.1), whose wording follows the position: an instruction that
stands behind its input says "the above sentence", not "the following sentence". Records without an input are the same in all positions.
A model must be asked as it was trained, so the position travels with the run (`check_position`).
"""

from __future__ import annotations

import re

from jaxsft.errors import UserError

POSITIONS = ("pre", "post", "double")
_WORDS = {"the following": "the above", "The following": "The above", "given below": "given above", "shown below": "shown above"}


def positioned(messages, parts, position: str) -> list[dict]:
  """`messages` with the question that `parts` (instruction, input) made set in the order of `position`.

  parts: None for a record without an input. The question is the last user message, as formats.py joined the two ("I\\nX"); one that a repair
  changed since is left as it is. It also gets the keys instruction, input and, in "double", instruction_after, for the alpaca template.
  """
  if position not in POSITIONS:
    raise UserError(f"unknown position {position!r}", wanted=", ".join(POSITIONS), knob="data.position")
  last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
  if parts is None or last < 0 or messages[last]["content"] != f"{parts[0]}\n{parts[1]}":
    return list(messages)
  instruction, given = parts
  after = flipped(instruction)
  order = {"pre": (instruction, given), "post": (given, after), "double": (instruction, given, after)}[position]
  question = messages[last] | {"content": "\n\n".join(order), "instruction": after if position == "post" else instruction, "input": given}
  if position == "double":
    question["instruction_after"] = after
  return [*messages[:last], question, *messages[last + 1:]]


def flipped(instruction: str) -> str:
  """The wording of an instruction that stands behind its input."""
  return re.sub("|".join(_WORDS), lambda match: _WORDS[match.group()], instruction)


def check_position(trained: str, asked: str) -> None:
  """Raises UserError where a model is asked in another position than it was trained in."""
  if trained != asked:
    raise UserError(f"this model was trained with the instruction in position {trained!r}, and would be asked in {asked!r}",
                    wanted=trained, knob="data.position")
