"""Under this name documented in 0.1: :mod:`pyablate.comparison.evaluation`."""

from pyablate.comparison.evaluation import Evaluation

__all__ = [
    "Evaluation",
]
