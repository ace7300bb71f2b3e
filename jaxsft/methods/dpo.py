"""Direct preference optimisation, sigmoid loss (arXiv 2305.18290): pairs of a chosen and a rejected reply against the starting model.

The reference is the same base with the adapter off, so LoRA and QLoRA need no second model in memory; full fine-tuning keeps a copy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxsft.losses import dpo_sigmoid
from jaxsft.step import Method, collect_one, descend, make_init
from jaxsft.transforms.policy import row_seeds


def build(c, policy, make_tx) -> Method:
  """c.method.beta is the strength of the pull to the reference (0.1 in the paper)."""
  plain_init = make_init(policy, make_tx)

  def init(params, key):
    trainable, frozen, opt, aux = plain_init(params, key)
    return trainable, {"base": frozen, "reference": policy.reference(trainable)}, opt, aux

  def log_probability_B(trainable, frozen, rows, seeds=None):
    nll_BT, weights_BT = policy.token_nll(trainable, frozen, rows, seeds)
    return -(nll_BT * weights_BT).sum(-1)

  def margins(state, frozen, batch, seeds=None):
    """(log pi / pi_ref of the chosen, of the rejected), [B] each."""
    ratio = lambda rows: (log_probability_B(state.trainable, frozen["base"], rows, seeds)
                          - jax.lax.stop_gradient(log_probability_B(frozen["reference"], frozen["base"], rows)))
    return ratio(batch["chosen"]), ratio(batch["rejected"])

  def terms(state, frozen, batch, seeds=None):
    chosen_B, rejected_B = margins(state, frozen, batch, seeds)
    real_B = _real_pairs(batch)
    loss_B = dpo_sigmoid(chosen_B, rejected_B, c.method.beta)
    return (loss_B * real_B).sum(), ((chosen_B > rejected_B) * real_B).sum(), real_B.sum()

  def objective(state, frozen, batch):
    loss, right, count = terms(state, frozen, batch, row_seeds(state, batch))
    return {"dpo": (loss, 1.0)}, {"reward_accuracy": (right, count)}

  def evaluate(state, frozen, batch):
    loss, right, count = terms(state, frozen, batch)
    return {"loss": (loss, count), "reward_accuracy": (right, count)}
  return Method(("pairs",), init, collect_one, descend(objective, lambda batch: {"dpo": _real_pairs(batch).sum()}, make_tx), evaluate)


def _real_pairs(batch):
  """1 for a pair, 0 for a padding row, [B] float32."""
  return (batch["chosen"]["weights"].sum(-1) > 0).astype(jnp.float32)
