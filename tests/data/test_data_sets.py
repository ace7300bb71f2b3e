"""The registry of public sets: every entry's schema is found in literal rows of that set, and a name leads to the hub as it should."""

import json
import types

import pytest

from jaxsft.data.__main__ import main
from jaxsft.data.formats import NAMED_ONLY, SCHEMAS, Conversation, canonicalise
from jaxsft.data.records import read_records
from jaxsft.data.sets import SETS, named
from jaxsft.errors import UserError

HH = "\n\nHuman: Q\n\nAssistant: "
MESSAGES = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
FROM = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
OASST = [{"message_id": "1", "parent_id": None, "user_id": "u", "text": "Q", "role": "prompter", "lang": "en", "deleted": False, "rank": None, "synthetic": False,
          "message_tree_id": "1", "tree_state": "ready_for_export", "review_result": True, "emojis": None, "labels": None},
         {"message_id": "2", "parent_id": "1", "user_id": "v", "text": "A", "role": "assistant", "lang": "en", "deleted": False, "rank": 0, "synthetic": False,
          "message_tree_id": "1", "tree_state": "ready_for_export", "review_result": True, "emojis": None, "labels": None}]
ROWS = {          # rows as the sets hold them, all of them asking Q and answering A
    "alpaca": [{"instruction": "Q", "input": "", "output": "A", "text": "Below is an instruction ... ### Response:\nA"}],
    "alpaca_cleaned": [{"output": "A", "instruction": "Q", "input": ""}],
    "sharegpt": [{"id": "x_0", "conversations": [{"from": "gpt", "value": "<div>hi</div>"}, *FROM, {"from": "human", "value": "bye"}]}],
    "sharegpt_vicuna": [{"id": "x_0", "conversations": FROM}], "oasst1": OASST, "oasst2": OASST,
    "flan": [{"inputs": "Q", "targets": "A", "_template_idx": 1, "_task_source": "CoT", "_task_name": "x", "_template_type": "zs_opt"}],
    "flan_muennighoff": [{"inputs": "Q", "targets": "A", "task": "x"}],
    "p3": [{"inputs": [1, 2], "inputs_pretokenized": "Q", "targets": [3], "targets_pretokenized": "A"}],
    "wizardlm": [{"idx": "x", "conversations": FROM}], "wizardlm_70k": [{"instruction": "Q", "output": "A"}],
    "ultrachat": [{"prompt": "Q", "prompt_id": "x", "messages": MESSAGES}], "ultrachat_raw": [{"id": "0", "data": ["Q", "A", "bye"]}],
    "lima": [{"conversations": ["Q", "A"], "source": "stackexchange"}], "dolly": [{"instruction": "Q", "context": "", "response": "A", "category": "open_qa"}],
    "gsm8k": [{"question": "Q", "answer": "A"}], "openorca": [{"id": "x", "system_prompt": "", "question": "Q", "response": "A"}],
    "self_instruct": [{"prompt": "Q", "completion": "A<|endoftext|>"}], "glaive_toolcall": [{"conversations": FROM, "tools": "[{\"name\": \"f\"}]"}],
    "hh_rlhf": [{"chosen": HH + "A", "rejected": HH + "B"}],
    "ultrafeedback": [{"prompt": "Q", "chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "B"}], "messages": MESSAGES, "score_chosen": 8.0}],
    "doit": [{"messages": MESSAGES, "type": "chinese", "question_format": 0}],
    "coig": [{"instruction": "", "conversations": [{"question": "Q", "answer": "A"}]}], "coig_cqia": [{"instruction": "Q", "input": "", "output": "A", "domain": ["x"]}],
    "belle_0_5m": [{"instruction": "Q", "input": "", "output": "A"}], "belle_1m": [{"instruction": "Q", "input": "", "output": "A"}],
    "belle_multiturn": [{"instruction": "Human:Q\nAssistant:", "input": "", "output": "A"}],
}


def test_every_set_has_rows_here():
  assert ROWS.keys() == SETS.keys() and {entry.format for entry in SETS.values()} <= {*SCHEMAS, *NAMED_ONLY}


@pytest.mark.parametrize("name", SETS)
def test_a_local_copy_is_read_with_format_auto(tmp_path, name):
  (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS[name]))
  for format in ("auto", SETS[name].format):
    records = read_records(types.SimpleNamespace(path=str(tmp_path / "rows.jsonl"), split="train", revision="", rows=0, format=format))
    got = canonicalise(records[0], format)
    assert len(records) == 1 and isinstance(got, Conversation), format
    assert [(m["role"], m["content"]) for m in got.messages] == [("user", "Q"), ("assistant", "A")], format


def test_a_name_leads_to_the_hub_with_all_it_needs(monkeypatch, tmp_path):
  import datasets
  asked = []
  monkeypatch.setattr(datasets, "load_dataset", lambda path, **more: asked.append((path, more)) or datasets.Dataset.from_list(ROWS["gsm8k"] * 3))
  source = types.SimpleNamespace(path="set:gsm8k", split="train", revision="r1", rows=2, format="auto")
  records = read_records(source)
  assert asked == [("openai/gsm8k", {"split": "train", "revision": "r1", "name": "main"})] and len(records) == 2 and records.where(1) == "openai/gsm8k:2"
  source.path, source.revision = "ultrachat", ""
  read_records(source)
  assert asked[-1] == ("HuggingFaceH4/ultrachat_200k", {"split": "train_sft", "revision": None})
  source.split = "test_sft"
  read_records(source)
  assert asked[-1][1]["split"] == "test_sft"
  source.path, source.split = "sharegpt", "train"
  read_records(source)
  assert asked[-1][1]["data_files"] == ["sg_90k_part1.json", "sg_90k_part2.json"]


def test_a_folder_of_that_name_goes_first_and_an_unknown_set_is_told(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "alpaca").mkdir()
  assert named("alpaca") is None and named("set:alpaca") is SETS["alpaca"] and named("dolly") is SETS["dolly"]
  with pytest.raises(UserError, match="no public set 'alpacca'.*did you mean 'alpaca'.*data.train.path"):
    read_records(types.SimpleNamespace(path="set:alpacca", split="train", revision="", rows=0))


def test_the_list(capsys):
  assert main(["sets", "--json"]) == 0
  assert json.loads(capsys.readouterr().out.splitlines()[-1])["lima"]["hub"] == "GAIR/lima"
  assert main(["sets"]) == 0
  assert "belle_multiturn" in capsys.readouterr().out
