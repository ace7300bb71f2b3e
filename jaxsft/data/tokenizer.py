"""A tokenizer from a directory, a GGUF file or a hub id: a fast one, since spans need character offsets."""

from __future__ import annotations

import pathlib

from jaxsft.errors import UserError


def load_tokenizer(path: str, revision: str = "", knob: str = "data.tokenizer"):
  """transformers' PreTrainedTokenizerFast; path "bytes" is a built-in one, a token a byte, with ChatML.

  Raises UserError when there is no tokenizer at `path`, or none with character offsets.
  """
  if not path:
    raise UserError("no tokenizer is named", wanted="a directory, a GGUF file or a hub id (owner/name)", knob=knob)
  if path == "bytes":
    return byte_tokenizer()
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


def byte_tokenizer():
  """One token a byte and ChatML's own: what smoke runs use where no model is at hand. 259 ids."""
  import tokenizers
  import transformers
  controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  core = tokenizers.Tokenizer(tokenizers.models.BPE({text: i for i, text in enumerate(controls + alphabet)}, []))
  core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  core.decoder = tokenizers.decoders.ByteLevel()
  core.add_special_tokens(controls)
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=controls[2], pad_token=controls[0])
  from jaxsft.data.template import jinja
  tokenizer.chat_template = jinja("chatml")
  return tokenizer
