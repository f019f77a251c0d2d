"""What was measured of this machine is kept between processes, and harms nothing if it is lost."""

from __future__ import annotations

import json

import pytest
import torch

from pyablate.engine import microbenchmarks
from pyablate.io import remembered


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder for what is measured, and a process that has measured nothing yet."""
    monkeypatch.setenv("PYABLATE_CACHE", str(tmp_path / "cache"))
    _another_process()
    yield tmp_path / "cache" / "measured.json"
    _another_process()


def _another_process():
    for name in ("convolution", "matrix", "unit", "change", "difference"):
        getattr(microbenchmarks, f"_{name}_rate").cache_clear()


def test_a_rate_is_measured_once_on_a_machine_and_again_when_asked(cache, monkeypatch):
    runs = []

    def stopwatch(work, device):
        runs.append(device)
        return 1.0 / len(runs)

    monkeypatch.setattr(microbenchmarks, "best", stopwatch)
    first = microbenchmarks.convolution_rate("cpu", torch.float32)
    alone = microbenchmarks.convolution_rate("cpu", torch.float32, alone=True)
    assert alone == 2 * first
    assert len(runs) == 2
    _another_process()
    assert microbenchmarks.convolution_rate("cpu", torch.float32) == first
    assert len(runs) == 2
    monkeypatch.setattr(microbenchmarks, "_machine", lambda _: "another machine")
    _another_process()
    assert microbenchmarks.convolution_rate("cpu", torch.float32) == 3 * first
    assert len(json.loads(cache.read_text())) == 2
    microbenchmarks.measure_again()
    assert not cache.exists()
    assert microbenchmarks.convolution_rate("cpu", torch.float32) == 4 * first


@pytest.mark.parametrize(
    "content",
    ["", "[1]", '{"m": 3}', '{"m": {"n": "fast"}}', '{"m": {"n": -1.0}}', '{"m": {"n": NaN}}',
     "[" * 9000, " " * (1 << 17)],
)  # fmt: skip
def test_a_damaged_file_is_no_figure_and_is_replaced(cache, content):
    cache.parent.mkdir()
    cache.write_text(content)
    assert remembered.recall("m", "n") is None
    remembered.remember("m", "n", 2.5)
    assert remembered.recall("m", "n") == 2.5


def test_a_disk_that_cannot_be_written_to_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PYABLATE_CACHE", str(tmp_path / "file"))
    remembered.remember("m", "n", 1.0)
    remembered.forget()
    assert remembered.recall("m", "n") is None


def test_nothing_is_kept_where_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PYABLATE_CACHE", "")
    assert remembered.place() is None
    monkeypatch.delenv("PYABLATE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remembered.place() == tmp_path / "pyablate" / "measured.json"
