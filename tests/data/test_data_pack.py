"""Packing: golden bins, efficiency, rows, and the attention and loss masks that segment ids stand for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsft.batch import FIELDS, next_token_targets
from jaxsft.data.pack import assemble, ffd, pack_in_groups, pack_rows
from jaxsft.errors import UserError


def bins(rows, lengths):
  return [[lengths[i] for i in row] for row in rows]


@pytest.mark.parametrize("algorithm", ["bfd", "ffd", "next_fit"])
def test_golden_bins(golden, algorithm):
  cases = golden("packing")["algorithms"]
  assert len(cases) == 6
  for case in cases:
    lengths = case["truncated"]
    assert bins(pack_rows(lengths, case["L"], algorithm), lengths) == case[algorithm], case["lengths"]


def test_golden_bfd_order_of_equal_rooms():
  """First in, first out among rows of equal room: TRL's rule, which no golden multiset shows."""
  assert pack_rows([6, 6, 4, 4], 10) == [[0, 2], [1, 3]]
  assert pack_rows([2, 1] * 100, 2) == [[i] for i in range(0, 200, 2)] + [[i, i + 2] for i in range(1, 200, 4)]


def test_golden_efficiency(golden):
  g = golden("packing")["efficiency"]
  lengths = np.clip(np.rint(np.exp(np.random.default_rng(0).normal(5.5, 0.8, g["n"]))), 8, 2048).astype(int)
  assert lengths.sum() == g["total"]
  want = {row["method"]: row.get("bins") for row in g["rows"]}
  in_groups, over_all = pack_in_groups(lengths, 2048), pack_rows(lengths, 2048)
  assert len(in_groups) == want["bfd or knapsack inside groups of 1000"] and lengths.sum() / (len(in_groups) * 2048) >= 0.995
  assert len(over_all) == want["bfd or knapsack over everything"] == g["lower_bound_bins"]
  assert len(pack_rows(lengths, 2048, "next_fit")) == want["next fit (sequential; grain with num_packing_bins 1)"]


@given(st.lists(st.integers(0, 12), max_size=60))
def test_nothing_is_lost_split_or_too_long(lengths):
  for algorithm in ("bfd", "ffd", "next_fit"):
    rows = pack_rows(lengths, 12, algorithm)
    assert sorted(i for row in rows for i in row) == [i for i, n in enumerate(lengths) if n]
    assert all(0 < sum(lengths[i] for i in row) <= 12 for row in rows)
  assert abs(len(pack_rows(lengths, 12)) - len(ffd(lengths, 12))) <= 1 + len(lengths) // 20


def test_what_does_not_fit_is_an_error():
  with pytest.raises(UserError, match="an example of 5 tokens does not fit a row of 4.*data.length"):
    pack_rows([5], 4)
  with pytest.raises(ValueError, match="5 tokens in a row of 4"):
    assemble([{"tokens": np.arange(5), "weights": np.ones(5)}], 4, 0)


def example(ids, weights):
  return {"tokens": np.array(ids, np.int32), "weights": np.array(weights, np.float32)}


def test_golden_row(golden):
  want = golden("packing")["grain_row"]["rows"]
  made = [assemble([example([5, 6, 7], [0, 1, 1]), example([8, 9], [0, 1])], 6, 99), assemble([example([4] * 4, [0, 1, 1, 1])], 6, 99)]
  for row, w in zip(made, want):
    assert row["tokens"].tolist() == w["input_ids"]
    assert row["segment_ids"].tolist() == w["input_ids_segment_ids"] and row["positions"].tolist() == w["input_ids_positions"]
    assert row["weights"].tolist() == [float(label != -100) for label in w["labels"]]
    assert {name: row[name].dtype for name in FIELDS} == {name: np.dtype(t) for name, t in FIELDS.items()}


def test_golden_bfd_labels(golden):
  g = golden("packing")["bfd_labels"]
  examples = [example(i[:4], [float(x != -100) for x in label[:4]]) for i, label in zip(g["input_ids"], g["labels"])]
  for row, ids, labels in zip(pack_rows([len(e["tokens"]) for e in examples], 4), g["out_input_ids"], g["out_labels"]):
    made = assemble([examples[i] for i in row], 4, 0)
    assert made["tokens"][:len(ids)].tolist() == ids and made["weights"][:len(ids)].tolist() == [float(x != -100) for x in labels]


