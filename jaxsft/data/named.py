"""The named chat templates, each a Jinja string: the very text that renders training rows is what an export writes as chat_template.

Written for transformers' environment (trim_blocks, lstrip_blocks, raise_exception). Grammar: specs/data.md section 3. `bos` says who puts
the family's <s>: "render" the template itself, "tokenizer" the encoder in front of the row, "" nobody unless the tokenizer does so by
habit. A refusal is raise_exception("kind: sentence").

Decisions where the sources differ or are silent:

  qwen3      as Qwen3's own: reasoning_content (or <think>...</think> in front of the content) is written for the turns after the last
             question only; earlier thoughts are not in the text. An answer after the last question that has no thought is written behind an
             empty <think> block, which is the template's and not trained
  mistral_*  as mistral_common (the oracle of the tests), blanks of SentencePiece written out: the system prompt is never lost, users in a
             row are joined. Two assistant turns in a row, which no canonical conversation has, are refused
  phi3       without BOS, <|endoftext|> behind a finished conversation (TRL's copy)
  alpaca     the header once, a system message in its place; later turns after a blank line, each answer closed by </s>. A user message that
             carries `instruction` and `input` (position.py) gets the three-section form
"""

from __future__ import annotations

from typing import NamedTuple


class Named(NamedTuple):
  """One template: Jinja text, the string that ends a turn, and who writes the BOS."""
  jinja: str
  end_of_turn: str
  bos: str
  bos_by: str = ""
  tokens: tuple[str, ...] = ()     # further strings of the template that must be one token each


KINDS = ("alternation", "system_unsupported", "must_start_with_user", "tools_unsupported", "content_and_tool_calls", "tool_call_id_missing")
_TEXT_ONLY = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] or m['tool_calls'] %}"
    "{{ raise_exception('tools_unsupported: this template has no tool turns') }}{% endif %}{% endfor %}"
    "{% if tools %}{{ raise_exception('tools_unsupported: this template has no tool definitions') }}{% endif %}")

_SPLIT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = DEFAULT %}{% set turns = messages %}{% endif %}")

_ALTERNATE = (
    "{% if m['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('alternation: roles must alternate user, assistant, user, ... after an optional system message') }}{% endif %}")

_LLAMA2 = (
    _TEXT_ONLY + _SPLIT_SYSTEM.replace("DEFAULT", "none") +
    "{% for m in turns %}" + _ALTERNATE +
    "{% if loop.first and system is not none %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '<s>[INST] ' + content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + content | trim + ' </s>' }}{% endif %}{% endfor %}")

_CHATML_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def _qwen(system: str) -> str:
  default = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n" + system + "<|im_end|>\\n' }}{% endif %}"
  return _TEXT_ONLY + default + _CHATML_TURNS


_VICUNA_SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
                  "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.")
_VICUNA = (
    _TEXT_ONLY + _SPLIT_SYSTEM.replace("DEFAULT", "'" + _VICUNA_SYSTEM + "'") + "{{ system + ' ' }}"
    "{% for m in turns %}" + _ALTERNATE +
    "{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + m['content'] + '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")

_LLAMA3 = (
    _TEXT_ONLY + "{{ '<|begin_of_text|>' }}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")

_GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('system_unsupported: gemma has no system turn') }}{% endif %}" +
    _TEXT_ONLY + "{{ '<bos>' }}{% for m in messages %}" + _ALTERNATE +
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}")


def _barred(end_of_turn: str, finish: str = "") -> str:
  """zephyr and phi3: <|role|>, a line break, the content, the end of the turn, a line break."""
  return (_TEXT_ONLY + "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '" + end_of_turn + "\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '" + finish + "' }}{% endif %}")


# ---------------------------------------------------------------- Qwen with tools and thoughts

_TOOL_LIST = (
    "{{ '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n"
    "You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}"
    "{{ '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\\n"
    "<tool_call>\\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}")

_TOOL_CALLS = (
    "{% for call in m['tool_calls'] or [] %}{% set f = call['function'] or call %}{{ '\\n' if content or not loop.first else '' }}"
    "{{ '<tool_call>\\n{\"name\": \"' + f['name'] + '\", \"arguments\": ' }}"
    "{{ f['arguments'] if f['arguments'] is string else f['arguments'] | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}")

_TOOL_RESULT = (
    "{% if loop.first or loop.previtem['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + m['content'] + '\\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem['role'] != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}")


def _qwen_tools(system: str, before: str, content: str, generate: str = "") -> str:
  """Qwen2.5 and Qwen3. `content` writes the content of an assistant message m and sets the variable of that name."""
  return (
      "{% set given = messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] if given else '" + system + "' %}"
      "{% if given or system or tools %}{{ '<|im_start|>system\\n' }}{{ system }}"
      "{% if tools %}{{ '\\n\\n' if given or system else '' }}" + _TOOL_LIST + "{% else %}{{ '<|im_end|>\\n' }}{% endif %}{% endif %}" + before +
      "{% for m in messages %}{% if m['role'] == 'user' or m['role'] == 'system' and not loop.first %}"
      "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
      "{% elif m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}" + content + _TOOL_CALLS + "{{ '<|im_end|>\\n' }}"
      "{% elif m['role'] == 'tool' %}" + _TOOL_RESULT + "{% endif %}{% endfor %}"
      "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}" + generate + "{% endif %}")


