"""Rates of a GPU, as far as they can be looked at without one."""

from __future__ import annotations

import contextlib

import torch

from pyablate.engine import microbenchmarks


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
    assert microbenchmarks._best(work, "cuda:1") == 2e-3
    assert on == ["cuda:1"]


def test_rates_of_the_processor_are_numbers():
    assert microbenchmarks.unit_rate("cpu") > 0
    assert microbenchmarks.change_rate("cpu") > 0
