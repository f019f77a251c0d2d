"""Exports that are remembered: for which networks they are taken again, what they keep alive."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import pyablate as pa
from pyablate import reference
from pyablate.network import any_batch, capture, export_memory
from pyablate.network.structure import structure

SCALE = 1.0


class Small(nn.Module):
    """Two layers with a batch norm between, and settings of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.act: nn.Module = nn.ReLU()
        self.power, self.shift = 1, torch.zeros(1)
        self.options = {"slope": [0.0]}
        for value in self.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=draw) + 0.1 * (value.ndim == 1))
        with torch.no_grad():
            self.first.weight -= 0.5
            self.last.weight -= 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.first(x))) + self.shift
        x = functional.leaky_relu(x, self.options["slope"][0]) if self.options else x
        return self.last(self.bent(x)) * SCALE

    def bent(self, x: Tensor) -> Tensor:
        return x**self.power if self.power != 1 else x


@pytest.fixture
def small() -> Small:
    return Small().eval()


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Layers of each export."""
    found: list[str] = []
    real = capture._export

    def export(model: Any, pair: Any, sites: Any) -> Any:
        found.append(",".join(site.name for site in sites))
        return real(model, pair, sites)

    monkeypatch.setattr(capture, "_export", export)
    return found


IMAGES = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(12) % 4


def right(model: nn.Module, layer: str = "act") -> pa.AblationResult:
    """Ablate, and compare with the oracle, which captures nothing."""
    result = pa.ablate(model, (IMAGES, LABELS), layer, audit=0, progress=False)
    assert reference.compare(result, model, (IMAGES, LABELS), layer).mismatches == 0
    assert result.strategy[layer] != "replay"
    return result


def test_it_is_taken_again_with_the_weights_of_today(small, exports):
    before = right(small)
    right(copy.deepcopy(small))
    small.train()  # the work is done on a copy in evaluation mode
    right(small)
    small.first.weight.data.neg_()  # of which the tensor itself knows nothing
    after = right(small)
    assert (before.predictions() != after.predictions()).any()
    small.norm.running_mean += 0.3
    small.last.weight = nn.Parameter(small.last.weight.flip(0).contiguous())
    right(small)
    small.first = nn.Linear(6, 8)  # of the same form
    right(small)
    assert exports == ["act"]
    right(small, "norm")
    assert exports == ["act", "norm"]
    pa.plan(small, IMAGES, "norm")
    assert exports == ["act", "norm"]


def replace_module(model: Small) -> None:
    model.act = nn.Tanh()


def widen(model: Small) -> None:
    model.first, model.norm, model.last = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)
    model.eval()


def add_hook(model: Small) -> None:
    model.last.register_forward_pre_hook(lambda module, args: (args[0] * 2 - 1,))


def put_on_a_forward(model: Small) -> None:
    plain = model.last.forward
    model.last.forward = lambda x: plain(x) - 3 * x[:, :4]  # type: ignore[method-assign]


def change(name: str, value: Any) -> Callable[[Small], None]:
    return lambda model: setattr(model, name, value)


CHANGES: dict[str, Callable[[Small], None]] = {
    "a module": replace_module,
    "sizes": widen,
    "a hook": add_hook,
    "a forward": put_on_a_forward,
    "a number": change("power", 2),
    "a tensor that is no buffer": change("shift", torch.full((1,), 0.4)),
    "inside a list": lambda model: model.options["slope"].__setitem__(0, 0.3),
    "a setting of a module": lambda model: setattr(model.norm, "eps", 0.7),
}


@pytest.mark.parametrize("what", ["a module", "a hook", "a number"])
def test_a_change_is_seen(small, exports, what):
    right(small)
    CHANGES[what](small)
    right(small)
    assert len(exports) == 2


def test_a_change_of_the_code_is_seen(small, exports, monkeypatch):
    right(small)
    monkeypatch.setattr(Small, "bent", lambda self, x: x.flip(1))
    right(small)
    monkeypatch.setitem(globals(), "SCALE", -1.0)
    right(small)
    assert len(exports) == 3


def test_one_that_gives_other_logits_is_not_taken(small, exports, monkeypatch):
    monkeypatch.setattr(export_memory, "structure", lambda model: "all are alike")
    right(small)
    small.power = 2
    right(small)
    assert len(exports) == 2


def test_what_cannot_be_told_is_exported_each_time(small, exports):
    small.lock = threading.Lock()
    assert structure(small) is None
    right(small)
    right(small)
    assert len(exports) == 2
    small.lock = Unwilling()
    assert structure(small) is None


class Unwilling(dict[str, int]):
    def items(self) -> Any:
        raise OSError


def test_no_network_is_kept_alive():
    small = Small().eval()
    add_hook(small)
    seen: list[weakref.ref[Any]] = []
    real = any_batch.export

    def export(model: nn.Module, pair: Tensor) -> Any:
        seen.extend(weakref.ref(one) for one in (model, model.first.weight))
        return real(model, pair)

    any_batch.export = export
    try:
        right(small)
    finally:
        any_batch.export = real
    seen.append(weakref.ref(small))
    assert export_memory._exports
    del small
    gc.collect()
    assert [one() for one in seen] == [None] * 3


def test_the_latest_are_remembered(small, monkeypatch):
    monkeypatch.setattr(export_memory, "MOST", 2)
    parts = capture._export(small.requires_grad_(False), IMAGES[:2], [])
    for key in ("a", "b"):
        export_memory.remember(key, parts, small)
    again = export_memory.recall("a", small)
    assert again is not None
    assert str(again.graph) == str(parts.graph)
    assert {str(node): value.data_ptr() for node, value in again.constants.items()} == {
        str(node): value.data_ptr() for node, value in parts.constants.items()
    }
    export_memory.remember("c", parts, small)
    assert [export_memory.recall(key, small) is None for key in "abc"] == [False, True, False]
    monkeypatch.setattr(export_memory, "LARGEST", 0)
    export_memory.remember("d", parts, small)  # `shift` is no weight
    export_memory.remember(None, parts, small)
    assert list(export_memory._exports) == ["a", "c"]


def test_networks_are_told_apart_and_recognised(small):
    told = structure(small)
    assert told is not None
    assert told == structure(copy.deepcopy(small)) == structure(Small().eval())
    for what, changed in CHANGES.items():
        other = copy.deepcopy(small)
        changed(other)
        assert structure(other) not in (None, told), what
    twice = copy.deepcopy(small)
    twice.last.bias = twice.last.bias  # the same
    assert structure(twice) == told
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    untied = structure(tied)
    tied[1].weight = tied[0].weight
    assert structure(tied) != untied
