"""Under this name documented in 0.1: :mod:`pyablate.experiments.directions`."""

from pyablate.experiments.directions import (
    next_weights,
    principal_components,
    relevant,
    rotations,
)

__all__ = [
    "next_weights",
    "principal_components",
    "relevant",
    "rotations",
]