_QWEN3 = _qwen_tools(
    "",
    # the last message of a user that is not a tool's answer in disguise: thoughts behind it are of the turn that goes on
    "{% set last = namespace(question=messages | length - 1, open=true) %}{% for m in messages | reverse %}"
    "{% if last.open and m['role'] == 'user'"
    " and not (m['content'].startswith('<tool_response>') and m['content'].endswith('</tool_response>')) %}"
    "{% set last.open = false %}{% set last.question = messages | length - 1 - loop.index0 %}{% endif %}{% endfor %}",
    "{% set content = m['content'] %}{% set thought = '' %}"
    "{% if m['reasoning_content'] is defined and m['reasoning_content'] is not none %}{% set thought = m['reasoning_content'] %}"
    "{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.index0 > last.question and (loop.last or thought) %}"
    "{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}{% else %}{{ content }}{% endif %}",
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}")


# ---------------------------------------------------------------- Mistral, as mistral_common writes it

def _mistral(version: int, blank: str) -> str:
  """Jinja of Mistral's instruct format V1, V3 or V7. `blank` is the one that SentencePiece puts in front of each piece; "" for Tekken."""
  order = (
      "{% if loop.first %}{% if m['role'] != 'user'" + (" and not (m['role'] == 'assistant' and system is not none)" if version >= 7 else "") +
      " %}{{ raise_exception('must_start_with_user: the first turn must be the user\\'s') }}{% endif %}"
      "{% elif m['role'] not in (['user', 'assistant'] if loop.previtem['role'] == 'user' else ['assistant', 'tool']"
      " if loop.previtem['role'] == 'tool' else ['tool'] if loop.previtem['tool_calls'] else ['user']) %}"
      "{{ raise_exception('alternation: ' + m['role'] + ' may not follow ' + loop.previtem['role']) }}{% endif %}")
  system_of_v7 = "{% if system is not none %}{{ '[SYSTEM_PROMPT]" + blank + "' + system + '[/SYSTEM_PROMPT]' }}{% endif %}"
  first = "[0]" if version == 1 else "[-1]"
  in_user = "" if version >= 7 else "{% if loop.index0 == runs.starts" + first + " and system is not none %}{{ system + '\\n\\n' }}{% endif %}"
  tools = "{% if tools and loop.index0 == runs.starts[-1] %}{{ '[AVAILABLE_TOOLS]" + blank + "' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
  opening, closing = (" [INST] ", " [/INST]") if version == 1 else ("[INST]" + blank, "[/INST]")
  answer = (
      "{% set content = m['content']" + ("" if version == 1 else ".rstrip(' ')") + " %}"
      "{% if content %}{{ '" + blank + "' + content }}{% endif %}")
  return (
      (_TEXT_ONLY if version == 1 else "") + _SPLIT_SYSTEM.replace("DEFAULT", "none") + "{{ '<s>' }}" + (system_of_v7 if version >= 7 else "") +
      "{% set runs = namespace(starts=[]) %}{% for m in turns %}"
      "{% if m['role'] == 'user' and (loop.first or loop.previtem['role'] != 'user') %}{% set runs.starts = runs.starts + [loop.index0] %}"
      "{% endif %}{% endfor %}"
      "{% for m in turns %}" + order +
      "{% if m['role'] == 'user' %}{% if not loop.first and loop.previtem['role'] == 'user' %}{{ '\\n\\n' }}{% else %}" +
      (tools if version > 1 else "") + "{{ '" + opening + "' }}" + in_user + "{% endif %}{{ m['content'] }}"
      "{% if loop.last or loop.nextitem['role'] != 'user' %}{{ '" + closing + "' }}{% endif %}"
      "{% elif m['role'] == 'assistant' %}" + answer + (_mistral_calls(version, blank) if version > 1 else "") + "{{ '</s>' }}" +
      ("{% else %}" + _mistral_result(version, blank) if version > 1 else "") + "{% endif %}{% endfor %}")


def _mistral_calls(version: int, blank: str) -> str:
  both = "" if version >= 7 else "{% if content %}{{ raise_exception('content_and_tool_calls: V3 has one or the other') }}{% endif %}"
  return (
      "{% if m['tool_calls'] %}" + both + "{{ '[TOOL_CALLS]" + blank + "[' }}{% for call in m['tool_calls'] %}{% set f = call['function'] or call %}"
      "{% set core = {'name': f['name'], 'arguments': f['arguments']} %}"
      "{{ ({'name': f['name'], 'arguments': f['arguments'], 'id': call['id']} if call['id'] else core) | tojson }}"
      "{{ '' if loop.last else ', ' }}{% endfor %}{{ ']' }}{% endif %}")


