"""Conversation -> text, trained character spans, and the stretches of text that must not become control tokens.

A template is one Jinja string, a named one (named.py) or the tokenizer's own, rendered once for the whole conversation in transformers'
sandbox. The spans are not searched for. Each assistant content is rendered with two private-use characters round it, so their places in
the output are the content's; without them the output must equal the plain render, which is checked for every conversation. A span runs
from the first rendered character of the content to the end of the end-of-turn that closes it, and holds nothing else:

  <|im_start|>assistant\\nHello!<|im_end|>\\n
                         ^^^^^^^^^^^^^^^^          what the template trims is not in the text, so it is not in the span

A turn that has no content of its own (a bare tool call), or whose content the template rewrites, starts where the render of the messages
before it, with the generation prompt, ends. Control strings inside contents ("<|im_end|>" typed by a user) are found in the same way and
reported as `protected`: tokenise.py encodes them as text. Control strings are the tokenizer's special tokens and the end-of-turn; other
added tokens (<think>, <tool_call>) are content.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

from jaxsft.data.named import NAMED
from jaxsft.errors import UserError, nearest

Span = tuple[int, int]
_KEYS = ("role", "content", "tool_calls", "name", "tool_call_id")


class Refused(Exception):
  """The template does not render this conversation: `kind` is a short code such as "alternation"."""

  def __init__(self, kind: str, message: str = ""):
    super().__init__(message or kind)
    self.kind = kind


@dataclasses.dataclass(frozen=True)
class Rendered:
  """Text, the spans of trained characters, and the spans of control strings that contents wrote. Half-open, in order, in characters."""
  text: str
  spans: tuple[Span, ...] = ()
  protected: tuple[Span, ...] = ()


@dataclasses.dataclass(frozen=True)
class Template:
  """A Jinja template and what a tokenizer makes of it. `get_template` builds it; without a tokenizer only `render` works."""
  name: str
  jinja: str
  end_of_turn: str
  bos: str = ""                          # the string that opens a row, "" where the family has none
  bos_in_render: bool = False
  specials: dict[str, Any] = dataclasses.field(default_factory=dict)     # what the Jinja text sees: bos_token, eos_token, ...
  controls: tuple[str, ...] = ()         # strings that must stay text inside contents
  end_of_turn_id: int = -1
  bos_token_id: int | None = None
  bos_id: int | None = None              # the same where it has to be put in front of each row; None where the render writes it
  export_prefix: str = ""                # Jinja in front of the exported template that writes that BOS

  @property
  def stop_strings(self) -> tuple[str, ...]:
    """What ends a generated answer."""
    return (self.end_of_turn,)

  @property
  def chat_template(self) -> str:
    """The Jinja text to export: apply_chat_template of a tokenizer that holds it gives exactly the tokens of a training row."""
    return self.export_prefix + self.jinja

  def render(self, messages, add_generation_prompt: bool = False, tools=None) -> Rendered:
    """Text and spans of canonical `messages`. Raises Refused where the template does, UserError when a span cannot be told."""
    plain = [{key: message[key] for key in _KEYS if key in message} for message in messages]
    text = self._jinja(plain, tools, add_generation_prompt)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    marks = _Marks(self._control_pattern, plain, tools)
    marked = self._jinja([marks.message(m) for m in plain], marks.everywhere(tools), add_generation_prompt)
    found = marks.read(marked)
    if found.text != text:
      raise UserError(f"template {self.name} renders a conversation differently when its contents are marked",
                      wanted="a template that copies contents", knob="data.template")
    starts = self._starts(plain, tools, text, turns, marks, found, add_generation_prompt)
    spans = {i: self._span(plain, tools, text, i, starts.get(i), found.protected) for i in turns}
    return Rendered(text, tuple(span for i, span in spans.items() if messages[i].get("trained", True)), found.protected)

  @functools.cached_property
  def _control_pattern(self):
    return re.compile("|".join(re.escape(c) for c in sorted(self.controls, key=len, reverse=True)) or "(?!)")

  def _jinja(self, messages, tools, add_generation_prompt) -> str:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template
    try:
      rendered, _ = render_jinja_template([messages], tools=tools, chat_template=self.jinja, add_generation_prompt=add_generation_prompt,
                                          **self.specials)
    except jinja2.exceptions.TemplateSyntaxError as error:
      raise UserError(f"template {self.name} is no valid Jinja (line {error.lineno}: {error.message})", knob="data.template") from None
    except jinja2.exceptions.TemplateError as error:
      kind, colon, _ = str(error).partition(": ")
      raise Refused(kind if colon and self.name in NAMED else "template_refused", str(error)) from None
    return rendered[0]

  def _starts(self, plain, tools, text, turns, marks, found, generate) -> dict[int, int]:
    """Where the content of each marked assistant turn starts; {} when the template lost marks, so that prefix renders have to say."""
    marked = [i for i in turns if plain[i]["content"].strip()]
    if len(found.starts) != len(marked):
      return {}
    if not any(plain[i]["content"][:1].isspace() for i in marked):
      return dict(zip(marked, found.starts))
    # leading blanks stand before the mark, so that the template may trim them: a render without them tells how many it kept
    bare = [m | {"content": m["content"].lstrip()} if i in marked else m for i, m in enumerate(plain)]
    without = marks.read(self._jinja([marks.message(m) for m in bare], marks.everywhere(tools), generate)).starts
    kept_so_far = [0, *(start - bare_start for start, bare_start in zip(found.starts, without))]
    return {i: start - (now - before) for i, start, now, before in zip(marked, found.starts, kept_so_far[1:], kept_so_far)}

  def _span(self, plain, tools, text, i, start, protected) -> Span:
    """Span of assistant turn `i` up to the end-of-turn that closes it; checks that the text between is the message's own."""
    core, by_prefix = plain[i]["content"].strip(), start is None
    if start is None:
      prefix = self._jinja(plain[:i], tools, True) if i else ""
      start = len(prefix) if text.startswith(prefix) else None
    at = None if start is None else _find_outside(text, self.end_of_turn, start, protected)
    if start is None or at is None:
      raise UserError(f"template {self.name} closes an assistant turn with no {self.end_of_turn!r}",
                      wanted="a template that ends each assistant turn", knob="data.template")
    body = text[start:at].strip()
    if by_prefix and core and body.endswith(core):           # what the template itself opens the turn with is not trained
      start = text.rindex(core, start, at)
    elif not plain[i].get("tool_calls") and body != core and not (by_prefix and body and _dense(core).endswith(_dense(body))):
      raise UserError(f"template {self.name} renders the answer {core[:40]!r} as {body[:40]!r}",
                      wanted="a template that copies contents", knob="data.template")
    return start, at + len(self.end_of_turn)


