"""What is exported renders, tokenises and stops as it was trained; tokenizers survive the trip."""

import json

import pytest

from jaxsft.convert import hf, load
from jaxsft.convert.check import check_export
from jaxsft.convert.source import open_source
from jaxsft.data.formats import Conversation
from jaxsft.data.template import get_template
from jaxsft.data.tokenise import encode
from jaxsft.data.witness import witness_of
from jaxsft.errors import UserError
from jaxsft.models.config import ModelConfig

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, what's 2+2?"},
            {"role": "assistant", "content": "4"}, {"role": "user", "content": "你好 😀"},
            {"role": "assistant", "content": "  Hello!\n"}]


@pytest.fixture
def export(hf_dir, shared, tmp_path):
  """export(tokenizer name, template name, **write_hf's) -> (directory, Template): a tiny model with a real tokenizer."""
  def make(tokenizer_name, template_name, **contents):
    source = open_source(hf_dir()[0])
    cfg = ModelConfig.from_hf(source.config)
    tokenizer = hf.load_tokenizer(shared / "data/tokenizers" / tokenizer_name)
    template = get_template(template_name, tokenizer)
    contents = {"chat_template": template.chat_template, "end_of_turn_ids": [template.end_of_turn_id]} | contents
    leaves = ((path, read) for path, _, _, read in load.leaf_reads(source, cfg))
    return hf.write_hf(tmp_path / "out", cfg, leaves, tokenizer, **contents), template
  return make


def row_of(directory, trained):
  """The witness of MESSAGES, as training tokenises them."""
  conversation = Conversation(MESSAGES)
  return witness_of(conversation, trained, encode(conversation, trained, hf.load_tokenizer(directory))["tokens"])


@pytest.mark.parametrize("tokenizer, template", [("qwen2.5", "chatml"), ("qwen2.5", "qwen2_5"), ("llama2", "vicuna"), ("llama2", "llama2")])
def test_the_trained_template_is_the_exported_one(export, tokenizer, template):
  """Lessons rows 6, 7 and 8."""
  directory, trained = export(tokenizer, template)
  text = check_export(directory, row_of(directory, trained))
  assert trained.render(MESSAGES).text in text
  stops = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
  assert trained.end_of_turn_id in stops


@pytest.mark.parametrize("name, template", [("qwen2.5", "chatml"), ("llama2", "vicuna"), ("llama2", "llama2")])
def test_the_rows_tokens_are_compared_too(export, shared, name, template):
  directory, trained = export(name, template)
  tokens = encode(Conversation(MESSAGES), trained, hf.load_tokenizer(shared / "data/tokenizers" / name))["tokens"]
  row = witness_of(Conversation(MESSAGES), trained, tokens)
  check_export(directory, row)
  check_export(directory, row | {"tokens": row["tokens"][:9]})                   # a truncated row
  with pytest.raises(UserError, match="other tokens than training did, from 3 on"):
    check_export(directory, row | {"tokens": [*row["tokens"][:3], 5, *row["tokens"][4:]]})
  with pytest.raises(UserError, match="other tokens"):
    check_export(directory, row | {"tokens": row["tokens"][1:]})


def test_another_template_is_caught(export):
  directory, trained = export("qwen2.5", "chatml", chat_template="{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}")
  with pytest.raises(UserError, match="other text than training did, from 0 on"):
    check_export(directory, row_of(directory, trained))


def test_a_missing_stop_is_caught(export):
  directory, trained = export("qwen2.5", "chatml")
  (directory / "generation_config.json").write_text('{"eos_token_id": [151643]}')
  with pytest.raises(UserError, match="does not stop at the end-of-turn '<|im_end|>'"):
    check_export(directory, row_of(directory, trained))


@pytest.mark.parametrize("name", ["qwen2.5", "llama2"])
def test_tokenizers_survive_the_trip(export, shared, name):
  """The same ids from the source, from AutoTokenizer on the export and from its bare tokenizer.json, which needs no class."""
  from tokenizers import Tokenizer
  from transformers import AutoTokenizer
  directory, trained = export(name, {"qwen2.5": "chatml", "llama2": "vicuna"}[name])
  own, auto = hf.load_tokenizer(shared / "data/tokenizers" / name), AutoTokenizer.from_pretrained(directory)
  bare = Tokenizer.from_file(str(directory / "tokenizer.json"))
  for text in ("Hello  world 2024\n\n x", "你好 😀", " a</s>b<|im_end|> c", ""):
    assert own(text, add_special_tokens=False).input_ids == auto(text, add_special_tokens=False).input_ids == \
        bare.encode(text, add_special_tokens=False).ids
    assert own(text).input_ids == auto(text).input_ids
  settings = json.loads((directory / "tokenizer_config.json").read_text())
  assert settings["tokenizer_class"] != "TokenizersBackend"
  assert settings["chat_template"] == (directory / "chat_template.jinja").read_text() == trained.chat_template
  assert (directory / "tokenizer.model").exists() == (name == "llama2")


def test_the_tokenizer_in_hand_keeps_its_template(hf_dir, shared, tmp_path):
  tokenizer = hf.load_tokenizer(shared / "data/tokenizers/qwen2.5")
  own = tokenizer.chat_template
  (tmp_path / "t").mkdir()
  hf.write_tokenizer(tmp_path / "t", tokenizer, "{{ messages }}")
  assert tokenizer.chat_template == own and hf.load_tokenizer(tmp_path / "t").chat_template == "{{ messages }}"
