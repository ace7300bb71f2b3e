"""The demo's own code, end to end on a tiny model: what it prints, what it leaves, and a second time in the same folder. The real one: test_demo_slow.py."""

import json
import os

import pytest
from test_demo_slow import KEYS

from demo import judge
from demo import run as demo
from jaxsft import config


@pytest.fixture
def small(tmp_path, monkeypatch):
  """The demo's directory of a tiny llama; two steps, a few mails."""
  import torch
  import transformers

  from jaxsft.data.tokenizer import byte_tokenizer
  shape = dict(vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
  torch.manual_seed(0)
  transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(tmp_path / "base")
  byte_tokenizer().save_pretrained(tmp_path / "base")
  load_config, load_mails = config.load, judge.load

  def shorter(reference):
    c = load_config(reference)
    for key, value in {"steps": 2, "data.length": 512, "batch_size": 8, "eval.rows": 2, "eval.every": 2, "lora.rank": 2}.items():
      config.override(c, key, str(value))
    return c
  monkeypatch.setattr(config, "load", shorter)
  monkeypatch.setattr(judge, "load", lambda path: load_mails(path)[:6])
  monkeypatch.setattr(demo, "say", lambda text: None)
  monkeypatch.setattr(os, "chdir", lambda path: None)
  return tmp_path / "base"


def test_what_the_demo_leaves_and_prints(small, tmp_path, capsys):
  workdir = tmp_path / "demo"
  assert demo.main([f"--workdir={workdir}", f"--model={small}"]) == 0
  out = capsys.readouterr().out
  summary = json.loads((workdir / "summary.json").read_text())
  assert all(key in summary for key in KEYS)
  assert 0 < summary["train_seconds"] < summary["wall_seconds"] and summary["held_out"] == 6
  for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors", "loss.png"):
    assert (workdir / name).stat().st_size > 1000
  assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
  rows = [json.loads(line) for line in (workdir / "answers.jsonl").read_text().splitlines()]
  assert len(rows) == 6 and all(row.keys() == {"id", "mail", "wanted", "before", "after"} for row in rows)
  for words in ("exact match  0.00 -> 0.00   on 6 held-out mails", "train loss", "eval loss", "tokens/s", str(workdir / "adapter"), str(workdir / "merged"),
                str(workdir / "loss.png"), "jaxsft.chat"):
    assert words in out.replace("\n", ""), words
  assert demo.main([f"--workdir={workdir}", f"--model={small}"]) == 0            # nothing is left to train: the figures stay
  assert json.loads((workdir / "summary.json").read_text()) == summary


def test_a_user_s_mistake_is_one_line(small, tmp_path, capsys):
  assert demo.main([f"--workdir={tmp_path / 'demo'}", f"--model={tmp_path / 'nowhere'}"]) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and err.count("\n") == 1 and "nowhere" in err