def _dense(text: str) -> str:
  """Without blanks: a template that takes an answer apart (its reasoning, say) may set it again with other line breaks."""
  return "".join(text.split())


def _find_outside(text: str, wanted: str, start: int, protected) -> int | None:
  """First place of `wanted` at or after `start` that lies in no protected span."""
  at = text.find(wanted, start)
  while at >= 0 and any(a < at + len(wanted) and at < b for a, b in protected):
    at = text.find(wanted, at + 1)
  return at if at >= 0 else None


@dataclasses.dataclass(frozen=True)
class _Found:
  text: str
  starts: list[int]
  protected: tuple[Span, ...]


class _Marks:
  """Four private-use characters that no content holds: round assistant contents, and round control strings in any content."""

  def __init__(self, controls, messages, tools):
    used = repr((messages, tools))       # repr keeps private-use characters only as escapes; compare with those
    base = next(b for b in range(0x10F000, 0x10FF00, 4) if all(f"\\U{b + i:08x}" not in used for i in range(4)))
    self.open, self.close, self.control, self.end = (chr(base + i) for i in range(4))
    self.controls = controls
    self.pattern = re.compile(f"[{self.open}{self.close}{self.control}{self.end}]")

  def message(self, message):
    marked = {key: self.everywhere(value) if key in ("content", "tool_calls") else value for key, value in message.items()}
    text = marked["content"]
    if message["role"] == "assistant" and (core := text.strip()):
      at = text.index(core)
      marked["content"] = text[:at] + self.open + core + self.close + text[at + len(core):]
    return marked

  def everywhere(self, value):
    """`value` with every control string in it marked."""
    if isinstance(value, str):
      return self.controls.sub(lambda match: self.control + match.group() + self.end, value)
    if isinstance(value, dict):
      return {key: self.everywhere(item) for key, item in value.items()}
    return [self.everywhere(item) for item in value] if isinstance(value, list | tuple) else value

  def read(self, marked: str) -> _Found:
    """The text without marks, and where they stood in it."""
    parts, starts, opened, protected, length, last = [], [], 0, [], 0, 0
    for match in self.pattern.finditer(marked):
      parts.append(marked[last:match.start()])
      length, last = length + match.start() - last, match.end()
      if match.group() == self.open:
        starts.append(length)
      elif match.group() == self.control:
        opened = length
      elif match.group() == self.end:
        protected.append((opened, length))
    return _Found("".join(parts) + marked[last:], starts, tuple(protected))


def jinja(name: str) -> str:
  """The Jinja text of a named template."""
  return _named(name).jinja


