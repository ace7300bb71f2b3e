"""config -> model, data, method -> the loop. It never names a method."""

from __future__ import annotations

import collections
import math
import resource
import signal
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft import base as bases
from jaxsft import config, metrics, optim, preflight, sharding
from jaxsft.batch import ROW_IDS, split_micro_batches
from jaxsft.checkpoint import Checkpoints
from jaxsft.convert.orbax import check_same_base, run_meta
from jaxsft.data.pipeline import make_eval_batches, make_stream
from jaxsft.data.template import get_template
from jaxsft.errors import UserError
from jaxsft.evaluation import Evaluation, Samples
from jaxsft.methods import registry
from jaxsft.models import decoder
from jaxsft.step import Method, TrainState
from jaxsft.transforms.policy import make_policy
from jaxsft.workdir import Workdir

IN_FLIGHT = 2      # steps dispatched before their numbers are read: enough to hide the host, not enough to pile up batches


class Interrupted(Exception):
  """A signal came; the state is saved."""


class NonFinite(Exception):
  """Loss or gradient is NaN or Inf; names the step and the rows."""


class Parts(NamedTuple):
  """What a run is made of."""
  c: Any
  mesh: Any
  base: bases.Base
  template: Any
  stream: Any
  steps: int
  method: Method
  policy: Any
  schedule: Any


def run(c, workdir) -> dict:
  """Trains c in DIR (resuming what is there) and returns what summary.json holds.

  Errors: UserError (the user can mend it), NonFinite, Interrupted after a signal once everything is saved.
  """
  started = time.monotonic()
  config.validate(c)
  work = Workdir(workdir, c)
  try:
    parts = build(c)
    try:
      return Loop(parts, work).run(started)
    finally:
      parts.stream.close()
  finally:
    work.close()


