"""The starting model on its mesh: read leaf by leaf and layer by layer, cast or quantised on the way, never whole on the host."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxsft import arithmetic, sharding
from jaxsft.convert.load import Read, check_tokenizer, load_params, nf4_notes, wants_nf4
from jaxsft.convert.orbax import run_meta
from jaxsft.convert.source import Source, open_source
from jaxsft.data.tokenizer import load_tokenizer
from jaxsft.errors import UserError
from jaxsft.models import decoder, families
from jaxsft.models.config import ModelConfig
from jaxsft.transforms import tree as trees

TRAINED_DTYPE = {"float32": "float32", "bfloat16_stochastic": "bfloat16"}


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
                    end_of_turn_ids=(template.end_of_turn_id,), lora=lora, nf4=quantised, witness=witness) | {"position": template.position}


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
  if c.data.length > cfg.max_position_embeddings and cfg.rope_parameters["rope_type"] != "dynamic":
    raise UserError(f"data.length is {c.data.length} and the model knows {cfg.max_position_embeddings} positions", wanted="at most that",
                    knob="data.length, or a rope scaling in the model's config.json")
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


def load(c, base: Base, mesh, init=None, trained: Callable[[str], bool] = lambda path: False):
  """The parameter tree on the mesh: c.nf4.targets as NF4Array, the rest in c.model.base_dtype.

  Kernels that the file holds in NF4 stay what they are, to the bit, where c.nf4.targets names them, and are dequantised elsewhere.
  trained(path): leaves that are trained themselves, and have c.optim.state's type whatever base_dtype is.
  init: the method's; with it, the bytes that each device will hold are told first (arithmetic.tell).
  Errors: what reading raises, and what arithmetic refuses.
  """
  if init:
    arithmetic.tell(c, base.cfg, mesh, init, base.source, functools.partial(_dtype, c, trained))
  make_leaf = functools.partial(_leaf, c, mesh, trained)
  if base.source:
    for note in nf4_notes(base.source, base.cfg, c.nf4.targets, c.nf4.double_quant):
      print(f"note: {note}", file=sys.stderr)
    return load_params(base.source, base.cfg, make_leaf)
  return _random(base.cfg, c.seed, make_leaf)


def _random(cfg, seed, make_leaf):
  """Random weights through the same door, so that a smoke run walks the real path."""
  params = dict(trees.flatten(decoder.init_params(cfg, jax.random.key(seed))))
  leaves = {}
  for name in families.leaves(cfg):
    array = np.asarray(params[name.path])
    read = Read(functools.partial(_layer_of, array))
    leaves[name.path] = make_leaf(name.path, array.shape[1:] if name.stacked else array.shape, cfg.num_hidden_layers if name.stacked else None, read)
  return trees.unflatten(leaves)


def _layer_of(array, layer):
  return array if layer is None else array[layer]


def _dtype(c, trained, path):
  return jnp.dtype(TRAINED_DTYPE[c.optim.state] if trained(path) else c.model.base_dtype)


def _leaf(c, mesh, trained, path, shape, layers, read):
  def one(layer):
    return read.as_nf4(layer, c.nf4.double_quant) if wants_nf4(c.nf4.targets, path) else _cast(read(layer), _dtype(c, trained, path))
  if layers is None:
    return _placed(path, one(None), mesh)
  return _stacked(path, (one(layer) for layer in range(layers)), layers, mesh)


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
