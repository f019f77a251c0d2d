"""Under this name documented in 0.1: :mod:`pyablate.experiments.accuracies`."""

from pyablate.experiments.accuracies import balanced_accuracy

__all__ = [
    "balanced_accuracy",
]
