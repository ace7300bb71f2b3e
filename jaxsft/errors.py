"""The one exception that means "you can mend this": the binaries print it as one line and exit with 2."""


class UserError(Exception):
  """A mistake of the user's: says what was found, what was wanted, and which knob to turn.

  The message is one line. Binaries catch it at the top (`exit_code`), nothing else does.
  """

  def __init__(self, found: str, *, wanted: str = "", knob: str = ""):
    self.found, self.wanted, self.knob = found, wanted, knob
    parts = [found]
    if wanted:
      parts.append(f"wanted {wanted}")
    if knob:
      parts.append(f"set {knob}")
    super().__init__("; ".join(" ".join(part.split()) for part in parts))


  def at(self, knob: str) -> "UserError":
    """The same mistake where another knob leads to it: a base that was moved is --base here and model.path there."""
    return UserError(self.found, wanted=self.wanted, knob=knob)


class NonFinite(Exception):
  """A loss, a gradient or parameters are NaN or Inf: the run stops with exit 1, and the message names the step and what is known of the cause."""


def nearest(name: str, known, limit: int = 1) -> list[str]:
  """The names of `known` closest to `name`, best first: for 'did you mean' in a message."""
  import difflib
  return difflib.get_close_matches(name, list(known), n=limit, cutoff=0.0)


def size(count: float) -> str:
  """A number of bytes for people: "512 B", "131 kB", "3.5 GB" (powers of 1000, as disks and `df -H` count)."""
  for unit in ("B", "kB", "MB", "GB", "TB"):
    if count < 999.5 or unit == "TB":
      return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.3g} {unit}"
    count /= 1000
  raise AssertionError
