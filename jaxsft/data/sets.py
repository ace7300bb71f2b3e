"""The public sets of the field by name: data.train.path="set:alpaca", or "alpaca" where no file has that name. `python -m jaxsft.data sets`.

An entry names where a set lies on the hub and what is odd about it; its records are read by the same schemas as a file's, so a local copy of
the set is simply a path. Licences are those of the sets' own cards when this was written: read the card before you train something to give away.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import NamedTuple

from jaxsft.errors import UserError, nearest

PREFIX = "set:"


class PublicSet(NamedTuple):
  """hub id, schema (formats.py), licence, quirks, and what load_dataset needs besides: split, subset, files."""
  hub: str
  format: str
  licence: str
  quirks: str = ""
  split: str = "train"
  subset: str = ""
  files: tuple[str, ...] = ()


_EVOLVED = "the 250k set of the paper is not public as such"
_CHINESE = "Chinese"
SETS = {
    "alpaca": PublicSet("tatsu-lab/alpaca", "alpaca", "CC BY-NC 4.0",
                        "52,002 rows; about 60% have no input; some outputs are empty; the hub's copy adds a text field, which is not read"),
    "alpaca_cleaned": PublicSet("yahma/alpaca-cleaned", "alpaca", "CC BY-NC 4.0", "Alpaca with its broken rows mended or removed"),
    "sharegpt": PublicSet("RyokoAI/ShareGPT52K", "sharegpt", "CC0 (as tagged)", "the 90K set: HTML in the answers; gpt first, trailing human and empty turns",
                          files=("sg_90k_part1.json", "sg_90k_part2.json")),
    "sharegpt_vicuna": PublicSet("anon8231489123/ShareGPT_Vicuna_unfiltered", "sharegpt", "Apache-2.0 (as tagged)",
                                 "long talks are split by pairs, so many begin in the middle",
                                 files=("ShareGPT_V3_unfiltered_cleaned_split.json",)),
    "oasst1": PublicSet("OpenAssistant/oasst1", "oasst", "Apache-2.0",
                        "one row a message: threads are built from the trees; format oasst_best keeps the best-ranked answers alone"),
    "oasst2": PublicSet("OpenAssistant/oasst2", "oasst", "Apache-2.0", "as oasst1, and holds its trees too: do not mix the two"),
    "flan": PublicSet("Open-Orca/FLAN", "flan", "CC BY 4.0 (as tagged)", "hundreds of millions of rows: take a part; many answers are one word"),
    "flan_muennighoff": PublicSet("Muennighoff/flan", "flan", "Apache-2.0 (upstream)", "rows of one task lie together: shuffle"),
    "p3": PublicSet("bigscience/P3", "flan", "Apache-2.0",
                    "a subset must be named; inputs and targets are token ids of T5, the *_pretokenized fields are read",
                    subset="cos_e_v1.11_question_option_description_text"),
    "wizardlm": PublicSet("WizardLMTeam/WizardLM_evol_instruct_V2_196k", "sharegpt", "MIT (as tagged)",
                          f"143k rows, meant to be merged with ShareGPT; {_EVOLVED}"),
    "wizardlm_70k": PublicSet("WizardLMTeam/WizardLM_evol_instruct_70k", "alpaca", "MIT (as tagged)", _EVOLVED),
    "ultrachat": PublicSet("HuggingFaceH4/ultrachat_200k", "messages", "MIT", "207,865 rows in train_sft, 23,110 in test_sft", split="train_sft"),
    "ultrachat_raw": PublicSet("stingning/ultrachat", "strings", "MIT",
                               "1.5M talks as lists of strings; lists of odd length end with the user, whose last turn is dropped"),
    "lima": PublicSet("GAIR/lima", "messages", "CC BY-NC-SA or stricter", "gated; 1,030 rows, 30 of them dialogues; conversations are plain strings"),
    "dolly": PublicSet("databricks/databricks-dolly-15k", "alpaca", "CC BY-SA 3.0", "15k rows; the input is called context, the answer response"),
    "gsm8k": PublicSet("openai/gsm8k", "question_answer", "MIT", "7,473 rows; answers hold <<3*4=12>> marks and end with #### and the number", subset="main"),
    "openorca": PublicSet("Open-Orca/OpenOrca", "question_answer", "MIT", "4M rows; system_prompt beside question and response"),
    "self_instruct": PublicSet("yizhongw/self_instruct", "prompt_completion", "Apache-2.0",
                               "completions end with <|endoftext|>, which is cut", subset="self_instruct"),
    "glaive_toolcall": PublicSet("llamafactory/glaive_toolcall_en", "sharegpt", "Apache-2.0", "tools are JSON text; function_call and observation turns"),
    "hh_rlhf": PublicSet("Anthropic/hh-rlhf", "preference", "MIT",
                         "pairs in one text each; in fine-tuning only the last chosen answer is trained; some texts are harmful by design"),
    "ultrafeedback": PublicSet("HuggingFaceH4/ultrafeedback_binarized", "preference", "MIT",
                               "for pairs; the conversation in messages is the chosen one", split="train_prefs"),
    "doit": PublicSet("ChiyuSONG/dynamics-of-instruction-tuning", "messages", "MIT (card; upstream terms remain)",
                      f"{_CHINESE}, ten abilities in the field type",
                      files=("curated/full/*.json",)),
    "coig": PublicSet("BAAI/COIG", "messages", "Apache-2.0 (parts differ)",
                      f"{_CHINESE}; conversations of question and answer; better fetched file by file: the parts have fields of their own"),
    "coig_cqia": PublicSet("m-a-p/COIG-CQIA", "alpaca", "see the card", f"{_CHINESE}; subsets by source, a subset must be named by a local path"),
    "belle_0_5m": PublicSet("BelleGroup/train_0.5M_CN", "alpaca", "GPL-3.0", f"{_CHINESE}; written by a ChatGPT model; input is always empty"),
    "belle_1m": PublicSet("BelleGroup/train_1M_CN", "alpaca", "GPL-3.0", f"{_CHINESE}; as belle_0_5m"),
    "belle_multiturn": PublicSet("BelleGroup/multiturn_chat_0.8M", "alpaca", "GPL-3.0",
                                 f"{_CHINESE}; the talk stands in instruction as Human: ... Assistant: and is split"),
}


def named(path: str, knob: str = "data.train.path") -> PublicSet | None:
  """The set that `path` names; None when it is a path. Raises UserError for set:NAME where there is no such set."""
  name = path.removeprefix(PREFIX)
  if path.startswith(PREFIX) and name not in SETS:
    raise UserError(f"there is no public set {name!r} (did you mean {nearest(name, SETS)[0]!r}?)", wanted="one of python -m jaxsft.data sets", knob=knob)
  return SETS.get(name) if path.startswith(PREFIX) or not pathlib.Path(path).exists() else None


def main(argv=None) -> int:
  """Prints the list; exit code 0."""
  parser = argparse.ArgumentParser(prog="python -m jaxsft.data sets", description="The public sets that data.train.path=set:NAME reads.")
  parser.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
  if parser.parse_args(argv).json:
    print(json.dumps({name: entry._asdict() for name, entry in SETS.items()}))
    return 0
  for name, entry in SETS.items():
    hub = entry.hub + (f" ({entry.subset})" if entry.subset else "") + (f": {', '.join(entry.files)}" if entry.files else "")
    print(f"{name:17} {entry.format:17} {hub}, split {entry.split}, {entry.licence}")
    if entry.quirks:
      print(f"{'':17} {entry.quirks}")
  return 0
