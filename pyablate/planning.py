"""Under this name documented in 0.1: :mod:`pyablate.runs.cost_model`."""

from pyablate.runs.cost_model import Peaks

__all__ = [
    "Peaks",
]
