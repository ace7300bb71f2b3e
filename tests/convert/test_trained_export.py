"""A real run of the trainer, exported: peft and transformers compute the logits that the trained model has here."""

import json
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from configs import common
from jaxsft import base as bases
from jaxsft import sharding, train
from jaxsft.checkpoint import Checkpoints
from jaxsft.convert.__main__ import main as convert
from jaxsft.convert.adapter import open_adapter
from jaxsft.data.tokenizer import byte_tokenizer
from jaxsft.models import decoder
from jaxsft.transforms import lora

TOKENS = np.random.default_rng(0).integers(0, 259, (2, 48)).astype(np.int32)


SHAPE = dict(vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
             pad_token_id=None, bos_token_id=None, eos_token_id=None)
MORE = {"llama": {}, "phi3": {}, "gemma3_text": dict(head_dim=16, sliding_window=8, sliding_window_pattern=2)}


@pytest.fixture(scope="module", params=["lora llama", "qlora llama", "lora gemma3_text", "qlora phi3"])
def trained(request, tmp_path_factory):
  """(workdir, logits of the trained model as the trainer sees it): a model of transformers' own making, 4 steps, float32."""
  mode, family = request.param.split()
  folder = tmp_path_factory.mktemp(mode)
  torch.manual_seed(0)
  transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **SHAPE | MORE[family])).save_pretrained(folder / "base")
  byte_tokenizer().save_pretrained(folder / "base")
  lines = [{"instruction": f"say {word}", "output": word * 3} for word in "one two three four five six seven eight".split()]
  (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  c = getattr(common, mode)(common.base())
  c.model.path, c.data.train.path, c.data.length, c.batch_size, c.steps = str(folder / "base"), str(folder / "data.jsonl"), 64, 8, 4
  c.model.dtype = c.model.base_dtype = "float32"
  c.optim.learning_rate, c.optim.schedule, c.eval.every, c.log.tensorboard, c.lora.rank = 5e-2, "constant", 0, False, 4
  train.run(c, folder / "run")
  mesh = sharding.make_mesh(c.mesh, jax.devices()[:1])
  params = bases.load(c, bases.open_base(c), mesh)
  adapter = open_adapter(folder / "run")
  logits = logits_here(adapter.cfg, lora.attach(params, jax.tree.map(jax.numpy.asarray, adapter.adapters), adapter.scale))
  assert np.abs(logits - logits_here(adapter.cfg, params)).max() > 0.1         # training moved it: equality below means something
  return folder / "run", logits, c


def logits_here(cfg, params):
  index = np.arange(TOKENS.shape[1], dtype=np.int32)
  batch = {"tokens": TOKENS, "segment_ids": np.ones_like(TOKENS), "positions": np.tile(index, (len(TOKENS), 1))}
  return np.asarray(decoder.logits(cfg, params, decoder.make_forward(cfg)(params, batch)))


def logits_there(model):
  with torch.no_grad():
    return model.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def test_the_adapter_in_peft_has_our_logits(trained, tmp_path):
  workdir, logits, c = trained
  assert convert([str(workdir), str(tmp_path / "adapter"), "--to=peft"]) == 0
  base = c.model.path
  if c.nf4.targets:       # peft's base must be what the adapter was trained on: the dequantised weights, exported with an adapter of zero
    base = str(tmp_path / "dequantised")
    adapter = open_adapter(workdir)
    from jaxsft.convert.hf import write_hf
    write_hf(base, adapter.cfg, adapter.base_leaves("nf4"), dtype="float32")
  model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(tmp_path / "adapter"))
  assert np.abs(logits_there(model) - logits).max() < 1e-3


def test_the_merged_model_in_transformers_has_our_logits(trained, tmp_path):
  workdir, logits, _ = trained
  assert convert([str(workdir), str(tmp_path / "merged"), "--merge", "--dtype=float32"]) == 0
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
  assert np.abs(logits_there(model) - logits).max() < 1e-3
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
  assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"
  assert model.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])


def test_every_checkpoint_is_whole(trained):
  workdir, _, _ = trained
  assert Checkpoints(workdir / "checkpoints", read_only=True).steps() == [4]


@pytest.mark.parametrize("how", ["--to=peft", "--merge"])
def test_an_export_that_renders_otherwise_is_no_success(trained, tmp_path, capsys, how):
  """Lessons row 8: the checkpoint keeps a training row, and every export is held against it."""
  workdir, _, _ = trained
  meta = Checkpoints(workdir / "checkpoints", read_only=True).meta(4)
  assert meta["witness"]["text"].startswith("<|im_start|>user\nsay one<|im_end|>\n")
  copy = tmp_path / "run"
  shutil.copytree(workdir, copy)
  vocabulary = json.loads((copy / "tokenizer/tokenizer.json").read_text())
  vocabulary["model"]["vocab"]["a"], vocabulary["model"]["vocab"]["y"] = vocabulary["model"]["vocab"]["y"], vocabulary["model"]["vocab"]["a"]
  (copy / "tokenizer/tokenizer.json").write_text(json.dumps(vocabulary))
  assert convert([str(copy), str(tmp_path / "out"), how, *(["--no-drift"] if how == "--merge" else [])]) == 2
  assert f"{tmp_path / 'out'} gives other tokens than training did" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()                                          # and nothing is left that somebody might serve


def test_to_orbax_stops_where_training_did(trained, tmp_path):
  """The trained end-of-turn is none of the base's eos ids here (they are null)."""
  workdir, _, _ = trained
  assert convert([str(workdir), str(tmp_path / "orbax"), "--merge", "--to=orbax"]) == 0
  end = Checkpoints(workdir / "checkpoints", read_only=True).meta(4)["end_of_turn_ids"]
  assert json.loads((tmp_path / "orbax/generation_config.json").read_text())["eos_token_id"][:1] == end
