"""The one decoder: Flax NNX modules, split once; outside this file a model is a nested dict of arrays and `forward(params, batch)`.

Layers are stacked on a leading L axis and scanned: compile time does not grow with depth, and a leaf may be richer than an array
(NF4, LoRA): `kernels.dot` asks the leaf.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsft.errors import UserError
from jaxsft.kernels.attention import attend, attention, sees
from jaxsft.kernels.dot import dot, embed, table
from jaxsft.models import families
from jaxsft.models.kinds import scans
from jaxsft.models.rope import BY_LENGTH, rotate, rotations, text_lengths
from jaxsft.transforms.tree import unflatten

REMAT = {  # what a layer keeps for the backward pass
    "none": None,                                                  # everything
    "full": jax.checkpoint_policies.nothing_saveable,              # its input alone
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,   # results of the projections
}


class Linear(nnx.Module):
  """x [..., in] -> [..., out]; the kernel may be any leaf that `kernels.dot` knows."""

  def __init__(self, inputs: int, outputs: int, bias: bool):
    self.kernel = nnx.Param(jnp.zeros((inputs, outputs)))
    self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

  def __call__(self, x):
    y = dot(x, self.kernel.get_value())
    return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


ACTIVATIONS: dict[str, Callable] = {"silu": jax.nn.silu, "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class RMSNorm(nnx.Module):
  """x / rms(x) * (offset + scale), in float32 inside; offset 1 in Gemma, whose scales rest at zero."""

  def __init__(self, width: int, cfg):
    self.offset = float(families.FAMILIES[cfg.model_type].unit_offset)
    self.scale = nnx.Param(jnp.full(width, 1 - self.offset))
    self.eps = cfg.rms_norm_eps

  def __call__(self, x):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    scale = self.scale.get_value().astype(jnp.float32)
    return (y * (self.offset + scale if self.offset else scale)).astype(x.dtype)


class Attention(nnx.Module):
  """Grouped-query self-attention with rotary positions."""

  def __init__(self, cfg):
    family = families.FAMILIES[cfg.model_type]
    H, N, K, D = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.hidden_size
    self.cuts = (H * K, (H + N) * K) if family.fused else ()
    if family.fused:
      self.qkv_proj = Linear(D, (H + 2 * N) * K, cfg.attention_bias)
    else:
      self.q_proj = Linear(D, H * K, cfg.attention_bias)
      self.k_proj = Linear(D, N * K, cfg.attention_bias)
      self.v_proj = Linear(D, N * K, cfg.attention_bias)
    self.q_norm = RMSNorm(K, cfg) if family.qk_norm else None
    self.k_norm = RMSNorm(K, cfg) if family.qk_norm else None
    self.o_proj = Linear(H * K, D, cfg.attention_out_bias)
    self.head_dim = K

  def _project(self, x_BTD):
    if self.cuts:
      return jnp.split(self.qkv_proj(x_BTD), self.cuts, axis=-1)
    return self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)

  def __call__(self, x_BTD, rotation, mix):
    """`mix(q, k, v) -> (mixed, kept)` is the attention over this row or over a cache."""
    q, k, v = (x.reshape(*x_BTD.shape[:2], -1, self.head_dim) for x in self._project(x_BTD))
    if self.q_norm is not None and self.k_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    mixed_BTHK, kept = mix(rotate(q, rotation), rotate(k, rotation), v)
    return self.o_proj(mixed_BTHK.reshape(*x_BTD.shape[:2], -1)), kept


class MLP(nnx.Module):
  """Gated: down(act(gate(x)) * up(x)), act SwiGLU's or GeGLU's."""

  def __init__(self, cfg):
    family = families.FAMILIES[cfg.model_type]
    self.fused, self.act = family.fused, ACTIVATIONS[family.activation]
    if family.fused:
      self.gate_up_proj = Linear(cfg.hidden_size, 2 * cfg.intermediate_size, cfg.mlp_bias)
    else:
      self.gate_proj = Linear(cfg.hidden_size, cfg.intermediate_size, cfg.mlp_bias)
      self.up_proj = Linear(cfg.hidden_size, cfg.intermediate_size, cfg.mlp_bias)
    self.down_proj = Linear(cfg.intermediate_size, cfg.hidden_size, cfg.mlp_bias)

  def __call__(self, x):
    gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1) if self.fused else (self.gate_proj(x), self.up_proj(x))
    return self.down_proj(self.act(gate) * up)


class DecoderLayer(nnx.Module):
  """Pre-norm attention and MLP, each added to the stream."""

  def __init__(self, cfg):
    self.input_layernorm = RMSNorm(cfg.hidden_size, cfg)
    self.self_attn = Attention(cfg)
    self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg)
    self.mlp = MLP(cfg)

  def __call__(self, x_BTD, rotation, mix):
    attended, kept = self.self_attn(self.input_layernorm(x_BTD), rotation, mix)
    x_BTD = x_BTD + attended
    return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), kept


class SandwichLayer(nnx.Module):
  """Attention and MLP normed before and after (Gemma 2 and 3)."""

  def __init__(self, cfg):
    norm = functools.partial(RMSNorm, cfg.hidden_size, cfg)
    self.input_layernorm, self.post_attention_layernorm = norm(), norm()
    self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
    self.self_attn, self.mlp = Attention(cfg), MLP(cfg)

  def __call__(self, x_BTD, rotation, mix):
    attended, kept = self.self_attn(self.input_layernorm(x_BTD), rotation, mix)
    x_BTD = x_BTD + self.post_attention_layernorm(attended)
    return x_BTD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTD))), kept


@functools.cache
def _layer_graph(cfg):
  """The structure of one layer, made once a config; no array exists."""
  layer: Callable = SandwichLayer if families.FAMILIES[cfg.model_type].sandwich else DecoderLayer
  return nnx.split(nnx.eval_shape(lambda: layer(cfg)))[0]


def abstract_params(cfg, dtype="float32"):
  """The parameter tree as jax.ShapeDtypeStruct."""
  return unflatten({path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for path, shape in families.shapes(cfg).items()})


def init_params(cfg, key, dtype="float32"):
  """Random parameters: normal(0, initializer_range), norms neutral, biases zero; a key a leaf, so the tree's order does not matter."""
  def leaf(number, path, shape):
    if path.endswith("scale"):
      return jnp.full(shape, 0 if families.FAMILIES[cfg.model_type].unit_offset else 1, dtype)
    if path.endswith("bias"):
      return jnp.zeros(shape, dtype)
    return (jax.random.normal(jax.random.fold_in(key, number), shape) * cfg.initializer_range).astype(dtype)
  return unflatten({path: leaf(i, path, shape) for i, (path, shape) in enumerate(sorted(families.shapes(cfg).items()))})


