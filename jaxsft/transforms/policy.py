"""What is trained of a model, as data: full, LoRA and QLoRA are three ways to split one parameter tree and to join it again."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxsft.batch import ROW_IDS, next_token_targets
from jaxsft.errors import UserError
from jaxsft.kernels import draws
from jaxsft.losses import token_nll
from jaxsft.transforms import lora, neftune
from jaxsft.transforms import tree as trees

EMBEDDING = "embed_tokens/embedding"


class Policy(NamedTuple):
  """A model with a trained part. Both trees are nested dicts; `trainable` None is the model before any training (adapters off).

  split(params, key) -> (trainable, frozen)
  hidden(trainable, frozen, batch, row_seeds_B=None) -> (hidden_BTD, head_DV)        row seeds arm dropout and NEFTune; without: exact
  token_nll(trainable, frozen, batch, row_seeds_B=None) -> (nll_BT, weights_BT)      of the next token, aligned, weight 0 where nothing is learned
  params(trainable, frozen) -> the whole tree that the decoder reads, as trained: for generation
  reference(trainable) -> what `trainable` must be for the model as it was at the start: None with adapters, else a copy
  """
  split: Callable
  hidden: Callable
  token_nll: Callable
  params: Callable
  reference: Callable


def make_policy(c, forward, output_kernel, softcap: float | None, rows_on_a_device: Callable[[int], int] = lambda rows: rows) -> Policy:
  """The policy of a config. forward(params, batch) -> hidden and output_kernel(params) -> [D, V] come from models/; softcap is its logits'.

  rows_on_a_device(rows of a batch) tells how many of them one device holds: c.loss_chunk counts tokens a device.
  """
  mode = _adapter_mode(c) if c.lora.rank else _full_mode(c)

  def hidden(trainable, frozen, batch, row_seeds_B=None):
    params = _with_noise(c, mode.join(trainable, frozen, row_seeds_B), row_seeds_B)
    return forward(params, batch), output_kernel(params)

  def nll(trainable, frozen, batch, row_seeds_B=None):
    hidden_BTD, head_DV = hidden(trainable, frozen, batch, row_seeds_B)
    labels_BT, weights_BT = next_token_targets(batch)
    chunk = max(1, c.loss_chunk // rows_on_a_device(labels_BT.shape[0]))
    return token_nll(hidden_BTD, head_DV, labels_BT, chunk, mode.head_trained(trainable, frozen), softcap), weights_BT
  return Policy(mode.split, hidden, nll, lambda trainable, frozen: mode.join(trainable, frozen, None), mode.reference)


def row_seeds(state, batch):
  """One seed [2] a row from (run's seed, step, global row): no split into micro-batches, devices or hosts changes a draw."""
  return draws.derive(draws.seed_of(jax.random.fold_in(state.rng, state.step))[None], batch[ROW_IDS])


def trained_whole(c) -> Callable[[str], bool]:
  """Whether the leaf of a path is itself trained: nothing is under adapters, all but c.freeze in full fine-tuning."""
  return lambda path: not c.lora.rank and not (c.freeze and re.search(c.freeze, path))


class _Mode(NamedTuple):
  split: Callable[..., Any]
  join: Callable[..., Any]
  head_trained: Callable[..., bool]
  reference: Callable[..., Any]


def _adapter_mode(c) -> _Mode:
  scale = lora.scaling(c.lora.rank, c.lora.alpha, c.lora.rslora)
  return _Mode(
      split=lambda params, key: (lora.init_adapters(params, c.lora.targets, c.lora.rank, key), params),
      join=lambda adapters, base, seeds: base if adapters is None else lora.attach(base, adapters, scale, c.lora.dropout, seeds),
      head_trained=lambda adapters, base: False,
      reference=lambda adapters: None)


def _full_mode(c) -> _Mode:
  def split(params, key):
    del key
    if not c.freeze:
      return params, {}
    trees.matching((path for path, _ in trees.flatten(params)), c.freeze, "freeze")
    trainable, frozen = trees.split(params, trained_whole(c))
    if not trainable:
      raise UserError(f"freeze={c.freeze!r} leaves nothing to train", wanted="a pattern that spares some parameters", knob="freeze")
    return trainable, frozen

  def join(trainable, frozen, seeds):
    del seeds
    return trees.merge(trainable, frozen)
  return _Mode(split, join, _head_in, lambda trainable: jax.tree.map(lambda x: x.copy(), trainable))


def _head_in(trainable, frozen) -> bool:
  """Whether the output projection is trained: itself, or the embedding where a tied model reads that as one."""
  return "lm_head" in trainable or ("embed_tokens" in trainable and "lm_head" not in frozen)


def _with_noise(c, params, row_seeds_B):
  if row_seeds_B is None or not c.neftune.alpha:
    return params
  seeds_B = draws.derive(row_seeds_B, lora.path_number(EMBEDDING))
  table = neftune.NoisyTable(params["embed_tokens"]["embedding"], seeds_B, c.neftune.alpha, c.neftune.length)
  return params | {"embed_tokens": {"embedding": table}}
