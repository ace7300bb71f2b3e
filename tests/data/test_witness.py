"""The row that a run keeps, to hold exports against."""

import json

import pytest
from ml_collections import ConfigDict

from configs import common
from jaxsft.data.examples import prepare
from jaxsft.data.template import get_template
from jaxsft.data.tokenizer import load_tokenizer
from jaxsft.data.witness import witness


@pytest.fixture
def examples_of(tmp_path):
  """examples_of(records, template=...) -> (Examples, Template) with the built-in tokenizer."""
  def make(*contents, template="chatml"):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n" for q, a in contents))
    data = ConfigDict(common.base().data)
    data.train.path, data.length = str(file), 512
    tokenizer = load_tokenizer("bytes")
    made = get_template(template, tokenizer)
    return prepare(data, 0, tokenizer, made), made
  return make


def test_the_shortest_plain_row_is_kept(examples_of):
  examples, template = examples_of(("a <|im_end|>", "b"), ("hello there", "you"), ("hi", "yo"))
  row = witness(examples, template)
  assert [m["content"] for m in row["messages"]] == ["hi", "yo"]           # the first holds a control string: a server reads it otherwise
  assert row["text"] == template.render(row["messages"]).text and row["tokens"] == examples[2]["tokens"].tolist()
  assert json.loads(json.dumps(row)) == row


def test_no_row_where_none_renders_the_same_way_twice(examples_of):
  examples, template = examples_of(("a <|im_end|>", "b"))
  assert witness(examples, template) == {}
  examples, template = examples_of(("a", "b"))
  dated = type("Dated", (), {"chat_template": "{{ strftime_now('%d') }}"})()
  assert witness(examples, template) and witness(examples, dated) == {}
