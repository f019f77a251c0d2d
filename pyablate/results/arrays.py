"""Types of the arrays of a result."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Counts = NDArray[Any]
"""int64; float64 where they are estimated, see :mod:`pyablate.results.estimate`."""
