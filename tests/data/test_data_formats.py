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
