"""How far a merged export is from the adapter it was made of, in logits: what rounding and another base cost."""

from __future__ import annotations

import numpy as np

from jaxsft.convert import load
from jaxsft.convert.adapter import Adapter
from jaxsft.convert.source import open_source
from jaxsft.models.config import ModelConfig

PROBE = [{"role": "user", "content": "What is the capital of France, and how many people live there?"},
         {"role": "assistant", "content": "The capital of France is Paris. About two million people live in the city itself."}]


def logit_drift(adapter: Adapter, merged_dir) -> dict[str, float]:
  """Both models in float32 on one probe conversation: max_abs and mean_abs difference of the logits, mean KL (nats), top-1 agreement.

  The adapter's side computes as training did: on the NF4 weights where the base was quantised. Memory: both models, on the host.
  """
  tokens = _probe(adapter)
  merged = open_source(merged_dir)
  ours = _log_probabilities(adapter.cfg, _attached(adapter), tokens)
  theirs = _log_probabilities(adapter.cfg, load.load_params(merged, ModelConfig.from_hf(merged.config), load.stack(np.float32)), tokens)
  (logits_a, log_p), (logits_b, log_q) = ours, theirs
  return {"max_abs": float(np.abs(logits_a - logits_b).max()), "mean_abs": float(np.abs(logits_a - logits_b).mean()),
          "kl": float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
          "top1_agreement": float((logits_a.argmax(-1) == logits_b.argmax(-1)).mean())}


def _probe(adapter) -> np.ndarray:
  """The probe's ids under the trained template; without a tokenizer or a template, ids spread over the vocabulary."""
  from jaxsft.errors import UserError
  try:
    tokenizer = adapter.tokenizer()
    ids = tokenizer.apply_chat_template(PROBE, tokenize=True, return_dict=False, chat_template=adapter.chat_template)
  except (UserError, ValueError):
    ids = np.arange(64) * 7919 % adapter.cfg.vocab_size
  return np.asarray(ids, np.int32)[None]


def _attached(adapter):
  """The base with NF4 leaves where it was trained on them, and the adapter over it."""
  import jax
  import jax.numpy as jnp

  from jaxsft.transforms import lora
  targets = adapter.nf4.get("targets", "")

  def make_leaf(path, shape, layers, read):
    if not load.wants_nf4(targets, path):
      return load.stack(np.float32)(path, shape, layers, read)
    parts = [read.as_nf4(layer, adapter.nf4["double_quant"]) for layer in (range(layers) if layers else [None])]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *parts) if layers else parts[0]
  return lora.attach(load.load_params(adapter.base, adapter.cfg, make_leaf), adapter.adapters, adapter.scale)


def _log_probabilities(cfg, params, tokens_BT):
  """(logits float32, log-probabilities float64) [T, V]; float64, as the KL of near-equal models drowns in float32."""
  import jax
  import jax.numpy as jnp

  from jaxsft.models import decoder
  T = tokens_BT.shape[1]
  batch = {"tokens": jnp.asarray(tokens_BT), "segment_ids": jnp.ones_like(tokens_BT), "positions": jnp.arange(T, dtype=jnp.int32)[None]}
  hidden = decoder.make_forward(cfg)(jax.tree.map(jnp.asarray, params), batch)
  logits = np.asarray(decoder.logits(cfg, params, hidden[0], precision="highest"))
  shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
  return logits, shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
