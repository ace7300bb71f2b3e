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


def test_alpaca_says_which_part_is_which():
  got = canonicalise({"instruction": "A\ud83d", "input": "C", "output": "B"})
  assert got.parts == ("A\ufffd", "C") and got.messages[0] == {"role": "user", "content": "A\ufffd\nC"}
  assert canonicalise({"instruction": "A", "input": " ", "output": "B"}).parts is None
  assert canonicalise({"messages": [{"role": "user", "content": "A", "parts": [1]}, *turns("a:B")]}).parts is None


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
  assert got.messages[2] == said | {"content": '{"r": [1]}'} and list(got.reasons) == ["json_content"]
  assert got.messages[1]["reasoning_content"] == "hm" and "reasoning_content" not in got.messages[3]


@pytest.mark.parametrize("record", [{"prompt": [{"role": ["user"], "content": "A"}], "completion": "B"}, {"messages": [{"role": {}, "content": 1}]}])
def test_a_role_that_is_no_string_is_unknown(record):
  assert canonicalise(record).code == "unknown_role"


def test_unknown_format_names_the_nearest():
  with pytest.raises(UserError, match="unknown format 'alpacca'.*did you mean 'alpaca'.*data.train.format"):
    canonicalise({}, "alpacca")
  assert canonicalise({"question": "A", "answer": "B"}, "alpaca").code == "unknown_schema"


def test_what_an_assistant_thought_is_kept_and_joined():
  thinks = lambda text, thought: {"role": "assistant", "content": text, "reasoning_content": thought}
  got = canonicalise({"messages": [*turns("u:A"), thinks("B", "one"), thinks("C", None), thinks("D", "two\ud83d")]})
  assert got.messages[1] == thinks("B\n\nC\n\nD", "one\n\ntwo\ufffd")
  got = canonicalise({"messages": [{"role": "user", "content": "A", "reasoning_content": "no"}, *turns("a:B")]})
  assert got.messages == turns("u:A a:B")


def said(dialogue):
  """"u:A a:B" -> a text as hh-rlhf has it."""
  return "".join(f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}" for m in turns(dialogue))


@pytest.mark.parametrize("record, schema, want, reasons", [
  ({"instruction": "A", "context": "C", "response": "B", "category": "closed_qa"}, "alpaca", "u:A\nC a:B", []),                        # Dolly
  ({"inputs_pretokenized": "A", "targets_pretokenized": "B", "inputs": [1], "targets": [2]}, "flan", "u:A a:B", []),                   # P3
  ({"prompt": "A", "completion": "B<|endoftext|>"}, "prompt_completion", "u:A a:B", ["end_marker_cut"]),                               # P3, as self-instruct wrote it
  ({"question": "A", "answer": "(C)", "rationale": "R"}, "cot", "u:A a:R\nThe_answer_is_(C).", []),                                    # FLAN CoT
  ({"system_prompt": "S", "question": "A", "response": "B"}, "question_answer", "s:S u:A a:B", []),                                    # OpenOrca
  ({"question": "A", "std_answer": "B", "class": "qa"}, "question_answer", "u:A a:B", []),                                             # BELLE's evaluation
  ({"instruction": "Human:A\nAssistant:B\nHuman:C\nAssistant:", "input": "", "output": "D"}, "alpaca", "u:A a:B u:C a:D", ["split_dialogue"]),   # BELLE multi-turn
  ({"instruction": "", "conversations": [{"question": "A", "answer": "B"}, {"question": "C", "answer": "D"}]}, "messages", "u:A a:B u:C a:D", []),   # COIG
  ({"instruction": "I", "conversations": {"question": ["A"], "answer": ["B"]}}, "messages", "u:I\nA a:B", []),                         # the same from the hub
  ({"textbox_q_instruction": "I", "textbox_q_context": " ", "textbox_question": "A", "textbox_answer": "B", "textbox_answer_analysis": "C"}, "coig_exam", "u:I\nA a:B\nC", []),
  ({"messages": json.dumps(turns("u:A a:B"))}, "messages", "u:A a:B", []),                                                             # a cell of a table
  ({"conversations": [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}], "system": "S"}, "messages", "s:S u:A a:B", []),
  ({"conversations": [{"from": "system", "value": "T"}, {"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}], "system": "S"}, "messages", "s:T u:A a:B", []),
])
def test_the_sets_of_the_field(record, schema, want, reasons):
  got = canonicalise(record)
  assert got.schema == schema and list(got.reasons) == reasons
  assert got.messages == [m | {"content": m["content"].replace("_", " ")} for m in turns(want)]


def test_a_preference_record_trains_the_last_chosen_answer_alone():
  for record in ({"chosen": said("u:A a:B u:C a:D"), "rejected": said("u:A a:B u:C a:E")},
                 {"prompt": turns("u:A a:B u:C"), "chosen": turns("a:D"), "rejected": turns("a:E")},
                 {"prompt": said("u:A a:B u:C") + "\n\nAssistant:", "chosen": "D", "rejected": "E"},
                 {"prompt": "ignored", "chosen": turns("u:A a:B u:C a:D"), "rejected": turns("u:A a:B u:C a:E")}):
    got = canonicalise(record)
    assert got.schema == "preference" and [m["content"] for m in got.messages] == ["A", "B", "C", "D"]
    assert [m.get("trained", True) for m in got.messages] == [True, False, True, True]


def test_a_text_is_no_conversation_and_read_only_when_named():
  assert canonicalise({"text": "A"}).code == "unknown_schema"
  assert canonicalise({"text": "A"}, "text").messages == turns("u:A") and canonicalise({"text": " "}, "text").code == "empty_text"
  assert canonicalise({"document": "A"}).schema == "document"


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
