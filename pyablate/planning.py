"""Under this name documented in 0.1: :mod:`pyablate.runs._plan`."""

from pyablate.runs._plan import Peaks

__all__ = [
    "Peaks",
]
