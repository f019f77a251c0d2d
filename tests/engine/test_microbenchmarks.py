"""Rates of a GPU, as far as they can be looked at without one."""

from __future__ import annotations

import contextlib

import pytest
import torch

from pyablate.engine import microbenchmarks


@pytest.fixture
def fresh():
    """Nothing is remembered from before, and nothing of the test afterwards."""
    found = [
        getattr(microbenchmarks, f"_{name}_rate") for name in ("convolution", "unit", "change")
    ]
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


@pytest.mark.parametrize("rate", ["convolution", "unit", "change"])
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
        dtype = (torch.float32,) if rate == "convolution" else ()
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
