"""The shell's commands, called within this process, and programs of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from pyablate.cli.app import app

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
    "OMP_NUM_THREADS": "1",
}


def invoke(*arguments: str) -> tuple[int, str]:
    """Exit code, and what went to standard output and standard error together."""
    found = CliRunner().invoke(app, list(arguments))
    return found.exit_code, found.output


def invoke_apart(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    found = CliRunner().invoke(app, list(arguments))
    return found.exit_code, found.stdout, found.stderr


def program(*arguments: object, **options: Any) -> str:
    """Run Python on a file or a module of the tests; what it prints."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout
