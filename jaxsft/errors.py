"""The one exception that means "you can mend this": the binaries print it as one line and exit with 2."""


class UserError(Exception):
  """A mistake of the user's: says what was found, what was wanted, and which knob to turn.

  The message is one line. Binaries catch it at the top (`exit_code`), nothing else does.
  """

  def __init__(self, found: str, *, wanted: str = "", knob: str = ""):
    parts = [found]
    if wanted:
      parts.append(f"wanted {wanted}")
    if knob:
      parts.append(f"set {knob}")
    super().__init__("; ".join(" ".join(part.split()) for part in parts))


def nearest(name: str, known, limit: int = 1) -> list[str]:
  """The names of `known` closest to `name`, best first: for 'did you mean' in a message."""
  import difflib
  return difflib.get_close_matches(name, list(known), n=limit, cutoff=0.0)
