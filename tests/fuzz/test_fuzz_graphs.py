"""Random networks, ablated in random ways, agree with the float64 hook loop.

``make fuzz`` runs 500 of them under a seed of the day; the tests run 30 that are always the same.
A failure prints the case as code: paste it into ``test_fuzz_found.py`` and mend what it shows.
"""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from cases import CASES, Case, check
from hypothesis import HealthCheck, Phase, given, settings

EXAMPLES = int(os.environ.get("FUZZ", "30"))
MINUTES = float(os.environ.get("FUZZ_MINUTES", "inf"))
nightly = "FUZZ" in os.environ
LIMITS: dict[str, Any] = {
    "max_examples": EXAMPLES,
    "deadline": None,
    "database": None,
    "derandomize": not nightly,
    "phases": [Phase.generate, Phase.shrink] if nightly else [Phase.generate],
    "print_blob": False,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
_ = (pytest, Case)
START = time.monotonic()
counted = {"graphs": 0, "pairs": 0, "near ties": 0}


@settings(**LIMITS)
@given(case=CASES)
def test_random_networks_agree_with_the_oracle(case: Case) -> None:
    if time.monotonic() - START > 60 * MINUTES:
        return
    agreement = check(case)
    counted["graphs"] += agreement.pairs > 0
    counted["pairs"] += agreement.pairs
    counted["near ties"] += agreement.near_ties


def test_the_comparisons_meant_something() -> None:
    if not counted["graphs"]:
        pytest.skip("no graphs were compared: the test before did not run")
    print(counted)
    assert counted["near ties"] < 0.2 * counted["pairs"]
