"""python -m jaxsft.convert SRC DST: Hugging Face, GGUF, peft and Orbax, and what a run trained, into one another.

  SRC                                     --to
  HF directory, GGUF file, hub id         hf (default), orbax
  converted model, workdir of a full run  hf (default), orbax
  workdir of an adapter run, peft dir     peft (default); hf or orbax with --merge

The JSON object of --json: source, destination, to, step (null for what has none), dtype, base_weights (null without a merge), parameters,
bytes, seconds, drift (null or {max_abs, mean_abs, kl, top1_agreement} of the merged model against base + adapter, see drift.py).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import sys
import time

from jaxsft.errors import UserError

DRIFT_LIMIT = 1_000_000_000  # parameters: above, both models in float32 may not fit, so that drift has to be asked for


def parser() -> argparse.ArgumentParser:
  out = argparse.ArgumentParser(prog="python -m jaxsft.convert", description="Convert a model or export what a run trained.")
  out.add_argument("source", metavar="SRC", help="HF directory, .gguf file, hub id, converted model, workdir of a run, or peft directory")
  out.add_argument("destination", metavar="DST", help="a directory that is not there yet")
  out.add_argument("--to", choices=("hf", "peft", "orbax"), help="default: peft for adapters without --merge, else hf")
  out.add_argument("--merge", action="store_true", help="add the adapter to its base")
  out.add_argument("--base-weights", choices=("nf4", "original"),
                   help="what to merge into: the dequantised NF4 weights (default for a QLoRA run, which trained on them), or those stored")
  out.add_argument("--base", default="", help="where the base lies now, when it was moved")
  out.add_argument("--step", type=int, help="which checkpoint; default the newest")
  out.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of the written model")
  out.add_argument("--revision", default="", help="of a hub id")
  out.add_argument("--overwrite", action="store_true", help="replace DST")
  out.add_argument("--drift", action=argparse.BooleanOptionalAction,
                   help="compare a merge's logits with base + adapter (default: below 1e9 parameters)")
  out.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
  return out


def main(argv=None) -> int:
  args = parser().parse_args(argv)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a tool of the host's: it takes no accelerator away from a run
  try:
    report = convert(args)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  drift = report["drift"]
  print(f"wrote {report['destination']} ({report['to']}, {report['bytes'] / 1e6:,.1f} MB, {report['seconds']:.1f} s)",
        file=sys.stderr)
  if drift:
    print(f"merged against adapter: logits differ by {drift['mean_abs']:.2g} on average, {drift['max_abs']:.2g} at most; "
          f"KL {drift['kl']:.2g} nats; {drift['top1_agreement']:.1%} of the likeliest tokens agree", file=sys.stderr)
  if args.json:
    print(json.dumps(report))
  return 0


def convert(args) -> dict:
  """Does it, and gives the report. Errors: UserError for what does not go together."""
  from jaxsft.convert.adapter import is_adapter
  start = time.monotonic()
  local = pathlib.Path(args.source).expanduser()
  report = {"source": args.source, "destination": args.destination, "to": args.to, "step": None, "dtype": args.dtype, "base_weights": None,
            "parameters": None, "bytes": None, "seconds": None, "drift": None}
  how = _convert_adapter if local.is_dir() and is_adapter(local) else _convert_model
  report |= how(args, local)
  report["bytes"] = sum(file.stat().st_size for file in pathlib.Path(args.destination).rglob("*") if file.is_file())
  return report | {"seconds": round(time.monotonic() - start, 3)}


def _convert_model(args, local) -> dict:
  from jaxsft.convert import load, orbax
  from jaxsft.convert.source import open_source
  from jaxsft.models.config import ModelConfig
  if args.merge or args.base_weights or args.base or args.to == "peft":
    raise UserError(f"{args.source} is no adapter", wanted="the workdir of an adapter run, or a peft directory",
                    knob="--to=hf or orbax, without --merge, --base and --base-weights")
  is_run = (local / "checkpoints").is_dir()
  if args.step is not None and not is_run:
    raise UserError(f"{args.source} has no checkpoints", wanted="no --step, or the workdir of a run", knob="--step")
  source = orbax.OrbaxSource(local, args.step) if is_run else open_source(args.source, args.revision)
  cfg = ModelConfig.from_hf(source.config, args.source)
  load.check_tensors(source, cfg)
  for note in load.nf4_notes(source, cfg, "", True):
    print(f"note: {note}", file=sys.stderr)
  leaves = ((path, read) for path, _, _, read in load.leaf_reads(source, cfg))
  ends = source.meta["end_of_turn_ids"] if isinstance(source, orbax.OrbaxSource) else ()
  _write(args, cfg, leaves, _tokenizer(source), source.chat_template, source.generation_config, ends, source, getattr(source, "meta", {}))
  return {"to": args.to or "hf", "step": source.step if isinstance(source, orbax.OrbaxSource) else None, "parameters": _parameters(cfg)}


def _convert_adapter(args, local) -> dict:
  from jaxsft.convert.adapter import open_adapter
  from jaxsft.transforms import tree
  to = args.to or ("hf" if args.merge else "peft")
  if (to == "peft") == args.merge:
    raise UserError(f"{args.source} holds adapters, and --to={to} {'excludes' if args.merge else 'needs'} --merge", wanted="one of the two",
                    knob="--to=peft without --merge, or --merge")
  adapter = open_adapter(local, args.step, args.base)
  weights = args.base_weights or ("nf4" if adapter.nf4 else "original")
  if weights == "nf4" and not adapter.nf4:
    raise UserError(f"{args.source} was not trained on an NF4 base", wanted="--base-weights=original", knob="--base-weights")
  out = {"to": to, "step": adapter.step, "parameters": _parameters(adapter.cfg)}
  if to == "peft":
    from jaxsft.convert.peft import write_peft
    tokenizer = _tokenizer(adapter)
    write_peft(args.destination, adapter.adapters, adapter.cfg, **adapter.lora, base=adapter.identity, nf4=adapter.nf4,
               end_of_turn_ids=adapter.end_of_turn_ids, tokenizer=tokenizer, chat_template=adapter.chat_template,
               overwrite=args.overwrite, check=_check(args, adapter.meta, tokenizer))
    return out | {"dtype": "float32", "parameters": sum(leaf.size for _, leaf in tree.flatten(adapter.adapters))}
  _write(args, adapter.cfg, adapter.merged_leaves(weights), _tokenizer(adapter), adapter.chat_template, adapter.base.generation_config,
         adapter.end_of_turn_ids, adapter.base, adapter.meta)
  return out | {"base_weights": weights, "drift": _drift(args, adapter)}


def _write(args, cfg, leaves, tokenizer, chat_template, generation_config, end_of_turn_ids, source, run):
  check = _check(args, run, tokenizer)
  if args.to == "orbax":
    from jaxsft.convert.orbax import run_meta, write_orbax
    meta = run_meta(cfg, source, chat_template=chat_template, end_of_turn_ids=end_of_turn_ids)
    write_orbax(args.destination, cfg, leaves, tokenizer, dtype=args.dtype, meta=meta, overwrite=args.overwrite, check=check)
  else:
    from jaxsft.convert.hf import write_hf
    write_hf(args.destination, cfg, leaves, tokenizer, dtype=args.dtype, chat_template=chat_template, generation_config=generation_config,
             end_of_turn_ids=end_of_turn_ids, overwrite=args.overwrite, check=check)


def _check(args, run, tokenizer):
  """What holds an export, before it takes its name, against the row that the run of this meta kept: None where there is none."""
  from jaxsft.convert.check import check_export
  row = run.get("witness")
  return functools.partial(check_export, row=row, name=args.destination) if row and tokenizer is not None else None


def _tokenizer(source):
  """The source's tokenizer; a model without one is converted without one, and says so."""
  try:
    return source.tokenizer()
  except UserError as error:
    print(f"note: no tokenizer is written ({error})", file=sys.stderr)
    return None


def _parameters(cfg) -> int:
  from math import prod

  from jaxsft.models.families import shapes
  return sum(prod(shape) for shape in shapes(cfg).values())


def _drift(args, adapter):
  wanted = args.drift if args.drift is not None else _parameters(adapter.cfg) < DRIFT_LIMIT
  if not wanted:
    return None
  from jaxsft.convert.drift import logit_drift
  return logit_drift(adapter, args.destination)


if __name__ == "__main__":
  sys.exit(main())