def output_kernel(params):
  """[D, V] of the output projection; a tied model has one array, read transposed."""
  return params["lm_head"]["kernel"] if "lm_head" in params else table(params["embed_tokens"]["embedding"]).T


def logits(cfg, params, hidden_CD, precision=None):
  """float32 [..., V] of hidden states: for generation and comparisons. Training never makes them whole (losses.token_nll)."""
  head = output_kernel(params)
  if hasattr(head, "dot_input"):
    found = dot(hidden_CD, head).astype(jnp.float32)
  else:
    found = jnp.dot(hidden_CD, jnp.asarray(head).astype(hidden_CD.dtype), preferred_element_type=jnp.float32, precision=precision)
  cap = cfg.final_logit_softcapping
  return cap * jnp.tanh(found / cap) if cap else found


def _embedded(cfg, params, tokens_BT, segments_BT, dtype):
  scale = cfg.hidden_size ** 0.5 if families.FAMILIES[cfg.model_type].scaled_embedding else 1.0
  return embed(tokens_BT, params["embed_tokens"]["embedding"], segments_BT, jnp.dtype(dtype), scale)


def _rotations(cfg, positions_BT, lengths_BT):
  """{Kind.rope: rotation} of all that the layers use."""
  return {rope: rope and rotations(positions_BT, cfg, rope, lengths_BT) for rope in {kind.rope for kind in cfg.layer_kinds}}


def _scores(cfg) -> dict:
  """What `attend` must know of the family."""
  scale = None if cfg.query_pre_attn_scalar is None else cfg.query_pre_attn_scalar ** -0.5
  return {"scale": scale, "softcap": cfg.attn_logit_softcapping}


def _walk(cfg, layer, carry, layers):
  """carry through all layers: `layer(kind)(carry, (params, number)) -> carry`, scanned over each run or period of alike layers."""
  for start, kinds, repeats in scans(cfg.layer_kinds):
    period, stop = len(kinds), start + len(kinds) * repeats
    part = layers if repeats * period == cfg.num_hidden_layers else jax.tree.map(operator.itemgetter(slice(start, stop)), layers)
    numbered = part, jnp.arange(start, stop)
    if period > 1:
      numbered = jax.tree.map(functools.partial(_fold, period), numbered)
    carry, _ = jax.lax.scan(functools.partial(_one_period, [layer(kind) for kind in kinds]), carry, numbered)
  return carry


