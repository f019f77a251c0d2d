"""The certificate of a screened run: what its sample says of the pairs that were not computed."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from pyablate.interventions import uniform
from pyablate.results.screening import LayerScreening, Sampled, Screening, most_wrong


@pytest.mark.parametrize("found", [0, 1, 7])
@pytest.mark.parametrize("chance", [0.001, 0.05, 0.5])
def test_more_wrong_pairs_would_have_been_found(found: int, chance: float) -> None:
    most = int(most_wrong(found, chance, 0.95))
    assert stats.binom.cdf(found, most, chance) >= 0.05 > stats.binom.cdf(found, most + 1, chance)


def test_nothing_is_missed_where_all_were_computed() -> None:
    assert most_wrong(3, 1.0, 0.95) == 3
    assert Sampled(10, 10, 3).missed(1.0, 0.95) == 0
    assert Sampled(10, 9, 3).missed(0.001, 0.95) == 1  # no more than there are


def screening(near: Sampled, far: Sampled, **more: object) -> Screening:
    layer = LayerScreening(near.pairs + far.pairs, 0, near.sampled + far.sampled, near, far)
    return Screening(1e-5, 0.2, 0.05, 9, 0, {"layer": layer})


@pytest.mark.parametrize(("near_wrong", "far_wrong"), [(0, 0), (3, 0), (40, 10), (0, 200)])
def test_the_bound_covers_what_was_missed(near_wrong: int, far_wrong: int) -> None:
    """95 % at least, over seeds of the real draw, wherever the wrong pairs lie."""
    pairs = 2000
    row, image = np.divmod(np.arange(pairs), 50)
    near = np.arange(pairs) < 600
    wrong = np.zeros(pairs, bool)
    wrong[:near_wrong] = True
    wrong[600 : 600 + far_wrong] = True
    covered = []
    for seed in range(400):
        sampled = uniform(seed, row, image) < np.where(near, 0.2, 0.05)
        parts = [
            Sampled(int(of.sum()), int((of & sampled).sum()), int((of & sampled & wrong).sum()))
            for of in (near, ~near)
        ]
        missed = int((wrong & ~sampled).sum())
        covered.append(screening(*parts).missed_bound >= missed)
    assert np.mean(covered) >= 0.95


def test_draws_are_uniform_and_differ_between_seeds() -> None:
    row, image = np.divmod(np.arange(100_000), 300)
    first, second = (uniform(seed, row, image) for seed in (0, 1))
    assert stats.kstest(first, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.02
    some = np.array([5, 99_999])
    np.testing.assert_array_equal(uniform(0, row[some], image[some]), first[some])


def test_parts_add_up_and_survive_json() -> None:
    first = screening(Sampled(10, 4, 1), Sampled(100, 5, 0))
    second = Screening(1e-5, 0.2, 0.05, 9, 0, {"other": LayerScreening(7, threshold=np.inf)})
    both = first + second + first
    assert both.pairs == 227
    assert both.layers["layer"].near == Sampled(20, 8, 2)
    assert both.wrong == 2
    assert both.settled == 220 - 18 + 7
    assert Screening.of(json.loads(json.dumps(both.to_json(), allow_nan=False))) == both


def test_runs_with_other_chances_are_bounded_by_the_smaller_ones() -> None:
    first = screening(Sampled(10, 4, 1), Sampled(100, 5, 0))
    second = replace(first, near_chance=0.1, far_chance=1.0)
    both = first + second
    assert (both.near_chance, both.far_chance) == (0.1, 0.05)
    assert both == second + first
    assert both.missed_bound >= max(first.missed_bound, second.missed_bound)


def test_the_table_has_a_row_for_each_layer() -> None:
    found = screening(Sampled(10, 4, 1), Sampled(100, 5, 0))
    row = found.to_dataframe().iloc[0]
    assert (row["pairs"], row["computed"], row["settled"], row["wrong"]) == (110, 9, 101, 1)
    assert row["missed_bound"] == found.missed_bound
    assert 0 < row["upper_bound"] == found.upper_bound < 1
    assert "1 of 9 of these, computed as a check, were wrong" in str(found)
