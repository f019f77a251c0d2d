"""Random networks, ablated in random ways, agree with the float64 hook loop.

A failure prints the case as code: paste it beside the tests of what was wrong, and mend that.
"""

from __future__ import annotations

import sys
from collections import Counter

import pytest
from hypothesis import assume, given
from support.fuzzing.budget import EXAMPLES, NIGHTLY, out_of_time, settings_for
from support.fuzzing.cases import CASES, Checked, check

LOW = ("int8", "bfloat16")
# Some networks turn out to have no units to compare, and a night promises a number of comparisons.
NETWORKS = 35 if NIGHTLY else 30

compared: list[Checked] = []
passed: set[int] = set()
failed: set[int] = set()  # never left out: Hypothesis makes these again, and smaller


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, about speed
@settings_for(NETWORKS)
@given(case=CASES)
def test_random_networks_agree_with_the_oracle(case):
    seed = case.network.seed
    assume(seed not in passed - failed)  # a variation of one before, which Hypothesis likes
    if not out_of_time():
        try:
            compared.append(check(case))
        except Exception:
            failed.add(seed)
            raise
        passed.add(seed)


def test_the_comparisons_meant_something():
    graphs = sum(one.agreement.pairs > 0 for one in compared)
    if failed or not (graphs or NIGHTLY):
        pytest.skip("the test before did not run, or found something")
    pairs = sum(one.agreement.pairs for one in compared)
    ties = sum(one.agreement.near_ties for one in compared)
    settled = sum((Counter(one.settled) for one in compared), Counter())
    low = [one.settled for one in compared if any(one.settled.get(tier) for tier in LOW)]
    if NIGHTLY:
        said = f"{graphs} of {EXAMPLES} networks, {pairs} predictions, {ties} of them near ties"
        tiers = ", ".join(f"{count} in {tier}" for tier, count in sorted(settled.items()))
        rescued = sum(one.get("float64", 0) for one in low)
        said += f"; settled by the dense part: {tiers}; low precision in {len(low)} networks, "
        said += f"where {rescued} pairs were left for float64"
        print(f"\ncompared: {said}", file=sys.__stderr__)
        why = "the minutes were up (FUZZ_MINUTES)" if out_of_time() else "too few were sound"
        assert graphs >= 0.9 * EXAMPLES, f"only {graphs} of {EXAMPLES} networks compared: {why}"
    else:
        assert graphs > 0.8 * EXAMPLES
        assert low  # the others have jumps, or too few pairs to measure
    assert ties < 0.2 * pairs