def _fold(period: int, x_L):
  return x_L.reshape(-1, period, *x_L.shape[1:])


def _one_period(bodies, carry, inputs):
  """One turn of a scan: its layer, or its layers one after the other."""
  for place, body in enumerate(bodies):
    carry = body(carry, inputs if len(bodies) == 1 else jax.tree.map(operator.itemgetter(place), inputs))
  return carry, None


def make_forward(cfg, dtype="float32", remat="none", attention_implementation="auto", constrain=lambda x_BTD: x_BTD):
  """forward(params, batch) -> hidden [B, T, D] after the final norm; batch as in batch.py. Never logits: `losses` makes them chunk by chunk.

  dtype: of activations. remat: none | full | dots. constrain: a sharding constraint on the stream between layers.
  """
  if remat not in REMAT:
    raise UserError(f"model.remat is {remat!r}", wanted=" | ".join(REMAT), knob="model.remat")

  def forward(params, batch):
    segments_BT = batch["segment_ids"]
    lengths_BT = text_lengths(segments_BT) if cfg.rope_parameters["rope_type"] in BY_LENGTH else None
    turned = _rotations(cfg, batch["positions"], lengths_BT)

    def layer(kind):
      mix = lambda q, k, v: (attention(q, k, v, segments_BT, attention_implementation, kind.window, **_scores(cfg)), None)

      def one(x_BTD, layer_params):
        return nnx.merge(_layer_graph(cfg), layer_params)(constrain(x_BTD), turned[kind.rope], mix)[0]
      if REMAT[remat] is not None:
        one = jax.checkpoint(one, policy=REMAT[remat], prevent_cse=False)     # inside a scan nothing can be merged across
      return lambda x_BTD, inputs: one(x_BTD, inputs[0])
    x_BTD = _embedded(cfg, params, batch["tokens"], segments_BT, dtype)
    return _final_norm(cfg, params, _walk(cfg, layer, x_BTD, params["layers"]))
  return forward


def init_cache(cfg, rows: int, slots: int, dtype="float32"):
  """Keys and values [L, B, S, N, K] of `slots` tokens a row; slot s holds the row's token at position s."""
  shape = (cfg.num_hidden_layers, rows, slots, cfg.num_key_value_heads, cfg.head_dim)
  return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def make_cached_forward(cfg, dtype="float32"):
  """forward(params, tokens_BT, positions_BT, cache) -> (hidden [B, T, D], cache): writes the tokens at their positions, sees slots up to them.

  Rows may be at different lengths. Padding on the right of a prompt is harmless: its slot lies past the row's end and is
  written over when the row gets there.

    prompts   a b c        slots after the first call   a b c .      row 2 goes on at position 2, over the padding
              d e pad                                   d e pad .
  """
  def forward(params, tokens_BT, positions_BT, cache):
    slots = cache["k"].shape[2]
    turned = _rotations(cfg, positions_BT, jnp.full_like(positions_BT, slots))    # a text may become as long as its cache
    rows = jnp.arange(tokens_BT.shape[0])[:, None]

    def layer(kind):
      def one(carry, inputs):
        x_BTD, *cached = carry      # the caches are carried whole and written in place: scanned over, XLA would copy them at every token
        layer_params, number = inputs

        def mix(q, k, v):
          k_cache, v_cache = (cache.at[number, rows, positions_BT].set(new) for cache, new in zip(cached, (k, v)))
          mask_BTS = sees(positions_BT[:, :, None], jnp.arange(slots), kind.window)
          return attend(q, k_cache[number], v_cache[number], mask_BTS, **_scores(cfg)), (k_cache, v_cache)
        x_BTD, cached = nnx.merge(_layer_graph(cfg), layer_params)(x_BTD, turned[kind.rope], mix)
        return (x_BTD, *cached)
      return one
    x_BTD = _embedded(cfg, params, tokens_BT, jnp.ones_like(tokens_BT), dtype)
    x_BTD, k, v = _walk(cfg, layer, (x_BTD, cache["k"], cache["v"]), params["layers"])
    return _final_norm(cfg, params, x_BTD), {"k": k, "v": v}
  return forward


def _final_norm(cfg, params, x_BTD):
  norm = RMSNorm(cfg.hidden_size, cfg)
  norm.scale.set_value(params["norm"]["scale"])
  return norm(x_BTD)
