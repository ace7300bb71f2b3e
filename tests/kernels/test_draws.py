"""The hashed draws: as uniform and as independent as dropout and noise need, by row, layer, place and step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.kernels import draws

ROOT = draws.seed_of(jax.random.key(0))


def rows(count, number=0):
  return draws.derive(draws.seed_of(jax.random.key(number))[None], jnp.arange(count))


def chi_square(values, bins):
  """(statistic - degrees of freedom) / its standard deviation: a standard normal, about, when `values` in [0, 1) are uniform."""
  counts = np.bincount((np.asarray(values).reshape(-1) * bins).astype(int), minlength=bins)
  expected = counts.sum() / bins
  return (((counts - expected) ** 2 / expected).sum() - (bins - 1)) / np.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("bins", [2, 16, 256, 1000])
@pytest.mark.parametrize("number", [0, 1, 12345])
def test_uniform_by_chi_square(number, bins):
  drawn = draws.uniform(rows(16, number), (250, 250))
  assert drawn.shape == (16, 250, 250) and drawn.dtype == jnp.float32
  assert 0 <= float(drawn.min()) and float(drawn.max()) < 1
  assert abs(chi_square(drawn, bins)) < 4


def test_uniform_in_each_row_and_in_each_bit():
  drawn = np.asarray(draws.uniform(rows(64), (100, 100)))
  assert max(abs(chi_square(row, 32)) for row in drawn) < 5
  bits = (drawn * 2 ** 24).astype(np.uint32)
  shares = [((bits >> bit) & 1).mean() for bit in range(24)]
  assert np.abs(np.array(shares) - 0.5).max() < 4.5 * 0.5 / np.sqrt(bits.size)


def correlations(drawn):
  """Off-diagonal correlations of the rows of [N, n], in standard deviations of independent ones."""
  drawn = np.reshape(drawn, (len(drawn), -1))
  return (np.corrcoef(drawn) * np.sqrt(drawn.shape[1]))[~np.eye(len(drawn), dtype=bool)]


@pytest.mark.parametrize("what", ["rows", "layers", "steps", "targets", "layers of two targets"])
def test_independent_between(what):
  """Consecutive rows, layers and steps, as the code numbers them."""
  base = rows(1)
  layer = lambda seed, count: draws.derive(seed[None], jnp.arange(count)[:, None])[:, 0]
  seeds = {
      "rows": rows(60),
      "layers": layer(base, 60),
      "steps": jnp.concatenate([draws.derive(draws.seed_of(jax.random.fold_in(jax.random.key(0), step))[None], jnp.array([7])) for step in range(60)]),
      "targets": jnp.concatenate([draws.derive(base, number) for number in range(60)]),
      "layers of two targets": jnp.concatenate([layer(draws.derive(base, number), 30) for number in (3, 4)]),
  }[what]
  assert seeds.shape == (60, 2)
  scores = correlations(draws.uniform(seeds, (64, 64)))
  assert np.abs(scores).max() < 5 and 0.9 < scores.std() < 1.1
  together = np.asarray(draws.uniform(seeds, (64, 64)) < 0.1).reshape(60, -1)               # and as dropout masks
  both = (together[:, None] & together[None]).mean(-1)[~np.eye(60, dtype=bool)]
  assert abs(both.mean() - 0.01) < 0.0005


def test_neighbouring_elements_are_independent():
  """Along a row and down a column of one mask, pairs by chi square over 16 x 16 cells."""
  drawn = np.asarray(draws.uniform(rows(8), (512, 512)))
  for lag in (1, 2, 64, 512):
    flat = drawn.reshape(8, -1)
    pairs = (flat[:, :-lag] * 16).astype(int) * 16 + (flat[:, lag:] * 16).astype(int)
    assert abs(chi_square((pairs + 0.5) / 256, 256)) < 4.5, lag


def test_ten_thousand_rows_and_layers_have_seeds_of_their_own():
  seeds = np.asarray(draws.derive(draws.derive(ROOT[None], jnp.arange(1000))[None], jnp.arange(32)[:, None])).reshape(-1, 2)
  assert len(np.unique(seeds, axis=0)) == 32_000
  drawn = np.asarray(draws.uniform(jnp.asarray(seeds), (2,)))
  assert len(np.unique(drawn, axis=0)) == 32_000


def test_the_same_names_give_the_same_numbers_in_any_company_and_under_jit():
  whole = draws.uniform(rows(8), (5, 6))
  np.testing.assert_array_equal(jax.jit(lambda s: draws.uniform(s, (5, 6)))(rows(8)[3:5]), whole[3:5])
  np.testing.assert_array_equal(draws.derive(ROOT[None], jnp.array([5, 2]))[1], draws.derive(ROOT, 2))
  first = [int(x * 2 ** 24) for x in draws.uniform(draws.derive(ROOT[None], jnp.array([0])), (3,))[0]]
  assert first == KNOWN, "draws changed: a resumed run would no longer continue to the bit"


KNOWN = [11685706, 15510070, 12463046]
