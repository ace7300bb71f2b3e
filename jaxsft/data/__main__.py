"""python -m jaxsft.data COMMAND: show (the default), stats, convert, render, tokenize, sets."""

import sys

COMMANDS = ("show", "stats", "convert", "render", "tokenize", "sets")


def main(argv=None) -> int:
  """Exit code of the command; flags without a command are show's."""
  argv = list(sys.argv[1:] if argv is None else argv)
  command = argv.pop(0) if argv and argv[0] in COMMANDS else "show"
  if command == "show":
    from jaxsft.data import show
    return show.main(argv)
  if command == "stats":
    from jaxsft.data import stats
    return stats.main(argv)
  if command == "sets":
    from jaxsft.data import sets
    return sets.main(argv)
  from jaxsft.data import lines
  return lines.main(command, argv)


if __name__ == "__main__":
  sys.exit(main())
