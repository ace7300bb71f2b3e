"""Twenty AdamW steps against torch (and peft) from the same start on the same packed, ragged rows; and no split into micro-batches changes a gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import tiny
import torch
import transformers

from jaxsft.batch import split_micro_batches
from jaxsft.methods import sft
from jaxsft.models import decoder, families
from jaxsft.models.config import ModelConfig
from jaxsft.step import TrainState
from jaxsft.transforms import tree as trees

STEPS, B, T, V = 20, 8, 24, 96
HF = transformers.LlamaConfig(vocab_size=V, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                              tie_word_embeddings=False, attn_implementation="eager")
CFG = ModelConfig.from_hf(HF.to_dict())
RATE = {tiny.FULL: 3e-3, tiny.LORA: 2e-2}
OPTIM = {"optim.schedule": "cosine", "optim.warmup": 3, "optim.weight_decay": 0.05, "optim.clip_norm": 1.0, "optim.b2": 0.99,
         "model.dtype": "float32", "model.base_dtype": "float32", "model.remat": "none", "lora.rank": 8, "lora.alpha": 16.0, "lora.dropout": 0.0}


def torch_model():
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(HF)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      parameter.copy_(1 + 0.1 * torch.randn_like(parameter) if "norm" in name else 0.1 * torch.randn_like(parameter))
  return model


def torch_loss(model, batch):
  """Mean NLL of the weighted tokens: transformers' logits under an explicit mask of segments, targets shifted here in torch."""
  tokens, segments, positions = (torch.tensor(batch[name]).long() for name in ("tokens", "segment_ids", "positions"))
  same = (segments[:, :, None] == segments[:, None, :]) & torch.ones(T, T).tril().bool()
  logits = model(tokens, attention_mask=torch.where(same, 0.0, -1e9)[:, None], position_ids=positions).logits
  weights = torch.tensor(batch["weights"])[:, 1:] * ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0))
  nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
  return (nll * weights).sum() / weights.sum()


def torch_run(model, rate, decays):
  """The losses of STEPS steps; `model` is left as trained."""
  parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
  groups = [{"params": [p for name, p in parameters if decays(name)], "weight_decay": 0.05},
            {"params": [p for name, p in parameters if not decays(name)], "weight_decay": 0.0}]
  optimiser = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, betas=(0.9, 0.99), eps=1e-8)
  share = lambda step: (step + 1) / 4 if step < 3 else 0.5 * (1 + np.cos(np.pi * (step - 3) / (STEPS - 3)))
  schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, share)
  losses = []
  for number in range(STEPS):
    loss = torch_loss(model, batch_of(number))
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for _, p in parameters], 1.0)
    optimiser.step()
    schedule.step()
    losses.append(loss.item())
  return losses


def batch_of(number):
  return tiny.rows(B, T, V, seed=number % 4)


def our_run(mode, trainable, params, micro_batches):
  """(losses, trained part) of the same steps through the seam, the batch cut into `micro_batches`."""
  c = tiny.settings(mode, **OPTIM, **{"optim.learning_rate": RATE[mode]})
  if mode == tiny.FULL:
    c.lora.rank = 0
  _, method = tiny.make(c, CFG)
  start, frozen, opt, aux = method.init(params, jax.random.key(0))
  assert jax.tree.structure(start) == jax.tree.structure(trainable)
  state = TrainState(jnp.int32(0), trainable, opt, aux, jax.random.key_data(jax.random.key(0)))
  step, losses = jax.jit(method.step), []
  for number in range(STEPS):
    state, metrics = step(state, frozen, split_micro_batches(batch_of(number), micro_batches))
    losses.append(float(metrics["loss"]))
  return losses, dict(trees.flatten(jax.tree.map(np.asarray, state.trainable)))


def stacked(state, name, hf):
  read = lambda layer: state[hf.format(layer=layer)].detach().numpy()
  arrays = [read(layer).T if name.transpose else read(layer) for layer in (range(CFG.num_hidden_layers) if name.stacked else (0,))]
  return np.stack(arrays) if name.stacked else arrays[0].copy()


def full_tree(model):
  return {name.path: stacked(model.state_dict(), name, name.hf) for name in families.leaves(CFG)}


