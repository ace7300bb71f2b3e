"""The chunked cross-entropy against the plain one, with its gradients; DPO's golden values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsft import losses


def problem(B=2, T=13, D=8, V=31):
  keys = jax.random.split(jax.random.key(0), 4)
  return (jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V)), jax.random.randint(keys[2], (B, T), 0, V),
          jax.random.uniform(keys[3], (B, T)))


def plain(hidden, head, labels):
  return optax.softmax_cross_entropy_with_integer_labels(hidden @ head, labels)


@pytest.mark.parametrize("head_trained", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_value_and_gradients_equal_the_plain_cross_entropy(chunk, head_trained):
  hidden, head, labels, weights = problem()
  ours = lambda hidden, head: (losses.token_nll(hidden, head, labels, chunk, head_trained) * weights).sum()
  theirs = lambda hidden, head: (plain(hidden, head, labels) * weights).sum()
  value, (dhidden, dhead) = jax.value_and_grad(ours, (0, 1))(hidden, head)
  wanted, (dhidden_wanted, dhead_wanted) = jax.value_and_grad(theirs, (0, 1))(hidden, head)
  np.testing.assert_allclose(value, wanted, rtol=1e-6)
  np.testing.assert_allclose(dhidden, dhidden_wanted, atol=1e-5)
  np.testing.assert_allclose(dhead, dhead_wanted if head_trained else np.zeros_like(head), atol=1e-5)


@pytest.mark.parametrize("head_trained", [True, False])
def test_no_array_of_all_logits_exists(head_trained):
  hidden, head, labels, weights = problem(B=2, T=64, V=500)
  step = jax.make_jaxpr(jax.grad(lambda h, w: (losses.token_nll(h, w, labels[:, :1].repeat(64, 1), 8, head_trained)).sum(), (0, 1)))(hidden, head)
  assert "2,64,500" not in str(step) and "8,2,8,500" not in str(step) and "2,8,500" in str(step)


def test_dpo_golden(golden):
  wanted = golden("preference_losses")
  inputs = {k: jnp.array(v) for k, v in wanted["inputs"].items() if isinstance(v, list)}
  loss = losses.dpo_sigmoid(inputs["logp_chosen"] - inputs["ref_logp_chosen"], inputs["logp_rejected"] - inputs["ref_logp_rejected"], 0.1)
  np.testing.assert_allclose(loss, wanted["losses"]["sigmoid"]["per_pair"], rtol=1e-6)
