"""The seam: TrainState, Method, and `descend`, which turns an objective into a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsft import watch
from jaxsft.optim import apply_updates


class TrainState(NamedTuple):
  """Everything that decides the next step, the data iterator apart. Donated by the step; the frozen base is not in it."""
  step: jax.Array       # int32: optimiser steps done
  trainable: Any        # parameters that move, float32 unless the config names bfloat16 with stochastic rounding
  opt: Any              # optimiser state
  aux: Any              # what the method must remember (queues, reference statistics, ...)
  rng: jax.Array        # base key; every draw folds in (step, global row) and never splits this


class Method(NamedTuple):
  """One training method; made by `build(c, policy, make_tx)` in methods/NAME.py. The loop knows nothing else of it.

  wants    batch parts it needs: ("rows",), ("pairs",), ...
  init     (params, key) -> (trainable, frozen, opt, aux)
  collect  (state, frozen, draw) -> (aux, [batch, ...])       host side; draw() is the stream's next batch, numpy [B, T] a field
  step     (state, frozen, batch) -> (state, metrics)         pure; batch leaves [M, B/M, ...]; jitted by the loop, state donated
  evaluate (state, frozen, batch) -> {name: (sum, count)}
  """
  wants: tuple[str, ...]
  init: Callable
  collect: Callable
  step: Callable
  evaluate: Callable


def evaluated(state: TrainState) -> TrainState:
  """The state with the parameters that evaluation, samples and exports use in place of those that move: an average of them where the optimiser keeps one."""
  return state._replace(trainable=watch.evaluation_params(state.opt, state.trainable))


def only_evaluated(state: TrainState):
  """What `evaluated` puts in the state's place, as a tree for a checkpoint; None where that is the state's own."""
  return {"trainable": evaluated(state).trainable} if watch.averages(state.opt) else None


def collect_one(state, frozen, draw):
  """The identity: one batch a step, nothing remembered."""
  del frozen
  return state.aux, [draw()]


def make_init(policy, make_tx, aux=lambda trainable, frozen: ()):
  """The usual `init`: split the parameters, start the optimiser."""
  def init(params, key):
    trainable, frozen = policy.split(params, key)
    return trainable, frozen, make_tx().init(trainable), aux(trainable, frozen)
  return init


def descend(objective, counts, make_tx):
  """A step that walks the micro-batches of a window, adds sums and gradients in float32, and divides each term ONCE by its count.

  objective(state, frozen, batch) -> ({term: (sum, coefficient)}, {metric: (sum, count)}); differentiated in state.trainable.
  counts(batch) -> {term: count}, from the weights alone: known for the whole window, all devices and hosts, before the first gradient.

    micro-batch 1: sum 12 over 4 tokens      a mean of means would be (3 + 1) / 2 = 2
    micro-batch 2: sum  2 over 2 tokens      here (12 + 2) / 6 = 2.33, as in one batch of both
  """
  tx = optax.with_extra_args_support(make_tx())

  def step(state: TrainState, frozen, batch):
    window = {term: jnp.maximum(count.sum(), 1.0) for term, count in jax.vmap(counts)(batch).items()}

    def loss_of(trainable, micro):
      terms, metrics = objective(state._replace(trainable=trainable), frozen, micro)
      means = {term: value / window[term] for term, (value, _) in terms.items()}
      return sum(coefficient * means[term] for term, (_, coefficient) in terms.items()), (means, metrics)
    (loss, (means, metrics)), gradients = _walk(jax.value_and_grad(loss_of, has_aux=True), state.trainable, batch)
    norm = optax.tree.norm(gradients)
    updates, opt = tx.update(gradients, state.opt, state.trainable, loss=loss, norm=norm)
    key = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), 0x0DD)
    trainable = apply_updates(state.trainable, updates, key)
    report = {"loss": loss, "grad_norm": norm, "supervised_tokens": sum(window.values())}
    report |= {f"loss_{term}": value for term, value in means.items()} if len(means) > 1 else {}
    report |= {name: value / jnp.maximum(count, 1.0) for name, (value, count) in metrics.items()} | watch.report(opt)
    return TrainState(state.step + 1, trainable, opt, state.aux, state.rng), report
  return step


def _walk(gradient, trainable, batch):
  """Sum of `gradient(trainable, micro)` over the leading axis M, gradients in float32; M = 1 runs without a loop."""
  first = jax.tree.map(lambda x: x[0], batch)
  if jax.tree.leaves(batch)[0].shape[0] == 1:
    value, gradients = gradient(trainable, first)
    return value, _float32(gradients)

  def body(total, micro):
    value, gradients = gradient(trainable, micro)
    return jax.tree.map(jnp.add, total, (value, _float32(gradients))), None
  shapes = jax.eval_shape(lambda: gradient(trainable, first))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], _float32_shapes(shapes[1])))
  return jax.lax.scan(body, zeros, batch)[0]


def _float32(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _float32_shapes(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)
