"""Preference pairs: what both sides must have in common, and the form in which hh-rlhf writes them."""

import collections
import types

import pytest

from jaxsft.data.formats import Drop
from jaxsft.data.pairs import sides
from jaxsft.data.records import read_records

HH = "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: "


@pytest.mark.parametrize("record", [
  {"chosen": HH + "D", "rejected": HH + "E"},
  {"prompt": HH, "chosen": "D", "rejected": "E"},
  {"prompt": HH, "chosen": {"role": "assistant", "content": "D"}, "rejected": [{"role": "assistant", "content": "E"}]},
])
def test_every_form_gives_the_same_pair(record):
  got = sides(record)
  assert [m["content"] for m in got["chosen"].messages] == ["A", "B", "C", "D"] and got["rejected"].messages[-1]["content"] == "E"
  for conversation in got.values():
    assert [m.get("trained", True) for m in conversation.messages if m["role"] == "assistant"] == [False, True]


@pytest.mark.parametrize("record, code", [
  ({"prompt": "A", "chosen": "B"}, "unknown_schema"), ({"prompt": "A", "chosen": "B", "rejected": "B"}, "same_answers"),
  ({"chosen": HH + "D", "rejected": HH.replace("C", "X") + "E"}, "prompts_differ"), ({"prompt": "A", "chosen": "B", "rejected": " "}, "no_assistant"),
  ({"chosen": "D", "rejected": "E"}, "unknown_schema"), ({"prompt": 3, "chosen": [1], "rejected": None}, "unknown_schema"),
])
def test_what_is_dropped(record, code):
  got = sides(record)
  assert isinstance(got, Drop) and got.code == code


def test_hh_rlhf(shared):
  records = read_records(types.SimpleNamespace(path=str(shared / "data/hh_rlhf/test.jsonl.gz"), split="train", revision="", rows=0))
  got = [sides(records[i]) for i in range(len(records))]
  counts = collections.Counter(pair.code if isinstance(pair, Drop) else "kept" for pair in got)
  assert counts == {"kept": 2308, "no_assistant": 3, "prompts_differ": 1}
  for record, pair in zip((records[i] for i in range(len(records))), got):
    if not isinstance(pair, Drop):
      last = pair["chosen"].messages[-1]
      assert record["chosen"].rstrip().endswith(last["content"].rstrip()) or "merged_same_role" in pair["chosen"].reasons
      assert not any("\n\nHuman:" in m["content"] for m in pair["chosen"].messages)
