"""A hub id as data: what is asked of the hub, and what comes of it."""

import types

import datasets
import pytest

from jaxsft.data.records import read_records
from jaxsft.errors import UserError


def source(**over):
  return types.SimpleNamespace(**dict(path="owner/name", format="auto", split="train", revision="", rows=0) | over)


def test_split_revision_and_rows_reach_the_hub(monkeypatch):
  asked = []

  def load_dataset(path, split, revision):
    asked.append((path, split, revision))
    return datasets.Dataset.from_list([{"prompt": f"{split} {i}", "completion": "x"} for i in range(5)])
  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  records = read_records(source(split="test_sft", revision="v1", rows=3))
  assert asked == [("owner/name", "test_sft", "v1")] and [r["prompt"] for r in (records[i] for i in range(len(records)))] == [f"test_sft {i}" for i in range(3)]
  assert records.where(2) == "owner/name:3"
  assert len(read_records(source())) == 5 and asked[-1] == ("owner/name", "train", None)


def test_an_error_without_words_is_told(monkeypatch):
  def load_dataset(*_, **__):
    raise RuntimeError
  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  with pytest.raises(UserError, match="owner/name is no file here, and as a hub id it failed .*RuntimeError"):
    read_records(source())
