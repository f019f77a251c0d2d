"""Under this name documented in 0.1: :mod:`pyablate.analysis.targets`."""

from pyablate.analysis.targets import entropy, gini, preferred_class_drop, unit_targets

__all__ = [
    "entropy",
    "gini",
    "preferred_class_drop",
    "unit_targets",
]
