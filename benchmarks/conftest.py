"""Options of the benchmark suite; `make bench` calls it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from measure import Settings

os.environ["PYABLATE_CACHE"] = ""  # each call measures the machine as it is now


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pyablate benchmarks")
    group.addoption("--images", type=int, default=2000, help="at most so many images per case")
    group.addoption("--rounds", type=int, default=3, help="rounds of rival, pyablate")
    group.addoption(
        "--seconds",
        type=float,
        default=0.8,
        help="about how long pyablate may take in one round; fewer images are run where it is more",
    )
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--no-compile", action="store_true", help="rivals without torch.compile")
    group.addoption(
        "--results",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of the JSON files, one per machine",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))  # rivals' libraries warn freely


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    option = request.config.getoption
    device = option("--device")
    if device.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return Settings(
        images=option("--images"),
        rounds=option("--rounds"),
        seconds=option("--seconds"),
        device=device,
        compiling=not option("--no-compile"),
        results=option("--results"),
    )
