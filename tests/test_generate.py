"""KV-cache sampling: against transformers, against a known story, against the softmax, and against itself however the rows are batched."""

import collections
import time

import jax
import jax.numpy as jnp
import llama2c
import numpy as np
import pytest
import tiny
import tiny_models

from jaxsft import sharding
from jaxsft.errors import UserError
from jaxsft.generate import Answer, bucket, make_generator, prepare
from jaxsft.models import decoder
from jaxsft.transforms import lora
from jaxsft.transforms import tree as trees

RAGGED = [[7, 3, 250], [11], list(range(40, 70)), [5] * 17, [9, 8, 7, 6, 5]]
NEVER = (-5,)                                # a stop id that no row meets


@pytest.fixture(scope="module")
def tinies(tmp_path_factory):
  """{kind: (torch model, ModelConfig, params)}."""
  out = {}
  for kind in ("llama", "qwen2"):
    directory = tmp_path_factory.mktemp(kind)
    out[kind] = (tiny_models.save_tiny(directory, kind), *tiny_models.open_tiny(directory))
  return out


@pytest.fixture(scope="module")
def llama(tinies):
  """(Generator, params) shared, so that its programs are compiled once."""
  _, cfg, params = tinies["llama"]
  return make_generator(cfg), params


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_greedy_equals_transformers_for_ragged_prompts_and_stops_where_it_does(tinies, kind):
  model, cfg, params = tinies[kind]
  generator = make_generator(cfg)
  expected = [tiny_models.greedy(model, prompt, 32) for prompt in RAGGED]
  assert all(len(answer) == 32 for answer in expected) and len({tuple(answer) for answer in expected}) == len(RAGGED)
  assert generator.generate(params, RAGGED, max_new_tokens=32, stop_ids=NEVER) == expected
  stops = {expected[0][9], expected[2][20]}
  cut = [tiny_models.greedy(model, prompt, 32, sorted(stops)) for prompt in RAGGED]
  assert len(cut[0]) <= 9 and len(cut[2]) <= 20 and not stops & {token for answer in cut for token in answer}
  answers = generator.sample(params, RAGGED, max_new_tokens=32, stop_ids=stops)
  assert answers == [Answer(answer, len(answer) < 32) for answer in cut]


def test_prompts_longer_than_a_part_of_the_prefill(tinies):
  model, cfg, params = tinies["llama"]
  prompts = [np.random.default_rng(n).integers(0, 259, n).tolist() for n in (300, 40, 257, 256)]
  assert make_generator(cfg).generate(params, prompts, max_new_tokens=8, stop_ids=NEVER) == [tiny_models.greedy(model, p, 8) for p in prompts]


def test_a_known_story(shared):
  """llama2.c's own greedy output with stories260K."""
  folder = shared / "data/stories260k"
  cfg, params = llama2c.read_model(folder / "stories260K.bin")
  pieces = llama2c.read_pieces(folder / "tok512.bin", cfg.vocab_size)
  tokens, = make_generator(cfg).generate(jax.tree.map(jnp.asarray, params), [[1]], max_new_tokens=200, stop_ids=[1])
  assert llama2c.text(pieces, tokens).startswith(
      "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. "
      "She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do.")


def test_smollm2_answers_as_in_transformers(demo_dir):
  """The demo's model, through its chat template: 32 tokens of 3 prompts in one batch."""
  import torch
  from transformers import AutoModelForCausalLM, AutoTokenizer
  tokenizer = AutoTokenizer.from_pretrained(demo_dir)
  questions = ["What is the capital of France?", "Write a short poem about the sea.", "Explain what a prime number is, with an example of one."]
  prompts = [tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False) for q in questions]
  with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(demo_dir, dtype=torch.float32).eval()
    expected = [tiny_models.greedy(model, prompt, 32, [2]) for prompt in prompts]
  del model
  cfg, params = tiny_models.open_tiny(demo_dir)
  answers = make_generator(cfg).sample(params, prompts, max_new_tokens=32, stop_ids=[2])
  assert [answer.tokens for answer in answers] == expected
  assert answers[0].stopped and tokenizer.decode(answers[0].tokens) == "The capital of France is Paris."


