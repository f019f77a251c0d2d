"""A result with awkward names for the tests of reports."""

from __future__ import annotations

import pytest
from support.report_pages import AWKWARD, structured

from pyablate.result import AblationResult


@pytest.fixture(scope="module")
def result() -> AblationResult:
    return structured(24, 5, 60, 3, AWKWARD)
