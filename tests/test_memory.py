"""What must never exist: a dequantised weight between forward and backward, and the logits of a whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax._src.ad_checkpoint import saved_residuals
from jax.extend import core

from jaxsft.losses import token_nll
from jaxsft.models import decoder
from jaxsft.transforms import nf4

REMAT = ("none", "dots", "full")


def kept_for_the_backward_pass(remat):
  """(shapes and dtypes that the loss keeps for its backward pass, shapes of the quantised kernels)."""
  cfg = tiny.config(hidden_size=64, intermediate_size=192, num_hidden_layers=3)
  c = tiny.settings(tiny.QLORA, **{"model.remat": remat, "lora.dropout": 0.1})
  policy, method = tiny.make(c, cfg)
  trainable, frozen, _, _ = method.init(tiny.quantise(c, decoder.init_params(cfg, jax.random.key(0), c.model.base_dtype)), jax.random.key(1))
  batch, seeds = tiny.rows(B=2), jnp.ones((2, 2), jnp.uint32)

  def loss(trainable):
    nll_BT, weights_BT = policy.token_nll(trainable, frozen, batch, seeds)
    return (nll_BT * weights_BT).sum()
  kernels = {leaf.shape[1:] for leaf in jax.tree.leaves(frozen, is_leaf=lambda x: isinstance(x, nf4.NF4Array)) if isinstance(leaf, nf4.NF4Array)}
  return [aval for aval, _ in saved_residuals(loss, trainable)], kernels


def dense_kernels(avals, kernels):
  """Floating arrays that end in a kernel's shape, either way round, stacked or not."""
  either = kernels | {shape[::-1] for shape in kernels}
  return [aval for aval in avals if jnp.issubdtype(aval.dtype, jnp.floating) and aval.shape[-2:] in either]


@pytest.mark.parametrize("remat", REMAT)
def test_qlora_keeps_no_dequantised_weight(remat):
  avals, kernels = kept_for_the_backward_pass(remat)
  assert kernels == {(64, 64), (64, 32), (64, 192), (192, 64)}
  assert dense_kernels(avals, kernels) == []
  assert any(aval.dtype == jnp.uint8 and aval.shape[1:] in kernels for aval in avals)          # the codes themselves are what is kept


def test_plain_autodiff_would_keep_them(monkeypatch):
  """The check above can see: with the custom backward pass taken away, all seven kernels are kept."""
  monkeypatch.setattr(nf4, "nf4_dot", lambda x, w: jnp.dot(x, nf4.dequantise(w, x.dtype)))
  assert len(dense_kernels(*kept_for_the_backward_pass("none"))) == 7


@functools.cache
def temporaries(layers, remat):
  """Bytes of temporaries of a compiled QLoRA step, 2,048 wide, 1 x 128; from shapes alone."""
  cfg = tiny.config(hidden_size=2048, intermediate_size=5504, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16, head_dim=128)
  c = tiny.settings(tiny.QLORA, **{"model.remat": remat})
  _, method = tiny.make(c, cfg)
  state, frozen = tiny.abstract_state(c, cfg)
  return jax.jit(method.step, donate_argnums=0).lower(state, frozen, tiny.abstract_rows(1, 1, 128)).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", ["none", "full"])
def test_four_more_layers_cost_less_than_half_their_bfloat16_weights(remat):
  weights = 4 * 2 * (4 * 2048 * 2048 + 3 * 2048 * 5504)
  assert temporaries(8, remat) - temporaries(4, remat) < weights / 2


def test_under_remat_a_layer_costs_next_to_nothing():
  assert temporaries(8, "full") - temporaries(4, "full") < 4 * 6e6             # its input and its adapter's gradients; facts measured 1 MB


B, T, V, D = 4, 64, 1009, 32


def avals_of(jaxpr):
  """Every abstract value of a jaxpr and of all jaxprs inside it."""
  for equation in jaxpr.eqns:
    yield from (var.aval for var in [*equation.invars, *equation.outvars])
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr))):
      if isinstance(value, core.ClosedJaxpr):
        value = value.jaxpr
      if isinstance(value, core.Jaxpr):
        yield from avals_of(value)


def largest_with_vocabulary(function, *args):
  """Of all arrays with a dimension V: the most elements a vocabulary entry."""
  sizes = [aval.size // V for aval in avals_of(jax.make_jaxpr(function)(*args).jaxpr) if V in getattr(aval, "shape", ())]
  return max(sizes)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("mode, over", [(tiny.FULL, {}), (tiny.FULL, {"freeze": "lm_head"}), (tiny.LORA, {}), (tiny.QLORA, {})])
@pytest.mark.parametrize("tied", [False, True])
def test_no_array_of_a_batchs_logits_in_training_or_evaluation(mode, over, tied, micro_batches):
  cfg = tiny.config(vocab_size=V, hidden_size=64, tie_word_embeddings=tied)
  c = tiny.settings(mode, loss_chunk=80, **({} if tied else over))
  _, method = tiny.make(c, cfg)
  state, frozen = tiny.abstract_state(c, cfg)
  step = largest_with_vocabulary(method.step, state, frozen, tiny.abstract_rows(micro_batches, B, T))
  evaluate = largest_with_vocabulary(method.evaluate, state, frozen, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tiny.abstract_rows(1, B, T)))
  assert step == evaluate == 80 < B * T                  # the chunk's logits, and nothing larger (the head has 64 a word)


@pytest.mark.parametrize("freeze, summed", [("", True), ("lm_head", False)])
def test_a_head_frozen_by_name_gets_no_gradient_though_the_embedding_is_trained(freeze, summed):
  cfg = tiny.config(vocab_size=V, hidden_size=64)
  c = tiny.settings(tiny.FULL, freeze=freeze, **{"model.base_dtype": "bfloat16"})
  policy, method = tiny.make(c, cfg)
  state, frozen = tiny.abstract_state(c, cfg)
  loss = lambda trainable, frozen, batch: policy.token_nll(trainable, frozen, batch)[0].sum()
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tiny.abstract_rows(1, B, T))
  avals = avals_of(jax.make_jaxpr(jax.grad(loss))(state.trainable, frozen, batch).jaxpr)
  assert any(aval.dtype == np.float32 and aval.shape == (64, V) for aval in avals) == summed


def test_a_frozen_head_has_no_gradient_array():
  """Lesson 15: no dW of a frozen head. The only [D, V] arrays are the head itself and its cast; a trained head's float32 sum is one more."""
  hidden, head, labels = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16), jax.ShapeDtypeStruct((D, V), jnp.bfloat16), jax.ShapeDtypeStruct((B, T), jnp.int32)

  def wide_float32(head_trained):
    gradient = jax.grad(lambda hidden, head, labels: token_nll(hidden, head, labels, 16, head_trained).sum(), (0, 1) if head_trained else 0)
    return sum(aval.dtype == np.float32 and aval.shape[-2:] in ((D, V), (V, D)) for aval in avals_of(jax.make_jaxpr(gradient)(hidden, head, labels).jaxpr))
  assert wide_float32(False) == 0 and wide_float32(True) > 0
