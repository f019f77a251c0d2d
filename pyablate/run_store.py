"""Under this name documented in 0.1: :mod:`pyablate.runs.run_folder`."""

from pyablate.runs.run_folder import StoreMismatch

__all__ = [
    "StoreMismatch",
]
