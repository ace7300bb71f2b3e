"""What several tests build from: small models, packed ragged rows, the three modes, concrete or as shapes alone."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from jaxsft import sharding
from jaxsft.methods import registry
from jaxsft.models import decoder
from jaxsft.models.config import ModelConfig
from jaxsft.optim import make_optimizer
from jaxsft.step import TrainState
from jaxsft.transforms import nf4
from jaxsft.transforms import tree as trees
from jaxsft.transforms.policy import make_policy

FULL, LORA, QLORA = "full", "lora", "qlora"
MODES = (FULL, LORA, QLORA)


def config(**over) -> ModelConfig:
  """A Llama of two layers, 64 wide."""
  return ModelConfig(**dict(model_type="llama", vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5) | over)


def rows(B=8, T=24, V=96, seed=0):
  """Packed rows of two conversations and padding, every row of another length; weights on the second half of each conversation, about."""
  rng = np.random.default_rng(seed)
  index, cut, stop = np.arange(T)[None], rng.integers(4, T // 2, (B, 1)), rng.integers(T // 2 + 2, T + 1, (B, 1))
  segments = np.where(index < stop, 1 + (index >= cut), 0).astype(np.int32)
  positions = (index - np.where(segments == 2, cut, 0)) * (segments > 0)
  middle = np.where(segments == 2, (stop - cut) // 2, cut // 2)
  return {"tokens": rng.integers(1, V, (B, T)).astype(np.int32) * (segments > 0), "segment_ids": segments, "positions": positions.astype(np.int32),
          "weights": ((positions >= middle) & (segments > 0)).astype(np.float32), "row_ids": np.arange(B, dtype=np.int32) + B * seed}


def abstract_rows(M, B, T):
  """A step's batch [M, B, T] as shapes."""
  whole = rows(1, 16) | {"row_ids": None}
  return {name: jax.ShapeDtypeStruct((M, B, T) if value is not None else (M, B), np.int32 if value is None else value.dtype) for name, value in whole.items()}


def settings(mode, **over):
  """configs/common.py in one of the three modes, without noise; `over` takes dotted keys."""
  c = common.base()
  {FULL: common.full, LORA: common.lora, QLORA: common.qlora}[mode](c)
  c.lora.rank = min(c.lora.rank, 4)
  with c.unlocked():
    c.update_from_flattened_dict({"loss_chunk": 64, **over})
  return c


def is_quantised(c, path):
  return bool(c.nf4.targets) and path.endswith("_proj/kernel")


def quantise(c, params, dtype=None):
  """`params` with the kernels that c names as stacked NF4Arrays."""
  def leaf(path, kernel):
    if not is_quantised(c, path):
      return kernel
    return jax.tree.map(lambda *layers: jnp.stack(layers), *[nf4.quantise(layer, c.nf4.double_quant, dtype) for layer in kernel])
  return trees.map_leaves(leaf, params)


def abstract_params(c, cfg):
  """The tree that a run of `c` starts from, as shapes: NF4 codes in bytes."""
  def leaf(path, kernel):
    if not is_quantised(c, path):
      return jax.ShapeDtypeStruct(kernel.shape, jnp.dtype(c.model.base_dtype))
    L, I, O = kernel.shape
    return nf4.NF4Array(jax.ShapeDtypeStruct((L, I, O), jnp.uint8), jax.ShapeDtypeStruct((L, I // 64, O), jnp.uint8),
                        jax.ShapeDtypeStruct((L, -(-I // 64 * O // 256)), jnp.float32), jax.ShapeDtypeStruct((L,), jnp.float32))
  return trees.map_leaves(leaf, decoder.abstract_params(cfg))


def make(c, cfg, mesh=None):
  """(policy, method) of a config; the mesh constrains the stream as train.py does."""
  constrain = sharding.constrain_stream(mesh) if mesh else (lambda x_BTD: x_BTD)
  shards = sharding.row_shards(mesh) if mesh else 1
  policy = make_policy(c, decoder.make_forward(cfg, c.model.dtype, c.model.remat, c.model.attention, constrain), decoder.output_kernel, cfg.final_logit_softcapping,
                       lambda rows: max(1, rows // shards))
  return policy, registry.build(c, policy, lambda: make_optimizer(c.optim, 20))


def abstract_state(c, cfg):
  """(TrainState, frozen) as shapes."""
  _, method = make(c, cfg)
  trainable, frozen, opt, aux = jax.eval_shape(method.init, abstract_params(c, cfg), jax.random.key(0))
  return TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, opt, aux, jax.ShapeDtypeStruct((2,), jnp.uint32)), frozen
