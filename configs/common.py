"""Shared parts of the experiment configs: one function a part, plain values, loads without jax."""

from __future__ import annotations

from ml_collections import ConfigDict

ALL_LINEAR = r"(q|k|v|o|gate|up|down)_proj/kernel$"


LLAMA2_7B = "meta-llama/Llama-2-7b-hf"


def template_of(model: str) -> str:
  """The model's own chat template; llama2 for the base model that the 7B configs name, which has none."""
  return "llama2" if model == LLAMA2_7B else "tokenizer"


WORDS = {"1": True, "true": True, "yes": True, "": True, "0": False, "false": False, "no": False}


def parse(arg: str | None, **defaults):
  """The text after the config's colon, "model=DIR,data=FILE,smoke=true", over `defaults`; values take the default's type."""
  values = dict(defaults)
  for part in filter(None, (arg or "").split(",")):
    name, _, text = part.partition("=")
    if name not in values:
      raise ValueError(f"config argument {name!r} is unknown; wanted one of {', '.join(sorted(values))}")
    if isinstance(values[name], bool):
      if text.lower() not in WORDS:
        raise ValueError(f"config argument {name}={text!r} is no truth value; wanted true or false")
      values[name] = WORDS[text.lower()]
    else:
      values[name] = type(values[name])(text)
  return ConfigDict(values)


def source(path: str = "", **over) -> ConfigDict:
  """One set of records: a file, a directory or glob of files, a hub id, or a public set by name (set:alpaca; python -m jaxsft.data sets)."""
  return ConfigDict(dict(
      path=path, format="auto",         # auto | messages | alpaca | ...: jaxsft/data/formats.py lists them
      split="train", revision="",
      rows=0,                           # 0: all
      policy="drop") | over)            # drop | strict: a record that cannot be trained on is left out and counted, or refused