def build(c) -> Parts:
  """Everything but the weights: cheap checks come before the expensive load."""
  mesh = sharding.make_mesh(c.mesh)
  sharding.check_batch(c, mesh)
  base = bases.open_base(c)
  template = get_template(c.data.template, base.tokenizer)
  stream = make_stream(c.data, c.seed, base.tokenizer, template, c.batch_size, jax.process_index(), jax.process_count())
  steps = c.steps or math.ceil(stream.rows(c.epochs) / c.batch_size)
  forward = decoder.make_forward(base.cfg, c.model.dtype, c.model.remat, c.model.attention, sharding.constrain_stream(mesh))
  policy = make_policy(c, forward, decoder.output_kernel, lambda rows: max(1, rows // sharding.row_shards(mesh)))
  method = registry.build(c, policy, lambda: optim.make_optimizer(c.optim, steps))
  if method.wants != ("rows",):
    raise UserError(f"method {c.method.name} trains on {', '.join(method.wants)}, and this data is rows", wanted="a method of rows", knob="method.name")
  return Parts(c, mesh, base, template, stream, steps, method, policy, optim.make_schedule(c.optim, steps))


class Loop:
  """One run over its state. The order of a step: collect, update, read the numbers of the step before, then what is due."""

  def __init__(self, parts: Parts, work: Workdir):
    self.p, self.work = parts, work
    self.checkpoints = Checkpoints(work.path / "checkpoints", parts.c.checkpoint.keep, parts.c.checkpoint.keep_best)
    self.state, self.frozen = self._start()
    self.restored = self._resume()
    where = jax.tree.map(lambda x: x.sharding, self.state)
    self.step = jax.jit(parts.method.step, donate_argnums=0, out_shardings=(where, sharding.replicated(parts.mesh)))
    self.batch_sharding = sharding.batch_sharding(parts.mesh)
    c = parts.c
    batches = make_eval_batches(c.data, c.seed, parts.base.tokenizer, parts.template, c.batch_size // c.micro_batches, jax.process_index(),
                                jax.process_count(), c.eval.rows) if c.eval.every else []
    self.evaluation = Evaluation(parts.method, batches, parts.mesh)
    self.samples = Samples(c, parts.base.cfg, parts.template, parts.base.tokenizer) if c.sample.prompts else None
    self.stop_signal: int | None = None
    self.pending: collections.deque = collections.deque()
    self.last: dict = {}
    self.evaluated: dict[int, dict] = {}
    self.speeds: list[float] = []

  def _start(self):
    c, mesh = self.p.c, self.p.mesh
    params = bases.load(c, self.p.base, mesh)
    trainable, frozen, opt, aux = self.p.method.init(params, jax.random.key(c.seed))
    if c.optim.state == "bfloat16_stochastic":
      trainable = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trainable)
    state = TrainState(jnp.int32(0), trainable, opt, aux, jax.random.key_data(jax.random.key(c.seed + 1)))
    return sharding.place(state, mesh), sharding.place(frozen, mesh)

  def _resume(self) -> int:
    """The step to go on from: 0, or the newest whole checkpoint's."""
    if not (steps := self.checkpoints.steps()):
      return 0
    self.state, data, meta = self.checkpoints.restore(steps[-1], self.state)
    if self.p.base.source:
      check_same_base(self.p.base.source, meta["base"], self.work.path)
    self.p.stream.restore(data)
    return steps[-1]

  def run(self, started: float) -> dict:
    """Preflight, the steps that are left, summary."""
    c, steps = self.p.c, self.p.steps
    facts = self._preflight()
    writers: list[Any] = [metrics.JsonLines(self.work.path / "metrics.jsonl", self.restored)]
    writers += [metrics.TensorBoard(self.work.path / "tensorboard")] if c.log.tensorboard else []
    self.terminal = metrics.Terminal(self.restored, steps)
    self.writers = [*writers, self.terminal]
    old = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
      self._steps()
      self.checkpoints.wait()
      self.checkpoints.close()
    finally:
      for number, handler in old.items():
        signal.signal(number, handler)
      for writer in self.writers:
        writer.close()
    summary = self._summary(started, facts)
    self.work.write_json("summary.json", summary)
    return summary

  def _steps(self):
    c, steps = self.p.c, self.p.steps
    if self.restored == 0:
      self._evaluate(0)
    elif self.restored == steps:
      self.terminal.say(f"step {steps} is done already; nothing is left to do")
    self.clock = time.monotonic()
    for number in range(self.restored + 1, steps + 1):
      self._one(number)
      evaluate = self._due(number, c.eval.every)
      save = number == steps or self.stop_signal or self._due(number, c.checkpoint.every)
      if evaluate or save:
        self._drain(0)
        if evaluate:
          self._evaluate(number)
        if save:
          self._save(number)
        self.clock = time.monotonic()
      if self.stop_signal and number < steps:
        self.checkpoints.wait()
        raise Interrupted(f"{signal.Signals(self.stop_signal).name}: saved step {number} of {steps}; the same command goes on from there")

  def _due(self, number: int, every: int) -> bool:
    return bool(every) and (number % every == 0 or number == self.p.steps)

  def _one(self, number: int):
    drawn: list[dict] = []

    def draw():
      drawn.append(next(self.p.stream))
      return drawn[-1]
    aux, batches = self.p.method.collect(self.state, self.frozen, draw)
    self.state = self.state._replace(aux=aux)
    for batch in batches:
      placed = sharding.place_batch(split_micro_batches(batch, self.p.c.micro_batches), self.batch_sharding)
      self.state, values = self.step(self.state, self.frozen, placed)
    self.pending.append((number, values, batches))
    self._drain(IN_FLIGHT - 1)

  def _drain(self, left: int):
    """Reads the numbers of steps until `left` are in flight; a number that is none stops the run."""
    while len(self.pending) > left:
      number, values, batches = self.pending.popleft()
      values = {name: float(value) for name, value in jax.device_get(values).items()}
      if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
        raise NonFinite(self._blame(number, values, batches))
      now = time.monotonic()
      tokens = int(sum((leaf > 0).sum() for batch in batches for leaf in _segments(batch))) * jax.process_count()
      seconds, self.clock = now - self.clock, now
      self.last = values | {"learning_rate": float(self.p.schedule(number - 1)), "tokens": tokens, "tokens_per_second": tokens / seconds,
                            "step_seconds": seconds}
      if number > self.restored + 1:                # the first step compiles
        self.speeds.append(tokens / seconds)
      if number == 1 or number % self.p.c.log.every == 0 or number == self.p.steps:
        self._write(number, self.last)

  def _blame(self, number, values, batches):
    rows = sorted({int(row) for batch in batches for row in np.ravel(batch[ROW_IDS])})
    where = [place for row in rows[:4] for place in self.p.stream.where(row)[:2]]
    return (f"step {number}: loss {values['loss']}, gradient norm {values['grad_norm']}; rows {rows[0]} to {rows[-1]} of the stream ({', '.join(where)} ...); "
            f"the newest checkpoint is whole. Lower optim.learning_rate, set optim.clip_norm, or look at these rows")

  def _write(self, number: int, values: dict):
    for writer in self.writers:
      writer.write(number, values)

  def _evaluate(self, number: int):
    report = self.evaluation.run(self.state, self.frozen)
    if report:
      self.evaluated[number] = report
      self._write(number, report)
    if self.samples:
      shown = self.samples.run(self.p.policy.params(self.state.trainable, self.frozen))
      metrics.append_json(self.work.path / "samples.jsonl", [{"step": number} | sample for sample in shown])
      for sample in shown:
        self.terminal.say(f"  {sample['prompt']!r} -> {sample['answer']!r}")

  def _save(self, number: int):
    c, base = self.p.c, self.p.base
    lora = {key: c.lora[key] for key in ("rank", "alpha", "dropout", "rslora")} if c.lora.rank else None
    meta = run_meta(base.cfg, base.source, tokenizer=c.data.tokenizer, chat_template=self.p.template.chat_template,
                    end_of_turn_ids=(self.p.template.end_of_turn_id,), lora=lora,
                    nf4={"targets": c.nf4.targets, "double_quant": c.nf4.double_quant} if c.nf4.targets else None)
    self.checkpoints.save(number, self.state, self.p.stream.state(), meta, self.evaluated.get(number, {}).get("eval_loss"))

  def _preflight(self) -> dict:
    p = self.p
    report = dict(p.stream.report)
    state = p.stream.state()
    batch = next(p.stream)
    p.stream.restore(state)
    rows = len(batch["tokens"]) // p.c.micro_batches
    part = {name: value[:rows] for name, value in batch.items()}
    loss = lambda batch: self.evaluation.sums(self.state, self.frozen, batch)["loss"]
    facts = {
        "device": preflight.device_facts(p.mesh), "steps": p.steps, "resumed_from": self.restored,
        "data": {key: report[key] for key in ("source", "records", "kept", "drops", "repairs", "format", "truncated", "longer_than_row")},
        "tokens": {key: report[key] for key in ("tokens", "supervised_tokens", "tokens_per_example", "supervised_per_example", "bos_per_example")},
        "template": {key: report[key] for key in ("template", "end_of_turn", "end_of_turn_trained")},
        "packing": {key: report[key] for key in ("pack", "row_length", "rows_per_epoch", "packing_efficiency", "padding_share", "examples_per_row")},
        "first_batch": preflight.check_rows(report, batch),
        "packed_equals_unpacked": preflight.check_packing(p.c, loss, part),
        "parameters": preflight.parameters(self.state.trainable, self.frozen),
        "state_bytes_a_device": {"optimiser": sharding.bytes_a_device(self.state.opt), "aux": sharding.bytes_a_device(self.state.aux)},
        "rules": preflight.rule_matches(p.c, self.state.trainable, self.frozen)}
    self.work.write_json("preflight.json", facts)
    preflight.print_table(facts)
    return facts

  def _summary(self, started: float, facts: dict) -> dict:
    losses = [line["loss"] for line in metrics.read_json_lines(self.work.path / "metrics.jsonl") if "loss" in line]
    evals = [line["eval_loss"] for line in metrics.read_json_lines(self.work.path / "metrics.jsonl") if "eval_loss" in line]
    return {"steps": self.p.steps, "train_loss_first": losses[0], "train_loss_last": losses[-1],
            "eval_loss_before": evals[0] if evals else None, "eval_loss_after": evals[-1] if evals else None,
            "tokens_per_second": float(np.median(self.speeds)) if self.speeds else None,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "wall_seconds": time.monotonic() - started,
            "resumed_from": self.restored, "parameters": facts["parameters"]}

  def _on_signal(self, number, _frame):
    if self.stop_signal:
      raise KeyboardInterrupt            # the second time: at once; what is on disk is whole
    self.stop_signal = number
    self.terminal.say(f"{signal.Signals(number).name}: finishing this step, then saving (again to leave at once)")


def _segments(batch):
  """Every segment_ids array of a batch, nested or not."""
  for name, value in batch.items():
    if isinstance(value, dict):
      yield from _segments(value)
    elif name == "segment_ids":
      yield value
