"""Reading records: where each came from, and what a user is told about a file that cannot be read."""

import gzip
import json
import types

import pytest
import zstandard

from jaxsft.data.records import read_records
from jaxsft.errors import UserError

A, B = {"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}


def source(path, rows=0):
  return types.SimpleNamespace(path=str(path), format="auto", split="train", revision="", rows=rows)


def test_every_container_gives_the_same_records(tmp_path):
  import pyarrow
  import pyarrow.feather
  import pyarrow.ipc
  import pyarrow.parquet
  (tmp_path / "list.json").write_text(json.dumps([A, B]))
  (tmp_path / "data.json").write_text(json.dumps({"data": [A, B]}))
  (tmp_path / "lines.json").write_text(json.dumps(A) + "\n" + json.dumps(B))
  (tmp_path / "lines.jsonl").write_text("\ufeff" + json.dumps(A) + "\r\n\r\n" + json.dumps(B) + "\r\n")
  (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(json.dumps(A).encode() + b"\n" + json.dumps(B).encode()))
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist([A, B]), tmp_path / "table.parquet")
  table = pyarrow.Table.from_pylist([A, B])
  pyarrow.feather.write_feather(table, tmp_path / "table.feather")
  for name, form in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
    with form(tmp_path / name, table.schema) as writer:
      writer.write_table(table)
  (tmp_path / "lines.ndjson").write_text(json.dumps(A) + "\n" + json.dumps(B))
  (tmp_path / "list.json.gz").write_bytes(gzip.compress(json.dumps([A, B]).encode()))
  two_frames = [zstandard.compress(json.dumps(record).encode() + b"\n") for record in (A, B)]
  (tmp_path / "lines.jsonl.zst").write_bytes(b"".join(two_frames))
  (tmp_path / "list.json.zst").write_bytes(zstandard.compress(json.dumps([A, B]).encode()))
  (tmp_path / "table.csv").write_text("question,answer\r\na,b\r\n\r\n\"c\",d\r\n")
  (tmp_path / "table.tsv.gz").write_bytes(gzip.compress(b"question\tanswer\na\tb\nc\td\n"))
  (tmp_path / "bare.tsv").write_text("a\tb\nc\td\n")
  (tmp_path / "dataset_info.json").write_text("{}")
  (tmp_path / "README.txt").write_text("beside data a text is a note")
  files = [f for f in sorted(tmp_path.iterdir()) if f.name not in ("dataset_info.json", "README.txt")]
  for file in files:
    records = read_records(source(file))
    assert [records[i] for i in range(len(records))] == [A, B], file
    assert len(read_records(source(file, rows=1))) == 1
  assert read_records(source(tmp_path / "lines.jsonl")).where(1) == "lines.jsonl:3"      # the blank line counts
  assert read_records(source(tmp_path / "list.json")).where(1) == "list.json:2"
  assert len(read_records(source(tmp_path))) == len(read_records(source(tmp_path / "*"))) == 2 * len(files)


def test_the_file_s_own_name_says_what_it_is_and_strings_under_data_are_one_record(tmp_path):
  (tmp_path / "set.jsonl").mkdir()
  (tmp_path / "set.jsonl/a.json").write_text(json.dumps([A, B], indent=1))
  assert len(read_records(source(tmp_path / "set.jsonl/a.json"))) == 2
  (tmp_path / "strings.json").write_text(json.dumps({"data": ["hi", "hello"]}))
  assert read_records(source(tmp_path / "strings.json"))[0] == {"data": ["hi", "hello"]}


def test_tables_say_the_line_and_keep_what_cells_hold(tmp_path):
  (tmp_path / "a.csv").write_text('question,answer\n"two\nlines, and ""quotes""",b\nc,\n', newline="")
  records = read_records(source(tmp_path / "a.csv"))
  assert records[0] == {"question": 'two\nlines, and "quotes"', "answer": "b"} and records[1] == {"question": "c", "answer": ""}
  assert [records.where(i) for i in range(2)] == ["a.csv:2", "a.csv:4"]
  (tmp_path / "a.tsv").write_text('"Q" is\\nthis \\times\tyes\tbecause\n')
  assert read_records(source(tmp_path / "a.tsv"))[0] == {"question": '"Q" is\nthis \\times', "answer": "yes", "rationale": "because"}


