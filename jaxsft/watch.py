"""Transformations around an optimiser: an average of the weights (EMA), the skip of spikes, norms by layer; what evaluation and reports read of their state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsft.transforms import tree as trees


def states(opt, kind: type) -> list:
  """The states of one kind anywhere in an optimiser's state."""
  is_kind = lambda x: isinstance(x, kind)
  return [leaf for leaf in jax.tree.leaves(opt, is_leaf=is_kind) if is_kind(leaf)]


class EmaState(NamedTuple):
  """inner: of the optimiser; ema: float32, like the parameters."""
  inner: Any
  ema: Any


def ema(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformationExtraArgs:
  """`tx`, and beside it ema <- decay ema + (1 - decay) parameters after each update, from the parameters at the start; float32.

  Parameters kept in bfloat16 are averaged before they are rounded.
  """
  inner = optax.with_extra_args_support(tx)

  def init(params):
    return EmaState(inner.init(params), jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params))

  def update(updates, state, params=None, **extra):
    updates, after = inner.update(updates, state.inner, params, **extra)
    moved = jax.tree.map(lambda p, u: p.astype(jnp.float32) + u.astype(jnp.float32), params, updates)
    return updates, EmaState(after, jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, moved))
  return optax.GradientTransformationExtraArgs(init, update)


def averages(opt) -> bool:
  """Whether evaluation, samples and exports use other parameters than those that the gradient is taken at."""
  return bool(states(opt, EmaState) or states(opt, optax.contrib.ScheduleFreeState))


def evaluation_params(opt, params):
  """What evaluation, samples and exports use: the EMA, schedule-free's x, or the parameters themselves."""
  for state in states(opt, EmaState):
    return state.ema
  for state in states(opt, optax.contrib.ScheduleFreeState):
    return optax.contrib.schedule_free_eval_params(state, params)
  return params


class SpikeState(NamedTuple):
  """losses, norms [window] float32: the last ones recorded, in a ring; recorded: how many ever were.

  skipped: 1.0 when the last step was, else 0.0; updates: how many steps were not.
  """
  inner: Any
  losses: jax.Array
  norms: jax.Array
  recorded: jax.Array
  skipped: jax.Array
  updates: jax.Array


FLAT = 1e-3      # the deviation counts as this share of the mean at least: on a flat stretch every ripple would be a spike


def bound(values_W, sigma: float):
  """mean + sigma x deviation (of the population) of the window."""
  mean = values_W.mean()
  return mean + sigma * jnp.maximum(values_W.std(), FLAT * jnp.abs(mean))


def skip_spikes(tx: optax.GradientTransformation, sigma: float, window: int) -> optax.GradientTransformationExtraArgs:
  """`tx`, but a step whose loss or gradient norm is over its bound moves nothing: no parameter, nothing in the state of `tx` (its schedule too).

  The bound is mean + sigma deviations of the last `window` recorded values; no step is judged before the window is full. Both numbers of every step
  are recorded, those over their bound as the bound: one spike does not hide the next, and a level that stays raised is accepted after some steps.
  NaN is over no bound; the loop stops on it. `update` needs loss and norm, of the whole window of micro-batches, before clipping.
  """
  inner = optax.with_extra_args_support(tx)

  def init(params):
    ring = jnp.zeros(window, jnp.float32)
    return SpikeState(inner.init(params), ring, ring.copy(), jnp.int32(0), jnp.float32(0), jnp.int32(0))

  def update(updates, state, params=None, *, loss, norm, **extra):
    full = state.recorded >= window
    bounds = [jnp.where(full, bound(values, sigma), jnp.inf) for values in (state.losses, state.norms)]
    skip = (loss > bounds[0]) | (norm > bounds[1])
    moved, after = inner.update(updates, state.inner, params, loss=loss, norm=norm, **extra)
    keep = lambda old, new: jax.tree.map(lambda o, n: jnp.where(skip, o, n), old, new)
    still = jax.tree.map(lambda u: jnp.full_like(u, -0.0), moved)         # p + -0.0 is p to the bit, whatever p
    losses, norms = (values.at[state.recorded % window].set(jnp.where(value > top, top, value))
                     for values, value, top in zip((state.losses, state.norms), (loss, norm), bounds))
    return keep(still, moved), SpikeState(keep(state.inner, after), losses, norms, state.recorded + 1, skip.astype(jnp.float32),
                                          state.updates + jnp.where(skip, 0, 1))
  return optax.GradientTransformationExtraArgs(init, update)


class NormsState(NamedTuple):
  """The norms of the last step, {"gradient/PATH" | "parameter/PATH": [L] or a scalar}, float32."""
  inner: Any
  norms: dict[str, jax.Array]


def layer_norms(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """`tx`, and the norm of each leaf's gradient (before clipping) and of its parameters before the update; a stacked leaf has one a layer."""
  inner = optax.with_extra_args_support(tx)

  def init(params):
    return NormsState(inner.init(params), jax.tree.map(jnp.zeros_like, _norms(params, params)))

  def update(updates, state, params=None, **extra):
    norms = _norms(updates, params)
    updates, after = inner.update(updates, state.inner, params, **extra)
    return updates, NormsState(after, norms)
  return optax.GradientTransformationExtraArgs(init, update)


def _norms(gradients, params):
  def norm(path, leaf):
    axes = tuple(range(1, leaf.ndim)) if path.startswith("layers/") else None
    return jnp.sqrt(jnp.square(leaf.astype(jnp.float32)).sum(axes))
  return {f"{kind}/{path}": norm(path, leaf) for kind, tree in (("gradient", gradients), ("parameter", params)) for path, leaf in trees.flatten(tree)}


def report(opt) -> dict[str, jax.Array]:
  """What these add to a step's metrics: skipped (0.0 or 1.0), updates (steps not skipped so far), layer_norms/KIND/PATH ([L] of a stacked leaf)."""
  out: dict[str, jax.Array] = {}
  for state in states(opt, SpikeState):
    out |= {"skipped": state.skipped, "updates": state.updates}
  for state in states(opt, NormsState):
    out |= {f"layer_norms/{name}": value for name, value in state.norms.items()}
  return out
