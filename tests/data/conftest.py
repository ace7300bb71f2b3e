"""Tokenizers of the data tests: real ones from the shared folder, and toys whose every token can be told by eye."""

import copy
import types

import pytest


@pytest.fixture(scope="session")
def qwen(shared):
  import transformers
  return transformers.AutoTokenizer.from_pretrained(shared / "data/tokenizers/qwen2.5")


@pytest.fixture(scope="session")
def llama2(shared):
  """Llama-2's SentencePiece model as its own class reads it: BOS, EOS, no habit of adding them."""
  import transformers
  return transformers.LlamaTokenizer.from_pretrained(shared / "data/tokenizers/llama2")


@pytest.fixture(scope="session")
def llama2_bos(shared):
  """The same with Llama-2's habit: a text is encoded with <s> in front."""
  import transformers
  return transformers.LlamaTokenizer.from_pretrained(shared / "data/tokenizers/llama2", add_bos_token=True)


def byte_tokenizer(specials=("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"), bos_habit=True, chat_template=None):
  """One token a byte, each special string one token; <s> in front when `bos_habit`."""
  import tokenizers
  import transformers
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(list(specials))
  if bos_habit:
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
  named = {role: text for role, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>")) if text in specials}
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)
  tokenizer.chat_template = chat_template
  return tokenizer


@pytest.fixture(scope="session")
def make_bytes():
  return byte_tokenizer


@pytest.fixture(scope="session")
def bytes_bos():
  return byte_tokenizer()


def settings(path="", eval_path="", **over):
  """The config's data part with these changes, as configs/common.py lays it down."""
  def source(place):
    return types.SimpleNamespace(path=str(place), format="auto", split="train", revision="", rows=0)
  c = types.SimpleNamespace(train=source(path), eval=source(eval_path), eval_share=0.0, template="chatml", position="pre", tokenizer="", length=256,
                            pack=True, train_on="assistant", long_rows="drop", workers=0)
  for name, value in over.items():
    assert hasattr(c, name), name
    setattr(c, name, value)
  return c


@pytest.fixture
def data_settings():
  return lambda *args, **over: copy.deepcopy(settings(*args, **over))
