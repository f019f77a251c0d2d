"""Under this name documented in 0.1: :mod:`pyablate.attribution.collapsed`."""

from pyablate.attribution.collapsed import collapse

__all__ = [
    "collapse",
]
