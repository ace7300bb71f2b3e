"""config -> optax chain: schedule, global-norm clipping, the optimiser by name, decay by name; and bfloat16 state with stochastic rounding."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsft import watch
from jaxsft.adamw8bit import scale_by_adam8bit
from jaxsft.errors import UserError, nearest
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


def make_optimizer(c, steps: int, layer_norms: bool = False) -> optax.GradientTransformation:
  """The optimiser that c.name asks for, after clipping by the global norm; then what watches it: EMA, spike skip and, asked for, norms by layer.

  Moments rest in float32, or in bfloat16 rounded stochastically when c.state says so. Weight decay is decoupled, times the learning rate, and
  skips leaves that c.no_decay finds. Errors: UserError for an unknown name or state.
  """
  if c.name not in OPTIMIZERS:
    close = nearest(c.name, OPTIMIZERS)
    raise UserError(f"optim.name is {c.name!r}", wanted=" | ".join(OPTIMIZERS) + (f" ({close[0]}?)" if close else ""), knob="optim.name")
  if 1 <= c.warmup >= steps:
    raise UserError(f"optim.warmup is {c.warmup} of {steps} steps: the peak learning rate is never reached", wanted="fewer, or a share below 1",
                    knob="optim.warmup, steps or epochs")
  if c.state not in ("float32", "bfloat16_stochastic"):
    raise UserError(f"optim.state is {c.state!r}", wanted="float32 | bfloat16_stochastic", knob="optim.state")
  decays = lambda params: trees.map_leaves(lambda path, _: not (c.no_decay and re.search(c.no_decay, path)), params)
  body = OPTIMIZERS[c.name](c, make_schedule(c, steps), decays)
  tx = optax.chain(optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(), body)
  tx = stochastic_state(tx) if c.state == "bfloat16_stochastic" else tx
  tx = watch.ema(tx, c.ema) if c.ema else tx
  tx = watch.skip_spikes(tx, c.spike_sigma, c.spike_window) if c.spike_sigma else tx
  return watch.layer_norms(tx) if layer_norms else tx


def _adamw(c, schedule, decays):
  return optax.adamw(schedule, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=decays)


def _adafactor(c, schedule, decays):
  """arXiv 1804.04235 at an absolute learning rate (no relative step, no parameter scale: a LoRA B starts at zero), no momentum, updates of RMS at most 1.

  Second moments are factored where both sides of a matrix have 128 elements or more. Rates and decay as transformers' Adafactor.
  """
  rms = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
  return optax.chain(by_layer(rms), optax.add_decayed_weights(c.weight_decay, decays), optax.scale_by_learning_rate(schedule))


def _lion(c, schedule, decays):
  return optax.lion(schedule, c.b1, c.b2, weight_decay=c.weight_decay, mask=decays)


MUON_RMS = 0.2        # of an update at rate 1, as AdamW's is about (arXiv 2502.16982): AdamW's learning rates and decays hold for Muon


def _muon(c, schedule, decays):
  """Muon on each layer's matrices, momentum c.b1, Nesterov; AdamW (b1, b2, eps) at the same rate on everything else.

  A matrix is a kernel [L, in, out], each of its L layers orthogonalised by itself, or the A or B of an adapter: two linear layers in a row, each with a
  spectral norm of its own. The embedding, the head, norms and biases are no matrices here.
  """
  # not optax.contrib.muon: it decays norms and biases too, and gives its AdamW Nesterov's momentum
  across = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)          # every axis before these is a batch of matrices
  each = lambda tree: trees.map_leaves(lambda _, leaf: leaf if isinstance(leaf, optax.MaskedNode) else across, tree)
  size = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u * (MUON_RMS * max(u.shape[-2:]) ** 0.5), updates))
  muon = optax.chain(optax.contrib.scale_by_muon(beta=c.b1, eps=c.eps, weight_dimension_numbers=each), size)
  both = optax.partition({"matrix": muon, "other": optax.scale_by_adam(c.b1, c.b2, c.eps)}, _matrix_or_other)
  return optax.chain(both, optax.add_decayed_weights(c.weight_decay, decays), optax.scale_by_learning_rate(schedule))


def _matrix_or_other(params):
  is_matrix = lambda path: re.search(r"/kernel(/a|/b)?$", path) and not path.startswith("lm_head/")
  return trees.map_leaves(lambda path, _: "matrix" if is_matrix(path) else "other", params)


def _adamw8bit(c, schedule, decays):
  adam = scale_by_adam8bit(c.b1, c.b2, c.eps)
  return optax.chain(adam, optax.add_decayed_weights(c.weight_decay, decays), optax.scale_by_learning_rate(schedule))


def _schedule_free(c, schedule, decays):
  """arXiv 2405.15682, AdamW inside; b1 mixes the iterate z and its average x to the point y where gradients are taken. Evaluation uses x."""
  inner = optax.chain(optax.scale_by_rms(decay=c.b2, eps=c.eps, eps_in_sqrt=False, bias_correction=True),
                      optax.add_decayed_weights(c.weight_decay, decays), optax.scale_by_learning_rate(schedule))
  return optax.contrib.schedule_free(inner, lambda count: schedule(count - 1), b1=c.b1)        # it counts steps from 1, its inner optimiser from 0


OPTIMIZERS = {"adamw": _adamw, "adafactor": _adafactor, "lion": _lion, "muon": _muon, "adamw8bit": _adamw8bit, "schedule_free": _schedule_free}


def by_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx` on each layer of the stacked leaves by itself (under "layers/", stacked on their first axis), and as it is on the others.

  For what looks at a leaf as a whole: a stack [L, in, out] is L matrices, not one.
  """
  stacked = lambda params: trees.map_leaves(lambda path, _: "stacked" if path.startswith("layers/") else "single", params)
  over = lambda function: lambda *args: jax.vmap(function)(*args) if jax.tree.leaves(args[0]) else function(*args)       # no stacked leaf: vmap refuses
  return optax.partition({"stacked": optax.GradientTransformation(over(tx.init), over(tx.update)), "single": tx}, stacked)


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
