"""Settings of the whole test suite."""

import os
from pathlib import Path

import pytest
import torch
from support import exports, simulated

# What is measured of the machine is not kept: nothing is written to the user's cache.
os.environ["PYABLATE_CACHE"] = ""

# The networks here are tiny: threads gain nothing, and on a busy machine waiting for one another
# costs them hundreds of times what the work does.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that may take longest, lest one process waits for the other's."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder that only executed code makes."""
    return tmp_path / "executed"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A small result on the disk."""
    simulated.small().save(tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, at a terminal that is wide enough for any line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def exports_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export a network once in all tests that say so; what is tested comes behind the export."""
    exports.keep(monkeypatch)
