"""Every family of the table, tiny and random, against transformers: files, cached decoding, gradients, adapters. Logits: test_decoder.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_models
import torch
import transformers

from jaxsft.convert import hf, load, merge, peft
from jaxsft.convert.source import open_source
from jaxsft.generate import make_generator
from jaxsft.models import decoder, families
from jaxsft.models.config import ModelConfig
from jaxsft.transforms import lora, nf4
from jaxsft.transforms import tree as trees

SHAPE = dict(vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=None)
GEMMA = dict(head_dim=32, sliding_window=6, query_pre_attn_scalar=20)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128)
LONG = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.5] * 4, long_factor=[2.0, 3.0] * 4)
CONFIGS = {       # windows of a few tokens and layers that end inside a period
    "llama": transformers.LlamaConfig(**SHAPE, rope_parameters=YARN),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=6),
    "qwen2": transformers.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True),
    "smollm3": transformers.SmolLM3Config(**SHAPE | dict(num_hidden_layers=6)),
    "gemma2": transformers.Gemma2Config(**SHAPE | GEMMA | dict(num_hidden_layers=5)),
    "gemma3_text": transformers.Gemma3TextConfig(**SHAPE | GEMMA | dict(num_hidden_layers=14)),
    "phi3": transformers.Phi3Config(**SHAPE, sliding_window=6, rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    "phi3_long": transformers.Phi3Config(**SHAPE, original_max_position_embeddings=128, rope_parameters=LONG),
}
PROMPTS = [[7, 3, 250], [11], list(range(40, 70)), [5] * 17]


@pytest.fixture(scope="module", params=CONFIGS)
def family(request, tmp_path_factory):
  """(torch model, directory, ModelConfig, params): every parameter random, in bfloat16's grid, so that a file of either type holds it."""
  config = CONFIGS[request.param]
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      rest = float("norm" in name and not config.model_type.startswith("gemma"))
      parameter.copy_((rest + 0.3 * torch.randn_like(parameter)).bfloat16().float())
  directory = tmp_path_factory.mktemp(request.param)
  model.save_pretrained(directory)
  return model, directory, *tiny_models.open_tiny(directory)


def test_the_table_holds_every_family():
  assert {config.model_type for config in CONFIGS.values()} == set(families.FAMILIES)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_export_and_reimport_are_bit_identical(family, tmp_path, dtype):
  model, directory, cfg, params = family
  hf.write_hf(tmp_path / "out", cfg, merge.tree_leaves(jax.tree.map(np.asarray, params)), dtype=dtype)
  source = open_source(tmp_path / "out")
  assert ModelConfig.from_hf(source.config) == cfg
  back = load.load_params(source, cfg)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b.astype(np.float32)), params, back)
  again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager",
                                                                             output_loading_info=True)
  assert not report["missing_keys"] and not report["unexpected_keys"]
  assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
  with torch.no_grad():
    tokens = torch.tensor([PROMPTS[2]])
    assert torch.equal(model(tokens).logits, again.eval()(tokens).logits)         # its config.json says the same


def test_greedy_text_equals_transformers(family):
  model, _, cfg, params = family
  expected = [tiny_models.greedy(model, prompt, 24) for prompt in PROMPTS]
  assert len({tuple(answer) for answer in expected}) == len(PROMPTS)
  assert make_generator(cfg).generate(params, PROMPTS, max_new_tokens=24, stop_ids=[-5]) == expected


def test_gradients_equal_torch(family):
  model, _, cfg, params = family
  batch = {name: jnp.asarray(value) for name, value in tiny.rows(B=2, T=40, V=259).items()}
  full = tiny.settings(tiny.FULL, **{"model.dtype": "float32", "loss_chunk": 16})
  policy, _ = tiny.make(full, cfg)
  trainable, frozen = policy.split(params, jax.random.key(0))

  def loss(trainable):
    nll_BT, weights_BT = policy.token_nll(trainable, frozen, batch)
    return (nll_BT * weights_BT).sum()
  value, gradient = jax.jit(jax.value_and_grad(loss))(trainable)
  theirs, total = torch_gradient(model, batch)
  assert abs(float(value) - total) < 1e-4 * total
  for name in families.leaves(cfg):
    ours = trees.get(gradient, name.path)
    wanted = [theirs[name.hf.format(layer=layer)] for layer in range(cfg.num_hidden_layers)] if name.stacked else theirs[name.hf]
    wanted = np.stack(wanted) if name.stacked else wanted
    wanted = np.swapaxes(wanted, -1, -2) if name.transpose else wanted
    assert np.linalg.norm(ours - wanted) < 1e-3 * np.linalg.norm(wanted), name.path


def torch_gradient(model, batch):
  """({name: gradient}, loss) of the same weighted sum, each text of a packed row alone."""
  model.zero_grad()
  total = torch.zeros(())
  rows = {name: np.asarray(value) for name, value in batch.items()}
  for row, segment in [(row, segment) for row in range(len(rows["tokens"])) for segment in (1, 2)]:
    here = rows["segment_ids"][row] == segment
    tokens, weights = (torch.tensor(rows[name][row][here]) for name in ("tokens", "weights"))
    nll = torch.nn.functional.cross_entropy(model(tokens[None].long()).logits[0, :-1], tokens[1:].long(), reduction="none")
    total = total + (nll * weights[1:]).sum()
  total.backward()
  return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}, float(total.detach())


def test_adapters_on_all_linear_layers_are_peft_s(family, tmp_path):
  """configs/common.py's ALL_LINEAR finds every projection, fused ones too, and peft computes with the exported adapter what we do."""
  from configs.common import ALL_LINEAR
  model, directory, cfg, params = family
  adapters = lora.init_adapters(params, ALL_LINEAR, 4, jax.random.key(1))
  kernels = {name.path for name in families.leaves(cfg) if name.path.endswith("_proj/kernel")}
  assert set(lora.kernel_paths(adapters)) == kernels and len(kernels) == (4 if cfg.model_type == "phi3" else 7)
  adapters = jax.tree.map(lambda x: 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)
  peft.write_peft(tmp_path / "adapter", jax.tree.map(np.asarray, adapters), cfg, rank=4, alpha=8.0, base=open_source(directory).identity)
  from peft import PeftModel
  attached = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), tmp_path / "adapter").eval()
  tokens = np.array([PROMPTS[2]], np.int32)
  batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": np.arange(30, dtype=np.int32)[None]}
  hidden = jax.jit(decoder.make_forward(cfg))(lora.attach(params, adapters, lora.scaling(4, 8.0)), batch)
  with torch.no_grad():
    theirs = attached(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  scale = max(1.0, np.abs(theirs).max())
  assert np.abs(np.asarray(decoder.logits(cfg, params, hidden)) - theirs).max() < 1e-3 * scale
  assert np.abs(theirs - model(torch.tensor(tokens, dtype=torch.long)).logits.detach().numpy()).max() > 0.05


def test_a_quantised_base_computes_as_its_dequantised_weights(family):
  """NF4 leaves are cut into runs and folded into periods like any other leaf."""
  _, _, cfg, params = family
  c = tiny.settings(tiny.QLORA)
  quantised = tiny.quantise(c, params)
  plain = trees.map_leaves(lambda path, leaf: jax.vmap(nf4.dequantise)(leaf) if isinstance(leaf, nf4.NF4Array) else leaf, quantised)
  batch = tiny.rows(B=2, T=24, V=259)
  forward = jax.jit(decoder.make_forward(cfg, remat="full"))
  np.testing.assert_allclose(forward(quantised, batch), forward(plain, batch), atol=2e-5, rtol=2e-5)
