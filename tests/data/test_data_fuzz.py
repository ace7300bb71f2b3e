"""Mutated records of every format: nothing crashes, and nothing that a user, a system prompt or a tool said is trained.

The checker does not look at spans or templates. Every text of the base records carries the mark of who says it; after a mutation the marks are
set anew where the place in a list says who speaks. What is trained (the tokens of weight 1, decoded) may then hold no foreign mark.
"""

import copy
import random

import pytest

from jaxsft.data.formats import Conversation, Drop, canonicalise
from jaxsft.data.template import Refused, get_template
from jaxsft.data.tokenise import encode_many
from jaxsft.data.tokenizer import load_tokenizer
from jaxsft.data.trees import expand

ASKED, SAID = "UUUU", "AAAA"           # the marks: never to be trained; free to be
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"x\": \"AAAA\"}"}}
TURNS = [{"role": "system", "content": ASKED}, {"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}, {"role": "user", "content": ASKED},
         {"role": "assistant", "content": SAID}]
HH = "\n\nHuman: UUUU\n\nAssistant: UUUU\n\nHuman: UUUU\n\nAssistant: "              # the earlier answer of a pair was not judged
LEAF = {"role": "assistant", "text": SAID, "message_id": "b", "rank": 0, "replies": []}
BASES = {
    "messages": {"messages": TURNS},
    "tools": {"messages": [TURNS[1], {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": ASKED, "tool_call_id": "c"}, TURNS[2]],
              "tools": [{"name": "f", "parameters": {}}]},
    "sharegpt": {"id": "x", "system": ASKED, "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}] * 2},
    "strings": {"id": "x", "data": [ASKED, SAID, ASKED, SAID]}, "lima": {"conversations": [ASKED, SAID], "source": "x"},
    "alpaca": {"instruction": ASKED, "input": ASKED, "output": SAID, "system": ASKED, "history": [[ASKED, SAID]]},
    "self_instruct": {"instruction": ASKED, "instances": [{"input": ASKED, "output": SAID}]},
    "flan": {"inputs": ASKED, "targets": SAID}, "p3": {"inputs_pretokenized": ASKED, "targets_pretokenized": SAID, "inputs": [1], "targets": [2]},
    "prompt_completion": {"prompt": ASKED, "completion": SAID},
    "prompt_messages": {"prompt": [*TURNS[:2], {"role": "assistant", "content": ASKED}, TURNS[1]], "completion": [TURNS[2]]},
    "cot": {"question": ASKED, "answer": SAID, "rationale": SAID}, "question_answer": {"system_prompt": ASKED, "question": ASKED, "answer": SAID},
    "coig": {"instruction": ASKED, "conversations": [{"question": ASKED, "answer": SAID}] * 2},
    "preference": {"chosen": HH + SAID, "rejected": HH + ASKED}, "belle": {"instruction": f"Human:{ASKED}\nAssistant:{SAID}\nHuman:{ASKED}\nAssistant:", "output": SAID},
    "oasst": {"message_tree_id": "a", "tree_state": "ready_for_export",
              "prompt": {"role": "prompter", "text": ASKED, "message_id": "a", "replies": [LEAF, LEAF | {"replies": [{"role": "prompter", "text": ASKED, "replies": [LEAF]}]}]}},
}
JUNK = [None, 0, -1.5, True, [], {}, "", " ", "\n", "\ud800", "x" * 3000, [[]], [None], {"a": [1]}, ["x", 2], [{"role": "user"}], "null", "[", "\u2028\x00\x1b", float("nan")]
POISON = ["<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>", "{{ x }}", "{% raw %}", "\U0001f600", "\udfff", "\U0010f000", "\ufffe", "<|endoftext|>",
          " ", "\n\n"]
SPEAKERS, FLAGS = ("role", "from"), ("train", "trained", "weight")


def places(value, path=()):
  """Every (path, value) below a value."""
  items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  for key, item in items:
    yield (*path, key), item
    yield from places(item, (*path, key))


def mutate(record, rng):
  """`record` with one to four changes, none of which puts one speaker's text into another's mouth."""
  for _ in range(rng.randint(1, 4)):
    found = list(places(record))
    if not found:
      return record
    path, value = rng.choice(found)
    holder = record
    for key in path[:-1]:
      holder = holder[key]
    key, what = path[-1], rng.random()
    if key in FLAGS:
      continue
    if what < 0.2:
      del holder[key]
    elif what < 0.45 or key in SPEAKERS:
      holder[key] = copy.deepcopy(rng.choice([*JUNK, "narrator"]))
    elif what < 0.6 and isinstance(value, str):
      holder[key] = value + rng.choice(POISON) if rng.random() < 0.5 or "Human:" in value else rng.choice(POISON) + value
    elif what < 0.75 and isinstance(holder, list):
      holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(rng.choice([value, *JUNK])))
    elif what < 0.9 and isinstance(value, list):
      rng.shuffle(value)
    elif isinstance(value, dict) and "content" in value and not any(flag in value for flag in FLAGS):
      flag = rng.choice([True, False, 0, 1, "yes", None])
      value[rng.choice(FLAGS)] = flag
      if flag in (False, 0) and isinstance(value["content"], str):
        value["content"] = value["content"].replace(SAID, ASKED)
  marked_anew(record)
  return record


def marked_anew(value):
  """Where the place says who speaks, the mark follows the place."""
  for _, item in places({"all": value}):
    if isinstance(item, list):
      item[:] = [text if not isinstance(text, str) else text.replace(SAID, ASKED) if i % 2 == 0 else text.replace(ASKED, SAID) for i, text in enumerate(item)]


def check(record, tokenizer, template, encoded):
  """Kept conversations of one mutated record; asserts that none holds a foreign mark where it is trained."""
  kept = []
  for raw, _ in expand([record]):
    got = canonicalise(raw)
    assert isinstance(got, Conversation | Drop)
    if isinstance(got, Conversation):
      kept.append(got)
      for message in got.messages:
        trained = message["role"] == "assistant" and message.get("trained", True)
        assert not (trained and ASKED in message["content"]), record
        assert message["role"] == "assistant" or "trained" not in message
  if not encoded:
    return
  for conversation, example in zip(kept, encode_many(kept, template, tokenizer)):
    if isinstance(example, Refused):
      continue
    trained = example["tokens"][example["weights"] > 0]
    answers = sum(m["role"] == "assistant" and m.get("trained", True) for m in conversation.messages)
    assert (trained == template.end_of_turn_id).sum() == answers, conversation
    assert ASKED not in tokenizer.decode(trained), conversation
    assert set(example["weights"].tolist()) <= {0.0, 1.0}


def fuzz(name, count, every):
  tokenizer = load_tokenizer("bytes")
  template = get_template("chatml", tokenizer)
  rng, kept = random.Random(name), 0
  for number in range(count):
    record = mutate(copy.deepcopy(BASES[name]), rng)
    try:
      check(record, tokenizer, template, number % every == 0)
    except Exception as error:
      raise AssertionError(f"{name} number {number}: {record!r}") from error
    kept += 1
  assert kept == count


@pytest.mark.parametrize("name", BASES)
def test_mutated_records(name):
  fuzz(name, 3000, every=20)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_many_mutated_records(name):
  fuzz(name, 20_000, every=1)


def test_the_checker_sees_a_user_who_is_trained():
  tokenizer = load_tokenizer("bytes")
  template = get_template("chatml", tokenizer)
  with pytest.raises(AssertionError):
    check({"messages": [TURNS[1], {"role": "assistant", "content": ASKED}]}, tokenizer, template, True)
