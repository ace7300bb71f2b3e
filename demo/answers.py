"""Answers of a model to the held-out mails, and how many are right. python -m demo.answers MODEL [--examples=4]

MODEL is whatever jaxsft.chat takes: a directory, a run's workdir, an adapter, a merged export. --examples puts so many mails with their
tickets from the training set in front of each question: what prompting alone reaches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from demo import judge

HERE = Path(__file__).parent
TRAIN, HELD_OUT = HERE / "tickets_train.jsonl", HERE / "tickets_eval.jsonl"
NEW_TOKENS = 40       # the longest ticket has 30 tokens
BATCH = 50            # mails answered at once


def answers(model, records: Sequence[dict], examples: Sequence[dict] = (), new_tokens: int = NEW_TOKENS) -> list[str]:
  """Greedy answers, one a record. model: jaxsft.inference.Model. examples: records shown before each question, in one conversation."""
  prompts = [model.encode(conversation(record, examples)) for record in records]
  found = model.generator.generate(model.params, prompts, max_new_tokens=new_tokens, stop_ids=model.stop_ids,
                                   batch_size=min(BATCH, len(prompts)))
  return [model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found]


def conversation(record: dict, examples: Sequence[dict]) -> list[dict]:
  """system, (mail, ticket) of each example, mail."""
  system, mail = judge.prompt(record)
  return [system, *(turn for example in examples for turn in example["messages"][1:]), mail]


def main(argv: Sequence[str] | None = None) -> int:
  from jaxsft.errors import UserError
  parser = argparse.ArgumentParser(prog="python -m demo.answers", description=__doc__.splitlines()[0])
  parser.add_argument("model", metavar="MODEL")
  parser.add_argument("--examples", type=int, default=0, help="worked examples put before each question")
  args = parser.parse_args(argv)
  try:
    from jaxsft.inference import open_model
    records = judge.load(HELD_OUT)
    found = answers(open_model(args.model), records, judge.load(TRAIN)[:args.examples])
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  wanted = [judge.answer(record) for record in records]
  for record, answer in zip(records, found):
    print("right" if answer.strip() == judge.answer(record) else "wrong", record["id"], repr(answer))
  print(f"exact match {judge.exact_match(found, wanted):.2f} of {len(wanted)}; by field {judge.field_match(found, wanted)}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