def adapter_tree(model):
  state = {key.removeprefix("base_model.model."): value for key, value in model.state_dict().items()}
  names = [name for name in families.leaves(CFG) if name.path.endswith("_proj/kernel")]
  return {f"{name.path}/{ours}": stacked(state, name, name.hf.replace(".weight", f".lora_{theirs}.default.weight"))
          for name in names for ours, theirs in (("a", "A"), ("b", "B"))}


@functools.cache
def oracle(mode):
  """(our trees of start and base, torch's losses, torch's end) of a mode."""
  model = torch_model()
  params = full_tree(model)
  if mode == tiny.FULL:
    losses = torch_run(model, RATE[mode], lambda name: "norm" not in name)
    return params, params, losses, full_tree(model)
  model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear"))
  start = adapter_tree(model)
  return start, params, torch_run(model, RATE[mode], lambda name: True), adapter_tree(model)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("mode", [tiny.FULL, tiny.LORA])
def test_twenty_steps_equal_torch(mode, micro_batches):
  start, params, losses, end = oracle(mode)
  tree = lambda leaves: trees.unflatten({path: jnp.asarray(leaf) for path, leaf in leaves.items()})
  ours, trained = our_run(mode, tree(start), tree(params), micro_batches)
  np.testing.assert_allclose(ours, losses, rtol=0, atol=1e-4)
  assert losses[-1] < 0.9 * losses[0]                                           # and it is a training run, not a standstill
  assert trained.keys() == end.keys() and len(end) == (12 if mode == tiny.FULL else 14)
  for path, wanted in end.items():
    error, norm, moved = (np.linalg.norm(x) for x in (trained[path] - wanted, wanted, wanted - start[path]))
    assert error <= 1e-3 * norm and error <= 5e-3 * moved, (path, error, norm, moved)


@functools.cache
def descent():
  """(jitted step, state, frozen) of plain descent at rate 1, dropout and noise on: what a step moves IS the gradient."""
  c = tiny.settings(tiny.LORA, **OPTIM | {"lora.dropout": 0.3, "neftune.alpha": 5.0})
  policy, _ = tiny.make(c, CFG)
  method = sft.build(c, policy, lambda: optax.sgd(1.0))
  trainable, frozen, opt, aux = method.init(decoder.init_params(CFG, jax.random.key(0)), jax.random.key(1))
  trainable = jax.tree.map(lambda x: x + 0.02, trainable)
  return jax.jit(method.step), TrainState(jnp.int32(5), trainable, opt, aux, jax.random.key_data(jax.random.key(2))), frozen


def gradient_of(micro_batches, batch):
  """(loss, gradient) of one step through the seam."""
  step, state, frozen = descent()
  after, metrics = step(state, frozen, split_micro_batches(batch, micro_batches))
  return float(metrics["loss"]), jax.tree.map(lambda before, after: np.asarray(before) - np.asarray(after), state.trainable, after.trainable)


def test_any_split_into_micro_batches_gives_the_same_gradient():
  """Ragged rows, two of them without a single supervised token, in another order too: lesson 1's short last window."""
  batch = tiny.rows(B, T, V, seed=1)
  batch["weights"][-2:] = 0
  loss, gradient = gradient_of(1, batch)
  order = np.random.default_rng(0).permutation(B)
  for micro_batches, rows in ((2, batch), (4, batch), (8, {name: value[order] for name, value in batch.items()})):
    other_loss, other = gradient_of(micro_batches, rows)
    assert other_loss == pytest.approx(loss, rel=1e-5), micro_batches
    for (path, wanted), (_, got) in zip(trees.flatten(gradient), trees.flatten(other)):
      assert np.linalg.norm(wanted) > 0 and np.linalg.norm(got - wanted) < 1e-5 * np.linalg.norm(wanted), (micro_batches, path)
  half = gradient_of(1, {name: value[:4] for name, value in batch.items()})[0] / 2 + gradient_of(1, {name: value[4:] for name, value in batch.items()})[0] / 2
  assert abs(half - loss) > 1e-3 * loss                                          # a mean of means would not have passed