@pytest.mark.parametrize("how", [dict(), dict(temperature=1.5), dict(temperature=1.5, top_k=20, top_p=0.9)])
def test_what_shares_a_batch_changes_no_sample(llama, how):
  generator, params = llama
  how |= dict(max_new_tokens=12, stop_ids=[17], seed=3)
  whole = generator.sample(params, RAGGED, **how)
  assert generator.sample(params, RAGGED + [[1, 2]] * 6, batch_size=4, **how)[:5] == whole
  streamed = collections.defaultdict(list)
  assert generator.sample(params, RAGGED, on_tokens=lambda i, tokens: streamed[i].extend(tokens), **how) == whole
  assert [streamed[i] for i in range(5)] == [answer.tokens for answer in whole]
  if how.get("temperature"):
    assert generator.sample(params, RAGGED, **how | dict(seed=4)) != whole
    same = generator.generate(params, [RAGGED[0]] * 4, **how)
    assert len({tuple(tokens) for tokens in same}) > 1         # one prompt at several places is several draws


def test_a_temperature_too_cold_for_float32_is_greedy(llama):
  """Logits divided by a denormal are infinite: 1e-39 gave an empty answer that looked finished."""
  generator, params = llama
  greedy = generator.sample(params, RAGGED, max_new_tokens=8, stop_ids=NEVER)
  assert generator.sample(params, RAGGED, max_new_tokens=8, stop_ids=NEVER, temperature=1e-39) == greedy


def constant_model(logits_V):
  """(cfg, params) whose next token has these logits, whatever came before."""
  cfg = tiny.config(vocab_size=len(logits_V))
  params = trees.map_leaves(lambda path, leaf: jnp.zeros(leaf.shape, leaf.dtype), decoder.abstract_params(cfg))
  params["embed_tokens"]["embedding"] = jnp.ones((cfg.vocab_size, cfg.hidden_size))
  params["norm"]["scale"] = jnp.ones(cfg.hidden_size)
  params["lm_head"]["kernel"] = jnp.tile(jnp.asarray(logits_V, jnp.float32), (cfg.hidden_size, 1)) / cfg.hidden_size
  return cfg, params


LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, -6.0])


def frequencies(seed=0, **how):
  cfg, params = constant_model(LOGITS)
  draws = make_generator(cfg).generate(params, [[1]] * 64, max_new_tokens=250, stop_ids=NEVER, batch_size=64, seed=seed, **how)
  assert all(len(row) == 250 for row in draws)
  return np.bincount(np.ravel(draws), minlength=len(LOGITS)) / 16000, np.array(draws)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature):
  found, draws = frequencies(temperature=temperature)
  share = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
  assert (np.abs(found - share) < 4.5 * np.sqrt(share * (1 - share) / 16000) + 1e-9).all(), (found, share)
  first, pairs = share[0], np.mean((draws[:, 1:] == 0) & (draws[:, :-1] == 0))
  assert abs(pairs - first ** 2) < 0.02 and abs(np.mean((draws[1:] == 0) & (draws[:-1] == 0)) - first ** 2) < 0.02     # neighbours are independent


def test_the_least_temperature_is_greedy():
  assert frequencies(temperature=1e-3)[0][0] == 1.0


@pytest.mark.parametrize("top_k, top_p", [(1, 1.0), (3, 1.0), (0, 0.5), (0, 0.9), (4, 0.7), (99, 1e-6), (8, 0.999)])
def test_top_k_and_top_p_keep_what_transformers_keeps(top_k, top_p):
  import torch
  from transformers import TopKLogitsWarper, TopPLogitsWarper
  scores = torch.tensor(LOGITS[None] / 0.8)
  scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
  share = torch.softmax(TopPLogitsWarper(top_p)(None, scores), -1)[0].numpy()
  found, _ = frequencies(temperature=0.8, top_k=top_k, top_p=top_p)
  assert (found[share == 0] == 0).all()
  assert (np.abs(found - share) < 4.5 * np.sqrt(share * (1 - share) / 16000) + 1e-9).all(), (found, share)


@pytest.mark.parametrize("top_k, top_p", [(0, 0.9), (50, 1.0), (50, 0.3), (10 ** 6, 0.95), (1, 0.5), (0, 0.999999)])
def test_the_threshold_of_a_large_vocabulary(top_k, top_p):
  """Found by bisection of the floats' bits; here by sorting, in float64, ties and both signs included."""
  from jaxsft.generate import _threshold
  logits_BV = np.round(np.random.default_rng(0).standard_normal((4, 5000)) * 4, 2).astype(np.float32)
  logits_BV[1] -= 100
  logits_BV[2, :100] = -np.inf
  found = jax.jit(_threshold)(logits_BV, np.int32(top_k), np.float32(top_p))
  for logits, least in zip(logits_BV.astype(np.float64), np.asarray(found)[:, 0]):
    kth = np.sort(logits)[-min(top_k or 5000, 5000)]
    share = np.where(logits >= kth, np.exp(logits - logits.max()), 0)
    share /= share.sum()
    assert least >= kth and (least in logits or top_p == 1.0)
    assert share[logits >= least].sum() > top_p - 1e-6 and (top_p == 1.0 or share[logits > least].sum() < top_p + 1e-6)


