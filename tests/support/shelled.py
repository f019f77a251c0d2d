"""The shell's commands, called within this process."""

from __future__ import annotations

from typer.testing import CliRunner

from pyablate.cli.app import app


def invoke(*arguments: str) -> tuple[int, str]:
    """Exit code, and what went to standard output and standard error together."""
    found = CliRunner().invoke(app, list(arguments))
    return found.exit_code, found.output
