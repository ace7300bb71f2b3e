"""Layers of one model that differ in what they see, not in what they hold: window and rotation a layer, and the scans that walk them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

SLIDING, FULL = "sliding_attention", "full_attention"     # transformers' `layer_types`
LONGEST_PERIOD = 8                                        # layers that one body of a scan may hold


class Kind(NamedTuple):
  """window: a token sees itself and the window - 1 before it (None: all). rope: "full", "local" (theta of sliding layers) or None."""
  window: int | None = None
  rope: str | None = "full"


class Scan(NamedTuple):
  """`repeats` times the layers of `kinds`, from layer `start` on."""
  start: int
  kinds: tuple[Kind, ...]
  repeats: int


def scans(kinds: Sequence[Kind]) -> tuple[Scan, ...]:
  """The fewest scans, from the front: each takes the shortest period that covers most of what is left.

    l l l l l g l l l l l g l l      6 x 2, then l x 2      (Gemma 3 with 14 layers)
    f f f f s s s s                  f x 4, then s x 4      (Qwen with max_window_layers 4)
  """
  found: list[Scan] = []
  at = 0
  while at < len(kinds):
    best = max((_repeated(kinds, at, period) for period in range(1, LONGEST_PERIOD + 1) if at + period <= len(kinds)),
               key=lambda scan: (scan.repeats * len(scan.kinds) if scan.repeats > 1 or len(scan.kinds) == 1 else 0, -len(scan.kinds)))
    found.append(best)
    at += best.repeats * len(best.kinds)
  return tuple(found)


def _repeated(kinds, at: int, period: int) -> Scan:
  body, repeats = tuple(kinds[at:at + period]), 1
  while tuple(kinds[at + repeats * period:at + (repeats + 1) * period]) == body:
    repeats += 1
  return Scan(at, body, repeats)


# What config.json says of the layers, a function a family: values -> kinds. Sources: the configuration_*.py of transformers.

def uniform(values: dict[str, Any], layers: int) -> tuple[Kind, ...]:
  """Full attention everywhere."""
  return (Kind(),) * layers


def all_sliding(values: dict[str, Any], layers: int) -> tuple[Kind, ...]:
  """sliding_window, where it is set, in every layer (Mistral, Phi-3)."""
  return (Kind(values.get("sliding_window")),) * layers


def last_sliding(values: dict[str, Any], layers: int) -> tuple[Kind, ...]:
  """With use_sliding_window the layers from max_window_layers on (Qwen 2 and 3)."""
  window = values.get("sliding_window") if values.get("use_sliding_window") else None
  types = values.get("layer_types") or [SLIDING if i >= values["max_window_layers"] else FULL for i in range(layers)]
  return tuple(Kind(window if kind == SLIDING else None) for kind in types)


def alternating(values: dict[str, Any], layers: int) -> tuple[Kind, ...]:
  """Every sliding_window_pattern-th layer sees all (Gemma 2: 2, Gemma 3: 6); sliding layers may have a theta of their own."""
  pattern = values["sliding_window_pattern"]
  types = values.get("layer_types") or [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]
  local = "local" if values["two_ropes"] else "full"
  return tuple(Kind(values["sliding_window"], local) if kind == SLIDING else Kind() for kind in types)


def some_without_rope(values: dict[str, Any], layers: int) -> tuple[Kind, ...]:
  """no_rope_layers holds 0 where a layer does not rotate; with use_sliding_window those layers slide (SmolLM3)."""
  turned = values.get("no_rope_layers") or [(i + 1) % values["no_rope_layer_interval"] for i in range(layers)]
  window = values.get("sliding_window") if values.get("use_sliding_window") else None
  types = values.get("layer_types") or [FULL if turned[i] else SLIDING for i in range(layers)]
  return tuple(Kind(window if kind == SLIDING else None, "full" if turned[i] else None) for i, kind in enumerate(types))
