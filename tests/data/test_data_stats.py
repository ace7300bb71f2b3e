"""python -m jaxsft.data stats, show -n and policy strict: what they count, against a count by hand."""

import json

import pytest

from jaxsft.data.__main__ import main
from jaxsft.data.examples import prepare
from jaxsft.data.template import get_template
from jaxsft.errors import UserError

BYTES = ["--tokenizer=bytes", "--template=chatml"]


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"question": "Q" * n, "answer": "AB"}) for n in (1, 2, 3, 80)))
  (tmp_path / "b.jsonl").write_text(json.dumps({"question": "Q", "answer": ""}) + "\n" + json.dumps({"instruction": "I", "output": "AB<|endoftext|>"}))
  return tmp_path


def last(capsys):
  return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_stats_by_hand(folder, capsys):
  """A turn of ChatML in bytes is control, role, line break, content, control, line break: 10 beside the question, 14 beside the answer of 2."""
  assert main(["stats", f"--path={folder}", *BYTES, "--length=64", "--json"]) == 0
  got = last(capsys)
  part = got["sources"]["train"]
  lengths = [len("_user\n_\n_assistant\nAB_\n") + n for n in (1, 2, 3, 80)] + [len("_user\nI_\n_assistant\nAB_\n") + len("<|endoftext|>")]
  kept = [n for n in lengths if n <= 64]
  assert part["records"] == 6 and part["kept"] == 4 and part["drops"] == {"too_long": 1, "no_assistant": 1} and part["format"] == {"question_answer": 5, "alpaca": 1}
  assert part["tokens"] == sum(kept) and part["longer_than_row"] == 1 and part["length_percentiles"]["p100"] == max(lengths) and part["length_percentiles"]["p0"] == min(lengths)
  assert part["trained_share"] == pytest.approx((4 * 3 + 13) / sum(kept)) and part["rows"] == 2
  assert part["padding_share"] == pytest.approx(1 - sum(kept) / 128) and part["padding_share_unpacked"] == pytest.approx(1 - sum(kept) / 256)
  assert part["files"]["a.jsonl"]["records"] == 4 and part["files"]["b.jsonl"]["kept"] == 1
  assert main(["stats", f"--path={folder}", *BYTES, "--length=64"]) == 0
  out = capsys.readouterr().out
  assert "too_long 1" in out and "a.jsonl" in out and "question_answer 5 (question and answer)" in " ".join(out.replace("│", " ").split())


def test_stats_of_a_config_with_a_held_out_share(folder, capsys):
  (folder / "experiment.py").write_text(f"""
from configs import common
def get_config(arg=None):
  c = common.base()
  c.data.train.path, c.data.template, c.data.tokenizer, c.data.eval_share = {str(folder / 'a.jsonl')!r}, "chatml", "bytes", 0.5
  return c
""")
  assert main(["stats", f"--config={folder}/experiment.py", "--json"]) == 0
  got = last(capsys)
  assert got["length"] == 2048 and sum(part["records"] for part in got["sources"].values()) == 4 and set(got["sources"]) == {"train", "eval"}


def test_show_several_records_and_the_row_they_fill(folder, capsys):
  arguments = ["show", f"--path={folder}/a.jsonl", *BYTES, "--length=64", "-n", "3"]
  assert main([*arguments, "--json"]) == 0
  got = last(capsys)
  lengths = [len(t["tokens"]) for t in got["records"]]
  assert len(got["records"]) == 3 and sum(row["filled"] for row in got["rows"]) == sum(lengths)
  for row in got["rows"]:
    assert row["filled"] + row["padding"] == 64 and [s["positions"][0] for s in row["segments"]] == [0] * len(row["segments"])
    assert [s["trained"] for s in row["segments"]] == [3] * len(row["segments"])
  assert main(arguments) == 0
  out = capsys.readouterr().out
  assert "row of 64 tokens" in out and "segment 1" in out and "a.jsonl:1" in out


@pytest.mark.parametrize("command, message", [
  (["stats", "--path=gone.jsonl", *BYTES], "gone.jsonl does not exist"), (["stats", *BYTES], "no path of training data"),
  (["show", "--path=gone.jsonl", *BYTES], "gone.jsonl does not exist"), (["show", "--path=x", *BYTES, "-n", "0"], "x does not exist"),
])
def test_mistakes(command, message, capsys):
  assert main(command) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


def test_strict_refuses_the_first_record_that_would_be_dropped(folder, data_settings, bytes_bos):
  c = data_settings(folder)
  c.train.policy = "strict"
  with pytest.raises(UserError, match=r"b.jsonl:1 cannot be trained on \(no_assistant\), 1 such records.*data.train.policy"):
    prepare(c, 0, bytes_bos, get_template("chatml", bytes_bos))
  c.train.policy = "drop"
  assert len(prepare(c, 0, bytes_bos, get_template("chatml", bytes_bos))) == 5
  c.train.policy, c.train.path, c.length = "strict", str(folder / "a.jsonl"), 30           # length has its own policy
  assert len(prepare(c, 0, bytes_bos, get_template("chatml", bytes_bos))) == 3


def test_a_plain_text_is_trained_whole_or_not_at_all(tmp_path, data_settings, bytes_bos):
  (tmp_path / "a.jsonl").write_text(json.dumps({"text": "hi <|im_end|>"}))
  c = data_settings(tmp_path / "a.jsonl", train_on="all")
  c.train.format = "text"
  got = prepare(c, 0, bytes_bos, get_template("chatml", bytes_bos))[0]
  assert bytes_bos.decode(got["tokens"]) == "<s>hi <|im_end|></s>" and bytes_bos.convert_tokens_to_ids("<|im_end|>") not in got["tokens"]
  assert got["weights"].tolist() == [0.0] + [1.0] * (len(got["tokens"]) - 1)
  c.train_on = "assistant"
  with pytest.raises(UserError, match="text_needs_train_on_all 1"):
    prepare(c, 0, bytes_bos, get_template("chatml", bytes_bos))


def test_what_was_detected_and_why(folder, data_settings, bytes_bos):
  why = prepare(data_settings(folder), 0, bytes_bos, get_template("chatml", bytes_bos)).report["format_why"]
  assert "question_answer by its fields (question and answer)" in why and "alpaca by its fields (instruction)" in why and "A MIXTURE OF SCHEMAS" in why
  why = prepare(data_settings(folder / "a.jsonl"), 0, bytes_bos, get_template("chatml", bytes_bos)).report["format_why"]
  assert "MIXTURE" not in why
