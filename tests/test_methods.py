"""One table, a row a method: what the seam promises, whatever the method. A new method adds a row here and nothing else."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_selection

from configs import common
from jaxsft import sharding
from jaxsft.batch import split_micro_batches
from jaxsft.checkpoint import Checkpoints
from jaxsft.methods import registry
from jaxsft.models import decoder
from jaxsft.models.config import ModelConfig
from jaxsft.step import TrainState
from jaxsft.transforms.policy import make_policy

B, T, V = 8, 24, 50
CFG = ModelConfig(model_type="llama", vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=8, initializer_range=0.1)   # a frozen random head of 0.02 has logits too flat for any adapter to learn


def rows(number, pairs=False):
  """A batch of ragged, packed rows: 4 + row tokens in segment 1, the rest but the padding in segment 2; few of the words occur."""
  rng = np.random.default_rng(number)
  tokens = rng.integers(1, 8, (B, T)).astype(np.int32)
  length = rng.integers(10, T + 1, (B, 1))
  index = np.arange(T)[None]
  segments = np.where(index < length, 1 + (index >= 4 + np.arange(B)[:, None]), 0).astype(np.int32)
  start = np.where(segments == 2, 4 + np.arange(B)[:, None], 0)
  out = {"tokens": tokens, "segment_ids": segments, "positions": ((index - start) * (segments > 0)).astype(np.int32),
         "weights": ((segments > 0) & (rng.random((B, T)) < .7)).astype(np.float32)}
  row_ids = np.arange(B, dtype=np.int32) + B * number
  if not pairs:
    return out | {"row_ids": row_ids}
  worse = out | {"tokens": rng.integers(1, V, (B, T)).astype(np.int32)}
  return {"chosen": out | {"row_ids": row_ids}, "rejected": worse | {"row_ids": row_ids}, "row_ids": row_ids}


@dataclasses.dataclass
class Row:
  """A method under test: its config, its batches, and how it must collapse to SFT (None: no such limit)."""
  config: dict
  pairs: bool = False
  wrap: Callable | None = None
  same_as_sft: Callable | None = None


ADAPTER = {"lora.rank": 4, "lora.alpha": 8.0, "lora.dropout": 0.2, "neftune.alpha": 5.0}
TABLE = {
    "sft_full": Row({}),
    "sft_full_frozen_embedding": Row({"freeze": "embed_tokens"}),
    "sft_lora_dropout_neftune": Row(ADAPTER),
    "dpo_lora": Row(ADAPTER | {"method.name": "dpo", "method.beta": 0.1}, pairs=True),
    "dpo_full": Row({"method.name": "dpo", "method.beta": 0.1}, pairs=True),
    "selection_lora": Row(ADAPTER, wrap=functools.partial(toy_selection.build, candidates=2, keep_share=0.5),
                          same_as_sft=functools.partial(toy_selection.build, candidates=1, keep_share=1.0)),
}


@functools.cache
def built(name, devices, wrap):
  """(mesh, method, jitted step, jitted evaluate, a fresh state, frozen): made once, so that each program is compiled once for the whole table."""
  row = TABLE[name]
  c = common.base()
  with c.unlocked():
    c.update_from_flattened_dict(row.config)
  c.loss_chunk = 16
  mesh = sharding.make_mesh(c.mesh, jax.devices()[:devices])
  policy = make_policy(c, decoder.make_forward(CFG, constrain=sharding.constrain_stream(mesh)), decoder.output_kernel, None)
  method = registry.build(c, policy, lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)))
  method = wrap(method, policy) if wrap else method
  trainable, frozen, opt, aux = method.init(decoder.init_params(CFG, jax.random.key(1)), jax.random.key(2))
  state = sharding.place(TrainState(jnp.int32(0), trainable, opt, aux, jax.random.key(3)), mesh)
  where = jax.tree.map(lambda x: x.sharding, state)
  step = jax.jit(method.step, donate_argnums=0, out_shardings=(where, sharding.replicated(mesh)))
  return mesh, method, step, jax.jit(method.evaluate), state, sharding.place(frozen, mesh)


@dataclasses.dataclass
class Run:
  """What some steps of a row of the table left."""
  state: TrainState
  history: list
  drawn: int
  report: dict


def run(name, steps=3, micro_batches=4, devices=1, wrap="own", resume=None) -> Run:
  """Some steps; resume: (checkpoints, step) to start from. Asserts that no frozen leaf moved."""
  mesh, method, step, evaluate, fresh, frozen = built(name, devices, TABLE[name].wrap if wrap == "own" else wrap)
  state, drawn, history = jax.tree.map(lambda x: x.copy(), fresh), 0, []
  before = jax.tree.map(np.array, frozen)
  if resume:
    state, data, _ = resume[0].restore(resume[1], state)
    drawn = data["drawn"]

  def draw():
    nonlocal drawn
    drawn += 1
    return rows((drawn - 1) % 5, TABLE[name].pairs)
  for _ in range(steps):
    aux, batches = method.collect(state, frozen, draw)
    state = state._replace(aux=sharding.place(aux, mesh))
    for batch in batches:
      state, metrics = step(state, frozen, sharding.place_batch(split_micro_batches(batch, micro_batches), sharding.batch_sharding(mesh)))
      history.append({k: float(v) for k, v in metrics.items()})
  jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, frozen))
  return Run(state, history, drawn, {k: tuple(map(float, v)) for k, v in evaluate(state, frozen, rows(0, TABLE[name].pairs)).items()})


def close(first, second, rtol=2e-4, atol=2e-5):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol), first, second)


each = pytest.mark.parametrize("name", TABLE)


@each
def test_compiles_once_and_the_state_is_stable(name):
  _, _, step, _, fresh, _ = built(name, 1, TABLE[name].wrap)
  compiled = step._cache_size()
  state = run(name, micro_batches=2).state
  assert step._cache_size() == compiled + 1
  assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), fresh)


@each
def test_micro_batches_equal_the_batch(name):
  one, four = run(name, micro_batches=1, steps=2), run(name, micro_batches=4, steps=2)
  close(one.state.trainable, four.state.trainable)
  close(one.history, four.history)


@each
def test_one_device_equals_eight(name):
  one, eight = run(name, devices=1, micro_batches=1, steps=2), run(name, devices=8, micro_batches=1, steps=2)
  close(one.state.trainable, eight.state.trainable)
  close(one.history, eight.history)


@each
def test_save_and_resume_continue_to_the_bit(name, tmp_path):
  straight, half = run(name, steps=4), run(name, steps=2)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(2, half.state, {"drawn": half.drawn}, {})
  checkpoints.wait()
  identical(straight.state, run(name, steps=2, resume=(checkpoints, 2)).state)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.same_as_sft])
def test_collapses_to_sft_at_its_limit(name):
  limit, plain = run(name, wrap=TABLE[name].same_as_sft), run(name, wrap=None)
  assert limit.history == plain.history
  identical(limit.state.trainable, plain.state.trainable)


@each
def test_the_loss_falls_on_a_toy_task(name):
  (first, count), (last, _) = run(name, steps=0).report["loss"], run(name, steps=40).report["loss"]
  assert count > 0 and last < 0.9 * first


def identical(first, second):
  plain = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(plain(a), plain(b)), first, second)