def test_a_text_file_is_one_document(tmp_path):
  (tmp_path / "a.txt").write_text("one\n\ntwo\n")
  (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three"))
  records = read_records(source(tmp_path))
  assert [records[i] for i in range(len(records))] == [{"document": "one\n\ntwo\n"}, {"document": "three"}] and records.where(1) == "b.txt.gz:1"


def test_a_split_or_revision_of_a_file_is_refused(tmp_path):
  (tmp_path / "a.jsonl").write_text(json.dumps(A))
  for name in ("split", "revision"):
    asked = source(tmp_path / "a.jsonl")
    setattr(asked, name, "trian")
    with pytest.raises(UserError, match=f"has no {name} 'trian'.*data.train.{name}"):
      read_records(asked)


def test_line_separators_inside_a_string_do_not_end_a_line(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"question": "a\u2028b\x85", "answer": "c"}\n', encoding="utf-8")
  assert read_records(source(tmp_path / "a.jsonl"))[0]["question"] == "a\u2028b\x85"


def test_provenance_over_several_files(tmp_path):
  (tmp_path / "1.jsonl").write_text(json.dumps(A) + "\n" + json.dumps(B))
  (tmp_path / "2.jsonl").write_text("\n" + json.dumps(A))
  (tmp_path / "LICENSE").write_text("text")
  records = read_records(source(tmp_path))
  assert [records.where(i) for i in range(3)] == ["1.jsonl:1", "1.jsonl:2", "2.jsonl:2"]


@pytest.mark.parametrize("name, content, message", [
    ("none.jsonl", None, r"none.jsonl does not exist; wanted a file.*set data.train.path"),
    ("a/b/c", None, r"a/b/c does not exist.*set data.train.path"),
    ("empty.jsonl", "\n", r"empty.jsonl is empty; wanted at least one record; set data.train.path"),
    ("empty.json", "", r"empty.json is empty"),
    ("nothing.json", "[]", r"nothing.json is empty"),
    ("bad.jsonl", '{"a": 1}\n\n{"a": \n', r"bad.jsonl:3: broken JSON \(.*\); wanted one JSON object a line; set data.train.path"),
    ("bad.json", '[{"a": 1},\n {"a": ]', r"bad.json:2: broken JSON"),
    ("list.jsonl", "[1]", r"list.jsonl:1: the record is a list"),
    ("numbers.json", "[1, 2]", r"numbers.json:1: the record is a int"),
    ("broken.jsonl.gz", gzip.compress(b'{"a": 1}' * 100, mtime=0)[:20] + b"\xff" * 40, r"broken.jsonl.gz cannot be read"),
    ("digits.jsonl", '{"a": ' + "9" * 5000 + "}", r"digits.jsonl:1: broken JSON"),
    ("digits.json", '{"a": ' + "9" * 5000 + "}", r"digits.json: JSON that cannot be read"),
    ("brackets.json", "[" * 100_000, r"brackets.json: JSON that cannot be read"),
    ("brackets.jsonl", "[" * 100_000, r"brackets.jsonl:1: broken JSON"),
    ("notes.md", "x", r"notes.md has an unknown extension; wanted one of .json, .jsonl"),
    ("blank.txt", " \n", r"blank.txt is empty"),
    ("bad.csv", "question,answer\na,b\nc\n", r"bad.csv:3: 1 fields under a header of 2"),
    ("head.csv", "a,b\nc,d\n", r"head.csv:1: 'a, b' is no header; wanted names of fields"),
    ("twice.csv", "answer,answer\nc,d\n", r"twice.csv:1: 'answer, answer' is no header"),
    ("quote.csv", 'question,answer\n"a"x,b\n', r"quote.csv:2: broken quoting"),
    ("ragged.tsv", "a\tb\tc\n\na\tb\n", r"ragged.tsv:3: 2 fields under a header of 3"),
    ("wide.tsv", "a\tb\tc\td\n", r"wide.tsv:1: 'a, b, c, d' is no header"),
    ("bad.jsonl.zst", b"x" * 30, r"bad.jsonl.zst cannot be read"),
    ("cut.jsonl.zst", zstandard.compress(b'{"a": 1}\n') + zstandard.compress(b'{"a": 1}\n' * 50_000)[:-9], r"cut.jsonl.zst cannot be read .the file is cut off"),
    ("bad.arrow", "x" * 40, r"bad.arrow is no readable Arrow file"),
    ("bad.parquet", "x", r"bad.parquet is no readable Parquet file"),
])
def test_what_the_user_is_told(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(UserError, match=message) as caught:
    read_records(source(tmp_path / name))
  assert "\n" not in str(caught.value)


def test_other_bad_places(tmp_path):
  with pytest.raises(UserError, match="holds no data file"):
    read_records(source(tmp_path))
  (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}')
  with pytest.raises(UserError, match="latin.jsonl cannot be read.*UTF-8"):
    read_records(source(tmp_path / "latin.jsonl"))
  with pytest.raises(UserError, match="no path of training data.*data.train.path"):
    read_records(source(""))
  with pytest.raises(UserError, match="nobody/nothing is no file here, and as a hub id it failed.*data.eval.path"):
    read_records(source("nobody/nothing"), "data.eval.path")


def test_real_files(shared):
  for name, count in (("gsm8k/train.jsonl", 7473), ("fastchat_dummy/dummy_conversation.json", 500), ("hh_rlhf/test.jsonl.gz", 2312),
                      ("flan_cot/aqua_train.tsv", 2728), ("flan_cot/ecqa_train.tsv", 7112), ("wikitext2/test.txt", 1)):
    assert len(read_records(source(shared / "data" / name))) == count
