"""The demo's data: nothing of the held-out half is in the training half, and no answer is to be had without reading the mail."""

import json
import re

import pytest

from demo import judge, make_tickets
from demo.answers import HELD_OUT as HELD_OUT_FILE
from demo.answers import TRAIN as TRAIN_FILE
from demo.wordings_held_out import HELD_OUT
from demo.wordings_train import TRAIN

RUN = 4       # words in a row that two sentences may not share


@pytest.fixture(scope="module")
def train():
  return judge.load(TRAIN_FILE)


@pytest.fixture(scope="module")
def held_out():
  return judge.load(HELD_OUT_FILE)


def runs(sentence):
  """Every run of RUN words; {item} counts as a word."""
  found = re.findall(r"[\w'{}]+", sentence.lower())
  return {tuple(found[i:i + RUN]) for i in range(len(found) - RUN + 1)}


def sentences(material):
  return [sentence for asks in material.ask.values() for sentence in asks]


def parts(layout):
  """The order of a mail's parts, whatever stands between them."""
  return tuple(re.findall(r"{(\w+)}", layout))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_files_are_what_the_generator_writes(split):
  assert (make_tickets.HERE / f"tickets_{split}.jsonl").read_text(encoding="utf-8") == make_tickets.text_of(split)


def test_enough_conversations_and_a_fifth_held_out(train, held_out):
  assert len(train) + len(held_out) >= 400
  assert len(held_out) >= 0.2 * (len(train) + len(held_out))
  assert len({record["id"] for record in (*train, *held_out)}) == len(train) + len(held_out)


@pytest.mark.parametrize("part", ["items", "hello", "bye", "chat", "layouts"])
def test_halves_share_no(part):
  assert not set(getattr(TRAIN, part)) & set(getattr(HELD_OUT, part))


def test_halves_share_no_name():
  assert not (set(TRAIN.first) | set(TRAIN.last)) & (set(HELD_OUT.first) | set(HELD_OUT.last))


def test_halves_share_no_order_of_parts():
  assert not set(map(parts, TRAIN.layouts)) & set(map(parts, HELD_OUT.layouts))


def test_halves_share_no_run_of_words():
  seen = set().union(*map(runs, sentences(TRAIN)))
  shared = {sentence: runs(sentence) & seen for sentence in sentences(HELD_OUT) if runs(sentence) & seen}
  assert not shared


def test_halves_share_no_order_number(train, held_out):
  numbers = [{json.loads(judge.answer(record))["order"] for record in half} for half in (train, held_out)]
  assert not numbers[0] & numbers[1]
  assert [len(half) for half in numbers] == [len(train), len(held_out)]


def test_both_halves_know_the_same_requests(train, held_out):
  assert TRAIN.ask.keys() == HELD_OUT.ask.keys()
  for half in (train, held_out):
    counts = [sum(json.loads(judge.answer(record))["request"] == request for record in half) for request in TRAIN.ask]
    assert max(counts) - min(counts) <= 1


def test_answers_are_strict_one_line_json_copied_from_the_mail(train, held_out):
  for record in (*train, *held_out):
    text, answer = judge.mail(record), judge.answer(record)
    ticket = json.loads(answer)
    assert list(ticket) == list(judge.FIELDS) and "\n" not in answer and json.dumps(ticket) == answer
    assert ticket["customer"] in text and str(ticket["order"]) in text
    assert not re.search(r"[{}]", text)


def test_no_answer_without_reading(train, held_out):
  assert len({judge.answer(record) for record in held_out}) >= 50
  scores = judge.baselines(train, held_out)
  assert max(scores[name] for name in ("constant", "nearest_characters", "nearest_words")) < 0.3


def test_every_sentence_and_layout_is_used(train):
  mails = "\n".join(map(judge.mail, train))
  for sentence in sentences(TRAIN):
    pattern = re.escape(sentence).replace(re.escape("{item}"), "[a-z ]+").replace(r"\ a\ [", r"\ an?\ [")
    assert re.search(pattern, mails), sentence
  for layout in TRAIN.layouts:
    assert re.search(re.sub(r"\\{\w+\\}", ".+", re.escape(layout)), mails), layout


def test_an_accordion_and_a_banjo(train, held_out):
  assert make_tickets.sentence("I got a {item}.", "accordion") == "I got an accordion."
  assert make_tickets.sentence("I got a {item}.", "banjo") == "I got a banjo."
  vowels = "|".join(item for item in TRAIN.items + HELD_OUT.items if item[0] in "aeiou")
  assert not [record["id"] for record in (*train, *held_out) if re.search(rf" a ({vowels})", judge.mail(record))]


def test_exact_match_is_of_strings():
  right = '{"customer": "Ann Lee", "order": 1234, "request": "refund"}'
  assert judge.exact_match([right, right + "\n", right.replace(": ", ":"), ""], [right] * 4) == 0.5
  assert judge.field_match(['{"customer": "Ann Lee", "order": "1234"}', "[1]"], [right] * 2) == dict(customer=0.5, order=0.0, request=0.0)


def test_the_look_up_finds_a_mail_that_is_there(train):
  """The baseline can succeed: asked for the training mails themselves it is right."""
  some = train[:20]
  for unit in ("characters", "words"):
    assert judge.exact_match(judge.nearest_neighbours(train, some, unit), [judge.answer(record) for record in some]) == 1.0