def base() -> ConfigDict:
  """Every knob there is, with its default. Experiment files change values; a key that is not here is an error."""
  c = ConfigDict()
  c.seed = 0
  c.steps = 1000                    # optimiser steps; 0: take them from epochs
  c.epochs = 0.0
  c.batch_size = 8                  # rows an optimiser step, over all hosts and micro-batches
  c.micro_batches = 1               # gradient accumulation: the batch is walked in this many parts
  c.model = ConfigDict(dict(
      path="", revision="",         # HF directory, GGUF file, hub id; "" with `shape` set: random weights (smoke runs)
      shape=ConfigDict(),           # HF config.json keys of a random model
      dtype="bfloat16",             # of activations and matrix products
      base_dtype="bfloat16",        # of frozen 16-bit leaves (embedding, head, norms of a quantised or LoRA base)
      attention="auto",             # auto | xla
      remat="full"))                # full | dots | none: what a layer recomputes in the backward pass
  c.data = ConfigDict(dict(
      train=source(), eval=source(),
      eval_share=0.0,               # held out of train when eval.path is ""
      template="tokenizer",         # tokenizer | chatml | llama2 | vicuna | ...: what is trained is what is exported
      tokenizer="",                 # "" : the model's own
      length=2048, pack=True,
      position="pre",               # pre | post | double: where the instruction of a record with an input stands
      train_on="assistant",         # assistant | last (the last answer alone) | all
      long_rows="drop",             # drop | truncate | error
      workers=0))                   # processes that tokenise; 0: in this one
  c.lora = ConfigDict(dict(rank=0, alpha=32.0, dropout=0.0, targets=ALL_LINEAR, rslora=False))   # rank 0: no adapter
  c.nf4 = ConfigDict(dict(targets="", double_quant=True))                                        # "" : not quantised
  c.freeze = ""                     # regex of leaves that full fine-tuning leaves alone
  c.neftune = ConfigDict(dict(alpha=0.0, length="segment"))                                      # length: segment | row
  c.method = ConfigDict(dict(name="sft", beta=0.1))                                              # beta: dpo
  c.loss_chunk = 1024               # tokens whose logits exist at the same time
  c.optim = ConfigDict(dict(
      name="adamw",                 # adamw | adafactor | lion | muon | adamw8bit | schedule_free, see below
      learning_rate=2e-4,
      # adamw 2e-4 with adapters, 1e-5 full; adamw8bit, muon: as adamw (a Muon update has the size of an AdamW one; b1 is its momentum, 0.95 is usual)
      # adafactor: as adamw to 3 times it (no momentum; b1, b2 and eps are not read)       lion: a tenth to a third, with b2 0.99 and 3 to 10 times the decay
      # schedule_free: 1 to 10 times adamw's, with schedule "constant" and some warm-up; its weights are an average, which evaluation and exports use
      schedule="cosine",            # constant | linear | cosine | wsd
      warmup=0.03,                  # below 1: a share of the steps; else steps
      decay=0.2,                    # wsd only: the share of steps that decays
      final=0.0,                    # the last learning rate, as a share of the peak
      weight_decay=0.0, no_decay=r"(norm|bias|layernorm)", b1=0.9, b2=0.999, eps=1e-8,
      clip_norm=1.0,                # 0: off
      state="float32",              # float32 | bfloat16_stochastic (adamw, lion)
      ema=0.0,                      # decay of an average of the weights, over about 1 / (1 - ema) steps; evaluation, samples and exports use it. 0: off
      spike_sigma=0.0,              # a step whose loss or gradient norm is over mean + this many deviations of the last spike_window steps moves nothing
      spike_window=50))             # steps; none is judged before so many are recorded. spike_sigma 0: off (6 is usual); NaN stops the run either way
  c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))        # -1: what is left of the devices
  c.eval = ConfigDict(dict(every=100, rows=0))                # every 0: never; rows 0: all
  c.sample = ConfigDict(dict(prompts=(), max_new_tokens=128, temperature=0.0))   # shown with each evaluation
  c.checkpoint = ConfigDict(dict(
      every=100, keep=2, keep_best=True,      # steps; the newest `keep` of these and the one of lowest evaluation loss stay
      every_minutes=0.0))                     # 0: off; a save so long after the last one, beside `keep`, gone with the next save
  c.log = ConfigDict(dict(
      every=10, tensorboard=True,
      wandb="",                               # a Weights & Biases project (pip install 'jaxsft[wandb]'); "": off
      layer_norms=False))                     # norms of gradient and parameters by leaf and layer, computed in each step
  return c.lock()                   # from here on a key that is not above is an error


def qlora(c: ConfigDict) -> ConfigDict:
  """NF4 base with double quantisation, float32 adapters on all linear layers (QLoRA's own setting)."""
  c.nf4.targets = ALL_LINEAR
  return lora(c)


def lora(c: ConfigDict) -> ConfigDict:
  """Rank-16 adapters on all linear layers at 2e-4."""
  c.lora.rank, c.lora.alpha, c.optim.learning_rate = 16, 32.0, 2e-4
  return c


def full(c: ConfigDict) -> ConfigDict:
  """Every parameter trained, float32 master weights, 1e-5."""
  c.lora.rank, c.optim.learning_rate, c.model.base_dtype = 0, 1e-5, "float32"
  return c


def smoke(c: ConfigDict) -> ConfigDict:
  """The same graph on a tiny random model, on the repository's own data unless other is named: a CPU runs it in under a minute."""
  if not c.data.train.path:
    c.data.train.path, c.data.eval.path = "demo/tickets_train.jsonl", c.data.eval.path or "demo/tickets_eval.jsonl"
  c.model.path, c.data.tokenizer = "", "bytes"
  c.model.shape = ConfigDict(dict(model_type="llama", vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, max_position_embeddings=4096))
  c.data.template, c.data.length, c.batch_size, c.micro_batches, c.steps, c.epochs = "tokenizer", 512, 8, 2, 6, 0.0
  c.eval.every, c.eval.rows, c.checkpoint.every, c.log.every = 3, 8, 3, 1
  return c
