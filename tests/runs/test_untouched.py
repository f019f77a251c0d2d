"""The model, the images and every global state come back as they were, whatever happens."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from support import networks
from support.state import state_of
from torch import Tensor, nn

import pyablate as pa

RUNS = {"engine": pa.ablate, "oracle": pa.reference.ablate}
WAYS: dict[str, Callable[..., Any]] = {
    **RUNS,
    "replay": partial(pa.ablate, strategy="replay"),
    "plan": lambda *subject, **options: pa.plan(*subject, **options).explain(),
}


@pytest.fixture
def subject() -> tuple[nn.Module, Tensor, Tensor]:
    """A network with mixed modes, frozen and unfrozen weights, gradients and a hook."""
    return prepared("residual")


def prepared(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    model = networks.ARCHITECTURES[name].build()
    networks.randomise(model, seed=4)
    _, images, labels = networks.network(name)
    model.train()
    nn.functional.cross_entropy(model(images), labels).backward()
    next(iter(model.children())).eval()
    first, *_ = model.parameters()
    first.requires_grad_(False)
    model.register_forward_hook(lambda _module, _inputs, output: output)
    return model, images, labels


@pytest.mark.parametrize("run", WAYS)
@pytest.mark.parametrize("intervention", ["zero", "noise", "resample", "direction"])
def test_after_success(subject, run, intervention):
    model, images, labels = subject
    before, pixels, classes = state_of(model), images.clone(), labels.clone()
    WAYS[run](model, (images, labels), ["body.2"], intervention=intervention)
    assert state_of(model) == before
    assert torch.equal(images, pixels)
    assert torch.equal(labels, classes)


@pytest.mark.parametrize("name", ["in_place", "used_twice", "vit", "routed", "norm_after_relu"])
def test_after_success_on_other_networks(name):
    model, images, labels = prepared(name)
    before, pixels = state_of(model), images.clone()
    pa.ablate(model, (images, labels), intervention="mean", progress=False)
    assert state_of(model) == before
    assert torch.equal(images, pixels)


def raising_iterable(images: Tensor, labels: Tensor, error: BaseException) -> Iterator[Any]:
    yield images[:10], labels[:10]
    raise error


class Broken(Exception):
    pass


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("error", [Broken("in the second batch"), KeyboardInterrupt()])
def test_after_the_data_raise(subject, run, error):
    model, images, labels = subject
    before = state_of(model)

    class Loader:
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[Any]:
            return raising_iterable(images, labels, error)

    with pytest.raises(type(error)):
        RUNS[run](model, Loader(), ["body.2"], batch_size=10, progress=False)
    assert state_of(model) == before


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("error", [Broken("in the model"), KeyboardInterrupt()])
@pytest.mark.parametrize("calls", [0, 3, 9])
def test_after_the_model_raises(subject, run, error, calls):
    """A module of the caller's gives up after some calls: during the survey, or later."""
    model, images, labels = subject
    left = [calls]

    def give_up(*_: object) -> None:
        if left[0] == 0:
            raise error
        left[0] -= 1

    model.body[3].register_forward_pre_hook(give_up)
    before = state_of(model)
    options: dict[str, Any] = {"strategy": "replay"} if run == "engine" else {}
    with pytest.raises(type(error)):
        RUNS[run](model, (images, labels), ["body.2"], batch_size=4, progress=False, **options)
    assert left == [0]
    assert state_of(model) == before


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("error", [Broken("in the report"), KeyboardInterrupt()])
def test_after_an_interruption_of_the_sweep(subject, run, error):
    model, images, labels = subject
    before = state_of(model)
    seen = []

    def report(done: int, total: int, layer: str) -> None:
        seen.append(done)
        if len(seen) == 2:
            raise error

    with pytest.raises(type(error)):
        RUNS[run](model, (images, labels), ["body.2"], batch_size=4, progress=report)
    assert len(seen) == 2
    assert state_of(model) == before


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_after_bad_input(subject, run):
    model, images, labels = subject
    before = state_of(model)
    for bad in ({"layers": "nowhere"}, {"groups": [["body.2:99"]]}, {"intervention": "x"}):
        with pytest.raises(ValueError):  # noqa: PT011  # the messages have tests of their own
            run(model, (images, labels), progress=False, **bad)
    with pytest.raises(ValueError, match="99"):
        run(model, (images, labels + 99), ["body.2"], progress=False)
    assert state_of(model) == before


def test_the_comparison_would_notice(subject):
    model = subject[0]
    before = state_of(model)
    disturbances: dict[str, Callable[[], Any]] = {
        "values": lambda: model.head.bias.data.add_(1),
        "modes": lambda: model.body[3].train(not model.body[3].training),
        "hooks": lambda: model.head.register_forward_hook(lambda *_: None),
        "grad flags": lambda: model.head.weight.requires_grad_(False),
        "gradients": lambda: model.head.weight.grad.zero_(),
        "torch generator": lambda: torch.rand(1),
        "numpy generator": lambda: np.random.rand(),  # noqa: NPY002
        "python generator": random.random,
    }
    for what, disturb in disturbances.items():
        disturb()
        after = state_of(model)
        assert after[what] != before[what], what
        before = after
