"""convert, render, tokenize: the contract that other programs drive, line by line, and its exit codes."""

import io
import json
import pathlib
import subprocess
import sys

import pytest

from jaxsft.data.__main__ import main

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TALK = {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]}


@pytest.fixture
def drive(monkeypatch, capsys):
  """drive(records, *arguments) -> the lines of output as objects; texts go in as they are."""
  def go(records, *arguments, code=0):
    text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert main(list(arguments)) == code
    out = capsys.readouterr()
    return [json.loads(line) for line in out.out.splitlines()] if code == 0 else out.err
  return go


def test_convert_gives_the_golden_conversations(golden, drive):
  cases = golden("formats")["cases"]
  for case, got in zip(cases, drive([case["input"] for case in cases], "convert"), strict=True):
    if case["error"]:
      assert got == {"error": case["error"]}, case["id"]
      continue
    assert got["reasons"] == case["reasons"], case["id"]
    assert [m["train"] for m in got["messages"]] == [m["role"] == "assistant" for m in got["messages"]]
    assert [{key: value for key, value in m.items() if key != "train"} for m in got["messages"]] == case["expected"]["messages"], case["id"]


def test_convert_keeps_what_belongs_to_a_message_and_its_flag(drive):
  call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}
  record = {"messages": [{"role": "user", "content": "A", "train": False}, {"role": "assistant", "content": None, "tool_calls": [call], "train": False},
                         {"role": "tool", "content": "R", "tool_call_id": "c1"}, {"role": "assistant", "content": "B", "reasoning_content": "hm", "train": True}],
            "tools": [{"name": "f"}]}
  got = drive([record], "convert", "--format=auto")[0]
  assert [m["train"] for m in got["messages"]] == [False, False, False, True]
  assert got["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": 1} and got["messages"][2]["tool_call_id"] == "c1"
  assert got["messages"][3]["reasoning_content"] == "hm" and got["tools"][0]["function"] == {"name": "f"}
  again = drive([got], "convert")[0]
  assert again["messages"] == got["messages"], "what comes out goes in again"


def test_convert_of_trees_and_odd_lines(drive):
  tree = {"prompt": {"role": "prompter", "text": "A", "replies": [{"role": "assistant", "text": "B"}, {"role": "assistant", "text": "C", "deleted": True}]}}
  rows = [{"message_id": "2", "parent_id": "1", "role": "assistant", "text": "E"}, {"message_id": "1", "parent_id": None, "role": "prompter", "text": "D"}]
  got = drive([rows[0], tree, "", "[1]", "\"x\"", {"document": "t"}, rows[1]], "convert")
  assert [line.get("error") or line["messages"][-1]["content"] for line in got] == ["B", "oasst_deleted", "unknown_schema", "unknown_schema", "plain_text", "E"]


@pytest.mark.parametrize("template", ["chatml", "llama2", "llama3", "qwen2_5", "vicuna"])
def test_render_without_a_tokenizer(drive, template, golden):
  got = drive([TALK], "render", f"--template={template}")[0]
  (start, end), = got["spans"]
  assert got["text"][start:end].lstrip().startswith("B") and "A" not in got["text"][start:end]


def test_render_repairs_nothing_and_honours_the_flag(drive):
  twice = {"messages": [{"role": "user", "content": "A"}, {"role": "user", "content": "C"}, {"role": "assistant", "content": "B"}]}
  untrained = {"messages": [{"role": "user", "content": "A", "train": False}, {"role": "assistant", "content": "B", "train": False}]}
  got = drive([twice, untrained, {"messages": [{"role": "narrator", "content": "x"}]}, {"text": "x"}, {"messages": [{"role": "user", "content": "A", "train": True}]}],
              "render", "--template=llama2")
  assert got[0] == {"error": "alternation"} and got[1]["spans"] == [] and [line["error"] for line in got[2:]] == ["unknown_role", "unknown_schema", "trained_not_assistant"]
  got = drive([{"messages": TALK["messages"][:1]}], "render", "--template=chatml", "--add-generation-prompt")[0]
  assert got == {"text": "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n", "spans": []}


def test_tokenize(drive):
  got, cut, refused = drive([TALK, TALK, {"messages": [{"role": "tool", "content": "x"}]}], "tokenize", "--template=chatml", "--tokenizer=bytes")
  assert len(got["tokens"]) == len(got["weights"]) and sum(got["weights"]) == 2 and set(got["weights"]) == {0, 1} and cut == got and "error" in refused
  short = drive([TALK], "tokenize", "--template=chatml", "--tokenizer=bytes", "--max-length=7")[0]
  assert short == {"tokens": got["tokens"][:7], "weights": got["weights"][:7]}
  assert all(drive([TALK], "tokenize", "--template=chatml", "--tokenizer=bytes", "--train_on=all")[0]["weights"])


@pytest.mark.parametrize("arguments, text, message", [
  (["convert"], "{\"a\": 1}\n{", "standard input:2: broken JSON"), (["convert", "--format=alpacca"], "", "did you mean 'alpaca'"),
  (["convert", "--input=gone.jsonl"], "", "gone.jsonl does not exist"), (["render"], "", "needs a tokenizer"), (["render", "--template=chatlm"], "", "chatlm"),
  (["tokenize", "--template=chatml", "--tokenizer=none"], "", "is no tokenizer"),
  (["tokenize", "--template=chatml", "--tokenizer=bytes", "--max-length=-1"], "", "--max-length is -1"),
])
def test_a_mistake_is_one_line_and_exit_2(drive, arguments, text, message):
  error = drive([text], *arguments, code=2)
  assert message in error and error.count("\n") == 1


def test_in_a_process_with_a_file_and_head(tmp_path):
  (tmp_path / "a.json").write_text(json.dumps([{"question": "A\ud83d", "answer": "ä"}] * 2000))
  go = lambda command: subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
  out = go(f"{sys.executable} -m jaxsft.data convert --input={tmp_path}/a.json | head -1")
  assert json.loads(out.stdout)["messages"][0]["content"] == "A\ufffd" and "ä" == json.loads(out.stdout)["messages"][1]["content"] and out.stderr == ""
  out = go(f"{sys.executable} -m jaxsft.data render --help")
  assert out.returncode == 0 and "--add-generation-prompt" in out.stdout
