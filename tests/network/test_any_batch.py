"""Networks that make a plain number of the batch size: captured, or replayed with the reason."""

from __future__ import annotations

import re

import pytest
from support import batch_idioms
from support.batch_idioms import CAPTURED, REPLAYED, network
from support.oracle import check


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_for_any_number_of_images(name: str) -> None:
    result = check(
        network(CAPTURED[name]), batch_idioms.data(), ["act"], intervention="mean", batch_size=20
    )
    assert "replay" not in str(result.strategy)
    assert result.flips.image.size > 5


@pytest.mark.parametrize("name", REPLAYED)
def test_replayed_with_the_reason_and_the_line(name: str, caplog: pytest.LogCaptureFixture) -> None:
    between, reason = REPLAYED[name]
    result = check(network(between), batch_idioms.data(), ["act"], intervention="mean")
    assert set(result.strategy.values()) <= {"replay", "replay (float64)"}
    said = re.escape(batch_idioms.__file__) + r":\d+\): every pair runs by replay"
    assert re.search(r"cannot be captured \(" + reason + said, caplog.text, re.DOTALL)
