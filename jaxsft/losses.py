"""Losses: arrays -> (sum, count), or a value a token that the caller sums. Logits exist for one chunk of tokens at a time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxsft.batch import next_token_targets


def token_nll(hidden_BTD, head_DV, labels_BT, chunk: int, head_trained: bool, softcap: float | None = None):
  """Negative log-likelihood in nats of each label, float32 [B, T]; softmax in float32, at most [B, chunk, V] of it at a time.

  The backward pass is its own. A frozen head gets no gradient at all: its forward pass already holds the softmax, so d loss / d hidden is made there
  and only scaled later (two products of [tokens, D, V], not three). A trained head is computed again, chunk by chunk, and its gradient summed in float32.
  chunk: tokens of each row at a time; the row's length need not divide by it. softcap: logits l become softcap tanh(l / softcap).
  """
  chunk = min(chunk, hidden_BTD.shape[1])
  pad = -hidden_BTD.shape[1] % chunk
  hidden = _chunks(jnp.pad(hidden_BTD, ((0, 0), (0, pad), (0, 0))), chunk)
  labels = _chunks(jnp.pad(labels_BT, ((0, 0), (0, pad))), chunk)
  nll = (_nll_trained_head if head_trained else _nll_frozen_head)(hidden, head_DV, labels, softcap)
  return _join(nll)[:, :hidden_BTD.shape[1]]


def _chunks(x_BT, chunk):
  """[B, n chunk, ...] -> [n, B, chunk, ...]: the scan runs along the row, so that rows stay where the mesh has them."""
  return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], -1, chunk, *x_BT.shape[2:]), 1, 0)


def _join(x_NBC):
  return jnp.moveaxis(x_NBC, 0, 1).reshape(x_NBC.shape[1], -1, *x_NBC.shape[3:])


def _logits(hidden_BCD, head_DV, softcap):
  logits_BCV = jnp.dot(hidden_BCD, head_DV.astype(hidden_BCD.dtype), preferred_element_type=jnp.float32)
  return softcap * jnp.tanh(logits_BCV / softcap) if softcap else logits_BCV


def _nll(logits_BCV, labels_BC):
  """(nll, log of the normaliser) of one chunk."""
  normaliser_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
  return normaliser_BC - jnp.take_along_axis(logits_BCV, labels_BC[..., None], -1)[..., 0], normaliser_BC


def _dlogits(logits_BCV, labels_BC, normaliser_BC, softcap):
  """d nll / d (uncapped) logits = (softmax - one_hot) (1 - (logits / softcap)^2), without a one-hot array in memory."""
  hit = labels_BC[..., None] == jnp.arange(logits_BCV.shape[-1])
  dlogits_BCV = jnp.exp(logits_BCV - normaliser_BC[..., None]) - hit
  return dlogits_BCV * (1 - (logits_BCV / softcap) ** 2) if softcap else dlogits_BCV


def _scan_nll(hidden, head_DV, labels, softcap):
  return jax.lax.map(lambda x: _nll(_logits(x[0], head_DV, softcap), x[1])[0], (hidden, labels))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _nll_frozen_head(hidden, head_DV, labels, softcap):
  return _scan_nll(hidden, head_DV, labels, softcap)


def _frozen_fwd(hidden, head_DV, labels, softcap):
  def one(x):
    logits_BCV = _logits(x[0], head_DV, softcap)
    nll_BC, normaliser_BC = _nll(logits_BCV, x[1])
    dlogits = _dlogits(logits_BCV, x[1], normaliser_BC, softcap).astype(x[0].dtype)
    return nll_BC, jnp.dot(dlogits, head_DV.T.astype(x[0].dtype))
  nll, dhidden = jax.lax.map(one, (hidden, labels))
  return nll, (dhidden, head_DV)


def _frozen_bwd(softcap, residuals, dnll):
  dhidden, head_DV = residuals
  return dhidden * dnll[..., None].astype(dhidden.dtype), jnp.zeros_like(head_DV), None


_nll_frozen_head.defvjp(_frozen_fwd, _frozen_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _nll_trained_head(hidden, head_DV, labels, softcap):
  return _scan_nll(hidden, head_DV, labels, softcap)


def _trained_fwd(hidden, head_DV, labels, softcap):
  return _scan_nll(hidden, head_DV, labels, softcap), (hidden, head_DV, labels)


def _trained_bwd(softcap, residuals, dnll):
  hidden, head_DV, labels = residuals

  def one(dhead, x):
    hidden_BCD, labels_BC, dnll_BC = x
    logits_BCV = _logits(hidden_BCD, head_DV, softcap)
    _, normaliser_BC = _nll(logits_BCV, labels_BC)
    dlogits = (_dlogits(logits_BCV, labels_BC, normaliser_BC, softcap) * dnll_BC[..., None]).astype(hidden_BCD.dtype)
    dhead += jnp.einsum("bcd,bcv->dv", hidden_BCD, dlogits, preferred_element_type=jnp.float32)
    return dhead, jnp.dot(dlogits, head_DV.T.astype(hidden_BCD.dtype))
  dhead, dhidden = jax.lax.scan(one, jnp.zeros(head_DV.shape, jnp.float32), (hidden, labels, dnll))
  return dhidden, dhead.astype(head_DV.dtype), None


_nll_trained_head.defvjp(_trained_fwd, _trained_bwd)


def next_token_count(batch):
  """The number (sum of weights) of supervised tokens of a batch: the count of next-token prediction, from the weights alone."""
  return next_token_targets(batch)[1].sum()


def dpo_sigmoid(log_ratio_chosen_B, log_ratio_rejected_B, beta: float):
  """-log sigmoid(beta (chosen - rejected)) a pair, [B]; ratios are log pi - log pi_ref of the summed completion (arXiv 2305.18290, eq. 7)."""
  return -jax.nn.log_sigmoid(beta * (log_ratio_chosen_B - log_ratio_rejected_B))
