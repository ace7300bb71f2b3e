"""Private-use characters put into messages before they are rendered, so that places in the rendered text can be read off, not searched for.

Marked are: the first and the last character of each assistant content, the first of each assistant reasoning_content, and both ends of every
control string that a content, a name or a tool definition holds. No content has these characters: they are chosen for each conversation.
"""

from __future__ import annotations

import dataclasses
import re

Span = tuple[int, int]
_MARKED = ("content", "reasoning_content", "tool_calls", "name", "tool_call_id", "instruction", "input", "instruction_after")


@dataclasses.dataclass(frozen=True)
class Found:
  """The text without marks; where each assistant content and thought starts, by message number; the control strings inside contents.

  A content that the template left out, changed at its start or wrote twice has no entry.
  """
  text: str
  contents: dict[int, int]
  thoughts: dict[int, int]
  protected: tuple[Span, ...]


class Marks:
  """Marks for one conversation: three characters and two more a message, all of them in no content."""

  def __init__(self, controls: re.Pattern, messages, tools):
    size = 3 + 2 * len(messages)
    # repr keeps private-use characters only as escapes
    used = {int(code, 16) for code in re.findall(r"\\U(0010[0-9a-f]{4})", repr((messages, tools)))}
    base = next(b for b in range(0x100000, 0x10FFF0 - size, size) if not used or used.isdisjoint(range(b, b + size)))
    self.controls, self.base = controls, base
    self.control, self.end, self.close = (chr(base + i) for i in range(3))
    self.pattern = re.compile(f"[{chr(base)}-{chr(base + size - 1)}]")

  def messages(self, messages) -> list[dict]:
    """All of them, marked."""
    return [self._message(i, message) for i, message in enumerate(messages)]

  def _message(self, i: int, message):
    marked = {key: self.everywhere(value) if key in _MARKED else value for key, value in message.items()}
    if message["role"] == "assistant":
      marked["content"] = _around(marked["content"], chr(self.base + 3 + 2 * i), self.close)
      if isinstance(marked.get("reasoning_content"), str):
        marked["reasoning_content"] = _around(marked["reasoning_content"], chr(self.base + 4 + 2 * i), "")
    return marked

  def everywhere(self, value):
    """`value` with every control string in it marked."""
    if isinstance(value, str):
      return self.controls.sub(lambda match: self.control + match.group() + self.end, value)
    if isinstance(value, dict):
      return {key: self.everywhere(item) for key, item in value.items()}
    return [self.everywhere(item) for item in value] if isinstance(value, list | tuple) else value

  def read(self, marked: str) -> Found:
    """The text without marks, and where they stood in it."""
    parts, places, opened, protected, length, last = [], {}, 0, [], 0, 0
    for match in self.pattern.finditer(marked):
      parts.append(marked[last:match.start()])
      length, last, mark = length + match.start() - last, match.end(), match.group()
      if mark == self.control:
        opened = length
      elif mark == self.end:
        protected.append((opened, length))
      elif mark != self.close:
        number = ord(mark) - self.base - 3
        places[number] = -1 if number in places else length         # written twice: it tells nothing
    places = {number: place for number, place in places.items() if place >= 0}
    return Found("".join(parts) + marked[last:], {number // 2: place for number, place in places.items() if number % 2 == 0},
                 {number // 2: place for number, place in places.items() if number % 2}, tuple(protected))


def _around(text: str, opening: str, closing: str) -> str:
  """`text` with marks round what is left of it without outer blanks, which a template may trim."""
  core = text.strip()
  at = text.index(core)
  return text[:at] + opening + core + closing + text[at + len(core):] if core else text
