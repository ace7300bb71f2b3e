"""From a Source into a parameter tree: every tensor checked first, then read leaf by leaf and layer by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxsft.convert.hf import hf_entries
from jaxsft.convert.source import Source
from jaxsft.errors import UserError
from jaxsft.models import families
from jaxsft.models.config import ModelConfig
from jaxsft.transforms import tree

Read = Callable[[int | None], np.ndarray]
MakeLeaf = Callable[[str, tuple[int, ...], int | None, Read], Any]
IGNORED = re.compile(r"rotary_emb\.inv_freq$|masked_bias$|attn\.bias$")  # constants that old files keep
BIAS = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.bias$")


def load_params(source: Source, cfg: ModelConfig, make_leaf: MakeLeaf | None = None) -> dict[str, Any]:
  """The parameter tree of `cfg` out of `source`.

  make_leaf(path, shape, layers, read) makes one leaf: `shape` is ONE layer's, in our orientation (kernels [in, out]); `layers` is L for a
  stacked leaf and None for one that is not; read(layer), or read(None), gives one array of that shape in the file's dtype, possibly a
  view into the file that lives as long as the array. Default: numpy stacks in the file's dtype (`stack()`).
  Memory: nothing here outlives the call of make_leaf. Errors: UserError for a tensor that is missing, misshapen or unknown to the family.
  """
  check_tensors(source, cfg)
  make_leaf = make_leaf or stack()
  return tree.unflatten({path: make_leaf(path, shape, layers, read) for path, shape, layers, read in leaf_reads(source, cfg)})


def leaf_reads(source: Source, cfg: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], int | None, Read]]:
  """(path, one layer's shape, layers, read) of every leaf, as `load_params` hands them to make_leaf."""
  sizes = families.sizes(cfg)
  for name in families.leaves(cfg):
    yield name.path, tuple(sizes[d] for d in name.dims), cfg.num_hidden_layers if name.stacked else None, _reader(source, name)


def _reader(source, name) -> Read:
  def read(layer: int | None) -> np.ndarray:
    array = source.read(name.hf.format(layer=layer))
    return array.T if name.transpose else array
  return read


def stack(dtype=None) -> MakeLeaf:
  """A make_leaf: plain numpy arrays, stacked, cast to `dtype` (None: the file's) a layer at a time."""
  def make_leaf(path, shape, layers, read):
    if layers is None:
      array = read(None)
      return np.array(array, dtype or array.dtype)
    first = read(0)
    out = np.empty((layers, *shape), dtype or first.dtype)
    for layer in range(layers):
      out[layer] = first if layer == 0 else read(layer)
      first = None
    return out
  return make_leaf


def check_tensors(source: Source, cfg: ModelConfig) -> None:
  """Every tensor of the config is there in its shape, and nothing is left over that the model would silently do without.

  Errors: UserError naming file, tensor and what to change. Reads no weights (but for a second head, see `_check_tied`).
  """
  present = set(source.names())
  wanted = {hf: (name, shape) for hf, name, _, shape in hf_entries(cfg)}
  missing = [hf for hf in wanted if hf not in present]
  if missing:
    tied = " or tie_word_embeddings to true in config.json" if missing == ["lm_head.weight"] else ""
    raise UserError(f"{source.path} lacks {len(missing)} of {len(wanted)} tensors, {missing[0]} first",
                    wanted=f"every tensor of a {cfg.num_hidden_layers}-layer {cfg.model_type}", knob=f"model.path to a whole model{tied}")
  for hf, (name, shape) in wanted.items():
    if source.shape(hf) != shape:
      raise UserError(f"{source.where(hf)}: {hf} has shape {source.shape(hf)}", wanted=f"{shape} by config.json ({_reason(name)})",
                      knob="model.path to weights and config.json that belong together")
  _check_rest(source, cfg, [name for name in sorted(present - set(wanted)) if not IGNORED.search(name)])


def _reason(name):
  keys = {"V": "vocab_size", "D": "hidden_size", "F": "intermediate_size", "HK": "num_attention_heads * head_dim",
          "NK": "num_key_value_heads * head_dim", "K": "head_dim", "QKV": "(num_attention_heads + 2 num_key_value_heads) * head_dim",
          "GU": "2 * intermediate_size"}
  return ", ".join(dict.fromkeys(keys[d] for d in name.dims))


def _check_rest(source, cfg, rest):
  if cfg.tie_word_embeddings and "lm_head.weight" in rest:
    rest.remove("lm_head.weight")
    _check_tied(source)
  if not rest:
    return
  if all(BIAS.search(name) for name in rest) and families.FAMILIES[cfg.model_type].mlp_bias:
    knob = "attention_bias or mlp_bias to true in config.json"
  else:
    knob = "model.path to weights and config.json that belong together"
  raise UserError(f"{source.where(rest[0])}: {len(rest)} tensors are no part of this {cfg.model_type}, {rest[0]} first",
                  wanted=f"the tensors of {cfg.num_hidden_layers} layers that config.json describes", knob=knob)


def _check_tied(source):
  """A tied model may store its head all the same; if it differs from the embedding, dropping it would change the model."""
  head, table = source.read("lm_head.weight"), source.read("model.embed_tokens.weight")
  same = head.shape == table.shape and all(np.array_equal(head[i:i + 4096], table[i:i + 4096]) for i in range(0, len(head), 4096))
  if not same:
    raise UserError(f"{source.where('lm_head.weight')}: lm_head.weight differs from model.embed_tokens.weight, and config.json ties them",
                    wanted="one of the two", knob="tie_word_embeddings to false in config.json")


def check_tokenizer(tokenizer, cfg: ModelConfig) -> None:
  """No id of the tokenizer lies beyond the embedding. UserError names the token."""
  token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
  if last >= cfg.vocab_size:
    raise UserError(f"the tokenizer has token {token!r} with id {last}, and the embedding has {cfg.vocab_size} rows",
                    wanted="a tokenizer whose ids are all below vocab_size", knob="data.tokenizer to the model's own")
