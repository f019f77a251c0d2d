"""Under this name documented in 0.1: :mod:`pyablate.results.store`."""

from pyablate.result import load
from pyablate.results.store import save

__all__ = [
    "load",
    "save",
]
