"""Parameter trees as paths: nested dicts of leaves, "a/b/c" names, and rules [(regex, value)] of which the first match wins."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from jaxsft.errors import UserError, nearest

Tree = dict[str, Any]


def flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """(path, leaf) of a nested dict in insertion order; anything that is no dict is a leaf, however rich."""
  for key, value in tree.items():
    path = f"{prefix}/{key}" if prefix else key
    if isinstance(value, dict):
      yield from flatten(value, path)
    else:
      yield path, value


def unflatten(leaves: dict[str, Any]) -> Tree:
  """The nested dict whose `flatten` gives `leaves`."""
  tree: Tree = {}
  for path, leaf in leaves.items():
    *parents, name = path.split("/")
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[name] = leaf
  return tree


def map_leaves(function: Callable[[str, Any], Any], tree: Tree, prefix: str = "") -> Tree:
  """`function(path, leaf)` on every leaf, same structure."""
  return {key: map_leaves(function, value, f"{prefix}{key}/") if isinstance(value, dict) else function(prefix + key, value)
          for key, value in tree.items()}


def split(tree: Tree, chosen: Callable[[str], bool]) -> tuple[Tree, Tree]:
  """(leaves whose path is chosen, the others); `merge` is the inverse."""
  inside: dict[str, Any] = {}
  outside: dict[str, Any] = {}
  for path, leaf in flatten(tree):
    (inside if chosen(path) else outside)[path] = leaf
  return unflatten(inside), unflatten(outside)


def merge(first: Tree, second: Tree) -> Tree:
  """Union of two trees with no leaf in common."""
  out = dict(first)
  for key, value in second.items():
    out[key] = merge(out[key], value) if isinstance(out.get(key), dict) and isinstance(value, dict) else value
  return out


def get(tree: Tree, path: str) -> Any:
  """The node at a path."""
  for key in path.split("/"):
    tree = tree[key]
  return tree


def matching(paths, regex: str, knob: str) -> list[str]:
  """Paths that `regex` finds; none is the user's mistake (a rule that matches nothing trains nothing, silently, elsewhere).

  Errors: UserError names the pattern, the nearest path and the knob.
  """
  paths = list(paths)
  try:
    found = [path for path in paths if re.search(regex, path)]
  except re.error as error:
    raise UserError(f"{knob}={regex!r} is no regular expression ({error})", knob=knob) from None
  if found:
    return found
  raise UserError(f"{knob}={regex!r} matches no parameter", wanted=f"a pattern of names such as {_nearest_path(regex, paths)!r} (nearest)", knob=knob)


def _nearest_path(regex: str, paths: list[str]) -> str:
  """The path that holds what is likest the longest plain word of the pattern: 'query_proj/kernel' is measured against pairs of names."""
  word = max(re.sub(r"[\\^$()|?*+\[\]]", " ", regex).split() or [""], key=len).strip("/")
  size = word.count("/") + 1
  windows = {"/".join(parts[i:i + size]) for parts in (path.split("/") for path in paths) for i in range(len(parts))}
  close = nearest(word, sorted(windows))
  return next((path for path in paths if close and close[0] in path), paths[0] if paths else "none: there is no such parameter")


def kernels(paths) -> list[str]:
  """Kernels that an adapter or a quantiser may take: all but the output projection, which the chunked loss reads as a plain array."""
  return [path for path in paths if path.endswith("/kernel") and not path.startswith("lm_head/")]


def assign(paths, rules: list[tuple[str, Any]], knob: str) -> dict[str, Any]:
  """{path: value} by the first rule that matches.

  Errors: UserError when a path matches no rule. A rule that nothing matches is the caller's to judge: tables serve many families.
  """
  table = {}
  for path in paths:
    for regex, value in rules:
      if re.search(regex, path):
        table[path] = value
        break
    else:
      raise UserError(f"no rule of {knob} covers the parameter {path!r}", wanted="a rule for every parameter", knob=knob)
  return table
