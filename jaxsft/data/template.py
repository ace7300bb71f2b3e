"""Conversation -> text, trained character spans, and the stretches of text that must not become control tokens.

A template is one Jinja string (a named one of named.py, a file, or the tokenizer's own), rendered once for the whole conversation in
transformers' sandbox. The spans are not searched for. Each assistant content is rendered with private-use characters round it (marks.py), so
their places in the output are the content's; without them the output must equal the plain render, which is checked for every conversation. A
span runs from the first rendered character of the content to the end of the end-of-turn that closes it, and holds nothing else:

  <|im_start|>assistant\\nHello!<|im_end|>\\n
                         ^^^^^^^^^^^^^^^^          what the template trims is not in the text, so it is not in the span

Thoughts (reasoning_content, or <think>...</think> in front of the content where the template takes that apart) are trained where the
template writes them, from the tag that opens them: Qwen3 writes those of the last turn and drops earlier ones, which are then not in the
text (`thoughts_dropped` in Rendered.reasons; data.train_on=last keeps a model from learning to answer those turns without a thought). A
turn that has no content of its own (a bare tool call), or whose content the template rewrites, starts where the render of the messages
before it, with the generation prompt, ends. Control strings inside contents ("<|im_end|>" typed by a user) are found in the same way and
reported as `protected`: tokenise.py encodes them as text. Control strings are the tokenizer's special tokens and the end-of-turn; other
added tokens (<think>, <tool_call>) are content.

Which turns: all assistant turns but those that say train: false (or trained: false).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from typing import Any

from jaxsft.data import position as positions
from jaxsft.data.marks import Marks, Span
from jaxsft.data.named import KINDS, NAMED, alpaca
from jaxsft.errors import UserError, nearest

_KEYS = ("role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id", "instruction", "input", "instruction_after")


class Refused(Exception):
  """The template does not render this conversation: `kind` is a short code such as "alternation"."""

  def __init__(self, kind: str, message: str = ""):
    super().__init__(message or kind)
    self.kind = kind


@dataclasses.dataclass(frozen=True)
class Rendered:
  """Text, the spans of trained characters, and the spans of control strings that contents wrote. Half-open, in order, in characters.

  `untrained`: the spans of assistant turns that are not to be trained. `reasons`: codes of what the template left out ("thoughts_dropped").
  """
  text: str
  spans: tuple[Span, ...] = ()
  protected: tuple[Span, ...] = ()
  untrained: tuple[Span, ...] = ()
  reasons: tuple[str, ...] = ()


def is_trained(message) -> bool:
  """Whether an assistant message is to be trained: yes unless it says train: false (or trained: false)."""
  return bool(message.get("train", message.get("trained", True)))


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
  position: str = "pre"                  # where the instruction of an alpaca-type record stands: position.py

  @property
  def stop_strings(self) -> tuple[str, ...]:
    """What ends a generated answer."""
    return (self.end_of_turn,)

  @property
  def chat_template(self) -> str:
    """The Jinja text to export: apply_chat_template of a tokenizer that holds it gives exactly the tokens of a training row."""
    return self.export_prefix + self.jinja

  def messages(self, conversation) -> list[dict]:
    """The messages of a formats.Conversation as this template renders them: instruction and input in the order of `position`."""
    return positions.positioned(conversation.messages, conversation.parts, self.position)

  def render(self, messages, add_generation_prompt: bool = False, tools=None) -> Rendered:
    """Text and spans of canonical `messages`. Raises Refused where the template does, UserError when a span cannot be told."""
    plain = [{key: message[key] for key in _KEYS if key in message} for message in messages]
    text = self._jinja(plain, tools, add_generation_prompt)
    apart = [self._taken_apart(message) for message in plain]
    marks = Marks(self._control_pattern, plain, tools)
    found = marks.read(self._jinja(marks.messages(apart), marks.everywhere(tools), add_generation_prompt))
    if found.text != text and apart != plain:              # the template takes thoughts off in another way
      apart, found = plain, marks.read(self._jinja(marks.messages(plain), marks.everywhere(tools), add_generation_prompt))
    if found.text != text:
      raise UserError(f"template {self.name} renders a conversation differently when its contents are marked",
                      wanted="a template that copies contents", knob="data.template")
    starts = self._starts(apart, tools, marks, found, add_generation_prompt)
    spans = {i: self._span(apart, tools, text, i, starts.get(i), found)
             for i, message in enumerate(messages) if message["role"] == "assistant"}
    thoughts = {i for i, m in enumerate(apart) if m["role"] == "assistant" and (m.get("reasoning_content") or "").strip()}
    return Rendered(text, tuple(span for i, span in spans.items() if is_trained(messages[i])), found.protected,
                    tuple(span for i, span in spans.items() if not is_trained(messages[i])),
                    ("thoughts_dropped",) if thoughts - found.thoughts.keys() else ())

  def _taken_apart(self, message):
    """An assistant message with <think>...</think> in front as Qwen3 reads it, where the template does that; others as they are."""
    content = message["content"]
    apart = message.get("reasoning_content") is not None
    if message["role"] != "assistant" or "</think>" not in content or apart or not self._splits_thoughts:
      return message
    thought, rest = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n"), content.split("</think>")[-1].lstrip("\n")
    if content.count("<think>") != 1 or content.count("</think>") != 1 or not content.lstrip().startswith("<think>"):
      raise Refused("thinking_malformed", "an answer holds </think>, but not one <think>...</think> in front of it: the template would lose text")
    return message | {"content": rest, "reasoning_content": thought}

  @functools.cached_property
  def _splits_thoughts(self) -> bool:
    return "reasoning_content" in self.jinja and "</think>" in self.jinja

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
      ours = colon and (self.name in NAMED or kind in KINDS)       # an exported named template is the tokenizer's own later
      raise Refused(kind if ours else "template_refused", str(error)) from None
    return rendered[0]

  def _starts(self, plain, tools, marks, found, generate) -> dict[int, int]:
    """Where the content of each marked assistant turn starts; {} when the template lost marks, so that prefix renders have to say."""
    marked = [i for i, m in enumerate(plain) if m["role"] == "assistant" and m["content"].strip()]
    if found.contents.keys() != set(marked):
      return {}
    if not any(plain[i]["content"][:1].isspace() for i in marked):
      return found.contents
    # leading blanks stand before the mark, so that the template may trim them: a render without them tells how many it kept
    bare = [m | {"content": m["content"].lstrip()} if i in marked else m for i, m in enumerate(plain)]
    without = marks.read(self._jinja(marks.messages(bare), marks.everywhere(tools), generate)).contents
    kept_so_far = [0, *(found.contents[i] - without[i] for i in marked)]
    return {i: found.contents[i] - (now - before) for i, now, before in zip(marked, kept_so_far[1:], kept_so_far)}

  def _span(self, plain, tools, text, i, start, found) -> Span:
    """Span of assistant turn `i` up to the end-of-turn that closes it; checks that the text between is the message's own."""
    core, calls = plain[i]["content"].strip(), plain[i].get("tool_calls")
    thought, by_prefix = found.thoughts.get(i), start is None
    if thought is not None:
      start = self._thought_start(plain, tools, text, i, thought)
    elif by_prefix:
      start = self._prefix_end(plain, tools, text, i)
    at = None if start is None else _find_outside(text, self.end_of_turn, start, found.protected)
    if start is None or at is None:
      raise UserError(f"template {self.name} closes an assistant turn with no {self.end_of_turn!r}",
                      wanted="a template that ends each assistant turn", knob="data.template")
    body = text[start:at].strip()
    if by_prefix and thought is None and core and body.endswith(core):      # what the template itself opens the turn with is not trained
      start = text.rindex(core, start, at)
    elif not calls and (body != core if thought is None else not body.endswith(core)) and \
        not (by_prefix and body and _dense(core).endswith(_dense(body))):
      raise UserError(f"template {self.name} renders the answer {core[:40]!r} as {body[:40]!r}",
                      wanted="a template that copies contents", knob="data.template")
    return start, at + len(self.end_of_turn)

  def _prefix(self, plain, tools, i) -> str | None:
    """The render of what stands before turn `i`, with the generation prompt; None where the template refuses that."""
    try:
      return self._jinja(plain[:i], tools, True) if i else ""
    except Refused:
      return None

  def _thought_start(self, plain, tools, text, i, thought: int) -> int:
    """Where the model begins to think in turn `i`: behind the generation prompt, which may hold the tag, else at the tag."""
    prefix = self._prefix(plain, tools, i)
    if prefix is not None and text.startswith(prefix) and len(prefix) <= thought:
      return len(prefix)
    tag = re.search(r"<[^<>\s]+>\s*$", text[:thought])
    return tag.start() if tag else thought

  def _prefix_end(self, plain, tools, text, i) -> int | None:
    """Where turn `i` starts that has no marked content.

    A turn without content: from where on the text is another when a content is written in its place; this leaves out what the template puts
    in front of every answer (Qwen3's empty thought). A content that the template rewrites: where the generation prompt ends.
    """
    prefix = self._prefix(plain, tools, i)
    by_prompt = len(prefix) if prefix is not None and text.startswith(prefix) else None
    if by_prompt is not None and plain[i]["content"].strip():
      return by_prompt
    # what stands before may depend on what comes after (Mistral's system prompt moves to the last question), so all of it is rendered; without
    # the tool turns up to the next question where the template refuses them behind a turn that calls nothing
    question = next((k for k in range(i + 1, len(plain)) if plain[k]["role"] == "user"), len(plain))
    answer = {"role": "assistant", "content": "\uf8ff"}
    for rest in (plain[i + 1:], plain[question:]):
      try:
        changed = self._jinja([*plain[:i], answer, *rest], tools, False)
      except Refused:
        continue
      return next((k for k, (a, b) in enumerate(zip(text, changed)) if a != b), by_prompt)
    return by_prompt


