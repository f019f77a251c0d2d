"""Rates of a GPU, as far as they can be looked at without one."""

from __future__ import annotations

import contextlib

import pytest
import torch

from pyablate.engine import microbenchmarks
from pyablate.runtime.chunking import SLICE


@pytest.fixture
def fresh():
    """Nothing is remembered from before, and nothing of the test afterwards."""
    names = ("convolution", "matrix", "unit", "change", "difference")
    found = [getattr(microbenchmarks, f"_{name}_rate") for name in names]
    for rate in found:
        rate.cache_clear()
    yield
    for rate in found:
        rate.cache_clear()


def test_a_gpu_is_given_enough_to_do():
    assert 2 * microbenchmarks._images("cuda:0") * 64 * 64 * 9 * 14 * 14 >= 50e9
    assert microbenchmarks._images("cpu") == 64
    assert microbenchmarks._times("cuda") * 512 * 4096 * 4 >= 256 << 20  # beyond its caches
    assert microbenchmarks._times("cpu") == 1


def test_a_gpu_is_timed_by_its_own_events_on_its_own_device(monkeypatch):
    clock, on = [0.0], []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def synchronize(self):
            clock[0] += 1000.0  # what a wait costs is in no figure

        def elapsed_time(self, end):
            return end.at - self.at

    @contextlib.contextmanager
    def device(name):
        on.append(name)
        yield

    def work():
        clock[0] += 2.0 if clock[0] > 50 else 9.0  # milliseconds; slower before it is warm

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", device)
    assert microbenchmarks.best(work, "cuda:1") == 2e-3
    assert on == ["cuda:1"]


def test_rates_of_the_processor_are_numbers():
    assert microbenchmarks.unit_rate("cpu") > 0
    assert microbenchmarks.change_rate("cpu") > 0
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert microbenchmarks.change_rate("cpu", dtype, "gelu") > 0
        assert microbenchmarks.difference_rate("cpu", dtype) > 0
        assert microbenchmarks.matrix_rate("cpu", dtype) > 0


@pytest.mark.usefixtures("fresh")
def test_rates_are_operations_and_bytes_of_a_slice_by_seconds(monkeypatch):
    ran = []

    def stopwatch(work, _device):
        ran.append(work())
        return 0.5

    monkeypatch.setattr(microbenchmarks, "best", stopwatch)
    found = microbenchmarks.matrix_rate("cpu", torch.float32)
    assert ran[-1].numel() * 4 == SLICE
    assert found == 2 * 2.0 * ran[-1].numel() * 64
    found = microbenchmarks.difference_rate("cpu", torch.float32)
    assert found == 2 * 2.0 * ran[-1].numel() * 4
    found = microbenchmarks.change_rate("cpu", torch.bfloat16, "gelu")
    assert found == 2 * 2.0 * ran[-1].numel() * 2


def test_one_thread_is_timed_without_the_turns_of_others(monkeypatch):
    """A rate that is kept for good is no worse where every run is interrupted."""
    own, wall = [0.0], [0.0]

    def work():
        own[0] += 0.01
        wall[0] += 0.03  # two others have their turns

    monkeypatch.setattr(microbenchmarks.time, "thread_time", lambda: own[0])
    monkeypatch.setattr(microbenchmarks.time, "perf_counter", lambda: wall[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert microbenchmarks.best(work, "cpu") == pytest.approx(0.01)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert microbenchmarks.best(work, "cpu") == pytest.approx(0.03)


@pytest.mark.parametrize("rate", ["convolution", "matrix", "unit", "change", "difference"])
@pytest.mark.usefixtures("fresh")
def test_a_lack_of_memory_is_not_remembered(monkeypatch, rate):
    short, best, tried = [True], microbenchmarks.best, []

    def stopwatch(work, device):
        tried.append(work)
        if short[0] and len(tried) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return best(work, device)

    def measure():
        tried.clear()
        dtype = () if rate in ("unit", "change") else (torch.float32,)
        return getattr(microbenchmarks, f"{rate}_rate")("cpu", *dtype)

    monkeypatch.setattr(microbenchmarks, "best", stopwatch)
    monkeypatch.setattr(microbenchmarks, "_images", lambda _: 8)
    monkeypatch.setattr(microbenchmarks, "_times", lambda _: 4)
    with_less = measure()
    assert with_less > 0
    assert len(tried) == 3  # all, half and a quarter
    short[0] = False
    enough = measure()
    assert enough > 0
    assert len(tried) == 1
    assert measure() == enough
    assert not tried


@pytest.mark.usefixtures("fresh")
def test_what_a_device_cannot_do_is_remembered_and_too_little_memory_said(monkeypatch):
    def stopwatch(error):
        def fail(_work, _device):
            raise error

        return fail

    monkeypatch.setattr(microbenchmarks, "best", stopwatch(MemoryError("no")))
    with pytest.raises(MemoryError):
        microbenchmarks.convolution_rate("cpu", torch.float32)
    monkeypatch.setattr(microbenchmarks, "best", stopwatch(RuntimeError("not implemented")))
    assert microbenchmarks.convolution_rate("cpu", torch.float32) == 0
    monkeypatch.undo()
    assert microbenchmarks.convolution_rate("cpu", torch.float32) == 0
    with pytest.raises(RuntimeError):
        microbenchmarks.convolution_rate("no such device", torch.float32)
