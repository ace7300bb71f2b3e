"""Templates: golden renders, an independent reference for any conversation, spans, refusals, and what the user is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsft.data.named import NAMED
from jaxsft.data.template import Refused, get_template, jinja, named_template
from jaxsft.errors import UserError

DEFAULT_VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
                  "The assistant gives helpful, detailed, and polite answers to the user's questions.")
NAMES = ("llama2", "llama3", "chatml", "qwen2", "qwen2_5", "qwen3", "vicuna", "mistral_v1", "mistral_v3", "mistral_v7", "mistral_tekken",
         "gemma", "phi3", "zephyr", "alpaca")
REST = "Write a response that appropriately completes the request.\n\n"
DEFAULT_QWEN = {"chatml": None, "qwen3": None, "qwen2": "You are a helpful assistant.",
                "qwen2_5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."}


def reference(name, messages, generate=False):
  """specs/data.md section 3 in plain Python: (text, spans)."""
  out, spans = [], []

  def put(text, content=None, close=""):
    out.append(text)
    if content is not None:
      start = sum(map(len, out))
      out.append(content + close)
      spans.append((start, start + len(content + close)))

  system = messages[0]["content"] if messages[0]["role"] == "system" else None
  turns = messages[system is not None:]
  if name == "llama2":
    for i, m in enumerate(turns):
      if m["role"] == "user":
        text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{m['content']}" if i == 0 and system is not None else m["content"]
        put(f"<s>[INST] {text.strip()} [/INST]")
      else:
        put(" ", m["content"].strip(), " </s>")
  elif name == "vicuna":
    put((DEFAULT_VICUNA if system is None else system) + " ")
    for m in turns:
      put(f"USER: {m['content']} ") if m["role"] == "user" else put("ASSISTANT: ", m["content"], "</s>")
    put("ASSISTANT:" if generate else "")
  elif name == "llama3":
    put("<|begin_of_text|>")
    for m in messages:
      answer = (m["content"].strip(), "<|eot_id|>") if m["role"] == "assistant" else ()
      put(f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", *answer)
      put("" if m["role"] == "assistant" else m["content"].strip() + "<|eot_id|>")
    put("<|start_header_id|>assistant<|end_header_id|>\n\n" if generate else "")
  elif name == "gemma":
    put("<bos>")
    for m in messages:
      put(f"<start_of_turn>{'user' if m['role'] == 'user' else 'model'}\n")
      put("", m["content"].strip(), "<end_of_turn>") if m["role"] == "assistant" else put(m["content"].strip() + "<end_of_turn>")
      put("\n")
    put("<start_of_turn>model\n" if generate else "")
  elif name in ("phi3", "zephyr"):
    end = "<|end|>" if name == "phi3" else "</s>"
    for m in messages:
      put(f"<|{m['role']}|>\n")
      put("", m["content"], end) if m["role"] == "assistant" else put(m["content"] + end)
      put("\n")
    put("<|assistant|>\n" if generate else "<|endoftext|>" if name == "phi3" else "")
  elif name == "alpaca":
    put(f"Below is an instruction that describes a task. {REST}" if system is None else system + "\n\n")
    for i, m in enumerate(turns):
      if m["role"] == "user":
        put("\n\n" * (i > 0) + f"### Instruction:\n{m['content']}\n\n### Response:")
      else:
        put("", m["content"], "</s>")
  elif name.startswith("mistral"):
    blank, users = "" if name == "mistral_tekken" else " ", [i for i, m in enumerate(turns) if m["role"] == "user"]
    put("<s>" + (f"[SYSTEM_PROMPT] {system}[/SYSTEM_PROMPT]" if system is not None and name == "mistral_v7" else ""))
    where = None if system is None or name == "mistral_v7" else users[0] if name == "mistral_v1" else users[-1]
    for i, m in enumerate(turns):
      if m["role"] == "user":
        text = (system + "\n\n" if i == where else "") + m["content"]
        put(f" [INST] {text} [/INST]" if name == "mistral_v1" else f"[INST]{blank}{text}[/INST]")
      else:
        put(blank, m["content"] if name == "mistral_v1" else m["content"].rstrip(" "), "</s>")
  else:
    if system is None and DEFAULT_QWEN[name]:
      put(f"<|im_start|>system\n{DEFAULT_QWEN[name]}<|im_end|>\n")
    for i, m in enumerate(messages):
      thinks, content = name == "qwen3" and i == len(messages) - 1 and m["role"] == "assistant", m["content"]
      put(f"<|im_start|>{m['role']}\n" + "<think>\n\n</think>\n\n" * thinks,
          *((content.lstrip("\n") if thinks else content, "<|im_end|>") if m["role"] == "assistant" else ()))
      put("\n" if m["role"] == "assistant" else m["content"] + "<|im_end|>\n")
    put("<|im_start|>assistant\n" if generate else "")
  return "".join(out), tuple(spans)


def test_golden_renders_byte_for_byte(golden):
  g = golden("templates")
  assert set(g["renders"]) <= set(NAMED) and set(NAMED) == set(NAMES)
  for name, renders in g["renders"].items():
    template, special = named_template(name), g["special_tokens"][name]
    assert template.end_of_turn == special["end_of_turn"]
    assert template.bos == special["bos"] and template.bos_in_render == special["bos_in_render"]
    assert template.stop_strings == (special["end_of_turn"],)
    for case_name, want in renders.items():
      case = g["cases"][case_name]
      if isinstance(want, dict):
        with pytest.raises(Refused) as refused:
          template.render(case["messages"], case["add_generation_prompt"])
        assert refused.value.kind == want["error"]
      else:
        assert template.render(case["messages"], case["add_generation_prompt"]).text == want, (name, case_name)


def test_jinja_of_a_named_template_renders_the_same_in_transformers(golden, qwen):
  g = golden("templates")
  for name, renders in g["renders"].items():
    for case_name, want in renders.items():
      case = g["cases"][case_name]
      if isinstance(want, str):
        assert qwen.apply_chat_template(case["messages"], chat_template=jinja(name), tokenize=False,
                                        add_generation_prompt=case["add_generation_prompt"]) == want


CONTENT = st.text(st.sampled_from(list("ab \n\t<|[/INST]>{}%'\"\\é😀\u3000")), min_size=1, max_size=12).filter(lambda s: s.strip())


@st.composite
def conversations(draw):
  body = [{"role": role, "content": draw(CONTENT)} for _ in range(draw(st.integers(1, 3))) for role in ("user", "assistant")]
  return ([{"role": "system", "content": draw(CONTENT)}] if draw(st.booleans()) else []) + body


@pytest.mark.parametrize("name", sorted(NAMED))
@given(messages=conversations())
def test_text_and_spans_equal_the_reference(name, messages):
  if name == "gemma" and messages[0]["role"] == "system":
    with pytest.raises(Refused) as refused:
      named_template(name).render(messages)
    assert refused.value.kind == "system_unsupported"
    messages = messages[1:]
  got = named_template(name).render(messages)
  assert (got.text, got.spans) == reference(name, messages)
  head = messages[:-1]
  assert named_template(name).render(head, add_generation_prompt=True).text == reference(name, head, True)[0]


def test_an_empty_answer_has_the_end_of_turn_alone():
  got = named_template("chatml").render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}])
  assert [got.text[a:b] for a, b in got.spans] == ["<|im_end|>"]


def test_an_untrained_turn_has_no_span():
  messages = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B", "trained": False},
              {"role": "user", "content": "C"}, {"role": "assistant", "content": "B"}]
  got = named_template("chatml").render(messages)
  assert got.spans == ((got.text.rindex("B"), got.text.rindex("<|im_end|>") + len("<|im_end|>")),)


def test_named_templates_refuse_tools():
  call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
  user = {"role": "user", "content": "A"}
  answer, tool = {"role": "assistant", "content": "B"}, {"role": "tool", "content": "C"}
  for messages in ([user, call], [user, answer, tool, answer]):
    for name in ("chatml", "llama3", "llama2", "qwen2", "vicuna", "mistral_v1", "gemma", "phi3", "zephyr", "alpaca"):
      with pytest.raises(Refused) as refused:
        named_template(name).render(messages)
      assert refused.value.kind == "tools_unsupported"


def test_the_tokenizers_own_template(qwen):
  template = get_template("tokenizer", qwen)
  assert (template.end_of_turn, template.bos_in_render, template.bos_id) == ("<|im_end|>", False, None)
  assert template.chat_template == qwen.chat_template
  messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "A"}, {"role": "assistant", "content": " B\n"},
              {"role": "user", "content": "B"}, {"role": "assistant", "content": "B"}]
  got = template.render(messages)
  assert got.text == qwen.apply_chat_template(messages, tokenize=False)
  assert (got.text, got.spans) == reference("qwen2_5", messages)


def test_tool_calls_are_trained_whole_in_their_own_order(qwen):
  arguments = {"z": "ü", "a": [1]}
  messages = [{"role": "user", "content": "A"},
              {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]},
              {"role": "tool", "content": "R"}, {"role": "assistant", "content": "B"}]
  got = get_template("tokenizer", qwen).render(messages)
  assert "None" not in got.text
  want = ['<tool_call>\n{"name": "f", "arguments": {"z": "ü", "a": [1]}}\n</tool_call><|im_end|>', "B<|im_end|>"]
  assert [got.text[a:b] for a, b in got.spans] == want


TRIMMING = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' }}{% if m['role'] == 'assistant' %}"
            "{% generation %}{{ m['content'].lstrip('\n') + '<|im_end|>' }}{% endgeneration %}"
            "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
            "{{ '\n' }}{% endfor %}")
THINKING = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
            "{% if loop.last %}"
            "{{ '<think>\n' + (m['content'].split('</think>')[0].split('<think>')[1] if '</think>' in m['content'] else '')"
            " + '\n</think>\n\n' }}{% endif %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}"
            "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def spans_of(template, *contents):
  roles = ("user", "assistant") * len(contents)
  got = template.render([{"role": role, "content": content} for role, content in zip(roles, contents)])
  return [got.text[a:b] for a, b in got.spans]


def test_spans_where_the_template_trims_a_part_of_the_blanks(make_bytes):
  template = get_template("tokenizer", make_bytes(chat_template=TRIMMING))
  assert spans_of(template, "A", "\n\n  B ", "C", " \nD", "\nE", "\n\nF") == ["  B <|im_end|>", " \nD<|im_end|>", "F<|im_end|>"]


def test_spans_where_the_template_rewrites_the_answer(make_bytes):
  template = get_template("tokenizer", make_bytes(chat_template=THINKING))
  assert spans_of(template, "A", "B", "C", "D") == ["B<|im_end|>", "D<|im_end|>"]
  answers = ("<think>x</think>\nB", "<think>y</think>\nD")
  assert spans_of(template, "A", answers[0], "C", answers[1]) == ["B<|im_end|>", "<think>\ny\n</think>\n\nD<|im_end|>"]
  assert spans_of(template, "A", answers[0], "C", "D") == ["B<|im_end|>", "D<|im_end|>"]     # the empty <think> is the template's own
  with pytest.raises(UserError, match="renders the answer '<think>y</think>z</think>D' as .*copies contents; set data.template"):
    spans_of(template, "A", "<think>y</think>z</think>D")


@pytest.mark.parametrize("chat_template, message", [
    (None, "this tokenizer has no chat template; wanted one of llama2.*set data.template"),
    ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
     "no end-of-turn.*would never learn to stop; set data.template"),
    ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if loop.last %}{{ eos_token }}{% endif %}{% endfor %}",
     "no end-of-turn"),
    ("{% for m in messages %}{{ m['content'] }}", "no valid Jinja"),
    ("{{ raise_exception('never') }}", "refuses a plain conversation .never."),
])
def test_own_templates_that_cannot_be_trained(make_bytes, chat_template, message):
  with pytest.raises(UserError, match=message):
    get_template("tokenizer", make_bytes(chat_template=chat_template))


def test_a_template_whose_end_of_turn_the_tokenizer_lacks(llama2, make_bytes, qwen):
  with pytest.raises(UserError, match=r"template chatml has the end-of-turn '<\|im_end\|>', which .* into \d+ tokens.*data.template"):
    get_template("chatml", llama2)
  with pytest.raises(UserError, match="template llama2 has the end-of-turn '</s>'"):
    get_template("llama2", qwen)
  with pytest.raises(UserError, match="template llama2 has the BOS '<s>'"):
    get_template("llama2", make_bytes(specials=("</s>",), bos_habit=False))
  with pytest.raises(UserError, match="unknown template 'chatm1' .did you mean 'chatml'.*data.template"):
    get_template("chatm1", qwen)


def test_a_template_that_changes_an_answer_is_an_error(make_bytes):
  shouting = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | upper + '<|im_end|>\n' }}{% endfor %}"
  with pytest.raises(UserError, match="no end-of-turn|renders the answer"):
    spans_of(get_template("tokenizer", make_bytes(chat_template=shouting)), "a", "b")


def test_private_use_characters_in_contents_are_kept():
  messages = [{"role": "user", "content": "\U0010f000\U0010f001"}, {"role": "assistant", "content": "\U0010f002"}]
  got = named_template("chatml").render(messages)
  assert (got.text, got.spans) == reference("chatml", messages)
