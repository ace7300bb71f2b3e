"""OpenAssistant trees: the golden threads, each rule of what is left out, the flat form, and where each thread came from."""

import json
import types

import pytest

from jaxsft.data.formats import Conversation, Drop, canonicalise
from jaxsft.data.records import read_records
from jaxsft.data.trees import expand, threads


def message(name, role, *replies, **over):
  return {"message_id": name, "role": role, "text": f"text {name}", "replies": list(replies)} | over


def tree(*replies, **over):
  """A tree, its root "r"; `over` goes to the tree, `root_` to the root."""
  return {"message_tree_id": "r", "tree_state": "ready_for_export", "prompt": message("r", "prompter", *replies)} | over


def names(found):
  return ["-".join(m["message_id"] for m in record["oasst_thread"]) if "oasst_thread" in record else record["oasst_drop"] for record, _ in found]


def flat(node, parent=None):
  rest = {key: value for key, value in node.items() if key != "replies"}
  return [rest | {"parent_id": parent}] + [row for reply in node["replies"] for row in flat(reply, node["message_id"])]


def test_the_golden_tree(golden):
  case = golden("formats")["oasst"]
  assert [[m["id"] for m in thread] for thread, code in threads(case["tree"]) if not code] == case["threads"]
  assert [[m["message_id"] for m in record["oasst_thread"]] for record, _ in expand([case["tree"]])] == case["threads"]


@pytest.mark.parametrize("record, want, best", [
  (tree(message("a", "assistant", rank=1), message("b", "assistant", rank=0)), ["r-a", "r-b"], ["oasst_rank", "r-b"]),
  (tree(message("a", "assistant")), ["r-a"], ["r-a"]),                                                     # no rank, no sibling
  (tree(message("a", "assistant"), message("b", "assistant", rank=0)), ["r-a", "r-b"], ["oasst_rank", "r-b"]),
  (tree(message("a", "assistant", deleted=True), message("b", "assistant")), ["oasst_deleted", "r-b"], None),
  (tree(message("a", "assistant", message("p", "prompter", message("b", "assistant", synthetic=True)))), ["oasst_synthetic"], None),
  (tree(message("a", "assistant", message("p", "prompter"), message("q", "prompter"))), ["r-a"], None),    # a prompter leaf counts once, and is left out
  (tree(message("a", "assistant", message("p", "prompter", message("b", "assistant")), message("q", "prompter"))), ["r-a-p-b"], None),
  (tree(message("a", "assistant"), tree_state="prompt_lottery_waiting"), ["oasst_not_ready"], None),
  (tree(message("a", "assistant")) | {"prompt": message("r", "prompter", message("a", "assistant"), review_result=False)}, ["oasst_not_reviewed"], None),
  (tree(message("a", "prompter", message("b", "assistant"))), ["oasst_not_alternating"], None),
  (tree(), ["no_assistant"], None), ({"prompt": {"replies": 3}}, ["oasst_bad_tree"], None), ({"prompt": {"replies": ["x"]}}, ["oasst_bad_tree"], None),
])
def test_the_rules(record, want, best):
  assert names(expand([record])) == want
  if best is not None:
    assert names(expand([record], "oasst_best")) == best
  if isinstance(record["prompt"].get("replies"), list) and all(isinstance(reply, dict) for reply in record["prompt"]["replies"]):
    rows = [row | {"tree_state": record["tree_state"]} for row in flat(record["prompt"])]
    assert names(expand(rows)) == want, "the flat form says the same"


def test_flat_rows_in_any_order_with_orphans_circles_and_doubles():
  rows = flat(message("r", "prompter", message("a", "assistant"), message("b", "assistant")))
  more = [{"message_id": "x", "parent_id": "gone", "role": "assistant", "text": "X"}, rows[0],
          {"message_id": "c", "parent_id": "d", "role": "prompter", "text": "C"}, {"message_id": "d", "parent_id": "c", "role": "assistant", "text": "D"}]
  found = expand([rows[2], {"question": "Q", "answer": "A"}, *more, rows[1]])
  assert [record.get("question") or names([(record, 0)])[0] for record, _ in found] == ["Q", "oasst_orphan", "r-b", "r-a", "oasst_orphan", "oasst_orphan"]
  assert [number for _, number in found] == [1, 2, 0, 6, 4, 5]
  assert canonicalise(found[1][0]) == Drop("oasst_orphan", "oasst")


def test_a_deep_tree_needs_no_recursion():
  node = message("z", "assistant")
  for i in range(1500):
    node = message(str(i), ("prompter", "assistant")[i % 2], node)
  assert len(threads(message("r", "prompter", node) if node["role"] == "assistant" else node)[0][0]) > 1500


def test_records_say_where_a_thread_came_from(tmp_path):
  (tmp_path / "trees.jsonl").write_text("\n".join(json.dumps(t) for t in (tree(message("a", "assistant"), message("b", "assistant")), {"question": "Q", "answer": "A"})))
  source = lambda **over: types.SimpleNamespace(path=str(tmp_path / "trees.jsonl"), split="train", revision="", **({"rows": 0, "format": "auto"} | over))
  records = read_records(source())
  assert [records.where(i) for i in range(len(records))] == ["trees.jsonl:1", "trees.jsonl:1", "trees.jsonl:2"]
  got = [canonicalise(records[i]) for i in range(3)]
  assert got[0].schema == "oasst" and got[0].messages == [{"role": "user", "content": "text r"}, {"role": "assistant", "content": "text a"}]
  assert len(read_records(source(rows=1))) == 1 and len(read_records(source(format="sharegpt"))) == 2


def test_the_real_sample(shared):
  """100 trees, 555 threads; what falls away is counted by code."""
  path = shared / "data/oasst_sample/en_100_tree.jsonl"
  source = lambda format: types.SimpleNamespace(path=str(path), split="train", revision="", rows=0, format=format)
  for format in ("oasst", "oasst_best"):
    records = read_records(source(format))
    got = [canonicalise(records[i], format) for i in range(len(records))]
    kept = [c for c in got if isinstance(c, Conversation)]
    codes = {code: sum(isinstance(c, Drop) and c.code == code for c in got) for code in ("oasst_synthetic", "oasst_deleted", "oasst_rank")}
    assert (len(got), len(kept)) == (555, 538 if format == "oasst" else 98) and len(kept) + sum(codes.values()) == len(got)
    assert all(m["role"] == ("user", "assistant")[i % 2] for c in kept for i, m in enumerate(c.messages))


def test_the_threads_of_a_tree_are_held_out_together(tmp_path, data_settings, bytes_bos):
  from jaxsft.data.examples import select
  rows = [json.dumps(tree(message("a", "assistant"), message("b", "assistant"), message("c", "assistant")) | {"prompt": message(
    str(i), "prompter", message(f"{i}a", "assistant"), message(f"{i}b", "assistant"), message(f"{i}c", "assistant"))}) for i in range(20)]
  (tmp_path / "trees.jsonl").write_text("\n".join(rows))
  c = data_settings(tmp_path / "trees.jsonl", eval_share=0.3)
  records, chosen, _ = select(c, 0, "eval")
  held = {records.where(i) for i in chosen}
  assert 0 < len(chosen) < 60 and len(chosen) == 3 * len(held)
