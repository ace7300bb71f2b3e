"""config -> optax chain: schedule, global-norm clipping, AdamW, decay by name; and bfloat16 state with stochastic rounding."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsft.errors import UserError
from jaxsft.transforms import tree as trees


def make_schedule(c, steps: int):
  """step -> learning rate: linear warm-up from 0, then constant, linear, cosine or wsd (flat, then linear decay over the last share)."""
  warm = int(round(c.warmup * steps if c.warmup < 1 else c.warmup))
  peak, final = c.learning_rate, c.learning_rate * c.final
  rest = max(1, steps - warm)
  decay_steps = max(1, int(round(c.decay * steps)))
  bodies = {
      "constant": lambda: optax.constant_schedule(peak),
      "linear": lambda: optax.linear_schedule(peak, final, rest),
      "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=c.final),
      "wsd": lambda: optax.linear_schedule(peak, final, decay_steps, transition_begin=max(0, rest - decay_steps))}
  if c.schedule not in bodies:
    raise UserError(f"optim.schedule is {c.schedule!r}", wanted=" | ".join(bodies), knob="optim.schedule")
  body = bodies[c.schedule]()
  # the first update must not be at rate 0: warm-up counts from one, as torch's does after its first scheduler step
  return optax.join_schedules([lambda step: peak * (step + 1) / (warm + 1), body], [warm]) if warm else body


def make_optimizer(c, steps: int) -> optax.GradientTransformation:
  """AdamW after clipping by the global norm; float32 moments, or bfloat16 ones rounded stochastically when c.state says so.

  Weight decay skips leaves that c.no_decay finds. Errors: UserError for an unknown name or state.
  """
  if c.name != "adamw":
    raise UserError(f"optim.name is {c.name!r}", wanted="adamw", knob="optim.name")
  if c.state not in ("float32", "bfloat16_stochastic"):
    raise UserError(f"optim.state is {c.state!r}", wanted="float32 | bfloat16_stochastic", knob="optim.state")
  decays = lambda params: trees.map_leaves(lambda path, _: not re.search(c.no_decay, path), params)
  adamw = optax.adamw(make_schedule(c, steps), c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=decays)
  tx = optax.chain(optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(), adamw)
  return stochastic_state(tx) if c.state == "bfloat16_stochastic" else tx


def apply_updates(params, updates, key):
  """params + updates in float32; bfloat16 leaves are rounded stochastically, so that updates below half an ulp count on average."""
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  moved = [_round_like(p.astype(jnp.float32) + u.astype(jnp.float32), p.dtype, k) for p, u, k in zip(leaves, jax.tree.leaves(updates), keys)]
  return jax.tree.unflatten(treedef, moved)


def stochastic_round(x, key):
  """float32 -> bfloat16, up or down with the probability that makes the mean exact: random bits are added below bfloat16's last one."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  noisy = (bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)) & jnp.uint32(0xFFFF0000)
  rounded = jax.lax.bitcast_convert_type(jnp.where(jnp.isfinite(x), noisy, bits), jnp.float32)
  return rounded.astype(jnp.bfloat16)


def _round_like(x, dtype, key):
  return stochastic_round(x, key) if dtype == jnp.bfloat16 else x.astype(dtype)


class StochasticState(NamedTuple):
  """The inner optimiser's state with its float32 arrays in bfloat16, and the key of the next rounding."""
  inner: optax.OptState
  key: jax.Array


def stochastic_state(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx` whose moments rest in bfloat16 (half the memory) and are computed in float32."""
  narrow = lambda state, key: _cast(state, jnp.float32, lambda x, k: stochastic_round(x, k), key)
  widen = lambda state: _cast(state, jnp.bfloat16, lambda x, _: x.astype(jnp.float32), jax.random.key(0))

  def init(params):
    key = jax.random.key_data(jax.random.key(0))
    return StochasticState(narrow(tx.init(params), jax.random.wrap_key_data(key)), key)

  def update(updates, state, params=None):
    now, later = jax.random.split(jax.random.wrap_key_data(state.key))
    updates, inner = tx.update(updates, widen(state.inner), params)
    return updates, StochasticState(narrow(inner, now), jax.random.key_data(later))
  return optax.GradientTransformation(init, update)


def _cast(tree, dtype, cast, key):
  leaves, treedef = jax.tree.flatten(tree)
  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(treedef, [cast(x, k) if x.dtype == dtype else x for x, k in zip(leaves, keys)])
