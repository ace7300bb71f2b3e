"""KV-cache sampling for evaluation, chat and on-policy methods: prompts in, new tokens out, everything between in two compiled programs.

  prefill   the prompts of a batch, `width` tokens at a time, into the cache; the first new token
  decode    one token a turn of a loop, until every row has stopped or `turns` are over (a number, not a shape: streaming compiles nothing)

A row's tokens lie in one array of `slots` columns, prompt and answer together:

    tokens_BS   a b c x y .      lengths  3   at  5        `at` tokens are known; the cache holds those before the last
                d e z . . .               2       3

Shapes come in a few sizes (`bucket`), and a batch takes those of the one before it where they are not over twice too large, so that few
programs are compiled. The k-th draw of prompt i depends on (seed, i, k) alone: which rows share a batch changes no sample.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft.errors import UserError
from jaxsft.models import decoder
from jaxsft.transforms import lora, nf4
from jaxsft.transforms import tree as trees

WIDEST = 256              # prompt tokens a row taken at once: bounds the memory of long prompts
PREFILL_TOKENS = 4096     # the same over all rows of a batch
LEAST = 32                # columns of the smallest program
COLD = 1e-5               # temperatures below take the likeliest token: logits divided by them overflow
CALL_SECONDS = 0.2        # how long a call of `decode` should take when somebody is watching


class Answer(NamedTuple):
  """New tokens without the stop token; stopped is False where the limit or the model's last position cut the answer."""
  tokens: list[int]
  stopped: bool


