"""A tokenizer from a directory, a GGUF file or a hub id: a fast one, since spans need character offsets."""

from __future__ import annotations

import pathlib

from jaxsft.errors import UserError


def load_tokenizer(path: str, revision: str = "", knob: str = "data.tokenizer"):
  """transformers' PreTrainedTokenizerFast. Raises UserError when there is none at `path`, or none with character offsets."""
  if path.endswith(".gguf"):
    from jaxsft.convert.source import open_source  # the one reader of GGUF; numpy only
    return open_source(path).tokenizer()
  import transformers
  place = pathlib.Path(path).expanduser()
  if not place.exists() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
    raise UserError(f"{path or 'no path'} is no tokenizer", wanted="a directory, a GGUF file or a hub id (owner/name)", knob=knob)
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(place) if place.exists() else path, revision=revision or None)
  except Exception as error:  # the hub client, the tokenizer's own code and a dozen parsers raise here
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    raise UserError(f"no tokenizer could be read from {path} ({reason[:200]})", wanted="tokenizer.json or its parts", knob=knob) from None
  if not tokenizer.is_fast:
    raise UserError(f"the tokenizer of {path} has no character offsets ({type(tokenizer).__name__})", wanted="a fast tokenizer", knob=knob)
  return tokenizer
