"""Random networks, ablated in random ways, agree with the float64 hook loop.

A failure prints the case as code: paste it into ``test_fuzz_found.py``, and mend what it shows.
"""

from __future__ import annotations

import sys

import pytest
from budget import EXAMPLES, NIGHTLY, out_of_time, settings_for
from cases import CASES, Case, check
from hypothesis import given

from pyablate.reference import Agreement

compared: list[Agreement] = []


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, about speed
@settings_for(30)
@given(case=CASES)
def test_random_networks_agree_with_the_oracle(case: Case) -> None:
    if not out_of_time():
        compared.append(check(case))


def test_the_comparisons_meant_something() -> None:
    graphs = sum(agreement.pairs > 0 for agreement in compared)
    if not graphs:
        pytest.skip("nothing was compared: the test before did not run, or found something")
    pairs = sum(agreement.pairs for agreement in compared)
    ties = sum(agreement.near_ties for agreement in compared)
    if NIGHTLY:
        said = f"{graphs} of {EXAMPLES} networks, {pairs} predictions, {ties} of them near ties"
        print(f"\ncompared: {said}", file=sys.__stderr__)
    else:
        assert graphs > 0.8 * EXAMPLES
    assert ties < 0.2 * pairs
