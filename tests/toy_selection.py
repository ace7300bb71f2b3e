"""A toy of online batch selection: a wrapper round any method whose `collect` scores candidates, keeps the best rows, remembers scores in `aux`."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft.batch import next_token_targets


def build(inner, policy, candidates: int, keep_share: float):
  """`inner` with selection: draws `candidates` batches, keeps the rows of highest loss that are far from the queue's mean."""
  @jax.jit
  def scores_B(trainable, frozen, batch, queue):
    nll_BT, weights_BT = policy.token_nll(trainable, frozen, batch)
    mean_B = (nll_BT * weights_BT).sum(-1) / jnp.maximum(weights_BT.sum(-1), 1)
    return mean_B, mean_B + 0.1 * jnp.abs(mean_B - queue.mean())

  def init(params, key):
    trainable, frozen, opt, aux = inner.init(params, key)
    return trainable, frozen, opt, {"inner": aux, "queue": jnp.zeros(4), "seen": jnp.int32(0)}

  def collect(state, frozen, draw):
    rows = [draw() for _ in range(candidates)]
    pool = {k: np.concatenate([row[k] for row in rows]) for k in rows[0]}
    loss_B, score_B = scores_B(state.trainable, frozen, pool, state.aux["queue"])
    kept = np.sort(np.argsort(-np.asarray(score_B), kind="stable")[:int(round(len(score_B) * keep_share))])
    queue = jnp.concatenate([state.aux["queue"], loss_B[kept]])[-4:]
    return state.aux | {"queue": queue, "seen": state.aux["seen"] + len(score_B)}, [{k: v[kept] for k, v in pool.items()}]
  return inner._replace(init=init, collect=collect)


def weights_of(batch):
  return next_token_targets(batch)[1]
