"""Under this name documented in 0.1: :mod:`pyablate.results.measures`."""

from pyablate.results.measures import MEASURES

__all__ = [
    "MEASURES",
]
