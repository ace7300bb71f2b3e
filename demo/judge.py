"""Scores tickets and draws the tables of the demo: exact match, what no training reaches, and answers side by side.

Exact match is equality of the strings after strip(): the ticket is read by a program, so its keys, their order, the spacing and
the types are part of the task. JSON equality would be kinder (it forgives spacing and key order) and is NOT what is reported.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FIELDS = ("customer", "order", "request")


def load(path: Path) -> list[dict]:
  """The records {"id", "messages"} of a tickets_*.jsonl file."""
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def mail(record: dict) -> str:
  return record["messages"][-2]["content"]


def answer(record: dict) -> str:
  return record["messages"][-1]["content"]


def prompt(record: dict) -> list[dict]:
  """The turns the model is given: all but the answer."""
  return record["messages"][:-1]


def exact_match(answers: Sequence[str], wanted: Sequence[str]) -> float:
  """Share of answers that equal the wanted one after strip()."""
  return float(np.mean([a.strip() == w for a, w in zip(answers, wanted, strict=True)]))


def field_match(answers: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
  """Share of answers whose field is right, for each field; an answer that is no JSON object has none right."""
  pairs = [(as_object(a), json.loads(w)) for a, w in zip(answers, wanted, strict=True)]
  return {field: float(np.mean([field in got and got[field] == right[field] for got, right in pairs])) for field in FIELDS}


def as_object(text: str) -> dict:
  try:
    value = json.loads(text)
  except ValueError:
    return {}
  return value if isinstance(value, dict) else {}


def constant_answer(train: Sequence[dict], held_out: Sequence[dict]) -> float:
  """Exact match of the best constant: the commonest answer of the HELD-OUT set itself, which no fair guess can beat."""
  del train
  (_, count), = Counter(map(answer, held_out)).most_common(1)
  return count / len(held_out)


def nearest_neighbours(train: Sequence[dict], held_out: Sequence[dict], unit: str) -> list[str]:
  """For each held-out mail the answer of the training mail with the largest cosine of n-gram counts.

  unit: "characters" (3- to 5-grams) or "words" (1- and 2-grams).
  """
  grams = [Counter(ngrams(mail(record), unit)) for record in (*train, *held_out)]
  index = {gram: i for i, gram in enumerate(sorted(set().union(*grams)))}
  vectors_NG = np.zeros((len(grams), len(index)), np.float32)       # N mails, G different n-grams
  for row_G, counts in zip(vectors_NG, grams):
    row_G[[index[gram] for gram in counts]] = list(counts.values())
  vectors_NG /= np.linalg.norm(vectors_NG, axis=1, keepdims=True)
  best = np.argmax(vectors_NG[len(train):] @ vectors_NG[:len(train)].T, axis=1)
  return [answer(train[i]) for i in best]


def ngrams(text: str, unit: str) -> list[str]:
  if unit == "characters":
    return [text[i:i + n] for n in (3, 4, 5) for i in range(len(text) - n + 1)]
  words = text.lower().split()
  return [" ".join(words[i:i + n]) for n in (1, 2) for i in range(len(words) - n + 1)]


def baselines(train: Sequence[dict], held_out: Sequence[dict]) -> dict[str, float]:
  """Exact match of what needs no model, and how often the look-up gets the request, the one field it could get, right."""
  wanted = [answer(record) for record in held_out]
  scores = {"constant": constant_answer(train, held_out)}
  for unit in ("characters", "words"):
    found = nearest_neighbours(train, held_out, unit)
    scores[f"nearest_{unit}"] = exact_match(found, wanted)
    scores[f"nearest_{unit}_request_only"] = field_match(found, wanted)["request"]
  return scores
