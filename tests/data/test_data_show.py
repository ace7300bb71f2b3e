"""python -m jaxsft.data: what it prints, as text and as JSON, and its exit codes."""

import io
import json
import pathlib
import subprocess
import sys

import pytest

from jaxsft.data.show import escaped, main, print_trace, trace
from jaxsft.data.template import get_template
from jaxsft.data.tokenizer import load_tokenizer
from jaxsft.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
RECORD = {"question": "Hi\x1b[31m", "answer": "Yo"}


@pytest.fixture
def files(tmp_path, make_bytes):
  make_bytes().save_pretrained(tmp_path / "tok")
  (tmp_path / "a.jsonl").write_text(json.dumps(RECORD) + "\n" + json.dumps({"question": "Q", "answer": ""}))
  return tmp_path


def test_json_is_the_last_line(files, capsys):
  arguments = ["--path", str(files / "a.jsonl"), "--tokenizer", str(files / "tok"), "--template", "chatml"]
  assert main([*arguments, "--json", "--length", "10"]) == 0
  got = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert got["where"] == "a.jsonl:1" and got["schema"] == "question_answer" and got["supervised"] == 3 and got["longer_than_row"]
  assert "".join(t["text"] for t in got["tokens"] if t["weight"]) == "Yo<|im_end|>" and got["drop"] == ""
  assert main([*arguments, "--json", "--index", "1"]) == 0
  assert json.loads(capsys.readouterr().out)["drop"] == "no_assistant"


def test_trained_tokens_are_coloured_and_control_characters_escaped(bytes_bos):
  import rich.console
  out = io.StringIO()
  traced = trace(RECORD, "a.jsonl:1", get_template("chatml", bytes_bos), bytes_bos)
  print_trace(traced, rich.console.Console(file=out, force_terminal=True, color_system="standard", width=200))
  text = out.getvalue()
  assert "\\x1b" in text and "\x1b[31m" not in text                 # the record's own escape sequence is shown, not obeyed
  assert "\x1b[1;4;32mY" in text or "\x1b[1;32mY" in text           # bold green
  assert "\x1b[1;32mH" not in text and "\x1b[1;4;32mH" not in text
  assert escaped("a\n\x07é") == "a\\n\\x07é"


def test_the_position_of_an_instruction_is_shown(tmp_path, capsys):
  (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "I", "input": "X", "output": "Y"}))
  for position, want in (("pre", "I\n\nX"), ("post", "X\n\nI")):
    assert main(["--path", str(tmp_path / "a.jsonl"), "--tokenizer", "bytes", "--template", "chatml", "--position", position, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert want in got["text"] and got["text"] == "".join(token["text"] for token in got["tokens"])


def test_user_mistakes_exit_2_with_one_line(files, capsys):
  path, tokenizer = ["--path", str(files / "a.jsonl")], ["--tokenizer", str(files / "tok")]
  for arguments, message in (([*tokenizer, "--template", "chatml", "--path", "gone.jsonl"], "gone.jsonl does not exist"),
                             ([*path, *tokenizer], "no chat template"),
                             ([*path, "--tokenizer", str(files / "none")], "is no tokenizer"),
                             ([*path, *tokenizer, "--template", "chatml", "--index", "7"], "no record 7")):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_config_gives_the_defaults(files, capsys):
  (files / "experiment.py").write_text(f"""
from configs import common
def get_config(arg=None):
  c = common.base()
  c.data.train.path, c.data.template, c.data.tokenizer = {str(files / 'a.jsonl')!r}, "chatml", {str(files / 'tok')!r}
  return c
""")
  assert main(["--config", str(files / "experiment.py:x=1"), "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["supervised"] == 3


def test_help_and_standard_input_in_a_process(files):
  out = subprocess.run([sys.executable, "-m", "jaxsft.data", "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
  assert "trained tokens are green" in out.stdout
  arguments = ["--input=-", "--tokenizer", str(files / "tok"), "--template", "chatml", "--json"]
  out = subprocess.run([sys.executable, "-m", "jaxsft.data", *arguments],
                       input=json.dumps(RECORD), capture_output=True, text=True, cwd=ROOT, check=True)
  assert json.loads(out.stdout.splitlines()[-1])["where"] == "standard input:1"


def test_a_folder_without_a_tokenizer(tmp_path):
  with pytest.raises(UserError, match="no tokenizer could be read from .*data.tokenizer"):
    load_tokenizer(str(tmp_path))


def test_the_built_in_bytes_tokenizer():
  tokenizer = load_tokenizer("bytes")
  traced = trace(RECORD, "a.jsonl:1", get_template("tokenizer", tokenizer), tokenizer)
  assert len(tokenizer) == 259 and "".join(t["text"] for t in traced["tokens"] if t["weight"]) == "Yo<|im_end|>"
