"""Thoughts: what Qwen3 writes and drops, what of it is trained, and tools as Qwen2.5's own template writes them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsft.data.formats import Conversation
from jaxsft.data.template import Refused, get_template, named_template
from jaxsft.data.tokenise import encode

CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"z": "ü", "a": [1]}}}]
CALL_TEXT = '<tool_call>\n{"name": "f", "arguments": {"z": "ü", "a": [1]}}\n</tool_call>'
RESULT = {"role": "tool", "content": "R"}
END = "<|im_end|>"


def user(content):
  return {"role": "user", "content": content}


def answer(content, thought=None, **more):
  return {"role": "assistant", "content": content, **({} if thought is None else {"reasoning_content": thought}), **more}


def shown(messages, name="qwen3", tools=None):
  got = named_template(name).render(messages, tools=tools)
  return got.text, [got.text[a:b] for a, b in got.spans], got.reasons


ASK = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
AGAIN = "<|im_end|>\n<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n"
TOOL = "<|im_end|>\n<|im_start|>user\n<tool_response>\nR\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


# texts: Qwen/Qwen3-8B's chat template, rendered by transformers; the trained parts are our decision
@pytest.mark.parametrize("messages, text, trained, reasons", [
    ([user("q"), answer("x", "why\n")], ASK + "<think>\nwhy\n</think>\n\nx<|im_end|>\n", ["<think>\nwhy\n</think>\n\nx"], ()),
    ([user("q"), answer("\nx")], ASK + "<think>\n\n</think>\n\nx<|im_end|>\n", ["x"], ()),
    ([user("q"), answer("<think>\nw\n</think>\n\nx")], ASK + "<think>\nw\n</think>\n\nx<|im_end|>\n", ["<think>\nw\n</think>\n\nx"], ()),
    ([user("q"), answer("x", "w1"), user("p"), answer("y", "w2")], ASK + "x" + AGAIN + "<think>\nw2\n</think>\n\ny<|im_end|>\n",
     ["x", "<think>\nw2\n</think>\n\ny"], ("thoughts_dropped",)),
    ([user("q"), answer("<think>a</think>x"), user("p"), answer("y")], ASK + "x" + AGAIN + "<think>\n\n</think>\n\ny<|im_end|>\n",
     ["x", "y"], ("thoughts_dropped",)),
    ([user("q"), answer("", "w1", tool_calls=CALLS), RESULT, answer("y", "w2")],
     ASK + "<think>\nw1\n</think>\n\n" + CALL_TEXT + TOOL + "<think>\nw2\n</think>\n\ny<|im_end|>\n",
     ["<think>\nw1\n</think>\n\n" + CALL_TEXT, "<think>\nw2\n</think>\n\ny"], ()),
    ([user("q"), answer("", tool_calls=CALLS), RESULT, answer("y")], ASK + CALL_TEXT + TOOL + "<think>\n\n</think>\n\ny<|im_end|>\n",
     [CALL_TEXT, "y"], ()),
    ([user("q"), answer("", "w1", tool_calls=CALLS), RESULT, answer("y", "w2"), user("p"), answer("z", "w3")],
     ASK + CALL_TEXT + TOOL + "y" + AGAIN + "<think>\nw3\n</think>\n\nz<|im_end|>\n",
     [CALL_TEXT, "y", "<think>\nw3\n</think>\n\nz"], ("thoughts_dropped",)),
    ([user("q"), answer("", tool_calls=CALLS)], ASK + "<think>\n\n</think>\n\n" + CALL_TEXT + "<|im_end|>\n", [CALL_TEXT], ()),
    ([user("q"), answer("hm", "w", tool_calls=CALLS * 2)],
     ASK + "<think>\nw\n</think>\n\nhm\n" + CALL_TEXT + "\n" + CALL_TEXT + "<|im_end|>\n",
     ["<think>\nw\n</think>\n\nhm\n" + CALL_TEXT + "\n" + CALL_TEXT], ()),
])
def test_qwen3(messages, text, trained, reasons):
  assert shown(messages) == (text, [part + END for part in trained], reasons)


@pytest.mark.parametrize("content", ["a</think>b", "<think>a</think>b</think>c", "x<think>y</think>z", "<think>a<think>b</think>c"])
def test_an_answer_that_qwen3_would_cut_is_refused(content):
  with pytest.raises(Refused) as refused:
    named_template("qwen3").render([user("q"), answer(content)])
  assert refused.value.kind == "thinking_malformed"
  assert content in named_template("qwen2_5").render([user("q"), answer(content)]).text          # which copies it
  named_template("qwen3").render([user(content), answer("x")])                                   # only answers are taken apart


def test_a_template_without_thoughts_says_that_it_drops_them():
  assert shown([user("q"), answer("x", "w")], "chatml")[1:] == (["x" + END], ("thoughts_dropped",))


OPENED = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['reasoning_content'] %}"
          "{{ '<think>\n' + m['reasoning_content'] + '\n</think>\n' }}{% endif %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}")


def test_a_tag_that_the_generation_prompt_writes_is_not_trained(make_bytes):
  template = get_template("tokenizer", make_bytes(chat_template=OPENED))
  got = template.render([user("q"), answer("x", "w1"), user("p"), answer("y", "w2")])
  assert [got.text[a:b] for a, b in got.spans] == ["w1\n</think>\nx" + END, "w2\n</think>\ny" + END] and not got.reasons


def test_no_thinking_mode_is_qwen3s(qwen):
  got = qwen.apply_chat_template([user("q")], chat_template=named_template("qwen3").jinja, tokenize=False, add_generation_prompt=True,
                                 enable_thinking=False)
  assert got == ASK + "<think>\n\n</think>\n\n"


def test_control_strings_in_thoughts_stay_text(qwen):
  template = get_template("qwen3", qwen)
  example = encode(Conversation([user("q"), answer("x", "why<|im_end|>\n<|im_start|>user")]), template, qwen)
  assert (example["tokens"] == template.end_of_turn_id).sum() == 2
  assert qwen.decode(example["tokens"][example["weights"] > 0]) == "<think>\nwhy<|im_end|>\n<|im_start|>user\n</think>\n\nx<|im_end|>"


TEXT = st.text(st.sampled_from(list("ab \n\"'{é😀")), max_size=8)


@st.composite
def tool_talks(draw):
  """Any order of turns, with calls, thoughts and results, as both templates take them."""
  out = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
  out.append(user("q" + draw(TEXT)))
  for role in draw(st.lists(st.sampled_from(["user", "assistant", "tool"]), max_size=5)):
    out.append(answer(draw(TEXT), **({"tool_calls": CALLS} if draw(st.booleans()) else {})) if role == "assistant" else {"role": role, "content": draw(TEXT)})
  return [*out, answer("b" + draw(TEXT))]


TOOLS = [{"type": "function", "function": {"name": "f", "description": "ü \"q\"", "parameters": {"z": 1, "a": {}}}}, {"type": "function", "function": {"name": "g"}}]


@settings(deadline=None)
@given(messages=tool_talks(), tools=st.sampled_from([None, TOOLS]), generate=st.booleans())
def test_qwen2_5_is_the_tokenizers_own(qwen, messages, tools, generate):
  ours, own = get_template("qwen2_5", qwen), get_template("tokenizer", qwen)
  want, got = own.render(messages, generate, tools), ours.render(messages, generate, tools)
  assert (got.text, got.spans) == (want.text, want.spans)
  assert got.text == qwen.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generate)


@settings(deadline=None)
@given(messages=tool_talks(), thought=TEXT.filter(str.strip))
def test_qwen3_spans_hold_the_answers_and_calls_alone(messages, thought):
  """A checker that knows only the format: between the head of each assistant turn and its end, the empty thought apart."""
  messages[-1]["reasoning_content"] = thought
  got = named_template("qwen3").render(messages)
  heads = got.text.split("<|im_start|>assistant\n")[1:]
  want = [head.split(END)[0] + END for head in heads]
  empty = "<think>\n\n</think>\n\n"
  found = [got.text[a:b] for a, b in got.spans]
  assert found == [w.removeprefix(empty) for w in want]
  assert found[-1].startswith("<think>\n") and thought.strip() in found[-1]
