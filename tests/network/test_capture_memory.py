"""Captures that are remembered: for equal networks, and for no others."""

import contextvars
import copy
import enum

import numpy as np
import pytest
import torch
from support import networks
from torch import nn

import pyablate as pa
from pyablate import reference
from pyablate.network import any_batch, capture_memory

UNTIMED = {"progress": False, "audit": 0}
LEVEL = 1.0


class Kind(enum.Enum):
    LOUD, QUIET = 2.0, 0.5


class Settings:
    def __init__(self):
        self.kinds = {"first": Kind.LOUD}


class Network(nn.Module):
    """Reads plain attributes, an object, an array, a function, and a global variable."""

    def __init__(self):
        super().__init__()
        self.first, self.relu, self.last = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Linear(6, 3)
        self.register_buffer("shift", torch.zeros(6, 1, 1))
        self.scale, self.settings, self.array = 1.0, Settings(), np.ones(1)
        self.function = torch.abs
        self.free = torch.ones(1)

    def forward(self, x):
        x = self.relu(self.first(x) * self.scale + self.shift) * float(self.array[0])
        x = self.function(x.mean((2, 3)) * self.settings.kinds["first"].value)
        return self.last(x) * LEVEL * self.free


@pytest.fixture
def exports(monkeypatch):
    """Return a list that grows with every export."""
    calls = []
    real = any_batch.export

    def counted(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(any_batch, "export", counted)
    with pa.keep_captures():
        yield calls


@pytest.fixture
def problem():
    torch.manual_seed(3)
    model = Network().eval()
    return model, torch.randn(24, 1, 7, 7), torch.randint(3, (24,))


def run(model, x, labels, layers="relu", **options):
    result = pa.ablate(model, (x, labels), layers, **UNTIMED, **options)
    assert reference.compare(result, model, (x, labels), layers).mismatches == 0
    return result


def test_an_equal_network_is_exported_once(problem, exports):
    model, x, labels = problem
    first = run(model, x, labels)
    again = run(model, x[5:], labels[5:])
    copied = run(copy.deepcopy(model), x, labels)
    assert len(exports) == 1
    assert np.array_equal(again.predictions(), first.predictions()[:, 5:])
    assert np.array_equal(copied.predictions(), first.predictions())
    assert first.strategy == again.strategy == copied.strategy


CHANGES = {
    "a weight": lambda m: m.first.weight.data[2].zero_(),
    "a buffer": lambda m: m.shift.add_(1.0),
    "a plain tensor": lambda m: m.free.mul_(-1.0),
    "a number": lambda m: setattr(m, "scale", -1.0),
    "the sign of zero": lambda m: setattr(m, "scale", -0.0),
    "true for 1.0": lambda m: setattr(m, "scale", True),
    "inside an object": lambda m: m.settings.kinds.update(first=Kind.QUIET),
    "an array": lambda m: m.array.__setitem__(0, -2.0),
    "a function": lambda m: setattr(m, "function", torch.neg),
    "a module": lambda m: setattr(m, "relu", nn.Tanh()),
    "a module's setting": lambda m: setattr(m.first, "stride", (2, 2)),
    "a hook": lambda m: m.first.register_forward_hook(lambda module, given, out: -out) and None,
    "its forward": lambda m: setattr(m, "forward", lambda x: Network.forward(m, -x)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_is_exported_anew(problem, exports, change):
    model, x, labels = problem
    before = run(model, x, labels)
    change(model)
    after = run(model, x, labels)
    assert len(exports) == 2
    with torch.no_grad():
        assert np.array_equal(after.baseline, model(x).argmax(1).numpy())
    assert before.baseline.shape == after.baseline.shape


def test_what_only_a_look_shows(problem, exports, monkeypatch):
    model, x, labels = problem
    run(model, x, labels)
    monkeypatch.setitem(globals(), "LEVEL", -1.0)
    after = run(model, x, labels)
    assert len(exports) == 2
    with torch.no_grad():
        assert np.array_equal(after.baseline, model(x).argmax(1).numpy())


def test_other_sites_and_shapes_are_captured_for_themselves(problem, exports):
    model, x, labels = problem
    run(model, x, labels)
    run(model, x, labels, "first")
    run(model, torch.randn(24, 1, 9, 9), labels)
    run(model.double(), x.double(), labels)
    assert len(exports) == 4
    run(model.float(), x, labels)
    assert len(exports) == 4


@pytest.mark.parametrize("awkward", [torch.Generator(), object(), {1: iter([1])}], ids=str)
def test_what_cannot_be_compared_is_not_kept(problem, awkward):
    model, _, _ = problem
    with pa.keep_captures():
        assert capture_memory.key_of(model) is not None
        model.awkward = awkward
        assert capture_memory.key_of(model) is None
        capture_memory.keep(None, None)
        assert capture_memory.find(None) is None


def test_nothing_is_kept_unasked(problem, exports):
    model, x, labels = problem
    empty = contextvars.copy_context()
    empty.run(capture_memory._kept.set, None)
    for _ in range(2):
        empty.run(run, model, x, labels)
    assert len(exports) == 2
    with pa.keep_captures():  # inside of another
        run(model, x, labels)
    run(model, x, labels)
    assert len(exports) == 3


def test_captures_go_when_the_block_ends(problem):
    model, x, labels = problem
    with pa.keep_captures():
        run(model, x, labels)
        assert len(capture_memory._kept.get()) == 1
    assert capture_memory._kept.get() is None
    with pytest.raises(ZeroDivisionError), pa.keep_captures():
        raise ZeroDivisionError
    assert capture_memory._kept.get() is None


def test_functions_that_ablate_several_times_export_once(problem, exports):
    model, x, labels = problem
    alone = contextvars.copy_context()
    alone.run(capture_memory._kept.set, None)
    alone.run(pa.cumulative, model, (x, labels), "relu", progress=False)
    assert len(exports) == 1


def test_shared_modules_are_told_from_equal_ones(problem, exports):
    model, _, _ = problem
    shared, apart = nn.ModuleList([model.relu, model.relu]), nn.ModuleList([nn.ReLU(), nn.ReLU()])
    assert capture_memory.key_of(shared) != capture_memory.key_of(apart)
    assert capture_memory.key_of(apart) == capture_memory.key_of(copy.deepcopy(apart))


def test_those_used_last_are_kept(problem, exports, monkeypatch):
    model, x, labels = problem
    others = [copy.deepcopy(model) for _ in range(2)]
    for number, other in enumerate(others):
        other.scale = 2.0 + number
    run(model, x, labels)
    held = capture_memory._bytes(next(iter(capture_memory._kept.get().values())))
    monkeypatch.setattr(capture_memory, "MOST_BYTES", 2 * held)
    run(others[0], x, labels)
    run(model, x, labels)
    run(others[1], x, labels)  # in the place of the first of the others
    assert len(exports) == 3
    run(model, x, labels)
    assert len(exports) == 3
    run(others[0], x, labels)
    assert len(exports) == 4
    monkeypatch.setattr(capture_memory, "MOST_BYTES", held - 1)
    run(others[1], x, labels)
    assert not capture_memory._kept.get()


def test_a_network_that_cannot_be_captured_is_asked_again(exports, caplog):
    class Jumps(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.last = nn.ReLU(), nn.Linear(4, 3)

        def forward(self, x):
            x = self.relu(x)
            return self.last(x) if float(x.sum()) > 0 else self.last(x) + 1

    torch.manual_seed(0)
    model, x = networks.made(Jumps(), torch.randn(8, 4)), torch.randn(16, 4)
    for _ in range(2):
        result = pa.ablate(model, x, "relu", **UNTIMED)
        assert "replay" in str(result.strategy)
    assert len(exports) == 2
