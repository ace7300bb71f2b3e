"""Every template with every real tokenizer it fits: rows equal transformers', contents stand in the text once, control strings stay text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsft.data.formats import Conversation
from jaxsft.data.named import NAMED
from jaxsft.data.template import get_template
from jaxsft.data.tokenise import encode

LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
PAIRS = [*((name, which) for which in ("llama2", "chinese_llama") for name in ("llama2", "vicuna", "zephyr", "alpaca", "mistral_v1")),
         ("llama3", "llama3"), *((name, "qwen2.5") for name in ("chatml", "qwen2", "qwen2_5", "qwen3", "tokenizer")),
         ("gemma", "bytes"), ("phi3", "bytes"), ("mistral_v3", "bytes"), ("mistral_v7", "bytes"), ("mistral_tekken", "bytes")]


@pytest.fixture(scope="module")
def tokenizers(shared, tmp_path_factory, make_bytes, llama2, qwen):
  import transformers
  from transformers.convert_slow_tokenizer import TikTokenConverter
  folder = tmp_path_factory.mktemp("chinese")
  (folder / "tokenizer.model").write_bytes((shared / "data/tokenizers/chinese_llama/chinese_sp.model").read_bytes())
  tiktoken = TikTokenConverter(str(shared / "data/tokenizers/llama3/tokenizer.model"), extra_special_tokens=list(LLAMA3)).converted()
  every = dict.fromkeys(("<s>", "</s>", *(t for spec in NAMED.values() for t in (spec.bos, spec.end_of_turn, *spec.tokens) if t)))
  return {"llama2": llama2, "chinese_llama": transformers.LlamaTokenizer.from_pretrained(folder), "qwen2.5": qwen,
          "llama3": transformers.PreTrainedTokenizerFast(tokenizer_object=tiktoken, bos_token=LLAMA3[0], eos_token=LLAMA3[1]),
          "bytes": make_bytes(tuple(every), bos_habit=False)}


def test_every_named_template_is_in_the_table():
  assert {name for name, _ in PAIRS} == {*NAMED, "tokenizer"}


def words(controls):
  """Contents with control strings, parts of them, and what merges with its neighbours."""
  part = st.sampled_from([*controls, *(c[:-1] for c in controls), "a", " ", "\n", "é", "你好", "😀", "\u200d", "1", "'s", "<", "|>", "[/", "##"])
  return st.lists(part, min_size=1, max_size=5).map("".join).filter(lambda s: s.strip())


def messages_of(contents):
  return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize("name, which", PAIRS)
def test_control_strings_in_contents_never_become_control_tokens(name, which, tokenizers):
  tokenizer = tokenizers[which]
  template = get_template(name, tokenizer)
  special = np.array(sorted(i for i, t in tokenizer.added_tokens_decoder.items() if t.special and i != tokenizer.unk_token_id))
  controls = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]

  def of_the_template(tokens):
    return tokens[np.isin(tokens, special)].tolist()

  @settings(deadline=None, max_examples=60)
  @given(contents=st.lists(words(controls), min_size=4, max_size=4))
  def check(contents):
    messages = messages_of(contents)
    example = encode(Conversation(messages), template, tokenizer)
    assert of_the_template(example["tokens"]) == of_the_template(encode(Conversation(messages_of("abcd")), template, tokenizer)["tokens"])
    ends = np.flatnonzero((example["tokens"] == template.end_of_turn_id) & (example["weights"] > 0))
    assert len(ends) == 2
    text = template.render(messages)
    for (a, b), content in zip(text.spans, contents[1::2]):
      assert text.text[a:b].removesuffix(template.end_of_turn).strip() == content.strip()
    mask = np.concatenate([[0], example["weights"] > 0, [0]])
    runs = np.flatnonzero(np.diff(mask)).reshape(-1, 2)
    assert len(runs) == 2 and [b - 1 for _, b in runs] == ends.tolist()
  check()


@pytest.mark.parametrize("name, which", PAIRS)
def test_rows_equal_transformers_own_and_hold_each_content_once(name, which, tokenizers):
  tokenizer = tokenizers[which]
  template = get_template(name, tokenizer)
  plain = st.lists(st.sampled_from(["a", "Bc", " ", "\n", "é", "你好", "😀", "12", "'s", "."]), min_size=1, max_size=6).map("".join).filter(str.strip)

  @settings(deadline=None, max_examples=40)
  @given(contents=st.lists(plain, min_size=4, max_size=4))
  def check(contents):
    messages = messages_of([f"<{i}>{content}</{i}>" for i, content in enumerate(contents)])
    example = encode(Conversation(messages), template, tokenizer)
    assert example["tokens"].tolist() == tokenizer.apply_chat_template(messages, chat_template=template.chat_template)["input_ids"]
    assert set(np.unique(example["weights"])) == {0.0, 1.0}
    text = template.render(messages).text
    assert [text.count(m["content"]) for m in messages] == [1] * 4
    prompt = template.render(messages[:3], add_generation_prompt=True).text
    assert text.startswith(prompt)                # what is asked at inference is the beginning of what is trained
  check()
