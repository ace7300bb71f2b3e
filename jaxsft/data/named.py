"""The named chat templates, each a Jinja string: the very text that renders training rows is what an export writes as chat_template.

Written for transformers' environment (trim_blocks, lstrip_blocks, raise_exception). Grammar: specs/data.md section 3. `bos` says who puts
the family's <s>: "render" the template itself, "tokenizer" the encoder in front of the row, "" nobody unless the tokenizer does so by
habit. A refusal is raise_exception("kind: sentence").
"""

from __future__ import annotations

from typing import NamedTuple


class Named(NamedTuple):
  """One template: Jinja text, the string that ends a turn, and who writes the BOS."""
  jinja: str
  end_of_turn: str
  bos: str
  bos_by: str = ""


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

NAMED = {
    "llama2": Named(_LLAMA2, "</s>", "<s>", "render"),
    "chatml": Named(_TEXT_ONLY + _CHATML_TURNS, "<|im_end|>", ""),
    "qwen2": Named(_qwen("You are a helpful assistant."), "<|im_end|>", ""),
    "qwen2_5": Named(_qwen("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."), "<|im_end|>", ""),
    "vicuna": Named(_VICUNA, "</s>", "<s>", "tokenizer"),
    "llama3": Named(_LLAMA3, "<|eot_id|>", "<|begin_of_text|>", "render"),
}
