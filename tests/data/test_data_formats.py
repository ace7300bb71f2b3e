"""The canonicaliser against golden/formats.json and the rules of specs/data.md section 2."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsft.data.formats import Conversation, Drop, canonicalise
from jaxsft.errors import UserError


def turns(text):
  """"u:A a:B" -> messages."""
  names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
  return [{"role": names[part[0]], "content": part[2:]} for part in text.split(" ")]


def test_golden_cases(golden):
  cases = golden("formats")["cases"]
  assert len(cases) == 10
  for case in cases:
    got = canonicalise(case["input"])
    if case["error"]:
      assert isinstance(got, Drop) and got.code == case["error"], case["id"]
    else:
      assert isinstance(got, Conversation), case["id"]
      assert got.messages == case["expected"]["messages"], case["id"]
      assert list(got.reasons) == case["reasons"], case["id"]


def test_golden_role_map(golden):
  from jaxsft.data.formats import ROLES
  assert golden("formats")["role_map"] == ROLES


def test_golden_unicode(golden):
  for case in golden("formats")["unicode"]["cases"]:
    got = canonicalise({"instruction": json.loads(case["json"]), "output": "B"})
    assert got.messages[0]["content"] == case["clean"] and got.reasons == ()


def test_lone_surrogate_becomes_the_replacement_character():
  got = canonicalise({"instruction": json.loads('"a\\ud83d"'), "output": "B"})
  assert got.messages[0]["content"] == "a\ufffd" and got.reasons == ("replaced_surrogate",)
  got.messages[0]["content"].encode()


@pytest.mark.parametrize("record, schema, want", [
    ({"messages": turns("u:A a:B"), "instruction": "X", "output": "Y"}, "messages", "u:A a:B"),
    ({"conversations": ["A", "B"]}, "messages", "u:A a:B"),
    ({"data": ["A", "B", "C"]}, "strings", "u:A a:B"),
    ({"instruction": "A", "input": " ", "output": "B", "prompt": "X", "completion": "Y"}, "alpaca", "u:A a:B"),
    ({"instruction": "A", "output": "B", "system": "S"}, "alpaca", "s:S u:A a:B"),
    ({"instruction": "A", "instances": [{"input": "C", "output": "B"}]}, "alpaca", "u:A\nC a:B"),
    ({"instruction": "A", "input": "", "response": "B"}, "alpaca", "u:A a:B"),
    ({"inputs": "A", "targets": "B"}, "flan", "u:A a:B"),
    ({"prompt": "A", "completion": "B"}, "prompt_completion", "u:A a:B"),
    ({"prompt": turns("s:S u:A"), "completion": turns("a:B")}, "prompt_completion", "s:S u:A a:B"),
    ({"question": "A", "answer": "B"}, "question_answer", "u:A a:B"),
])
def test_schemas_in_order(record, schema, want):
  got = canonicalise(record)
  assert got.schema == schema and got.messages == turns(want)


@pytest.mark.parametrize("record, code", [
    ({"text": "A"}, "unknown_schema"), ({}, "unknown_schema"), ({"messages": [1, 2]}, "unknown_schema"),
    ({"messages": []}, "no_assistant"), ({"messages": turns("u:A")}, "no_assistant"), ({"messages": turns("a:A")}, "no_assistant"),
    ({"messages": turns("u: a:B")}, "empty_user"), ({"messages": [{"role": "user", "content": None}, *turns("a:B")]}, "empty_user"),
    ({"messages": turns("u:A s:S a:B")}, "system_not_first"),
    ({"messages": turns("u:A t:R a:B")}, "tool_without_call"),
    ({"messages": [{"content": "A"}]}, "unknown_role"),
    ({"conversations": [{"from": "human", "value": "A"}, {"from": "function_call", "value": "not json"}]}, "bad_tool_call"),
    ({"messages": [{"role": "user", "content": "A", "weight": 1}, *turns("a:B")]}, "trained_not_assistant"),
    ({"question": "A", "answer": ""}, "no_assistant"),
])
def test_drops(record, code):
  got = canonicalise(record)
  assert isinstance(got, Drop) and got.code == code


@pytest.mark.parametrize("given_turns, want, reasons", [
    ("u:A a:B u:C a:", "u:A a:B", ["empty_assistant_cut", "dropped_trailing_non_assistant"]),
    ("u:A a:B u:C a: u:D a:E", "u:A a:B", ["empty_assistant_cut", "dropped_trailing_non_assistant"]),
    ("s: u:A a:B", "u:A a:B", []),
    ("s:S a:hi u:A a:B", "s:S u:A a:B", ["dropped_leading_non_user"]),
    ("s:S s:R u:A a:B a:C", "s:S\n\nR u:A a:B\n\nC", ["merged_same_role"]),
    ("a:hi u:A u:B a:C u:D", "u:A\n\nB a:C", ["merged_same_role", "dropped_leading_non_user", "dropped_trailing_non_assistant"]),
])
def test_repairs_and_the_order_of_their_reasons(given_turns, want, reasons):
  got = canonicalise({"messages": turns(given_turns)})
  assert got.messages == turns(want) and list(got.reasons) == reasons


def test_a_message_may_say_whether_it_is_trained():
  got = canonicalise({"messages": [*turns("u:A"), {"role": "assistant", "content": "B", "weight": 0}, *turns("u:C"),
                                   {"role": "assistant", "content": "D", "weight": 1}]})
  assert [m.get("trained", True) for m in got.messages if m["role"] == "assistant"] == [False, True]
  got = canonicalise({"messages": [*turns("u:A a:B"), {"role": "assistant", "content": "C", "trained": False}]})
  assert got.messages[1] == {"role": "assistant", "content": "B\n\nC", "trained": False}
  got = canonicalise({"prompt": turns("u:A a:B u:C"), "completion": turns("a:D")})
  assert [m.get("trained", True) for m in got.messages if m["role"] == "assistant"] == [False, True]


def test_arguments_on_the_wire_are_json_text_and_become_an_object():
  call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1, "a": "\\u00fc"}'}}
  got = canonicalise({"messages": [*turns("u:A"), {"role": "assistant", "content": None, "tool_calls": [call]}, *turns("t:R a:B")],
                      "tools": [{"name": "f", "parameters": {}}]})
  assert got.messages[1] == {"role": "assistant", "content": "",
                             "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": "ü"}}, "id": "c1"}]}
  assert list(got.messages[1]["tool_calls"][0]["function"]["arguments"]) == ["b", "a"]
  assert got.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize("content, text, reason", [
    ([{"type": "text", "text": "A"}, {"type": "text", "text": "B"}], "AB", "joined_parts"), ([{"text": "A"}], "A", "joined_parts"),
    (42, "42", "number_content"), (0.5, "0.5", "number_content"),
    ([{"type": "image", "url": "x"}], "", "content_not_text"), ({"a": 1}, "", "content_not_text"), (True, "", "content_not_text"),
])
def test_contents_that_are_no_strings_leave_a_reason(content, text, reason):
  """Training on half a record without a word is what the peers do."""
  got = canonicalise({"messages": [{"role": "system", "content": content}, *turns("u:A a:B")]})
  assert (got.messages[0]["content"] if text else got.messages[0]["role"]) == (text or "user") and list(got.reasons) == [reason]
  got = canonicalise({"messages": [*turns("u:A"), {"role": "assistant", "content": content}]})
  assert got.messages[1]["content"] == text if text else got.code == "no_assistant"


def test_alpaca_inputs_that_are_no_strings_and_its_history():
  user = lambda record: canonicalise(record).messages[0]["content"]
  assert user({"instruction": "double", "input": 21, "output": "42"}) == "double\n21"
  assert user({"instruction": "sum", "input": [1, 2], "output": "3"}) == "sum\n[1, 2]"
  assert canonicalise({"instruction": "double 21", "output": 42}).messages[1]["content"] == "42"
  got = canonicalise({"instruction": "C", "output": "D", "history": [["A", "B"]], "system": "S"})
  assert got.messages == turns("s:S u:A a:B u:C a:D")


def test_null_columns_count_as_absent():
  """A Parquet file has every column in every row."""
  got = canonicalise({"instruction": None, "output": None, "question": None, "answer": None, "prompt": "A", "completion": "B"})
  assert got.messages == turns("u:A a:B") and got.schema == "prompt_completion"
  assert canonicalise({"messages": [{"role": None, "from": "human", "content": None, "value": "A"}, *turns("a:B")]}).messages == turns("u:A a:B")


@pytest.mark.parametrize("weight, trained", [("0", False), ("false", False), (0.0, False), ("True", True), (1, True), (None, True)])
def test_weights_in_any_spelling(weight, trained):
  got = canonicalise({"messages": [*turns("u:A"), {"role": "assistant", "content": "B", "weight": weight}]})
  assert got.messages[1].get("trained", True) is trained


@pytest.mark.parametrize("weight", [0.3, "half", 2, [1]])
def test_a_weight_between_drops_the_record(weight):
  assert canonicalise({"messages": [*turns("u:A"), {"role": "assistant", "content": "B", "weight": weight}]}).code == "bad_weight"


def test_what_a_tool_says_keeps_its_name_and_its_call():
  call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
  said = {"role": "tool", "content": {"r": [1]}, "tool_call_id": "c1", "name": "f"}
  got = canonicalise({"messages": [*turns("u:A"), {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"}, said, *turns("a:B")]})
  assert got.messages[2] == said | {"content": '{"r": [1]}'} and list(got.reasons) == ["reasoning_dropped", "json_content"]


@pytest.mark.parametrize("record", [{"prompt": [{"role": ["user"], "content": "A"}], "completion": "B"}, {"messages": [{"role": {}, "content": 1}]}])
def test_a_role_that_is_no_string_is_unknown(record):
  assert canonicalise(record).code == "unknown_role"


def test_unknown_format_names_the_nearest():
  with pytest.raises(UserError, match="unknown format 'alpacca'.*did you mean 'alpaca'.*data.train.format"):
    canonicalise({}, "alpacca")
  assert canonicalise({"question": "A", "answer": "B"}, "alpaca").code == "unknown_schema"


RAW = st.lists(st.fixed_dictionaries({
    "from": st.sampled_from(["human", "gpt", "system", "tool", "function_call", "narrator"]),
    "value": st.sampled_from(["A", "B ", " ", "", '{"name": "f", "arguments": {}}', None, 3])}), max_size=7)


@given(RAW)
def test_whatever_comes_out_is_canonical(raw):
  got = canonicalise({"conversations": raw})
  if isinstance(got, Drop):
    return
  roles = [m["role"] for m in got.messages]
  body = roles[1:] if roles[0] == "system" else roles
  assert body[0] == "user" and body[-1] == "assistant" and "system" not in body
  for before, after in zip(got.messages, got.messages[1:]):
    assert before["role"] != after["role"] or "tool_calls" in before or "tool_calls" in after or after["role"] == "tool"
  for m in got.messages:
    assert isinstance(m["content"], str) and (m["content"].strip() or m.get("tool_calls") or m["role"] == "tool")
  assert len(set(got.reasons)) == len(got.reasons)
  assert canonicalise({"messages": got.messages}).messages == got.messages