def test_golden_loss_mask_and_counts(golden):
  g = golden("packing")["loss_mask"]
  batch = {"tokens": np.arange(6, dtype=np.int32), "segment_ids": np.array(g["segment_ids"], np.int32),
           "weights": np.array([float(x != -100) for x in g["labels"]], np.float32)}
  labels, weights = next_token_targets(batch)
  assert weights[:-1].tolist() == g["shifted_mask"] and weights.sum() == g["count"] and weights[-1] == 0
  assert labels[:-1].tolist() == [1, 2, 3, 4, 5]
  opens = {**batch, "weights": np.ones(6, np.float32)}        # even with every token trained, a segment's first one is no target
  assert next_token_targets(opens)[1].tolist() == [1, 1, 0, 1, 0, 0]


def test_golden_attention_mask(golden):
  g = golden("packing")["attention_mask"]
  row = assemble([example([5, 6, 7], [0, 1, 1]), example([8, 9], [0, 1])], 6, 0)
  segment, t = row["segment_ids"], np.arange(6)
  assert row["segment_ids"].tolist() == g["segment_ids"]
  mask = (t[None, :] <= t[:, None]) & (segment[:, None] == segment[None, :]) & (segment[:, None] > 0)
  assert mask.astype(int).tolist() == g["mask"]


def attention_loss(row, use_segments=True):
  """Sum and count of the golden's tiny RoPE attention over one row."""
  rng = np.random.default_rng(0)
  E, projections = rng.normal(size=(11, 8)), [rng.normal(size=(8, 8)) / np.sqrt(8) for _ in range(4)]
  x = E[row["tokens"]]
  q, k, v = (x @ w for w in projections[:3])
  angle = row["positions"][:, None] / 10000 ** (np.arange(4) / 4)

  def rope(y):
    a, b = y[:, :4], y[:, 4:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

  t, segment = np.arange(len(x)), row["segment_ids"] if use_segments else np.ones(len(x), int)
  allowed = (t[None] <= t[:, None]) & (segment[:, None] == segment[None])
  scores = np.where(allowed, rope(q) @ rope(k).T / np.sqrt(8), -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  logits = (x + p / p.sum(-1, keepdims=True) @ v @ projections[3]) @ E.T
  labels, weights = next_token_targets(row | ({} if use_segments else {"segment_ids": np.ones(len(x), np.int32)}))
  m = logits.max(-1)
  nll = m + np.log(np.exp(logits - m[:, None]).sum(-1)) - logits[np.arange(len(x)), labels]
  return (nll * weights).sum(), weights.sum()


def test_golden_packed_loss_equals_unpacked(golden):
  g = golden("packing")["loss_equality"]
  a, b = (example(g[name], [1.0] * len(g[name])) for name in "ab")
  separate = [attention_loss(assemble([e], len(e["tokens"]), 0)) for e in (a, b)]
  assert sum(s for s, _ in separate) == pytest.approx(g["separate_sum"], abs=1e-9) and sum(n for _, n in separate) == g["count"]
  packed = assemble([a, b], 8, 0)
  assert attention_loss(packed) == (pytest.approx(g["packed_with_segments_sum"], abs=1e-9), g["count"])
  running = packed | {"positions": np.arange(8, dtype=np.int32)}
  assert attention_loss(running)[0] == pytest.approx(g["packed_without_position_reset_sum"], abs=1e-9)
  assert attention_loss(running, use_segments=False) == (pytest.approx(g["naive_causal_sum"], abs=1e-9), g["naive_count"])


def test_golden_token_weight_is_one_over_the_global_count(golden):
  g = golden("packing")["weights"]
  row = assemble([example(range(8), [0] + [1] * 7), example(range(3), [0, 1, 1])], 11, 0)
  assert 1 / next_token_targets(row)[1].sum() == pytest.approx(g["global_token_mean"])


def test_padding_is_told_by_length_and_never_by_its_id():
  """Lessons row 6: where the padding id is the end-of-turn's, as in SmolLM2, the model still learns to stop."""
  row = assemble([example([5, 99], [0, 1]), example([8, 9, 99], [0, 1, 1])], 7, 99)
  assert row["tokens"].tolist() == [5, 99, 8, 9, 99, 99, 99]
  assert row["weights"].tolist() == [0, 1, 0, 1, 1, 0, 0] and row["segment_ids"].tolist() == [1, 1, 2, 2, 2, 0, 0]
