"""The train binary: python -m jaxsft.main --config=FILE[:name=value,...] --workdir=DIR [--config.key=value ...]

Exit codes: 0 done; 2 your mistake (one line says what was found, what was wanted, which knob); 75 stopped by a signal after saving,
the same command resumes; 1 anything else.
"""

from __future__ import annotations

import sys

from jaxsft.errors import UserError

OK, FAILED, USER, STOPPED = 0, 1, 2, 75


def parse(argv: list[str]):
  """(config reference, workdir, [(key, text)]). Errors: UserError for a flag that is none."""
  reference, workdir, overrides = "", "", []
  flags = iter(argv)
  for flag in flags:
    name, found, value = flag.partition("=")
    if name in ("--config", "--workdir") and not found:
      value = next(flags, "")
    if name == "--config":
      reference = value
    elif name == "--workdir":
      workdir = value
    elif name.startswith("--config.") and found:
      overrides.append((name.removeprefix("--config."), value))
    else:
      raise UserError(f"flag {flag!r} is unknown", wanted="--config=FILE[:name=value] --workdir=DIR --config.key=value")
  if not reference or not workdir:
    raise UserError("no --config or no --workdir", wanted="--config=configs/qlora_7b.py --workdir=runs/mine")
  return reference, workdir, overrides


def main(argv: list[str] | None = None) -> int:
  """Runs the training and returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or "--help" in argv or "-h" in argv:
    print(__doc__)
    return OK if argv else USER
  try:
    from jaxsft import config
    reference, workdir, overrides = parse(argv)
    c = config.load(reference)
    for key, text in overrides:
      config.override(c, key, text)
    return _train(c, workdir)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return USER
  except KeyboardInterrupt:            # before the run listens to signals: nothing has begun
    print("interrupted before the run began", file=sys.stderr)
    return STOPPED


def _train(c, workdir) -> int:
  from jaxsft.errors import NonFinite
  from jaxsft.stop import Interrupted, Stop
  try:
    with Stop() as starting:           # jax takes seconds to import
      from jaxsft import train
      starting.check()
    train.run(c, workdir)
    return OK
  except Interrupted as stopped:
    print(stopped, file=sys.stderr)
    return STOPPED
  except NonFinite as error:
    print(f"stopped: {error}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
  sys.exit(main())