def test_few_programs_serve_many_batches(tinies):
  _, cfg, params = tinies["llama"]
  generator = make_generator(cfg)
  prompts = [[1 + n % 200] * n for n in range(1, 61)]
  how = dict(max_new_tokens=10, stop_ids=NEVER, batch_size=8)
  generator.generate(params, prompts, **how)
  first = generator.programs
  assert first == 2                          # for 8 batches, every one of another length
  generator.generate(params, prompts[::-1], **how)
  generator.generate(params, prompts[10:], **how | dict(stop_ids=[3, 4]))
  generator.generate(params, prompts, on_tokens=lambda i, tokens: None, **how)
  assert generator.programs == first
  for temperature, top_k, top_p in ((0.3, 5, 1.0), (0.9, 0, 0.5), (1.1, 7, 0.9)):
    generator.generate(params, prompts[:8], temperature=temperature, top_k=top_k, top_p=top_p, seed=top_k, **how)
  assert generator.programs == first + 2     # the values are arguments


def test_buckets_are_few_and_waste_little():
  sizes = [bucket(n, 32) for n in range(1, 513)]
  assert sorted(set(sizes)) == [32, 48, 64, 96, 128, 192, 256, 384, 512]
  assert all(n <= size < max(33, 1.5 * n) for n, size in enumerate(sizes, 1)) and [bucket(n, 1) for n in (1, 2, 3, 5)] == [1, 2, 3, 6]


def test_a_conversation_that_grows_compiles_little(tinies):
  _, cfg, params = tinies["llama"]
  generator = make_generator(cfg)
  for length in range(5, 60, 5):
    generator.generate(params, [[3] * length], max_new_tokens=16, stop_ids=NEVER, least_slots=256)
  assert generator.programs <= 3


def test_no_array_holds_the_logits_of_a_whole_prompt(tinies):
  """Only the last position meets the head: nothing in the program of the prefill is as large as rows x width x vocabulary."""
  from jaxsft.generate import _request, _settings
  _, cfg, params = tinies["llama"]
  generator = make_generator(cfg)
  tokens_BS, request = _request(cfg, dict(enumerate([[1] * 32] * 4)), 4, 48, 8)
  traced = generator._prefill.trace(params, tokens_BS, request | _settings([2], 0.0, 0, 1.0, 0), np.int32(1), width=32, how="greedy")
  shapes = {variable.aval.shape for jaxpr in all_jaxprs(traced.jaxpr.jaxpr) for equation in jaxpr.eqns for variable in equation.outvars}
  assert (4, 259) in shapes and not any(259 in shape and np.prod(shape) >= 4 * 32 * 259 for shape in shapes)


def all_jaxprs(jaxpr):
  yield jaxpr
  for equation in jaxpr.eqns:
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
      if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
        yield from all_jaxprs(getattr(inner, "jaxpr", inner))


def adapted(params, quantised):
  """The base with an adapter that matters, over NF4 or over the plain kernels."""
  c = tiny.settings(tiny.QLORA if quantised else tiny.LORA)
  adapters = lora.init_adapters(params, c.lora.targets, 4, jax.random.key(0))
  adapters = trees.map_leaves(lambda path, x: jax.random.normal(jax.random.key(len(path)), x.shape) * 0.1, adapters)
  return lora.attach(tiny.quantise(c, params), adapters, 2.0)


@pytest.mark.parametrize("quantised", [False, True])
def test_prepared_parameters_are_plain_and_equal_to_rounding(tinies, quantised):
  _, cfg, params = tinies["llama"]
  rich = adapted(params, quantised)
  plain = prepare(rich)
  assert all(type(leaf) is type(params["norm"]["scale"]) for _, leaf in trees.flatten(plain))
  batch = tiny.rows(V=259)
  hidden = jax.jit(decoder.make_forward(cfg))
  before, views, merged = (np.asarray(hidden(p, batch)) for p in (params, rich, plain))
  assert np.abs(views - merged).max() < 1e-4 and np.abs(views - before).max() > 0.1
  generator = make_generator(cfg)
  how = dict(max_new_tokens=16, stop_ids=NEVER)
  assert generator.generate(rich, RAGGED, **how) == generator.generate(plain, RAGGED, **how) != generator.generate(params, RAGGED, **how)


