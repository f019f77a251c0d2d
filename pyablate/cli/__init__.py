"""The shell."""

from pyablate.cli.app import main

__all__ = ["main"]
