"""Under this name documented in 0.1: :mod:`pyablate.analysis.statistics`."""

from pyablate.analysis.statistics import (
    adjusted,
    layer_rows,
    max_class_test,
    mcnemar,
    noise_floor,
    random_half,
    significance,
    split_half_drop,
)

__all__ = [
    "adjusted",
    "layer_rows",
    "max_class_test",
    "mcnemar",
    "noise_floor",
    "random_half",
    "significance",
    "split_half_drop",
]
