"""The starting model on its mesh: read leaf by leaf and layer by layer, cast or quantised on the way, never whole on the host."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxsft import sharding
from jaxsft.convert.load import check_tokenizer, load_params
from jaxsft.convert.orbax import run_meta
from jaxsft.convert.source import Source, open_source
from jaxsft.data.tokenizer import load_tokenizer
from jaxsft.errors import UserError
from jaxsft.models import decoder, families
from jaxsft.models.config import ModelConfig
from jaxsft.transforms import nf4
from jaxsft.transforms import tree as trees


class Base(NamedTuple):
  """What a run starts from. source is None for random weights."""
  cfg: ModelConfig
  source: Source | None
  tokenizer: Any

  def meta(self, c, template, witness: dict) -> dict:
    """What each checkpoint says of the model, so that it can be exported without the config (convert.orbax.run_meta)."""
    lora = {key: c.lora[key] for key in ("rank", "alpha", "dropout", "rslora")} if c.lora.rank else None
    quantised = {"targets": c.nf4.targets, "double_quant": c.nf4.double_quant} if c.nf4.targets else None
    return run_meta(self.cfg, self.source, tokenizer=c.data.tokenizer, chat_template=template.chat_template,
                    end_of_turn_ids=(template.end_of_turn_id,), lora=lora, nf4=quantised, witness=witness)


def open_base(c) -> Base:
  """Config, source and tokenizer of c.model; no weights are read.

  Errors: UserError for whatever is wrong with the model or its tokenizer, and for a rule that finds no leaf of it.
  """
  source = open_source(c.model.path, c.model.revision) if c.model.path else None
  cfg = ModelConfig.from_hf(source.config if source else c.model.shape.to_dict(), c.model.path or "model.shape")
  if c.data.tokenizer:
    tokenizer = load_tokenizer(c.data.tokenizer)
  elif source:
    tokenizer = source.tokenizer()
  else:
    raise UserError("a random model has no tokenizer", wanted="a tokenizer ('bytes' is built in)", knob="data.tokenizer")
  check_tokenizer(tokenizer, cfg)
  _check_rules(c, cfg)
  return Base(cfg, source, tokenizer)


def _check_rules(c, cfg):
  """Every rule of the config finds something: known from the names alone, before minutes of loading."""
  paths = list(families.shapes(cfg))
  kernels = trees.kernels(paths)
  for wanted, regex, knob, among in ((c.lora.rank, c.lora.targets, "lora.targets", kernels), (c.nf4.targets, c.nf4.targets, "nf4.targets", kernels),
                                     (c.freeze, c.freeze, "freeze", paths)):
    if wanted:
      trees.matching(among, regex, knob)


def load(c, base: Base, mesh):
  """The parameter tree on the mesh: c.nf4.targets as NF4Array, the rest in c.model.base_dtype.

  Errors: what reading raises.
  """
  make_leaf = functools.partial(_leaf, c, mesh)
  if base.source:
    return load_params(base.source, base.cfg, make_leaf)
  return _random(base.cfg, c.seed, make_leaf)


def _random(cfg, seed, make_leaf):
  """Random weights through the same door, so that a smoke run walks the real path."""
  params = dict(trees.flatten(decoder.init_params(cfg, jax.random.key(seed))))
  leaves = {}
  for name in families.leaves(cfg):
    array = np.asarray(params[name.path])
    read = lambda layer, array=array: array if layer is None else array[layer]
    leaves[name.path] = make_leaf(name.path, array.shape[1:] if name.stacked else array.shape, cfg.num_hidden_layers if name.stacked else None, read)
  return trees.unflatten(leaves)


def _leaf(c, mesh, path, shape, layers, read):
  quantised = bool(c.nf4.targets) and bool(trees.kernels([path])) and re.search(c.nf4.targets, path)
  convert = (lambda x: nf4.quantise(jnp.asarray(x), c.nf4.double_quant)) if quantised else functools.partial(_cast, dtype=jnp.dtype(c.model.base_dtype))
  if layers is None:
    return _placed(path, convert(read(None)), mesh)
  return _stacked(path, (convert(read(layer)) for layer in range(layers)), layers, mesh)


def _cast(x, dtype):
  return np.asarray(x).astype(dtype)


def _placed(path, leaf, mesh):
  where = sharding.shardings(trees.unflatten({path: leaf}), mesh)
  return jax.device_put(leaf, trees.get(where, path))


def _stacked(path, layer_leaves, layers, mesh):
  """One [L, ...] leaf, filled in place on the device: the host holds one layer at a time."""
  stack: list[jax.Array] = []
  for number, leaf in enumerate(layer_leaves):
    parts, treedef = jax.tree.flatten(leaf)
    if not stack:
      abstract = jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct((layers, *np.shape(x)), x.dtype) for x in parts])
      where = jax.tree.leaves(sharding.shardings(trees.unflatten({path: abstract}), mesh), is_leaf=lambda x: isinstance(x, NamedSharding))
      stack = [jnp.zeros(x.shape, x.dtype, device=s) for x, s in zip(jax.tree.leaves(abstract), where)]
    stack = [_write(buffer, part, number) for buffer, part in zip(stack, parts)]
  return jax.tree.unflatten(treedef, stack)


@functools.partial(jax.jit, donate_argnums=0)
def _write(buffer, part, number):
  return jax.lax.dynamic_update_index_in_dim(buffer, part, number, 0)