class Generator:
  """Samples from one model shape. Its programs are compiled on first use, for each structure of `params`, and kept."""

  def __init__(self, cfg, dtype: str = "float32"):
    self.cfg, self.dtype = cfg, dtype
    self.programs = 0         # traced so far
    forward = self._counted(decoder.make_cached_forward(cfg, dtype))
    head = functools.partial(decoder.logits, cfg)
    new_cache = functools.partial(decoder.init_cache, cfg, dtype=dtype)
    self._prefill = jax.jit(functools.partial(_prefill, forward, head, new_cache), static_argnames=("width", "how"))
    self._decode = jax.jit(functools.partial(_decode, forward, head), static_argnames=("how",), donate_argnames=("state",))

  def _counted(self, forward):
    """Each program holds the model once: its tracing is counted."""
    def traced(*args):
      self.programs += 1
      return forward(*args)
    return traced

  def generate(self, params, prompts: Sequence[Sequence[int]], **how) -> list[list[int]]:
    """The new tokens of each prompt, in the order given; arguments as `sample`."""
    return [answer.tokens for answer in self.sample(params, prompts, **how)]

  def sample(self, params, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Iterable[int], temperature: float = 0.0,
             top_k: int = 0, top_p: float = 1.0, seed: int = 0, batch_size: int = 16, least_slots: int = 0,
             on_tokens: Callable[[int, list[int]], Any] | None = None) -> list[Answer]:
    """An Answer for each prompt, in the order given.

    params: the decoder's tree; kernels may be rich leaves (LoRA views, NF4), which are then dequantised at every token: see `prepare`.
    temperature 0 takes the likeliest token. Else logits / temperature, cut to the top_k likeliest (0: all; those level with the k-th stay),
    then to the likeliest that together reach top_p (at least one), as transformers does. stop_ids end a row.
    least_slots: room for prompt and answer from the start, so that a conversation that grows compiles nothing.
    on_tokens(prompt's index, new tokens) is called as tokens come, several times a second; what it raises ends the generation.
    Errors: UserError for an empty prompt, one beyond the model's max_position_embeddings, and settings out of range.
    """
    check_settings(max_new_tokens, temperature, top_k, top_p, batch_size)
    _check_prompts(self.cfg, prompts)
    settings = _settings(stop_ids, temperature, top_k, top_p, seed)
    how = "greedy" if temperature < COLD else "filtered" if top_k or top_p < 1 else "free"
    answers: dict[int, Answer] = {}
    slots = width = 0
    for indices in _batches([len(prompt) for prompt in prompts], batch_size):
      rows = batch_size if len(prompts) > batch_size else bucket(len(prompts), 1)
      lengths = [len(prompts[i]) for i in indices]
      width = _width(max(lengths), rows, width)
      slots = _slots(max(lengths), max(_end(self.cfg, length, max_new_tokens) for length in lengths), width, slots, least_slots)
      tokens_BS, request = _request(self.cfg, {i: prompts[i] for i in indices}, rows, slots, max_new_tokens)
      state = self._run(params, tokens_BS, request | settings, indices, width, how, on_tokens)
      answers |= _answers(state, request, indices)
    return [answers[i] for i in range(len(prompts))]

  def _run(self, params, tokens_BS, request, indices, width, how, on_tokens):
    """The last state of one batch, on the host."""
    chunks = np.int32(-(-int(request["lengths"].max()) // width))
    state = self._prefill(params, tokens_BS, request, chunks, width=width, how=how)
    if on_tokens is None:
      return _fetch(self._decode(params, state, request, np.int32(tokens_BS.shape[1]), how=how))
    seen, turns = request["lengths"], 1
    while True:
      now = _fetch(state)
      for row, index in enumerate(indices):
        if now["at"][row] > seen[row]:
          on_tokens(index, now["tokens"][row, seen[row]:now["at"][row]].tolist())
      if _done(now, request).all():
        return now
      seen, start = now["at"], time.monotonic()
      state = jax.block_until_ready(self._decode(params, state, request, np.int32(turns), how=how))
      turns = int(np.clip(turns * CALL_SECONDS / (time.monotonic() - start), 1, 2 * turns))


def stop_ids(template, source, cfg, tokenizer, trained=()) -> tuple[int, ...]:
  """Every id that ends an answer: the template's end of turn, those a run trained, the model's own by each of its files. source may be None."""
  stored = source.generation_config.get("eos_token_id") if source else None
  groups = (template.end_of_turn_id, trained, stored, cfg.eos_token_id, tokenizer.eos_token_id)
  return tuple(sorted({int(i) for group in groups for i in (group if isinstance(group, list | tuple) else (group,)) if i is not None}))


def make_generator(cfg, dtype: str = "float32") -> Generator:
  """A Generator of the model `cfg`; dtype is that of activations and cache."""
  return Generator(cfg, dtype)


def prepare(params, dtype: str = "float32"):
  """`params` with NF4 dequantised, LoRA merged, and kernels and embedding in `dtype`, once and for all.

  A token then takes about a fifth less time (SmolLM2 in NF4 with rank 16, 2 CPU cores: 29 against 35 ms alone, 55 against 68 in a batch of
  16), for parameters x dtype's size of memory on top.
  Not bit-equal to the rich leaves: x W + s (x A) B becomes x (W + s A B), rounded to `dtype`.
  """
  plain = jax.jit(functools.partial(_plain, dtype=dtype))
  return trees.map_leaves(lambda path, leaf: plain(leaf) if path.endswith(("kernel", "embedding")) else leaf, params)


def _plain(leaf, dtype):
  rich = isinstance(leaf, lora.LoRAKernel | nf4.NF4Array)
  return jax.lax.map(lambda layer: _dense(layer).astype(dtype), leaf) if rich and len(leaf.shape) == 3 else _dense(leaf).astype(dtype)


def _dense(leaf):
  """The [in, out] array that one layer's leaf stands for."""
  if isinstance(leaf, lora.LoRAKernel):
    return lora.merge(_dense(leaf.base), leaf.a, leaf.b, leaf.scale)
  return nf4.dequantise(leaf) if isinstance(leaf, nf4.NF4Array) else leaf


def bucket(size: int, least: int) -> int:
  """The smallest of least x 1, 1.5, 2, 3, 4, 6, 8, ... (whole numbers) that holds `size`."""
  power = least
  while power < size:
    if power * 3 % 2 == 0 and power * 3 // 2 >= size:
      return power * 3 // 2
    power *= 2
  return power


def check_settings(max_new_tokens: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, batch_size: int = 16):
  """Errors: UserError for a setting of `Generator.sample` that is out of range."""
  for found, good, wanted in ((f"max_new_tokens {max_new_tokens}", max_new_tokens >= 1, "at least 1"),
                              (f"temperature {temperature}", 0 <= temperature < float("inf"), "0 (greedy) or more"),
                              (f"top_k {top_k}", top_k >= 0, "0 (off) or more"), (f"top_p {top_p}", 0 < top_p <= 1, "above 0, at most 1"),
                              (f"batch_size {batch_size}", batch_size >= 1, "at least 1")):
    if not good:
      raise UserError(f"generation with {found}", wanted=wanted, knob=found.split()[0])


def _check_prompts(cfg, prompts):
  for i, prompt in enumerate(prompts):
    if not len(prompt):
      raise UserError(f"prompt {i} is empty", wanted="at least one token, such as a BOS")
    if len(prompt) > cfg.max_position_embeddings:
      raise UserError(f"prompt {i} has {len(prompt)} tokens", wanted=f"at most the model's {cfg.max_position_embeddings} positions")
    if odd := [token for token in prompt if not 0 <= token < cfg.vocab_size]:
      raise UserError(f"prompt {i} holds the token {odd[0]}", wanted=f"ids from 0 to {cfg.vocab_size - 1}")


def _settings(stop_ids, temperature, top_k, top_p, seed):
  stops = sorted(set(stop_ids))
  return {"stop_ids": np.array(stops + [-1] * (bucket(len(stops), 4) - len(stops)), np.int32), "seed": np.uint32(seed % 2 ** 32),
          "temperature": np.float32(temperature), "top_k": np.int32(min(top_k, 2 ** 31 - 1)), "top_p": np.float32(top_p)}


def _batches(lengths, batch_size):
  """Indices of the prompts, longest first: rows of a batch are near in length, and memory runs out at once or never."""
  order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
  return [order[start:start + batch_size] for start in range(0, len(order), batch_size)]


def _width(longest, rows, last):
  """Prompt tokens taken at once: enough for the longest prompt in as few equal parts as memory allows, or what the batch before had."""
  widest = max(LEAST, min(WIDEST, PREFILL_TOKENS // rows))
  width = LEAST
  while width * -(-longest // widest) < longest:
    width *= 2
  return last if width <= last <= 2 * width else width


def _slots(longest, end, width, last, least):
  """Columns of a batch: prompts in whole parts of `width`, and their answers."""
  slots = bucket(max(-(-longest // width) * width, end, least), LEAST)
  return last if slots <= last <= 2 * slots else slots


def _end(cfg, length, max_new_tokens):
  """Prompt and answer together: the last new token is never fed, so that it needs no position."""
  return min(length + max_new_tokens, max(length, cfg.max_position_embeddings) + 1)


def _request(cfg, prompts, rows, slots, max_new_tokens):
  """(tokens_BS, {lengths, ends, indices} [B]) of a batch; rows that only fill it end where they start."""
  tokens_BS = np.zeros((rows, slots), np.int32)
  lengths, ends, indices = np.ones(rows, np.int32), np.ones(rows, np.int32), np.zeros(rows, np.int32)
  for row, (index, prompt) in enumerate(prompts.items()):
    tokens_BS[row, :len(prompt)] = prompt
    lengths[row], ends[row], indices[row] = len(prompt), _end(cfg, len(prompt), max_new_tokens), index
  return tokens_BS, {"lengths": lengths, "ends": ends, "indices": indices}


def _prefill(forward, head, new_cache, params, tokens_BS, request, chunks, *, width, how):
  """Feeds `chunks` x `width` columns and emits the first new token of each row."""
  B, S = tokens_BS.shape
  rows, last_B = jnp.arange(B), request["lengths"] - 1

  def chunk(number, carry):
    cache, last_BD = carry
    start = number * width
    positions_BT = jnp.broadcast_to(start + jnp.arange(width), (B, width))
    hidden_BTD, cache = forward(params, jax.lax.dynamic_slice_in_dim(tokens_BS, start, width, 1), positions_BT, cache)
    inside_B = (last_B >= start) & (last_B < start + width)
    picked_BD = hidden_BTD[rows, jnp.clip(last_B - start, 0, width - 1)]
    return cache, jnp.where(inside_B[:, None], picked_BD, last_BD)
  cache = new_cache(B, S)
  cache, last_BD = jax.lax.fori_loop(0, chunks, chunk, (cache, jnp.zeros((B, params["norm"]["scale"].shape[0]), cache["k"].dtype)))
  state = {"tokens": tokens_BS, "at": request["lengths"], "stopped": jnp.zeros(B, bool), "cache": cache}
  return _emit(state, head(params, last_BD), request, how)


def _decode(forward, head, params, state, request, turns, *, how):
  """At most `turns` more tokens a row."""
  rows = jnp.arange(request["lengths"].shape[0])

  def turn(carry):
    number, state = carry
    last_B = state["at"] - 1       # rows that are done feed their last token once more, and are not heard
    hidden_BTD, cache = forward(params, state["tokens"][rows, last_B][:, None], last_B[:, None], state["cache"])
    return number + 1, _emit(state | {"cache": cache}, head(params, hidden_BTD[:, 0]), request, how)
  going = lambda carry: (carry[0] < turns) & ~_done(carry[1], request).all()
  return jax.lax.while_loop(going, turn, (jnp.int32(0), state))[1]


def _done(state, request):
  return state["stopped"] | (state["at"] >= request["ends"])


def _emit(state, logits_BV, request, how):
  """The state with one more token in each row that is not done, or with the row stopped."""
  next_B = _choose(logits_BV, request, state["at"] - request["lengths"], how)
  going_B = ~_done(state, request)
  ends_B = (next_B[:, None] == request["stop_ids"]).any(-1)
  heard_B = going_B & ~ends_B
  column_B = jnp.where(heard_B, state["at"], state["tokens"].shape[1])      # past the last column: dropped
  tokens_BS = state["tokens"].at[jnp.arange(next_B.shape[0]), column_B].set(next_B, mode="drop")
  return state | {"tokens": tokens_BS, "at": state["at"] + heard_B, "stopped": state["stopped"] | (going_B & ends_B)}


def _choose(logits_BV, request, numbers_B, how):
  """One token a row, int32 [B]; numbers_B: how many the row has already."""
  if how == "greedy":
    return jnp.argmax(logits_BV, -1).astype(jnp.int32)
  logits_BV = logits_BV / request["temperature"]
  if how == "filtered":
    logits_BV = jnp.where(logits_BV >= _threshold(logits_BV, request["top_k"], request["top_p"]), logits_BV, -jnp.inf)

  def draw(index, number, logits_V):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(request["seed"]), index), number)
    return jax.random.categorical(key, logits_V)
  return jax.vmap(draw)(request["indices"], numbers_B, logits_BV).astype(jnp.int32)


def _threshold(logits_BV, top_k, top_p):
  """[B, 1]: the least logit that both filters let through."""
  none = lambda: jnp.full(logits_BV.shape[:1] + (1,), -jnp.inf)
  kth_B1 = jax.lax.cond(top_k > 0, lambda: _largest(logits_BV, jnp.ones_like(logits_BV), top_k.astype(jnp.float32)), none)
  share_BV = jax.nn.softmax(jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf), -1)
  return jnp.maximum(kth_B1, jax.lax.cond(top_p < 1, lambda: _largest(logits_BV, share_BV, top_p), none))


def _largest(x_BV, weights_BV, enough):
  """[B, 1]: the largest value t of float32 such that the weights of the x >= t sum to `enough`; -inf when all together do not.

  Found bit by bit in the floats' own order, 32 sums: exact, and a tenth of the time that sorting a vocabulary takes on a CPU.
  """
  in_order = lambda bits: jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
  places_BV = in_order(jax.lax.bitcast_convert_type(x_BV, jnp.uint32))

  def one_bit(number, found_B1):
    higher_B1 = found_B1 | (jnp.uint32(1 << 31) >> number.astype(jnp.uint32))
    sums_B1 = jnp.where(places_BV >= higher_B1, weights_BV, 0).sum(-1, keepdims=True)
    return jnp.where(sums_B1 >= enough, higher_B1, found_B1)
  found_B1 = jax.lax.fori_loop(0, 32, one_bit, jnp.zeros((x_BV.shape[0], 1), jnp.uint32))
  bits_B1 = jnp.where(found_B1 >> 31 == 1, found_B1 & jnp.uint32(2 ** 31 - 1), ~found_B1)
  return jnp.where(found_B1 == 0, -jnp.inf, jax.lax.bitcast_convert_type(bits_B1, jnp.float32))


def _fetch(state):
  """What the host needs of a state: all but the cache. Copies, as the next call takes the state's buffers."""
  return {name: np.array(state[name]) for name in ("tokens", "at", "stopped")}


def _answers(state, request, indices):
  return {index: Answer(state["tokens"][row, request["lengths"][row]:state["at"][row]].tolist(), bool(state["stopped"][row]))
          for row, index in enumerate(indices)}