def test_prepare_casts_what_meets_activations_alone(tinies):
  half = prepare(adapted(tinies["llama"][2], True), "bfloat16")
  kinds = {path: str(leaf.dtype) for path, leaf in trees.flatten(half)}
  assert {kind for path, kind in kinds.items() if path.endswith(("kernel", "embedding"))} == {"bfloat16"}
  assert {kind for path, kind in kinds.items() if path.endswith("scale")} == {"float32"}


def test_parameters_on_a_mesh_answer_the_same(llama):
  generator, params = llama
  mesh = sharding.make_mesh(tiny.settings(tiny.FULL, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}).mesh)
  how = dict(max_new_tokens=8, stop_ids=NEVER)
  assert generator.generate(sharding.place(params, mesh), RAGGED, **how) == generator.generate(params, RAGGED, **how)


def test_the_last_position_ends_an_answer(tinies):
  model, cfg, params = tinies["llama"]
  prompts = [[4] * n for n in (509, 512, 500)]
  answers = make_generator(cfg).sample(params, prompts, max_new_tokens=6, stop_ids=NEVER)
  assert [len(answer.tokens) for answer in answers] == [4, 1, 6] and not any(answer.stopped for answer in answers)
  assert [answer.tokens for answer in answers[1:]] == [tiny_models.greedy(model, prompts[1], 1), tiny_models.greedy(model, prompts[2], 6)]


def test_a_batch_ends_when_its_rows_have(llama):
  """400 tokens are allowed and 3 wanted: the loop does not go on."""
  generator, params = llama
  first, = generator.generate(params, [RAGGED[0]], max_new_tokens=400, stop_ids=NEVER)
  how = dict(max_new_tokens=400, stop_ids=[first[3]])
  generator.generate(params, [RAGGED[0]], **how)

  def seconds(**how):
    start = time.monotonic()
    generator.generate(params, [RAGGED[0]], **how)
    return time.monotonic() - start
  assert min(seconds(**how) for _ in range(3)) < 0.3 * min(seconds(**how | dict(stop_ids=NEVER)) for _ in range(3))


def test_tokens_are_shown_as_they_come_and_a_watcher_can_stop(llama):
  generator, params = llama
  calls = []
  answer, = generator.generate(params, [[3, 4]], max_new_tokens=100, stop_ids=NEVER, on_tokens=lambda i, tokens: calls.append(tokens))
  assert len(calls[0]) == 1 and len(calls) >= 3 and sum(calls, []) == answer and all(calls)

  def stop(index, tokens):
    raise KeyboardInterrupt
  with pytest.raises(KeyboardInterrupt):
    generator.generate(params, [[3, 4]], max_new_tokens=100, stop_ids=NEVER, on_tokens=stop)
  assert generator.generate(params, [[3, 4]], max_new_tokens=100, stop_ids=NEVER) == [answer]


def test_no_prompt_is_no_answer(llama):
  assert llama[0].sample(llama[1], [], max_new_tokens=4, stop_ids=[2]) == []


@pytest.mark.parametrize("prompts, how, message", [
    ([[1], []], {}, "prompt 1 is empty; wanted at least one token"),
    ([[1] * 513], {}, "prompt 0 has 513 tokens; wanted at most the model's 512 positions"),
    ([[1, 259]], {}, "prompt 0 holds the token 259; wanted ids from 0 to 258"),
    ([[-1, 2]], {}, "prompt 0 holds the token -1; wanted ids from 0 to 258"),
    ([[1]], dict(max_new_tokens=0), "generation with max_new_tokens 0; wanted at least 1; set max_new_tokens"),
    ([[1]], dict(temperature=-1.0), "generation with temperature -1.0; wanted 0 .greedy. or more; set temperature"),
    ([[1]], dict(temperature=float("nan")), "generation with temperature nan"),
    ([[1]], dict(top_k=-1), "generation with top_k -1"), ([[1]], dict(top_p=0.0), "generation with top_p 0.0"),
    ([[1]], dict(top_p=1.5), "wanted above 0, at most 1; set top_p"), ([[1]], dict(batch_size=0), "generation with batch_size 0")])
def test_what_cannot_be_generated_is_said(llama, prompts, how, message):
  with pytest.raises(UserError, match=message):
    llama[0].generate(llama[1], prompts, **dict(max_new_tokens=4, stop_ids=[2]) | how)
