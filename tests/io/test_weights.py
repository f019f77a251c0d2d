"""Checkpoints as trainers leave them: under keys, behind prefixes, with counters and wrappers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyablate.io.weights import load_state, read_state

State = dict[str, Tensor]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(2, 3)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Inner()


def below(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + key: value for key, value in state.items()}


def some_below(prefix: str, which: str) -> Callable[[State], State]:
    return lambda s: {prefix * k.startswith(which) + k: v for k, v in s.items()}


def beside(others: State, prefix: str = "") -> Callable[[State], State]:
    return lambda state: below(prefix)(state) | others


OTHER = {"optimizer": {"state": {}, "lr": 0.1}, "epoch": 3}
CHECKPOINTS: dict[str, Callable[[State], Any]] = {
    "bare": lambda s: s,
    **{
        f"under {key}": lambda s, key=key: {**OTHER, key: s}
        for key in "state_dict model_state_dict model net model_state weights params ema".split()
    },
    "under a usual key beside another": lambda s: {"ema": {}, "model": s, "teacher": s},
    **{f"behind {prefix}": below(prefix) for prefix in ("module.", "model.", "net.", "a.b.c.")},
    "behind _orig_mod.": below("_orig_mod."),
    "behind module._orig_mod.": below("module._orig_mod."),
    "a part compiled": lambda s: {k.replace("conv.", "conv._orig_mod."): v for k, v in s.items()},
    "backbone. in front of some": some_below("backbone.", "conv"),
    "others beside the backbone": beside({"projection.weight": torch.ones(4)}, "backbone."),
    "counters of a profiler": beside(
        {"total_ops": torch.ones(1), "conv.total_params": torch.ones(1)}
    ),
    "Lightning": lambda s: {"state_dict": below("model.net.")(s), "hyper_parameters": {"lr": 1.0}},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_of_trainers_are_read(name: str, tmp_path: Path) -> None:
    trained, model = Inner(), Inner()
    torch.save(CHECKPOINTS[name](trained.state_dict()), tmp_path / "weights.pt")
    load_state(model, read_state(tmp_path / "weights.pt"), "weights.pt")
    for key, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_the_model_may_have_a_prefix_that_the_checkpoint_lacks() -> None:
    trained, model = Inner(), Outer()
    load_state(model, trained.state_dict(), "weights.pt")
    assert torch.equal(model.net.head.weight, trained.head.weight)


def test_a_reading_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pyablate")
    load_state(
        Inner(), beside({"queue": torch.ones(3)}, "encoder.")(Inner().state_dict()), "moco.pt"
    )
    assert caplog.messages == [
        "weights: 'moco.pt' fits the model by what is below 'encoder.', the other 1 entries left "
        "out (queue)"
    ]


def test_a_checkpoint_that_can_be_read_in_two_ways_is_refused() -> None:
    state = Inner().state_dict()
    both = below("student.")(state) | below("teacher.")(state)
    with pytest.raises(
        ValueError, match=r"fits the model in several ways: .*student.* or .*teacher"
    ):
        load_state(Inner(), both, "weights.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": {"x": torch.ones(1)}, "b": {"x": torch.ones(1)}}, r"several state dicts \(a, b\)"),
        ({"epoch": 3}, r"found 1 other entries \(epoch\)"),
        ({}, "found dict without entries"),
        ([torch.ones(1)], "expected a state dict in .* found list"),
        (Inner(), r"(?s)objects other than tensors \(.*Inner.*torch.load.*safetensors"),
    ],
)
def test_other_files_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        read_state(tmp_path / "weights.pt")


def test_what_does_not_fit_is_named() -> None:
    state = Inner().state_dict()
    state["conv.weight"] = torch.ones(1)
    with pytest.raises(
        ValueError, match=r"1 of another shape \(conv.weight: expected \[2, 1, 3, 3\]"
    ):
        load_state(Inner(), state, "weights.pt")