def named_template(name: str) -> Template:
  """A named template without a tokenizer: renders, encodes nothing."""
  spec = _named(name)
  return Template(name, spec.jinja, spec.end_of_turn, spec.bos, spec.bos_by == "render",
                  controls=tuple(text for text in (spec.bos, spec.end_of_turn) if text))


def _named(name: str):
  if name not in NAMED:
    raise UserError(f"unknown template {name!r} (did you mean {nearest(name, [*NAMED, 'tokenizer'])[0]!r}?)",
                    wanted=f"tokenizer, {', '.join(NAMED)}", knob="data.template")
  return NAMED[name]


def get_template(name: str, tokenizer) -> Template:
  """Template `name` ("tokenizer": the tokenizer's own) bound to `tokenizer`.

  Raises UserError: an unknown name; a tokenizer without a template; a template whose assistant turns end with no token of their own; a
  template whose end-of-turn or BOS is not one token of this tokenizer.
  """
  template = _own_template(tokenizer) if name == "tokenizer" else named_template(name)
  eot_id = _one_token(template, template.end_of_turn, "end-of-turn", tokenizer)
  if template.bos_in_render:
    _one_token(template, template.bos, "BOS", tokenizer)
  bos, prefix = _bos_in_front(template, tokenizer)
  if not template.bos_in_render:
    template = dataclasses.replace(template, bos=tokenizer.bos_token if bos is not None else "")
  controls = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | {template.end_of_turn}
  return dataclasses.replace(
      template, end_of_turn_id=eot_id, bos_token_id=tokenizer.convert_tokens_to_ids(template.bos) if template.bos else None, bos_id=bos,
      export_prefix=prefix, controls=tuple(sorted(controls)), specials=dict(tokenizer.special_tokens_map))


def _one_token(template: Template, text: str, what: str, tokenizer) -> int:
  ids = tokenizer(text, add_special_tokens=False).input_ids
  if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
    raise UserError(f"template {template.name} has the {what} {text!r}, which this tokenizer cuts into {len(ids)} tokens",
                    wanted="a tokenizer that holds it as one token, or another template", knob="data.template")
  return ids[0]


def _bos_in_front(template: Template, tokenizer) -> tuple[int | None, str]:
  """The BOS id to put in front of each row (None: none), and the Jinja that writes it in an export."""
  bos_id, habit = tokenizer.bos_token_id, tokenizer("a").input_ids[:1]
  wanted = bos_id is not None and (habit == [bos_id] or (template.name in NAMED and NAMED[template.name].bos_by == "tokenizer"))
  if template.bos_in_render or not wanted:
    return None, ""
  text = "Hello"
  want = [bos_id, *tokenizer(text, add_special_tokens=False).input_ids]
  # SentencePiece puts a blank in front of a text but not after a special token: then the export has to write it
  glue = next((g for g in ("", " ") if tokenizer(tokenizer.bos_token + g + text, add_special_tokens=False).input_ids == want), "")
  return bos_id, "{{ bos_token" + (" + ' '" if glue else "") + " }}"


def _own_template(tokenizer) -> Template:
  """The tokenizer's own template; its end-of-turn is the token that follows each assistant content in a probe conversation."""
  text = tokenizer.get_chat_template() if tokenizer.chat_template else None
  if not text:
    raise UserError("this tokenizer has no chat template", wanted=f"one of {', '.join(NAMED)}", knob="data.template")
  bare = Template("tokenizer", text, "", specials=dict(tokenizer.special_tokens_map))
  roles = ("user", "assistant", "user", "assistant")
  try:
    probe = bare._jinja([{"role": role, "content": f"probe{i}"} for i, role in enumerate(roles)], None, False)
  except Refused as refused:
    raise UserError(f"the tokenizer's template refuses a plain conversation ({refused})", wanted="another template",
                    knob="data.template") from None
  tokens = sorted((t.content for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
  pattern = re.compile(r"\s*(" + ("|".join(map(re.escape, tokens)) or "(?!)") + ")")
  found = [pattern.match(probe, probe.find(f"probe{i}") + len(f"probe{i}")) for i in (1, 3) if f"probe{i}" in probe]
  ends = [match.group(1) for match in found if match]
  if len(ends) != 2 or ends[0] != ends[1]:
    raise UserError("the tokenizer's template has no end-of-turn: nothing, or no token of the tokenizer, follows each assistant answer",
                    wanted="a template that ends each assistant turn with one token, or the model would never learn to stop",
                    knob="data.template")
  bos = tokenizer.bos_token or ""
  return dataclasses.replace(bare, end_of_turn=ends[0], bos=bos, bos_in_render=bool(bos) and probe.startswith(bos))