def _dense(text: str) -> str:
  """Without blanks: a template that takes an answer apart (its reasoning, say) may set it again with other line breaks."""
  return "".join(text.split())


def _find_outside(text: str, wanted: str, start: int, protected) -> int | None:
  """First place of `wanted` at or after `start` that lies in no protected span."""
  at = text.find(wanted, start)
  while at >= 0 and any(a < at + len(wanted) and at < b for a, b in protected):
    at = text.find(wanted, at + 1)
  return at if at >= 0 else None


def jinja(name: str) -> str:
  """The Jinja text of a named template."""
  return _named(name).jinja


def named_template(name: str, position: str = "pre") -> Template:
  """A named template without a tokenizer: renders, encodes nothing. Raises UserError for an unknown name or position."""
  spec = _named(name)
  if position not in positions.POSITIONS:
    raise UserError(f"unknown position {position!r}", wanted=", ".join(positions.POSITIONS), knob="data.position")
  text = alpaca(position) if name == "alpaca" else spec.jinja
  return Template(name, text, spec.end_of_turn, spec.bos, spec.bos_by == "render", position=position,
                  controls=tuple(text for text in (spec.bos, spec.end_of_turn, *spec.tokens) if text))


def _named(name: str):
  if name not in NAMED:
    raise UserError(f"unknown template {name!r} (did you mean {nearest(name, [*NAMED, 'tokenizer'])[0]!r}?)",
                    wanted=f"tokenizer, {', '.join(NAMED)} or a .jinja file", knob="data.template")
  return NAMED[name]


