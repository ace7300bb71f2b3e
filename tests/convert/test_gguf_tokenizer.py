"""Tokenizers rebuilt from GGUF fields, against the tokenizers those fields were taken from."""

import base64
import json

import pytest

from jaxsft.convert import hf
from jaxsft.convert.gguf_tokenizer import LLAMA3_SPLIT, build
from jaxsft.errors import UserError

TEXTS = ["Hello, world! It's 2024; I'll pay $3.50.", "  two  blanks\n\n\ttab\r\n", "你好，世界。今天天气不错！",
         "emoji 😀👩‍👩‍👧 and ½ ² ٣",
         "def f(x):\n    return x[0] != 'a'  # ok\n", "naïve café Größe", "1234567890 12 345", "", " ", "\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_qwen2_ids_equal_transformers(qwen2, text):
  tokenizer, theirs = qwen2
  chat = f"<|im_start|>user\n{text}<|im_end|>\n<tool_call>"
  assert tokenizer(chat).input_ids == theirs(chat).input_ids
  assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_qwen2_composes_characters(qwen2):
  tokenizer, theirs = qwen2
  decomposed = "cafe\u0301 A\u030a"
  assert tokenizer(decomposed).input_ids == theirs(decomposed).input_ids
  assert tokenizer.decode(tokenizer(decomposed).input_ids) == "caf\u00e9 \u00c5"


@pytest.fixture(scope="module")
def qwen2(shared):
  folder = shared / "data/tokenizers/qwen2.5"
  return build(qwen_fields(folder), folder), hf.load_tokenizer(folder)


def qwen_fields(folder):
  vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
  added = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
  tokens, types = sorted(vocab, key=vocab.get), [1] * len(vocab)
  for i in sorted(added, key=int):
    assert int(i) == len(tokens)
    tokens.append(added[i]["content"])
    types.append(3 if added[i]["special"] else 4)
  merges = [line for line in (folder / "merges.txt").read_text(encoding="utf-8").split("\n") if line and not line.startswith("#version")]
  return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": tokens,
          "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges,
          "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"), "tokenizer.ggml.add_bos_token": False}


@pytest.fixture(scope="module")
def llama2(shared):
  """(our tokenizer from the fields that llama.cpp would write, sentencepiece's own)."""
  import sentencepiece
  model = sentencepiece.SentencePieceProcessor(model_file=str(shared / "data/tokenizers/llama2/tokenizer.model"))
  count = model.get_piece_size()
  kind = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in range(count)]
  fields = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(count)],
            "tokenizer.ggml.scores": [model.get_score(i) for i in range(count)], "tokenizer.ggml.token_type": kind,
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}
  return build(fields, "llama2.gguf"), model


