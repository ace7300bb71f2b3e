"""Orbax checkpoints of everything that decides the next step: trainable, optimiser, aux, rng, data iterator, and the base's identity."""

from __future__ import annotations

import logging
import pathlib
import shutil
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxsft.errors import UserError, size
from jaxsft.workdir import disk_errors


def _hush():
  """What goes wrong in a save is raised where somebody waits for it. Hushed: Orbax's log of each step and of each error on its way there, asyncio's of the

  writes that nobody waits for any more, and tensorstore's word on those that end after Orbax has closed their event loop.
  """
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
  shown = sys.unraisablehook
  sys.unraisablehook = lambda late: None if str(late.exc_value) == "Event loop is closed" else shown(late)


_hush()


def storable(tree) -> dict[str, jax.Array]:
  """The leaves by path, uint4 viewed as int4: Orbax refuses uint4 (in the background, leaving no step), and a flat dict needs no types to restore."""
  view = lambda x: jax.lax.bitcast_convert_type(x, jnp.int4) if x.dtype == jnp.uint4 else x
  return {_name(path): view(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator=".")


def _abstract(tree) -> dict[str, jax.ShapeDtypeStruct]:
  narrow = lambda dtype: jnp.int4 if dtype == jnp.uint4 else dtype
  return {_name(path): jax.ShapeDtypeStruct(leaf.shape, narrow(leaf.dtype), sharding=leaf.sharding)
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _refill(tree, leaves):
  view = lambda x, like: jax.lax.bitcast_convert_type(x, jnp.uint4) if like.dtype == jnp.uint4 else x
  return jax.tree_util.tree_map_with_path(lambda path, like: view(leaves[_name(path)], like), tree)


TEMPORARY = "temporary"      # among the metrics that Orbax keeps with a step, so that a restart knows
ASK_EVERY = 16               # steps between two questions to host 0 for its clock: each waits for the steps in flight


class Kept:
  """What Orbax may not delete: what `lasting` keeps of the saves that last, and the newest of all, so that a temporary one is gone with the next."""

  def __init__(self, lasting):
    self.lasting = lasting

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """One truth value a checkpoint, oldest first."""
    lasting = [info for info in checkpoints if not (info.metrics or {}).get(TEMPORARY)]
    kept = {info.step for info, keep in zip(lasting, self.lasting.should_preserve(lasting, context=context)) if keep}
    return [info.step in kept or info is checkpoints[-1] for info in checkpoints]


class Checkpoints:
  """The folder DIR/checkpoints: asynchronous saves, the newest `keep` and, with keep_best, the one of lowest evaluation loss.

  Two policies: what the caller saves by its steps lasts by the rule above; a temporary save, `due` every_minutes after the save before it, stays until
  the next one of either kind and counts in neither. clock: seconds, of this host.
  """

  def __init__(self, directory, keep: int = 2, keep_best: bool = True, read_only: bool = False, every_minutes: float = 0.0, clock=time.monotonic):
    policy = checkpoint_managers.preservation_policy
    kept, loss = [policy.LatestN(max(1, keep))], lambda metrics: metrics.get("eval_loss", float("inf"))
    if keep_best:
      kept.append(policy.BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False))
    self.directory = pathlib.Path(directory).absolute()
    if self.directory.exists() and not self.directory.is_dir():
      raise UserError(f"{self.directory} is a file", wanted="a folder of checkpoints, or nothing", knob="--workdir")
    self._manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
        preservation_policy=Kept(policy.AnyPreservationPolicy(kept)), best_fn=loss, best_mode="min",       # best_fn: else losses are not written for a restart
        create=not read_only, read_only=read_only, cleanup_tmp_directories=not read_only))
    self._period, self._clock = 60 * every_minutes, clock
    self._saved = clock()

  def steps(self) -> list[int]:
    """Complete checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

  def due(self, step: int) -> bool:
    """Whether a temporary save is due after this step: by the clock of host 0, for all hosts must save together."""
    late = bool(self._period) and self._clock() - self._saved >= self._period
    if not self._period or jax.process_count() == 1:
      return late
    if step % ASK_EVERY:
      return False
    from jax.experimental import multihost_utils
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(late)))

  def save(self, step: int, state, data: dict[str, Any], meta: dict[str, Any], eval_loss: float | None = None, *, evaluated=None, temporary: bool = False):
    """Starts a save; returns once the arrays are copied, so that they may be donated. A failed earlier save is raised here.

    evaluated: a tree like `state`, of the leaves that evaluation and exports use in place of the state's (an average); `read` gives these.
    Errors: UserError when the disk is full; the previous checkpoint stays good, for a step exists only when it is whole.
    """
    items = {"state": storable(state)} | ({"evaluated": storable(evaluated)} if evaluated is not None else {})
    self._check_disk(sum(leaf.nbytes for leaves in items.values() for leaf in leaves.values()))
    facts = {TEMPORARY: 1.0} if temporary else None if eval_loss is None else {"eval_loss": float(eval_loss)}
    with disk_errors(self.directory):
      self._manager.save(step, args=ocp.args.Composite(data=ocp.args.JsonSave(data), meta=ocp.args.JsonSave(meta),
                                                       **{name: ocp.args.StandardSave(leaves) for name, leaves in items.items()}), metrics=facts, force=True)
    self._saved = self._clock()

  def check(self):
    """Raises what a background save has run into, if it has; waits for nothing."""
    with disk_errors(self.directory):
      self._manager.check_for_errors()

  def wait(self):
    """Until the save under way is on disk; raises what went wrong with it."""
    with disk_errors(self.directory):
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def restore(self, step: int, like):
    """(state like `like` in structure, dtypes and shardings, data, meta) of one step."""
    items = self._manager.restore(step, args=ocp.args.Composite(
        state=ocp.args.StandardRestore(_abstract(like)), data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore()))
    return _refill(like, items["state"]), items["data"], items["meta"]

  def meta(self, step: int) -> dict[str, Any]:
    """The meta of one step, without its arrays."""
    return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

  def read(self, step: int, prefix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """(leaves as they were saved whose path begins with `prefix`, as numpy on the host; meta): for tools that know no training state.

    Where evaluation used other leaves than the state's, it gives those that evaluation used.
    """
    averaged = self._leaves(step, "evaluated", prefix) if (self.directory / str(step) / "evaluated").is_dir() else {}
    return self._leaves(step, "state", prefix, but=averaged) | averaged, self.meta(step)

  def _leaves(self, step: int, item: str, prefix: str, but=()) -> dict[str, Any]:
    folder = self.directory / str(step) / item
    handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())  # a fresh manager has no metadata of an item that it never saved
    saved = dict(handler.metadata(folder).item_metadata.tree)
    target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in saved.items() if name.startswith(prefix) and name not in but}
    how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in target}
    return handler.restore(folder, args=ocp.args.PyTreeRestore(item=target, restore_args=how, partial_restore=True)) if target else {}

  def close(self):
    """Ends the background threads; waits for the save under way (an interpreter that exits sooner loses it)."""
    with disk_errors(self.directory):
      self._manager.close()

  def _check_disk(self, needed: int):
    free = shutil.disk_usage(self.directory).free
    if free < needed * 1.05:
      raise UserError(f"{self.directory} has {size(free)} free and a checkpoint takes {size(needed)} (earlier checkpoints are whole)",
                      wanted="free disk space", knob="--workdir to a larger disk, or checkpoint.keep lower")
