"""Supervised fine-tuning: next-token cross-entropy on the weighted tokens."""

from __future__ import annotations

from jaxsft.losses import next_token_count
from jaxsft.step import Method, collect_one, descend, make_init
from jaxsft.transforms.policy import row_seeds


def build(c, policy, make_tx) -> Method:
  """The plain method; every other collapses to it at its limit."""
  del c

  def objective(state, frozen, batch):
    nll_BT, weights_BT = policy.token_nll(state.trainable, frozen, batch, row_seeds(state, batch))
    return {"nll": ((nll_BT * weights_BT).sum(), 1.0)}, {}

  def evaluate(state, frozen, batch):
    nll_BT, weights_BT = policy.token_nll(state.trainable, frozen, batch)
    return {"loss": ((nll_BT * weights_BT).sum(), weights_BT.sum())}
  return Method(("rows",), make_init(policy, make_tx), collect_one,
                descend(objective, lambda batch: {"nll": next_token_count(batch)}, make_tx), evaluate)
