"""OpenAssistant message trees -> threads: one raw record becomes several, each with the place it came from.

Two forms are read: nested trees ({"prompt": {..., "replies": [...]}, "tree_state", ...}, or the root message itself) and flat rows, one a
message (message_id, parent_id, text, role), as the hub holds them. The rules are Open-Assistant's own (oasst_dataset.py): trees that are
ready for export and whose prompt passed review; depth first to the leaves; no thread with a deleted or synthetic message; with `top_k` an
answer needs rank < top_k, and a rank of None passes only for a sole sibling; a prompter leaf counts for the first sibling alone and is then
left out. What does not pass becomes a record with the code of its drop, so that it is counted.

Codes: oasst_not_ready, oasst_not_reviewed, oasst_deleted, oasst_synthetic, oasst_rank, oasst_bad_tree, oasst_orphan (a flat row whose parent is
not there), oasst_not_alternating.
"""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]
BEST = "oasst_best"
FORMATS = ("auto", "oasst", BEST)


def is_tree(record) -> bool:
  root = record.get("prompt")
  return isinstance(root, dict) and "replies" in root or isinstance(record.get("replies"), list) and "role" in record and "parent_id" not in record


def is_row(record) -> bool:
  """A flat row: one message of a tree."""
  return "message_id" in record and "parent_id" in record and "role" in record and "text" in record


def expand(records, format: str = "auto") -> list[tuple[Record, int]]:
  """(record, number of the record it came from): trees and flat rows taken apart, every other record as it is, in the order of the source.

  A thread of flat rows stands where its first message stood and comes from its last one. Records that are no OpenAssistant ones pass, whatever the format.
  """
  top_k = 1 if format == BEST else 0
  roots = _linked(records)
  out: list[tuple[Record, int]] = []
  for number, record in enumerate(records):
    if is_row(record):
      if number in roots:                     # the other rows are part of a tree
        out += _tree_records(*roots[number], number, top_k)
    elif is_tree(record):
      root = record["prompt"] if isinstance(record.get("prompt"), dict) else record
      out += _tree_records(root, record.get("tree_state"), number, top_k)
    else:
      out.append((record, number))
  return out


def _linked(records) -> dict[int, tuple[Record, Any]]:
  """Row number -> (root message with nested replies, tree_state) for each flat row that begins a tree; rows that hang on nothing begin one, as orphans."""
  rows = [(number, record) for number, record in enumerate(records) if is_row(record)]
  nodes: dict[Any, Record] = {}
  for number, record in rows:
    nodes.setdefault(str(record["message_id"]), {**record, "replies": [], "row": number})
  roots: dict[int, tuple[Record, Any]] = {}
  for node in nodes.values():
    parent = nodes.get(str(node["parent_id"])) if node["parent_id"] is not None else None
    if parent is not None:
      parent["replies"].append(node)
    else:
      roots[node["row"]] = ({**node, "orphan": True} if node["parent_id"] is not None else node, node.get("tree_state"))
  reached = {node["row"] for root, _ in roots.values() for node in _nodes(root)}
  first_rows = {node["row"] for node in nodes.values()}
  for number, _ in rows:                      # a circle of parents, or the same message twice
    if number not in reached or number not in first_rows:
      roots[number] = ({"orphan": True, "row": number}, None)
  return roots


def _nodes(root):
  stack = [root]
  while stack:
    node = stack.pop()
    yield node
    stack += [reply for reply in _replies(node) or () if isinstance(reply, dict)]


def _tree_records(root: Record, state, number: int, top_k: int) -> list[tuple[Record, int]]:
  """The threads and drops of one tree as records."""
  tree = str(root.get("message_tree_id") or root.get("message_id") or root.get("id") or "")

  def dropped(code):
    return [({"oasst_drop": code, "message_tree_id": tree}, root.get("row", number))]

  if root.get("orphan"):
    return dropped("oasst_orphan")
  if state is not None and state != "ready_for_export":
    return dropped("oasst_not_ready")
  if root.get("review_result") is False:
    return dropped("oasst_not_reviewed")
  found = threads(root, top_k)
  if not found:
    return dropped("no_assistant")            # a prompt that nobody answered
  return [({"oasst_drop": code, "message_tree_id": tree} if code else
           {"oasst_thread": [_turn(message) for message in thread], "message_tree_id": tree}, thread[-1].get("row", number)) for thread, code in found]


def threads(root: Record, top_k: int = 0) -> list[tuple[list[Record], str]]:
  """(messages from the root to a leaf, "" or the code of its drop) for each leaf of a nested tree, depth first; top_k 0: every rank."""
  found, stack = [], [[root]]
  while stack:
    thread = stack.pop()
    replies = _replies(thread[-1])
    if replies is not None and all(isinstance(reply, dict) for reply in replies) and replies:
      stack += [[*thread, reply] for reply in reversed(replies)]
    elif replies is None or replies:
      found.append((thread, "oasst_bad_tree"))
    elif len(thread) > 1:
      if thread[-1].get("role") != "assistant" and thread[-2]["replies"][0] is not thread[-1]:
        continue                              # the thread up to here is its first sibling's
      why = _why_dropped(thread, top_k)       # with the leaf, as Open-Assistant has it
      thread = thread if thread[-1].get("role") == "assistant" else thread[:-1]
      if len(thread) > 1:
        found.append((thread, why))
  return found


def _replies(message) -> list | None:
  replies = message.get("replies")
  return [] if replies is None else replies if isinstance(replies, list) else None


def _why_dropped(thread, top_k: int) -> str:
  for code, field in (("oasst_deleted", "deleted"), ("oasst_synthetic", "synthetic")):
    if any(message.get(field) for message in thread):
      return code
  if any(message.get("role") != ("prompter", "assistant")[i % 2] for i, message in enumerate(thread)):
    return "oasst_not_alternating"
  for parent, message in zip(thread, thread[1:]):
    rank = message.get("rank")
    alone = len(parent["replies"]) == 1
    if top_k and message["role"] == "assistant" and (not alone if rank is None else not isinstance(rank, int | float) or rank >= top_k):
      return "oasst_rank"
  return ""


def _turn(message) -> Record:
  return {"role": message["role"], "content": message.get("text"), "message_id": message.get("message_id") or message.get("id")}
