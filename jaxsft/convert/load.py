"""From a Source into a parameter tree: every tensor checked first, then read leaf by leaf and layer by layer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsft.convert.hf import hf_entries
from jaxsft.convert.source import Source
from jaxsft.errors import UserError
from jaxsft.models import families
from jaxsft.models.config import ModelConfig
from jaxsft.transforms import nf4, tree


@dataclasses.dataclass(frozen=True)
class Read:
  """How one leaf is read. read(layer), or read(None) where nothing is stacked: one array in our orientation, in the file's dtype, possibly a
  view into the file that lives as long as the array; float32 where the file holds NF4.

  as_nf4(layer, double_quant): the kernel as NF4: the file's own codes and scales where it holds them, else quantised here.
  doubles: of each layer, whether the file's NF4 is doubly quantised, None where it holds no NF4; empty: no layer does.
  """
  array: Callable[[int | None], np.ndarray]
  stored: Callable[[int | None], nf4.NF4Array | None] = lambda layer: None
  doubles: tuple[bool | None, ...] = ()

  def __call__(self, layer: int | None) -> np.ndarray:
    return self.array(layer)

  def as_nf4(self, layer: int | None, double_quant: bool) -> nf4.NF4Array:
    """One layer as NF4; of a leaf that the file holds in NF4, double_quant is the file's: layers that it does not hold so must fit the others."""
    held = self.stored(layer)
    return held if held is not None else nf4.quantise(jnp.asarray(self.array(layer)), self.double_quant(double_quant))

  def double_quant(self, asked: bool) -> bool:
    """Whether the leaf has doubly quantised scales: as the file has, else as asked."""
    return next((double for double in self.doubles if double is not None), asked)


def wants_nf4(targets: str, path: str) -> bool:
  """Whether the rule nf4.targets names this leaf: a kernel, and not the output projection."""
  return bool(targets) and bool(tree.kernels([path])) and bool(re.search(targets, path))


MakeLeaf = Callable[[str, tuple[int, ...], int | None, Read], Any]
IGNORED = re.compile(r"rotary_emb\.inv_freq$|masked_bias$|attn\.bias$")  # constants that old files keep
BIAS = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.bias$")


def load_params(source: Source, cfg: ModelConfig, make_leaf: MakeLeaf | None = None) -> dict[str, Any]:
  """The parameter tree of `cfg` out of `source`.

  make_leaf(path, shape, layers, read) makes one leaf: `shape` is ONE layer's, in our orientation (kernels [in, out]); `layers` is L for a
  stacked leaf and None for one that is not; read gives one array of that shape (`Read`). Default: numpy stacks in the file's dtype (`stack()`).
  Memory: nothing here outlives the call of make_leaf. Errors: UserError for a tensor that is missing, misshapen or unknown to the family.
  """
  check_tensors(source, cfg)
  make_leaf = make_leaf or stack()
  return tree.unflatten({path: make_leaf(path, shape, layers, read) for path, shape, layers, read in leaf_reads(source, cfg)})


def leaf_reads(source: Source, cfg: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], int | None, Read]]:
  """(path, one layer's shape, layers, read) of every leaf, as `load_params` hands them to make_leaf."""
  sizes = families.sizes(cfg)
  for name in families.leaves(cfg):
    yield name.path, tuple(sizes[d] for d in name.dims), cfg.num_hidden_layers if name.stacked else None, _reader(source, name, cfg)


def _reader(source, name, cfg) -> Read:
  def array(layer: int | None) -> np.ndarray:
    found = source.read(name.hf.format(layer=layer))
    return found.T if name.transpose else found

  def stored(layer: int | None) -> nf4.NF4Array | None:
    hf = name.hf.format(layer=layer)
    return source.read_nf4(hf) if hf in source.nf4 else None
  doubles = tuple(source.nf4.get(name.hf.format(layer=layer)) for layer in (range(cfg.num_hidden_layers) if name.stacked else (None,)))
  return Read(array, stored, doubles if any(double is not None for double in doubles) else ())


def nf4_notes(source: Source, cfg: ModelConfig, targets: str, double_quant: bool) -> list[str]:
  """What becomes of weights that the source holds in NF4, a line each, where it is not simply "they stay": said before they are read."""
  reads = {path: read for path, _, _, read in leaf_reads(source, cfg) if read.doubles}
  held = {path: sum(double is not None for double in read.doubles) for path, read in reads.items()}
  plain = {path: read.doubles.count(None) for path, read in reads.items() if wants_nf4(targets, path)}
  dequantised = sum(count for path, count in held.items() if path not in plain)
  notes = [f"{dequantised} weights that {source.path} holds in NF4 are dequantised (nf4.targets keeps what it names)"] if dequantised else []
  if sum(plain.values()):
    notes.append(f"{sum(plain.values())} weights that {source.path} does not hold in NF4 are quantised: nf4.targets names them, and other layers' are")
  if any(reads[path].double_quant(double_quant) != double_quant for path in plain):
    notes.append(f"{source.path} holds NF4 with{'out' * double_quant} double quantisation: it stays so, whatever nf4.double_quant says")
  return notes


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
