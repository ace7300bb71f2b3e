"""config -> model, data, method -> the loop. It never names a method."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft import base as bases
from jaxsft import config, metrics, optim, preflight, sharding
from jaxsft.batch import ROW_IDS, split_micro_batches
from jaxsft.checkpoint import Checkpoints
from jaxsft.convert.check import check_export
from jaxsft.convert.orbax import check_same_base, keep_tokenizer
from jaxsft.data.pipeline import make_eval_batches, make_stream
from jaxsft.data.template import get_template
from jaxsft.data.witness import witness
from jaxsft.errors import NonFinite, UserError
from jaxsft.evaluation import Evaluation, Samples
from jaxsft.methods import registry
from jaxsft.models import decoder
from jaxsft.step import Method, TrainState, evaluated, only_evaluated
from jaxsft.stop import Interrupted, Stop
from jaxsft.transforms.policy import make_policy, trained_whole
from jaxsft.workdir import Workdir, disk_errors

IN_FLIGHT = 2      # steps dispatched before their numbers are read: enough to hide the host, not enough to pile up batches


class Parts(NamedTuple):
  """What a run is made of."""
  c: Any
  mesh: Any
  base: bases.Base
  template: Any
  stream: Any
  held_out: list
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
  with Stop() as stop, contextlib.closing(Workdir(workdir, c)) as work, disk_errors(workdir):
    parts = build(c, str(work.scratch))
    stop.check()
    kept = Checkpoints(work.path / "checkpoints", c.checkpoint.keep, c.checkpoint.keep_best, every_minutes=c.checkpoint.every_minutes)
    with contextlib.closing(parts.stream), contextlib.closing(kept) as saved:
      done = work.read_json("summary.json")
      if done and done.get("steps") == parts.steps and saved.steps()[-1:] == [parts.steps]:
        print(f"step {parts.steps} is done already: nothing is left to do in {work.path}", file=sys.stderr)
        return done
      return Loop(parts, work, saved, stop).run(started)


def build(c, scratch: str | None = None) -> Parts:
  """Everything but the weights: cheap checks come before the expensive load."""
  mesh = sharding.make_mesh(c.mesh)
  sharding.check_batch(c, mesh)
  base = bases.open_base(c)
  template = get_template(c.data.template, base.tokenizer, c.data.position)
  stream = make_stream(c.data, c.seed, base.tokenizer, template, c.batch_size, jax.process_index(), jax.process_count(), scratch=scratch)
  held_out = make_eval_batches(c.data, c.seed, base.tokenizer, template, c.batch_size // c.micro_batches, jax.process_index(), jax.process_count(),
                               c.eval.rows) if c.eval.every else []
  steps = c.steps or math.ceil(stream.rows(c.epochs) / c.batch_size)
  forward = decoder.make_forward(base.cfg, c.model.dtype, c.model.remat, c.model.attention, sharding.constrain_stream(mesh))
  policy = make_policy(c, forward, decoder.output_kernel, base.cfg.final_logit_softcapping, lambda rows: max(1, rows // sharding.row_shards(mesh)))
  method = registry.build(c, policy, lambda: optim.make_optimizer(c.optim, steps, c.log.layer_norms))
  if method.wants != ("rows",):
    raise UserError(f"method {c.method.name} trains on {', '.join(method.wants)}, and no stream of these is built yet", wanted="a method of rows",
                    knob="method.name")
  return Parts(c, mesh, base, template, stream, held_out, steps, method, policy, optim.make_schedule(c.optim, steps))


class Loop:
  """One run over its state. The order of a step: collect, update, read the numbers of the step before, then what is due."""

  def __init__(self, parts: Parts, work: Workdir, checkpoints: Checkpoints, stop: Stop):
    self.p, self.work, self.checkpoints, self.stop = parts, work, checkpoints, stop
    self.restored = self._newest()
    self.state, self.frozen = self._start()
    if self.restored:
      self._resume()
    where = jax.tree.map(lambda x: x.sharding, self.state)
    self.step = jax.jit(parts.method.step, donate_argnums=0, out_shardings=(where, sharding.replicated(parts.mesh)))
    self.all_finite = jax.jit(lambda tree: jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all())
    self.batch_sharding = sharding.batch_sharding(parts.mesh)
    self.evaluation = Evaluation(parts.method, parts.held_out, parts.mesh)
    self.samples = Samples(parts.c, parts.base, parts.template) if parts.c.sample.prompts else None
    self.pending: collections.deque = collections.deque()
    self.last: dict = {}                  # the numbers of the newest step that was read
    self.eval_loss: float | None = None   # of the step at hand

  def _start(self):
    c, mesh = self.p.c, self.p.mesh
    params = bases.load(c, self.p.base, mesh, self.p.method.init, trained_whole(c))
    trainable, frozen, opt, aux = self.p.method.init(params, jax.random.key(c.seed))
    state = TrainState(jnp.int32(0), trainable, opt, aux, jax.random.key_data(jax.random.key(c.seed + 1)))
    return sharding.place(state, mesh), sharding.place(frozen, mesh)

  def _newest(self) -> int:
    """The step to go on from, 0 or the newest whole checkpoint's; refused before the weights are loaded when base or data are others."""
    if not (steps := self.checkpoints.steps()):
      return 0
    meta = self.checkpoints.meta(steps[-1])
    if self.p.base.source:
      check_same_base(self.p.base.source, meta["base"], self.work.path, knob="model.path or --workdir")
    self.p.stream.check_same(meta["data"], f"step {steps[-1]} in {self.work.path}")
    return steps[-1]

  def _resume(self):
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state)
    self.state = None                     # the fresh state goes before the saved one comes: the device holds one
    self.state, data, _ = self.checkpoints.restore(self.restored, like)
    self.p.stream.restore(data)

  def run(self, started: float) -> dict:
    """Preflight, the steps that are left, summary."""
    c, path = self.p.c, self.work.path
    facts = preflight.check(self.p, self.state, self.frozen, self.evaluation, self.restored)
    self.work.write_json("preflight.json", facts)
    preflight.print_table(facts)
    keep_tokenizer(path, self.p.base.tokenizer, self.p.template.chat_template)
    self.witness = witness(self.p.stream.examples, self.p.template, c.data.train.format)
    if self.witness:
      check_export(path / "tokenizer", self.witness)
    self.work.begin()                     # from here on DIR is this run's
    metrics.cut(path / "samples.jsonl", self.restored)
    self.writers, self.terminal = metrics.open_writers(c.log, path, self.restored, self.p.steps, json.loads(config.to_json(c)))
    self.stop.check()
    self.stop.stepping = True
    try:
      self._steps()
      self.checkpoints.wait()
    finally:
      for writer in self.writers:
        writer.close()
    summary = self._summary(started, facts)
    self.work.write_json("summary.json", summary)
    print(metrics.closing_line(summary, path), file=sys.stderr)
    return summary

  def _steps(self):
    c, steps = self.p.c, self.p.steps
    if self.restored == 0 and c.eval.every:
      self._evaluate(0)
    self.clock = time.monotonic()
    for number in range(self.restored + 1, steps + 1):
      self._one(number)
      self.checkpoints.check()
      evaluate = self._due(number, c.eval.every)
      stopping = self.stop.name      # read once: a signal that comes during the evaluation waits for the next step
      save = number == steps or stopping or self._due(number, c.checkpoint.every)
      temporary = not save and self.checkpoints.due(number)
      if evaluate or save or temporary:
        self._drain(0)
        if evaluate:
          self._evaluate(number)
        if save or temporary:
          self._save(number, temporary)
        self.clock = time.monotonic()
      if stopping and number < steps:
        self.checkpoints.wait()
        raise Interrupted(f"{stopping}: saved step {number} of {steps}; the same command goes on from there")

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
    self.eval_loss = None
    self._drain(IN_FLIGHT - 1)

  def _drain(self, left: int):
    """Reads the numbers of steps until `left` are in flight; a number that is none stops the run."""
    while len(self.pending) > left:
      number, values, batches = self.pending.popleft()
      values = metrics.scalars(jax.device_get(values))
      if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
        raise NonFinite(self._blame(number, f"loss {values['loss']}, gradient norm {values['grad_norm']}", batches))
      now = time.monotonic()
      tokens = sum(map(metrics.count_tokens, batches)) * jax.process_count()
      seconds, self.clock = now - self.clock, now
      rates = {"tokens": tokens, "tokens_per_second": tokens / seconds, "step_seconds": seconds}
      self.last = values | {"learning_rate": float(self.p.schedule(values.get("updates", number) - 1))} | rates
      self.batches = batches
      if self._logged(number) and not self._due(number, self.p.c.eval.every):       # else the evaluation writes both as one
        self._write(number, self.last)

  def _logged(self, number: int) -> bool:
    return number == 1 or number % self.p.c.log.every == 0 or number == self.p.steps

  def _write(self, number: int, values: dict):
    for writer in self.writers:
      writer.write(number, values)

  def _evaluate(self, number: int):
    report = self.evaluation.run(self.state, self.frozen)
    self.eval_loss = report.get("eval_loss")
    if report or (number and self._logged(number)):
      self._write(number, self.last | report)
    if self.samples:
      shown = self.samples.run(self.p.policy.params(evaluated(self.state).trainable, self.frozen))
      metrics.append_json(self.work.path / "samples.jsonl", [{"step": number} | sample for sample in shown])
      for sample in shown:
        self.terminal.say(f"  {sample['prompt']!r} -> {sample['answer']!r}")

  def _save(self, number: int, temporary: bool):
    if not self.all_finite(self.state.trainable):
      raise NonFinite(self._blame(number, "a parameter is NaN or Inf after its update", self.batches))
    meta = self.p.base.meta(self.p.c, self.p.template, self.witness) | {"data": self.p.stream.fingerprint}
    self.checkpoints.save(number, self.state, self.p.stream.state(), meta, self.eval_loss, evaluated=only_evaluated(self.state), temporary=temporary)

  def _blame(self, number: int, what: str, batches) -> str:
    rows = sorted({int(row) for batch in batches for row in np.ravel(batch[ROW_IDS])})
    where = [place for row in rows[:4] for place in self.p.stream.where(row)[:2]]
    self.checkpoints.wait()
    saved = f"step {self.checkpoints.steps()[-1]} is saved and whole" if self.checkpoints.steps() else "no step was saved before"
    return (f"step {number}: {what}; rows {rows[0]} to {rows[-1]} of the stream ({', '.join(where)} ...); {saved}. "
            f"Lower optim.learning_rate, set optim.clip_norm, or look at these rows")

  def _summary(self, started: float, facts: dict) -> dict:
    return {"steps": self.p.steps, **metrics.summarise(metrics.read_json_lines(self.work.path / "metrics.jsonl")),
            "peak_rss_bytes": metrics.peak_rss_bytes(), "wall_seconds": time.monotonic() - started, "resumed_from": self.restored,
            "parameters": facts["parameters"]}
