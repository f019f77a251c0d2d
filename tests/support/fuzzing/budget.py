"""How many examples the fuzzers run: few and always the same in the tests, many in ``make fuzz``.

``FUZZ`` is the number of random networks (30 in the tests); the other fuzzers run in proportion.
``FUZZ_MINUTES`` ends a nightly run early; with less than nine in ten networks compared it fails.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings

GRAPHS = 30
NIGHTLY = "FUZZ" in os.environ
EXAMPLES = int(os.environ.get("FUZZ", GRAPHS))
_END = time.monotonic() + 60 * float(os.environ.get("FUZZ_MINUTES", "inf"))


def out_of_time() -> bool:
    """Whether a nightly run has used up its minutes."""
    return time.monotonic() > _END


def settings_for(examples: int) -> Callable[[Any], Any]:
    """Return the settings of a fuzzer that runs this many examples in the tests."""
    return settings(
        max_examples=max(1, examples * EXAMPLES // GRAPHS),
        deadline=None,
        database=None,
        derandomize=not NIGHTLY,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
