"""The shell's commands, called within this process, and programs of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from pyablate.cli.app import app

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
    "OMP_NUM_THREADS": "1",
}

TINY_NETWORK = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )
"""
"""A module with a network that a command can make."""

DATA = ("small_network:make", "--data", "images.npz")
"""Network and data of the directory in which commands are tested."""


def write_photos(folder: Path, *, each: int, side: int) -> None:
    """Fill a folder with colour noise of three classes."""
    draw = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def invoke(*arguments: str) -> tuple[int, str]:
    """Exit code, and what went to standard output and standard error together."""
    found = CliRunner().invoke(app, list(arguments))
    return found.exit_code, found.output


def invoke_apart(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    found = CliRunner().invoke(app, list(arguments))
    return found.exit_code, found.stdout, found.stderr


def error_lines(err: str) -> list[str]:
    """Lines of standard error, without the one that says that the extension is missing."""
    return [line for line in err.splitlines() if "native module" not in line]


def program(*arguments: object, **options: Any) -> str:
    """Run Python on a file or a module of the tests; what it prints."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout
