"""Jinja files, which turns are trained, who writes the BOS, and exports that stay what they were."""

import numpy as np
import pytest

from jaxsft.data.formats import Conversation
from jaxsft.data.named import NAMED
from jaxsft.data.template import Refused, get_template, jinja, named_template
from jaxsft.data.tokenise import encode
from jaxsft.errors import UserError


def talk(*contents, **flags):
  """Turns that alternate; flags: answer number -> what its message says besides."""
  out = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
  return Conversation([m | flags.get(f"turn{i}", {}) for i, m in enumerate(out)])


def trained(conversation, template, tokenizer, train_on="assistant"):
  example = encode(conversation, template, tokenizer, train_on)
  mask = np.concatenate([[0], example["weights"] > 0, [0]])
  edges = np.flatnonzero(np.diff(mask)).reshape(-1, 2)
  return [tokenizer.decode(example["tokens"][a:b]) for a, b in edges]


def test_a_jinja_file_is_a_template(tmp_path, qwen):
  file = tmp_path / "mine.jinja"
  file.write_text(qwen.chat_template, encoding="utf-8")
  template, own = get_template(str(file), qwen), get_template("tokenizer", qwen)
  assert (template.name, template.end_of_turn, template.chat_template) == (str(file), "<|im_end|>", qwen.chat_template)
  messages = talk("A", "B<|im_end|>", "C", "D").messages
  assert template.render(messages) == own.render(messages)
  assert encode(talk("A", "B"), template, qwen)["tokens"].tolist() == encode(talk("A", "B"), own, qwen)["tokens"].tolist()


def test_a_jinja_file_with_a_bos(tmp_path, llama2):
  file = tmp_path / "l2.jinja"
  file.write_text(jinja("llama2"), encoding="utf-8")
  template = get_template(str(file), llama2)
  assert (template.bos, template.bos_in_render, template.end_of_turn) == ("<s>", True, "</s>")
  assert (encode(talk("A", "B", "C", "D"), template, llama2)["tokens"] == 1).sum() == 2


def test_jinja_files_that_are_none(tmp_path, qwen):
  with pytest.raises(UserError, match="missing.jinja cannot be read .No such file.*wanted a Jinja file in UTF-8; set data.template"):
    get_template(str(tmp_path / "missing.jinja"), qwen)
  (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe")
  with pytest.raises(UserError, match="bytes.jinja cannot be read .UnicodeDecodeError"):
    get_template(str(tmp_path / "bytes.jinja"), qwen)
  (tmp_path / "broken.jinja").write_text("{% for %}")
  with pytest.raises(UserError, match="broken.jinja is no valid Jinja"):
    get_template(str(tmp_path / "broken.jinja"), qwen)
  (tmp_path / "endless.jinja").write_text("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}")
  with pytest.raises(UserError, match="endless.jinja has no end-of-turn"):
    get_template(str(tmp_path / "endless.jinja"), qwen)


@pytest.mark.parametrize("key", ["train", "trained"])
def test_which_turns_are_trained(qwen, key):
  template = get_template("qwen2_5", qwen)
  three, no = ("A", "B", "C", "D", "E", "F"), {key: False}
  assert trained(talk(*three), template, qwen) == ["B<|im_end|>", "D<|im_end|>", "F<|im_end|>"]
  assert trained(talk(*three), template, qwen, "last") == ["F<|im_end|>"]
  assert trained(talk(*three, turn3=no), template, qwen) == ["B<|im_end|>", "F<|im_end|>"]
  assert trained(talk(*three, turn3=no), template, qwen, "last") == ["F<|im_end|>"]
  assert trained(talk(*three, turn5=no), template, qwen, "last") == []
  whole = encode(talk(*three), template, qwen, "all")["weights"]
  assert whole.all()
  assert [part for part in trained(talk(*three, turn3=no), template, qwen, "all") if "D" in part] == []
  assert encode(talk(*three, turn3=no), template, qwen, "all")["weights"].sum() == whole.sum() - 2        # D and its end
  with pytest.raises(UserError, match="unknown train_on 'first'; wanted assistant, last, all; set data.train_on"):
    encode(talk(*three), template, qwen, "first")


def test_a_call_is_a_turn_of_its_own_for_last(qwen):
  call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
  messages = [{"role": "user", "content": "A"}, call, {"role": "tool", "content": "R"}, {"role": "assistant", "content": "B"}]
  template = get_template("qwen2_5", qwen)
  assert trained(Conversation(messages), template, qwen, "last") == ["B<|im_end|>"]
  assert trained(Conversation([*messages[:1], call | {"train": False}, *messages[2:]]), template, qwen) == ["B<|im_end|>"]
  assert len(trained(Conversation(messages), template, qwen)) == 2


PHI = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize("name", ["phi3", "zephyr", "vicuna", "alpaca", "chatml", "qwen3"])
@pytest.mark.parametrize("habit", [True, False])
def test_who_writes_the_bos(name, habit, make_bytes):
  """Not in the text; in front of the row, once, where the tokenizer has the habit or the family (Vicuna, Alpaca) is trained so."""
  tokenizer = make_bytes(PHI, habit)
  template = get_template(name, tokenizer)
  assert "<s>" not in template.render(talk("A", "B").messages).text and not template.bos_in_render
  tokens = encode(talk("A", "B", "C", "D"), template, tokenizer)["tokens"].tolist()
  in_front = habit or name in ("vicuna", "alpaca")
  assert tokens.count(tokenizer.bos_token_id) == in_front and (tokens[0] == tokenizer.bos_token_id) == in_front
  want = tokenizer.apply_chat_template(talk("A", "B", "C", "D").messages, chat_template=template.chat_template)["input_ids"]
  assert tokens == want


def test_phi3_needs_its_last_token(make_bytes):
  with pytest.raises(UserError, match=r"template phi3 has the control string '<\|endoftext\|>', which this tokenizer cuts"):
    get_template("phi3", make_bytes(tuple(s for s in PHI if s != "<|endoftext|>")))


def test_gemma_refuses_before_it_looks_at_the_order():
  def kind(*roles):
    with pytest.raises(Refused) as refused:
      named_template("gemma").render([{"role": role, "content": "x"} for role in roles])
    return refused.value.kind
  assert kind("system", "assistant") == "system_unsupported" and kind("assistant") == kind("user", "user") == "alternation"


EVERY = tuple(dict.fromkeys(text for spec in NAMED.values() for text in (spec.bos, spec.end_of_turn, *spec.tokens) if text))


@pytest.mark.parametrize("name", NAMED)
def test_an_export_read_back_as_the_tokenizers_own_is_the_same_template(name, make_bytes):
  """What a run's checkpoint holds: texts, spans, refusals and prompts must not change when it is opened again."""
  tokenizer = make_bytes(tuple(dict.fromkeys(("<s>", "</s>", *EVERY))), bos_habit=False)
  template = get_template(name, tokenizer)
  tokenizer.chat_template = template.chat_template
  again = get_template("tokenizer", tokenizer)
  assert again.end_of_turn == template.end_of_turn
  for contents in (("A", "B"), ("A", " B\n", "C </s>", "D<|im_end|>")):
    first, second = encode(talk(*contents), template, tokenizer), encode(talk(*contents), again, tokenizer)
    assert first["tokens"].tolist() == second["tokens"].tolist() and first["weights"].tolist() == second["weights"].tolist()
  if name not in ("chatml", "qwen2", "qwen2_5", "qwen3", "llama3", "phi3", "zephyr"):
    wrong = talk("A", "B").messages[1:] if name != "gemma" else [{"role": "system", "content": "S"}, *talk("A", "B").messages]
    kinds = []
    for one in (template, again):
      with pytest.raises(Refused) as refused:
        one.render(wrong)
      kinds.append(refused.value.kind)
    assert kinds[0] == kinds[1] != "template_refused"


@pytest.mark.parametrize("name", NAMED)
def test_real_tool_records_render_or_are_refused_by_kind(shared, name):
  """300 conversations, 191 with tools: every answer and call has its span, and no template drops a tool in silence."""
  import collections
  import types

  from jaxsft.data.formats import canonicalise
  from jaxsft.data.records import read_records
  source = types.SimpleNamespace(path=str(shared / "data/llamafactory_demo/glaive_toolcall_en_demo.json"), split="train", revision="", rows=0)
  records, template, kinds = read_records(source), named_template(name), collections.Counter()
  for record in (records[i] for i in range(len(records))):
    made = canonicalise(record)
    try:
      got = template.render(template.messages(made), tools=made.tools)
    except Refused as refused:
      kinds[refused.kind] += 1
      continue
    assert len(got.spans) == sum(m["role"] == "assistant" for m in made.messages)
    assert all(got.text[a:b].endswith(template.end_of_turn) and got.text[a:b].count(template.end_of_turn) == 1 for a, b in got.spans)
    assert not made.tools or '"name": "' + made.tools[0]["function"]["name"] in got.text
  tools = name in ("qwen2_5", "qwen3", "mistral_v3", "mistral_v7", "mistral_tekken")
  assert dict(kinds) == ({} if name.startswith("qwen") and tools else {"tool_call_id_missing": 153} if tools else {"tools_unsupported": 191})
