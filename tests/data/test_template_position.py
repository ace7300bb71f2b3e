"""Where the instruction of an alpaca-type record stands: the golden cases, the wording, the alpaca template, and its export."""

import pytest

from jaxsft.data.formats import Conversation, canonicalise
from jaxsft.data.position import check_position, flipped, positioned
from jaxsft.data.template import get_template, named_template
from jaxsft.data.tokenise import encode
from jaxsft.errors import UserError


def record(instruction, given, answer=None):
  """What formats.canonicalise makes of an alpaca record: the two joined by a line break, and apart in `parts`."""
  content = f"{instruction}\n{given}" if given.strip() else instruction
  messages = [{"role": "user", "content": content}] + ([{"role": "assistant", "content": answer}] if answer is not None else [])
  return Conversation(messages, parts=(instruction, given) if given.strip() else None)


def prompt(name, position, conversation):
  template = named_template(name, position)
  return template.render(template.messages(conversation)).text


def test_golden_cases(golden):
  cases = {case["id"]: case for case in golden("templates")["instruction_position"]}
  for name in ("pre", "post", "pre_noinput", "post_noinput"):
    case = cases[name]
    assert prompt("alpaca", case["mode"], record(case["instruction"], case["input"])) == case["render"], name
  double = cases["double"]
  message = {"role": "user", "content": "-", "instruction": double["pre_instruction"], "input": double["input"],
             "instruction_after": double["post_instruction"]}
  assert named_template("alpaca", "double").render([message]).text == double["render"]
  for name, position in (("pre_chat", "pre"), ("post_chat", "post")):
    case = cases[name]
    [question] = positioned(record(case["instruction"], case["input"]).messages, (case["instruction"], case["input"]), position)
    assert question["content"] == case["render"]
    assert prompt("chatml", position, record(case["instruction"], case["input"])) == f"<|im_start|>user\n{case['render']}<|im_end|>\n"


def test_records_without_an_input_are_the_same_in_every_position():
  for name in ("alpaca", "chatml"):
    assert len({prompt(name, position, record("Say the following: a", " ")) for position in ("pre", "post", "double")}) == 1


def test_the_wording_follows_the_position():
  assert flipped("Translate the following sentences from English to German.") == "Translate the above sentences from English to German."
  assert flipped("The following is listed below.") == "The above is listed below." and flipped("Follow me") == "Follow me"
  assert prompt("chatml", "post", record("Translate the following.", "X the following")) == \
      "<|im_start|>user\nX the following\n\nTranslate the above.<|im_end|>\n"
  assert "Translate the following." in prompt("chatml", "pre", record("Translate the following.", "X"))
  assert prompt("chatml", "double", record("Do the following", "X")) == "<|im_start|>user\nDo the following\n\nX\n\nDo the above<|im_end|>\n"
  text = prompt("alpaca", "double", record("Do the following", "X"))
  assert text.index("### Instruction:\nDo the following\n") < text.index("### Input:\nX\n") < text.index("### Instruction:\nDo the above\n")


def test_only_the_question_that_the_record_made_is_set_anew():
  made = record("I", "X", "A")
  assert positioned(made.messages, made.parts, "post")[1:] == made.messages[1:]
  assert positioned(made.messages, None, "post") == made.messages
  merged = [{"role": "user", "content": "I\nX\n\nmore"}, made.messages[1]]
  assert positioned(merged, made.parts, "post") == merged
  history = [{"role": "user", "content": "I\nX"}, {"role": "assistant", "content": "B"}, *made.messages]
  assert [m["content"] for m in positioned(history, made.parts, "post")] == ["I\nX", "B", "X\n\nI", "A"]
  assert made.messages[0] == {"role": "user", "content": "I\nX"}                # not changed in place


def test_rows_and_their_export_hold_the_position(llama2):
  ids = {}
  for position in ("pre", "post", "double"):
    template, made = get_template("alpaca", llama2, position), record("Name the following.", "X", "A")
    assert template.position == position
    example = encode(made, template, llama2)
    ids[position] = example["tokens"].tolist()
    want = llama2.apply_chat_template(template.messages(made), chat_template=template.chat_template)["input_ids"]
    assert ids[position] == want and want.count(1) == 1 and want[0] == 1
    rendered = template.render(template.messages(made))
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["A</s>"]
  assert len(set(map(tuple, ids.values()))) == 3


def test_a_record_on_its_way():
  """From the raw record: canonical content as formats.py says, position and sections from the parts it keeps."""
  made = canonicalise({"instruction": "Fix the following", "input": "X", "output": "A", "history": [["I0", "A0"]]})
  assert made.messages[2]["content"] == "Fix the following\nX"
  assert [m["content"] for m in named_template("chatml", "post").messages(made)] == ["I0", "A0", "X\n\nFix the above", "A"]
  text = named_template("alpaca", "post").render(named_template("alpaca", "post").messages(made)).text
  assert text.endswith("### Input:\nX\n\n### Instruction:\nFix the above\n\n### Response:A</s>")


def test_alpaca_in_several_turns_and_with_a_system_message():
  rest = "Write a response that appropriately completes the request.\n\n"
  turns = [{"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, "ABCD")]
  text = "### Instruction:\nA\n\n### Response:B</s>\n\n### Instruction:\nC\n\n### Response:D</s>"
  assert named_template("alpaca").render(turns).text == f"Below is an instruction that describes a task. {rest}{text}"
  assert named_template("alpaca").render([{"role": "system", "content": "S"}, *turns]).text == f"S\n\n{text}"


def test_positions_that_are_none_and_models_asked_otherwise(llama2):
  for ask in (lambda: named_template("chatml", "behind"), lambda: get_template("alpaca", llama2, "behind"),
              lambda: positioned([], None, "behind"), lambda: get_template("tokenizer", llama2_with_template(llama2), "behind")):
    with pytest.raises(UserError, match="unknown position 'behind'; wanted pre, post, double; set data.position"):
      ask()
  check_position("post", "post")
  with pytest.raises(UserError, match="trained with the instruction in position 'post', and would be asked in 'pre'; wanted post; set data.position"):
    check_position("post", "pre")


def llama2_with_template(llama2):
  import copy
  out = copy.deepcopy(llama2)
  out.chat_template = named_template("llama2").jinja
  return out
