"""Names of methods to their builders: a literal table, the only file of methods/ that knows more than one."""

from __future__ import annotations

from jaxsft.errors import UserError, nearest
from jaxsft.methods import dpo, sft

METHODS = {
    "sft": sft.build,
    "dpo": dpo.build,
}


def build(c, policy, make_tx):
  """The method that c.method.name asks for. Errors: UserError for an unknown one, the nearest named."""
  if c.method.name not in METHODS:
    raise UserError(f"method.name is {c.method.name!r}", wanted=f"{' or '.join(nearest(c.method.name, METHODS)) or ' | '.join(METHODS)}", knob="method.name")
  return METHODS[c.method.name](c, policy, make_tx)
