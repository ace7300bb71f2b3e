"""How full, LoRA and QLoRA split one tree, join it again, and what stands for the model at the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxsft.errors import UserError
from jaxsft.models import decoder
from jaxsft.transforms import lora
from jaxsft.transforms import tree as trees

CFG = tiny.config()


def split(mode, **over):
  policy, _ = tiny.make(tiny.settings(mode, **{"model.dtype": "float32", **over}), CFG)
  params = decoder.init_params(CFG, jax.random.key(0))
  return policy, params, *policy.split(params, jax.random.key(1))


def test_full_trains_everything_and_keeps_a_copy_as_reference():
  policy, params, trainable, frozen = split(tiny.FULL)
  assert frozen == {} and [path for path, _ in trees.flatten(trainable)] == [path for path, _ in trees.flatten(params)]
  reference = policy.reference(trainable)
  same = lambda a, b: a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer()
  assert not any(jax.tree.leaves(jax.tree.map(same, reference, trainable)))              # the state is donated: a shared buffer would be gone after a step


def test_freeze_leaves_alone_what_it_names_and_joins_to_the_same_tree():
  policy, params, trainable, frozen = split(tiny.FULL, freeze="embed_tokens|norm")
  assert {path for path, _ in trees.flatten(trainable)} == {path for path, _ in trees.flatten(params) if path.endswith("kernel")}
  jax.tree.map(np.testing.assert_array_equal, policy.params(trainable, frozen), params)


def test_freeze_that_leaves_nothing_or_finds_nothing_is_the_users_mistake():
  with pytest.raises(UserError, match=r"freeze='\.' leaves nothing to train; wanted .*; set freeze"):
    split(tiny.FULL, freeze=".")
  with pytest.raises(UserError, match=r"freeze='embedd_tokens' matches no parameter; wanted .*embed_tokens/embedding"):
    split(tiny.FULL, freeze="embedd_tokens")


def test_adapters_alone_are_trained_and_their_absence_is_the_reference():
  policy, params, trainable, frozen = split(tiny.LORA)
  assert all(path.endswith(("kernel/a", "kernel/b")) for path, _ in trees.flatten(trainable))
  assert jax.tree.map(lambda a, b: a is b, frozen, params) == jax.tree.map(lambda _: True, params)       # the base itself, no copy
  assert policy.reference(trainable) is None
  moved = jax.tree.map(lambda x: x + 0.1, trainable)
  nll = lambda trainable: policy.token_nll(trainable, frozen, tiny.rows(B=2))[0]
  np.testing.assert_array_equal(nll(None), nll(trainable))                             # B is zero: the start is the base
  assert np.abs(np.asarray(nll(moved) - nll(None))).max() > 0.1
  joined = dict(trees.flatten(policy.params(moved, frozen)))
  assert sum(isinstance(leaf, lora.LoRAKernel) for leaf in joined.values()) == 7 and isinstance(joined["lm_head/kernel"], jax.Array)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("freeze, trained", [("", True), ("lm_head|embed_tokens", False)])
def test_the_head_has_a_gradient_exactly_when_it_is_trained(tied, freeze, trained):
  """A tied head's gradient flows into the embedding, through look-up and projection both: against plain softmax cross-entropy over all logits."""
  cfg = tiny.config(tie_word_embeddings=tied, num_hidden_layers=1)
  policy, _ = tiny.make(tiny.settings(tiny.FULL, freeze=freeze and ("embed_tokens" if tied else freeze), **{"model.dtype": "float32"}), cfg)
  trainable, frozen = policy.split(decoder.init_params(cfg, jax.random.key(0)), jax.random.key(1))
  batch = tiny.rows(B=2)

  def plain(trainable):
    params = trees.merge(trainable, frozen)
    logits = decoder.make_forward(cfg)(params, batch) @ decoder.output_kernel(params)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.roll(batch["tokens"], -1, 1)[..., None], -1)[..., 0]
    return (nll * policy.token_nll(trainable, frozen, batch)[1]).sum()

  def ours(trainable):
    nll, weights = policy.token_nll(trainable, frozen, batch)
    return (nll * weights).sum()
  got, wanted = (dict(trees.flatten(jax.jit(jax.grad(loss))(trainable))) for loss in (ours, plain))
  assert ("embed_tokens/embedding" in got) == trained and ("lm_head/kernel" in got) == (trained and not tied)
  for path, gradient in wanted.items():
    np.testing.assert_allclose(got[path], gradient, rtol=1e-4, atol=1e-5, err_msg=path)