def get_template(name: str, tokenizer, position: str = "pre") -> Template:
  """Template `name` ("tokenizer": the tokenizer's own; NAME.jinja: a file) bound to `tokenizer`; position: see position.py.

  Raises UserError: an unknown name or position; a file that cannot be read; a tokenizer without a template; a template whose assistant turns
  end with no token of their own; a template whose end-of-turn, BOS or other control string is not one token of this tokenizer.
  """
  if name == "tokenizer" or name.endswith(".jinja"):
    template = dataclasses.replace(_own_template(tokenizer) if name == "tokenizer" else _file_template(name, tokenizer), position=position)
    named_template("chatml", position)                       # checks the position
  else:
    template = named_template(name, position)
  eot_id = _one_token(template, template.end_of_turn, "end-of-turn", tokenizer)
  for text in NAMED[name].tokens if name in NAMED else ():
    _one_token(template, text, "control string", tokenizer)
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
  text = tokenizer.get_chat_template() if tokenizer.chat_template else None
  if not text:
    raise UserError("this tokenizer has no chat template", wanted=f"one of {', '.join(NAMED)}", knob="data.template")
  return _probed("tokenizer", "the tokenizer's template", text, tokenizer)


def _file_template(name: str, tokenizer) -> Template:
  try:
    text = pathlib.Path(name).expanduser().read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"the template {name} cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})",
                    wanted="a Jinja file in UTF-8", knob="data.template") from None
  return _probed(name, f"the template {name}", text, tokenizer)


def _probed(name: str, shown: str, text: str, tokenizer) -> Template:
  """A template of which only the Jinja is known; its end-of-turn is the token that follows each assistant content in a probe conversation."""
  bare = Template(name, text, "", specials=dict(tokenizer.special_tokens_map))
  roles = ("user", "assistant", "user", "assistant")
  try:
    probe = bare._jinja([{"role": role, "content": f"probe{i}"} for i, role in enumerate(roles)], None, False)
  except Refused as refused:
    raise UserError(f"{shown} refuses a plain conversation ({refused})", wanted="another template", knob="data.template") from None
  tokens = sorted((t.content for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
  pattern = re.compile(r"\s*(" + ("|".join(map(re.escape, tokens)) or "(?!)") + ")")
  found = [pattern.match(probe, probe.find(f"probe{i}") + len(f"probe{i}")) for i in (1, 3) if f"probe{i}" in probe]
  ends = [match.group(1) for match in found if match]
  if len(ends) != 2 or ends[0] != ends[1]:
    raise UserError(f"{shown} has no end-of-turn: nothing, or no token of the tokenizer, follows each assistant answer",
                    wanted="a template that ends each assistant turn with one token, or the model would never learn to stop",
                    knob="data.template")
  bos = tokenizer.bos_token or ""
  return dataclasses.replace(bare, end_of_turn=ends[0], bos=bos, bos_in_render=bool(bos) and probe.startswith(bos))
