"""Under this name documented in 0.1: :mod:`pyablate.results.result`."""

from pyablate.results.result import AblationResult, Audit, Effort, Flips

__all__ = [
    "AblationResult",
    "Audit",
    "Effort",
    "Flips",
]
