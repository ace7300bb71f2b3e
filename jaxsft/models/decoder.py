"""The one decoder: Flax NNX modules, split once; outside this file a model is a nested dict of arrays and `forward(params, batch)`.

Layers are stacked on a leading L axis and scanned: compile time does not grow with depth, and a leaf may be richer than an array
(NF4, LoRA): `kernels.dot` asks the leaf.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsft.errors import UserError
from jaxsft.kernels.attention import attend, attention
from jaxsft.kernels.dot import dot, embed, table
from jaxsft.models import families
from jaxsft.models.rope import rotate, rotations
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


class RMSNorm(nnx.Module):
  """x / rms(x) * scale, in float32 inside."""

  def __init__(self, width: int, eps: float):
    self.scale = nnx.Param(jnp.ones(width))
    self.eps = eps

  def __call__(self, x):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * self.scale.get_value().astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
  """Grouped-query self-attention with rotary positions."""

  def __init__(self, cfg):
    H, N, K, D = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.hidden_size
    self.q_proj = Linear(D, H * K, cfg.attention_bias)
    self.k_proj = Linear(D, N * K, cfg.attention_bias)
    self.v_proj = Linear(D, N * K, cfg.attention_bias)
    self.o_proj = Linear(H * K, D, cfg.attention_out_bias)
    self.head_dim = K

  def __call__(self, x_BTD, rotation, mix):
    """`mix(q, k, v) -> (mixed, kept)` is the attention over this row or over a cache."""
    q, k, v = (proj(x_BTD).reshape(*x_BTD.shape[:2], -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
    mixed_BTHK, kept = mix(rotate(q, rotation), rotate(k, rotation), v)
    return self.o_proj(mixed_BTHK.reshape(*x_BTD.shape[:2], -1)), kept


class MLP(nnx.Module):
  """SwiGLU."""

  def __init__(self, cfg):
    self.gate_proj = Linear(cfg.hidden_size, cfg.intermediate_size, cfg.mlp_bias)
    self.up_proj = Linear(cfg.hidden_size, cfg.intermediate_size, cfg.mlp_bias)
    self.down_proj = Linear(cfg.intermediate_size, cfg.hidden_size, cfg.mlp_bias)

  def __call__(self, x):
    return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
  """Pre-norm attention and MLP, each added to the stream."""

  def __init__(self, cfg):
    self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
    self.self_attn = Attention(cfg)
    self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
    self.mlp = MLP(cfg)

  def __call__(self, x_BTD, rotation, mix):
    attended, kept = self.self_attn(self.input_layernorm(x_BTD), rotation, mix)
    x_BTD = x_BTD + attended
    return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), kept


@functools.cache
def _layer_graph(cfg):
  """The structure of one layer, made once a config; no array exists."""
  return nnx.split(nnx.eval_shape(lambda: DecoderLayer(cfg)))[0]


def abstract_params(cfg, dtype="float32"):
  """The parameter tree as jax.ShapeDtypeStruct."""
  return unflatten({path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for path, shape in families.shapes(cfg).items()})


def init_params(cfg, key, dtype="float32"):
  """Random parameters: normal(0, initializer_range), norms one, biases zero; a key a leaf, so the tree's order does not matter."""
  def leaf(number, path, shape):
    if path.endswith("scale"):
      return jnp.ones(shape, dtype)
    if path.endswith("bias"):
      return jnp.zeros(shape, dtype)
    return (jax.random.normal(jax.random.fold_in(key, number), shape) * cfg.initializer_range).astype(dtype)
  return unflatten({path: leaf(i, path, shape) for i, (path, shape) in enumerate(sorted(families.shapes(cfg).items()))})


def output_kernel(params):
  """[D, V] of the output projection; a tied model has one array, read transposed."""
  return params["lm_head"]["kernel"] if "lm_head" in params else table(params["embed_tokens"]["embedding"]).T


def make_forward(cfg, dtype="float32", remat="none", attention_implementation="auto", constrain=lambda x_BTD: x_BTD):
  """forward(params, batch) -> hidden [B, T, D] after the final norm; batch as in batch.py. Never logits: `losses` makes them chunk by chunk.

  dtype: of activations. remat: none | full | dots. constrain: a sharding constraint on the stream between layers.
  """
  if remat not in REMAT:
    raise UserError(f"model.remat is {remat!r}", wanted=" | ".join(REMAT), knob="model.remat")

  def forward(params, batch):
    segments_BT = batch["segment_ids"]
    rotation = rotations(batch["positions"], cfg)
    mix = lambda q, k, v: (attention(q, k, v, segments_BT, attention_implementation), None)

    def layer(x_BTD, layer_params):
      x_BTD, _ = nnx.merge(_layer_graph(cfg), layer_params)(constrain(x_BTD), rotation, mix)
      return x_BTD, None
    if REMAT[remat] is not None:
      layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=False)     # inside a scan nothing can be merged across
    x_BTD = embed(batch["tokens"], params["embed_tokens"]["embedding"], segments_BT, jnp.dtype(dtype))
    x_BTD, _ = jax.lax.scan(layer, x_BTD, params["layers"])
    return _final_norm(cfg, params, x_BTD)
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
    rotation = rotations(positions_BT, cfg)
    rows = jnp.arange(tokens_BT.shape[0])[:, None]

    def layer(carry, inputs):
      x_BTD, *cached = carry      # the caches are carried whole and written in place: scanned over, XLA would copy them at every token
      layer_params, number = inputs

      def mix(q, k, v):
        k_cache, v_cache = (cache.at[number, rows, positions_BT].set(new) for cache, new in zip(cached, (k, v)))
        mask_BTS = jnp.arange(k_cache.shape[2]) <= positions_BT[:, :, None]
        return attend(q, k_cache[number], v_cache[number], mask_BTS), (k_cache, v_cache)
      x_BTD, cached = nnx.merge(_layer_graph(cfg), layer_params)(x_BTD, rotation, mix)
      return (x_BTD, *cached), None
    x_BTD = embed(tokens_BT, params["embed_tokens"]["embedding"], jnp.ones_like(tokens_BT), jnp.dtype(dtype))
    numbered = params["layers"], jnp.arange(cfg.num_hidden_layers)
    (x_BTD, k, v), _ = jax.lax.scan(layer, (x_BTD, cache["k"], cache["v"]), numbered)
    return _final_norm(cfg, params, x_BTD), {"k": k, "v": v}
  return forward


def _final_norm(cfg, params, x_BTD):
  norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
  norm.scale.set_value(params["norm"]["scale"])
  return norm(x_BTD)
