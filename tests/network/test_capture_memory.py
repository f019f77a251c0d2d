"""Captures that are kept inside of functions that ablate one network several times."""

import numpy as np
import pytest
import torch
from torch import nn

import pyablate as pa
from pyablate import reference
from pyablate.network import any_batch, capture_memory

UNTIMED = {"progress": False, "audit": 0}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.relu, self.last = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.relu(self.first(x)).mean((2, 3)))


@pytest.fixture
def exports(monkeypatch):
    """Return a list that grows with every export."""
    calls = []
    real = any_batch.export

    def counted(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(any_batch, "export", counted)
    return calls


def network(seed=3):
    torch.manual_seed(seed)
    return Network().eval()


@pytest.fixture
def problem():
    return network(), torch.randn(24, 1, 7, 7), torch.randint(3, (24,))


def run(model, x, labels, layers="relu", **options):
    result = pa.ablate(model, (x, labels), layers, **UNTIMED, **options)
    assert reference.compare(result, model, (x, labels), layers).mismatches == 0
    return result


def test_one_network_is_exported_once(problem, exports):
    model, x, labels = problem
    with capture_memory.same_network():
        first = run(model, x, labels)
        again = run(model, x[5:], labels[5:])
        with capture_memory.same_network():  # inside of another
            third = run(model, x, labels)
    assert len(exports) == 1
    assert np.array_equal(again.predictions(), first.predictions()[:, 5:])
    assert np.array_equal(third.predictions(), first.predictions())
    assert first.strategy == again.strategy


def test_nothing_is_kept_from_call_to_call(problem, exports):
    model, x, labels = problem
    run(model, x, labels)
    run(model, x, labels)
    assert len(exports) == 2
    with pytest.raises(ValueError, match="no layer"), capture_memory.same_network():
        pa.ablate(model, (x, labels), "none")
    run(model, x, labels)
    assert len(exports) == 3


def test_what_is_another_capture(problem, exports):
    model, x, labels = problem
    other = network(4)
    with capture_memory.same_network():
        run(model, x, labels)
        run(other, x, labels)
        assert len(exports) == 2
        run(model, x, labels, "first")
        run(model, torch.randn(24, 1, 9, 9), labels)
        assert len(exports) == 4
        run(other.double(), x.double(), labels)
        assert len(exports) == 5
        run(model, x, labels)  # no longer among those used last
        assert len(exports) == 6
        assert len(capture_memory._kept.get()) == capture_memory.MOST


FUNCTIONS = {
    "cumulative": lambda m, data: pa.cumulative(m, data, "relu", progress=False),
    "shapley": lambda m, data: pa.shapley(m, data, "relu", permutations=4, progress=False),
    "minimal_sets": lambda m, data: pa.minimal_sets(m, data, "relu", progress=False),
    "unit_sets": lambda m, data: pa.unit_sets(m, data, "relu", progress=False),
    "rotation_control": lambda m, data: pa.rotation_control(m, data, "relu", progress=False),
    "optimal_constants": lambda m, data: pa.optimal_constants(m, data, "relu", progress=False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_ablate_several_times_export_once(problem, exports, monkeypatch, name):
    model, x, labels = problem
    FUNCTIONS[name](model, (x, labels))
    once = len(exports)
    monkeypatch.setattr(capture_memory, "find", lambda model, how: None)
    FUNCTIONS[name](model, (x, labels))
    assert once == 1
    assert len(exports) - once > 1