@pytest.mark.parametrize("text", TEXTS)
def test_llama2_ids_equal_sentencepiece(llama2, text):
  ours, theirs = llama2
  assert ours(text, add_special_tokens=False).input_ids == theirs.encode(text)
  assert ours(text).input_ids == [1, *theirs.encode(text)]
  assert ours.decode(ours(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", TEXTS)
def test_llama3_ids_equal_a_plain_bpe_over_its_ranks(llama3, text):
  ours, ranks = llama3
  assert ours(text, add_special_tokens=False).input_ids == rank_bpe(text, ranks)
  assert ours(text + "<|eot_id|>").input_ids == [128000, *rank_bpe(text, ranks), 128001]
  assert ours.decode(ours(text, add_special_tokens=False).input_ids) == text


def test_llama3_words_that_no_merge_reaches(llama3):
  """A word that is a token is that token, even where its merges would end elsewhere (ignore_merges)."""
  import regex
  ours, ranks = llama3
  odd = []
  for token, i in ranks.items():
    text = token.decode(errors="ignore")
    if len(token) > 12 and text.encode() == token and regex.findall(LLAMA3_SPLIT, text) == [text] and len(bpe_parts(token, ranks, i)) > 2:
      odd.append((text, i))
  assert odd
  for text, i in odd[:50]:
    assert ours(text, add_special_tokens=False).input_ids == [i]


@pytest.fixture(scope="module")
def llama3(shared):
  from transformers.convert_slow_tokenizer import bytes_to_unicode
  lines = (shared / "data/tokenizers/llama3/tokenizer.model").read_bytes().splitlines()
  ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
  letter = bytes_to_unicode()
  spell = lambda token: "".join(letter[b] for b in token)
  merges = []
  for token in sorted(ranks, key=ranks.get):
    if len(token) > 1:
      halves = bpe_parts(token, ranks, stop=ranks[token])
      if len(halves) == 2:
        merges.append(" ".join(map(spell, halves)))
  tokens = [spell(token) for token in sorted(ranks, key=ranks.get)] + ["<|begin_of_text|>", "<|eot_id|>"]
  fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * len(ranks) + [3, 3], "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": 128000, "tokenizer.ggml.eos_token_id": 128001}
  return build(fields, "llama3.gguf"), ranks


def bpe_parts(word, ranks, stop=None):
  """The bytes of `word` merged by the lowest rank first, up to but without rank `stop`."""
  parts = [bytes([b]) for b in word]
  while True:
    joined = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
    pairs = [pair for pair in joined if stop is None or pair[0] < stop]
    if not pairs:
      return parts
    i = min(pairs)[1]
    parts[i:i + 2] = [parts[i] + parts[i + 1]]


def rank_bpe(text, ranks):
  import regex
  words = (word.encode() for word in regex.findall(LLAMA3_SPLIT, text))
  return [i for word in words for i in ([ranks[word]] if word in ranks else [ranks[part] for part in bpe_parts(word, ranks)])]


def smollm_fields(**over):
  """A byte-level vocabulary of the 256 bytes, "th", "the", and three added tokens in front."""
  from transformers.convert_slow_tokenizer import bytes_to_unicode
  tokens = ["<|endoftext|>", "<|im_start|>", "<think>", *bytes_to_unicode().values(), "th", "the", "12"]
  return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
          "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(tokens) - 3), "tokenizer.ggml.merges": ["t h", "th e", "1 2"],
          "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.padding_token_id": 0,
          "tokenizer.chat_template": "{{ messages[0]['content'] }}", "general.architecture": "llama", "llama.context_length": 77} | over


@pytest.mark.parametrize("text", TEXTS)
def test_smollm_splits_every_digit_and_loses_nothing(text):
  tokenizer = build(smollm_fields(), "x.gguf")
  ids = tokenizer(text).input_ids
  assert tokenizer.decode(ids) == text
  assert tokenizer.convert_tokens_to_ids("12") not in ids
  assert tokenizer.tokenize("12") == ["1", "2"]
  assert build(smollm_fields(**{"tokenizer.ggml.pre": "gpt-2"}), "x.gguf").tokenize("12") == ["12"]


def test_added_tokens_template_and_limits():
  tokenizer = build(smollm_fields(), "x.gguf")
  assert tokenizer("<|im_start|>the<think>").input_ids == [1, tokenizer.convert_tokens_to_ids("the"), 2]
  special = {t.content: t.special for t in tokenizer.added_tokens_decoder.values()}
  assert special == {"<|endoftext|>": True, "<|im_start|>": True, "<think>": False}
  assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_start|>", "<|endoftext|>",
                                                                                                       "<|endoftext|>", 77)
  assert tokenizer.decode([1, 2, 3], skip_special_tokens=True) == "<think>!"
  assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_bos_where_the_file_asks():
  assert build(smollm_fields(**{"tokenizer.ggml.add_bos_token": True}), "x.gguf")("the").input_ids[0] == 1
  assert build(smollm_fields(**{"tokenizer.ggml.add_bos_token": False}), "x.gguf")("the").input_ids[0] != 1


@pytest.mark.parametrize("change, words", [
    ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken'; wanted one of smollm"),
    ({"tokenizer.ggml.model": "t5"}, "tokenizer model 't5'; wanted gpt2 or llama"),
    ({"tokenizer.ggml.tokens": None}, "no tokenizer"),
    ({"tokenizer.ggml.model": "llama"}, "without scores"),
])
def test_what_is_not_known_is_refused(change, words):
  with pytest.raises(UserError, match=words):
    build(smollm_fields(**change), "x.gguf")
