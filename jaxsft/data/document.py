"""A plain text -> tokens and weights: no template, no roles, every token trained, the tokenizer's end of text at the end."""

from __future__ import annotations

import numpy as np

from jaxsft.data.template import Template
from jaxsft.errors import UserError


def encode_document(text: str, template: Template, tokenizer) -> dict[str, np.ndarray]:
  """tokens int32 [T] and weights float32 [T], all 1 but a BOS, which stands in front where rows of this `template` have one.

  Control strings in the text stay text. Raises UserError for a tokenizer without an end-of-text token.
  """
  if tokenizer.eos_token_id is None:
    raise UserError("this tokenizer has no end-of-text token to close a document with", wanted="one with eos_token, or conversations", knob="data.tokenizer")
  begin = template.bos_id if template.bos_id is not None else template.bos_token_id
  ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
  tokens_T = np.array(([] if begin is None else [begin]) + ids + [tokenizer.eos_token_id], np.int32)
  weights_T = np.ones(len(tokens_T), np.float32)
  weights_T[:begin is not None] = 0
  return {"tokens": tokens_T, "weights": weights_T}