def _mistral_result(version: int, blank: str) -> str:
  start = ("{% if not m['tool_call_id'] %}{{ raise_exception('tool_call_id_missing: a Mistral tool turn names its call') }}{% endif %}"
           "{{ '[TOOL_RESULTS]" + blank + "' }}")
  if version >= 7:
    return start + "{{ m['tool_call_id'] + '[TOOL_CONTENT]" + blank + "' + m['content'] + '[/TOOL_RESULTS]' }}"
  # mistral_common parses the content and writes JSON again; Jinja has no parser: what looks like JSON stays as it is
  json = ("c[:1] == '{' and c[-1:] == '}' or c[:2] in ['[{', '[\"', '[['] and c[-1:] == ']' or c in ['[]', 'true', 'false', 'null']"
          " or c == c | int | string or c == c | float | string")
  return (start + "{% set c = m['content'] %}{{ '{\"content\": ' }}{{ c if " + json + " else c | tojson }}"
          "{{ ', \"call_id\": ' + m['tool_call_id'] | tojson + '}[/TOOL_RESULTS]' }}")


# ---------------------------------------------------------------- alpaca

_REST = "Write a response that appropriately completes the request."
_ALPACA_HEADERS = {
    "": "Below is an instruction that describes a task. " + _REST,
    "pre": "Below is an instruction that describes a task, paired with an input that provides further context. " + _REST,
    "post": "Below is an input sentence as context, paired with an instruction that describes a task. " + _REST,
}
_ALPACA_HEADERS["double"] = _ALPACA_HEADERS["pre"]
_INSTRUCTION, _INPUT = "'### Instruction:\\n' + m['instruction'] + '\\n\\n'", "'### Input:\\n' + m['input'] + '\\n\\n'"
_ALPACA_SECTIONS = {
    "pre": _INSTRUCTION + " + " + _INPUT, "post": _INPUT + " + " + _INSTRUCTION,
    "double": _INSTRUCTION + " + " + _INPUT + " + '### Instruction:\\n' + m['instruction_after'] + '\\n\\n'",
}


def alpaca(position: str) -> str:
  """Jinja of the alpaca template with the instruction before ("pre"), after ("post") or on both sides ("double") of the input.

  Source: arXiv 2308.12097 (Post-Instruction); specs/data.md section 8.1.
  """
  return (
      _TEXT_ONLY + _SPLIT_SYSTEM.replace("DEFAULT", "none") + "{% for m in turns %}" + _ALTERNATE +
      "{% if m['role'] == 'user' %}{% if not loop.first %}{{ '\\n\\n' }}{% elif system is not none %}{{ system + '\\n\\n' }}"
      "{% elif m['input'] %}{{ '" + _ALPACA_HEADERS[position] + "\\n\\n' }}{% else %}{{ '" + _ALPACA_HEADERS[""] + "\\n\\n' }}{% endif %}"
      "{% if m['input'] %}{{ " + _ALPACA_SECTIONS[position] + " }}{% else %}{{ '### Instruction:\\n' + m['content'] + '\\n\\n' }}{% endif %}"
      "{{ '### Response:' }}{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}")


_SPEECH = ("[INST]", "[/INST]")
NAMED = {
    "llama2": Named(_LLAMA2, "</s>", "<s>", "render"),
    "chatml": Named(_TEXT_ONLY + _CHATML_TURNS, "<|im_end|>", ""),
    "qwen2": Named(_qwen("You are a helpful assistant."), "<|im_end|>", ""),
    "qwen2_5": Named(_qwen_tools("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "",
                                 "{% set content = m['content'] %}{{ content }}"),
                     "<|im_end|>", ""),
    "qwen3": Named(_QWEN3, "<|im_end|>", "", tokens=("<|im_start|>",)),
    "vicuna": Named(_VICUNA, "</s>", "<s>", "tokenizer"),
    "llama3": Named(_LLAMA3, "<|eot_id|>", "<|begin_of_text|>", "render"),
    "mistral_v1": Named(_mistral(1, " "), "</s>", "<s>", "render"),
    "mistral_v3": Named(_mistral(3, " "), "</s>", "<s>", "render", _SPEECH),
    "mistral_v7": Named(_mistral(7, " "), "</s>", "<s>", "render", (*_SPEECH, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
    "mistral_tekken": Named(_mistral(3, ""), "</s>", "<s>", "render", _SPEECH),
    "gemma": Named(_GEMMA, "<end_of_turn>", "<bos>", "render", ("<start_of_turn>",)),
    "phi3": Named(_barred("<|end|>", "<|endoftext|>"), "<|end|>", "", tokens=("<|user|>", "<|assistant|>", "<|endoftext|>")),
    "zephyr": Named(_barred("</s>"), "</s>", ""),
    "alpaca": Named(alpaca("pre"), "</s>", "<s>", "tokenizer"),
}
