"""A GGUF file's tokenizer, rebuilt with `tokenizers` from the file's fields (transformers needs torch to do so)."""

from __future__ import annotations

import pathlib
from typing import Any

from jaxsft.errors import UserError

CONTROL, USER_DEFINED, UNKNOWN = 3, 4, 2  # tokenizer.ggml.token_type

LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2_LIKE = ("gpt-2", "default")
BYTE_LEVEL = {"llama-bpe": LLAMA3_SPLIT, "llama3": LLAMA3_SPLIT, "llama-v3": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT}
ADDS_BOS = ("llama-bpe", "llama3", "llama-v3")  # where the file does not say, llama.cpp puts a BOS in front for these


def build(fields: dict[str, Any], path: pathlib.Path):
  """transformers' PreTrainedTokenizerFast of a GGUF's metadata, chat template included.

  Errors: UserError for a tokenizer model or a pre-tokenizer that is not known here: a near miss would give wrong ids in silence.
  """
  from transformers import PreTrainedTokenizerFast
  kind, tokens = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
  if not tokens:
    raise UserError(f"{path} has no tokenizer", wanted="a GGUF with tokenizer fields", knob="data.tokenizer")
  if kind == "gpt2":
    backend = _byte_level(fields, tokens, path)
  elif kind == "llama":
    backend = _sentencepiece(fields, tokens, path)
  else:
    raise UserError(f"{path} has tokenizer model {kind!r}", wanted="gpt2 or llama", knob="data.tokenizer to the model's HF directory")
  _add_tokens(backend, fields, tokens)
  _add_ends(backend, fields, tokens, kind)
  roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
  ids = {role: fields.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
  return PreTrainedTokenizerFast(
      tokenizer_object=backend, **{role: tokens[i] for role, i in ids.items() if i is not None},
      chat_template=fields.get("tokenizer.chat_template"), clean_up_tokenization_spaces=False,
      model_max_length=int(fields.get(f"{fields.get('general.architecture')}.context_length", 1 << 30)))


def _byte_level(fields, tokens, path):
  """GPT-2's kind of BPE; the pre-tokenizer goes by name."""
  from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
  pre = fields.get("tokenizer.ggml.pre")
  if pre != "smollm" and pre not in GPT2_LIKE and pre not in BYTE_LEVEL:
    known = ", ".join(["smollm", *GPT2_LIKE, *BYTE_LEVEL])
    raise UserError(f"{path} has pre-tokenizer {pre!r}", wanted=f"one of {known}", knob="data.tokenizer to the model's HF directory")
  merges = [tuple(m.split(" ", 1)) for m in fields["tokenizer.ggml.merges"]]
  vocab = {token: i for i, token in enumerate(tokens)}
  backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=BYTE_LEVEL.get(pre) == LLAMA3_SPLIT))
  if pre == "qwen2":
    backend.normalizer = normalizers.NFC()
  if pre in BYTE_LEVEL:
    first: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(BYTE_LEVEL[pre]), behavior="isolated")]
  else:
    first = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in BYTE_LEVEL)
  backend.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentencepiece(fields, tokens, path):
  """Llama 2's kind of BPE: the merges follow from the scores, unknown characters fall back to bytes."""
  from tokenizers import Tokenizer, decoders, models, normalizers
  scores = fields.get("tokenizer.ggml.scores")
  if not scores:
    raise UserError(f"{path} has a llama tokenizer without scores", wanted="a whole file",
                    knob="data.tokenizer to the model's HF directory")
  vocab = {token: i for i, token in enumerate(tokens)}
  types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
  unknown = next((token for token, t in zip(tokens, types) if t == UNKNOWN), None)
  backend = Tokenizer(models.BPE(vocab=vocab, merges=_merges(vocab, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True))
  space = fields.get("tokenizer.ggml.add_space_prefix", True)
  backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * bool(space) + [normalizers.Replace(" ", "▁")])
  decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  backend.decoder = decoders.Sequence(decoder + [decoders.Strip(" ", 1, 0)] * bool(space))
  return backend


def _merges(vocab, scores):
  """Every way to make a token of two others, the best score first, as sentencepiece would pick them."""
  found = []
  for token, i in vocab.items():
    pairs = [(token[:k], token[k:]) for k in range(1, len(token)) if token[:k] in vocab and token[k:] in vocab]
    found += [(-scores[i], vocab[a], vocab[b], a, b) for a, b in pairs]
  return [(a, b) for _, _, _, a, b in sorted(found)]


def _add_tokens(backend, fields, tokens):
  """Control tokens are special; user-defined ones are matched whole but are text."""
  from tokenizers import AddedToken
  types = fields.get("tokenizer.ggml.token_type") or []
  marked = [AddedToken(token, special=t != USER_DEFINED, normalized=False)
            for token, t in zip(tokens, types) if t in (CONTROL, USER_DEFINED, UNKNOWN)]
  backend.add_special_tokens([t for t in marked if t.special])
  backend.add_tokens([t for t in marked if not t.special])


def _add_ends(backend, fields, tokens, kind):
  """BOS in front and EOS behind, where the file asks for them (or its kind does by default)."""
  from tokenizers import processors
  by_default = kind == "llama" or fields.get("tokenizer.ggml.pre") in ADDS_BOS
  bos = fields.get("tokenizer.ggml.bos_token_id") if fields.get("tokenizer.ggml.add_bos_token", by_default) else None
  eos = fields.get("tokenizer.ggml.eos_token_id") if fields.get("tokenizer.ggml.add_eos_token", False) else None
  front, behind = ([tokens[i]] if i is not None else [] for i in (bos, eos))
  if front or behind:
    backend.post_processor = processors.TemplateProcessing(
        single=[*front, "$A", *behind], pair=[*front, "$A", *behind, *(f"{t}:1" for t in front), "$B:1", *(f"{t}:1" for t in behind)],
        special_tokens=[(tokens[i], i) for i in (bos, eos) if i is not None])
