"""Under this name documented in 0.1: :mod:`pyablate.results.store`."""

from pyablate.results.store import load, save

__all__ = [
    "load",
    "save",
]
