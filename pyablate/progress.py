"""Under this name documented in 0.1: :mod:`pyablate.runtime.progress`."""

from pyablate.runtime.progress import reporting

__all__ = [
    "reporting",
]
