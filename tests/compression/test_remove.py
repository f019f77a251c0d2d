"""Units taken out: the smaller network does what the masked one does."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from support.compressible import Dense, Grouped, Mobile, Shifted, Written, images, made
from torch import nn

import pyablate as pa
from pyablate.comparison import _latency
from pyablate.compression._remove import size
from pyablate.compression._target import Target, search

pytest.importorskip("torch_pruning")

NEAR_TIE = 1e-4  # of the largest logit: the smaller network computes in float32


@pytest.mark.parametrize("name", pa.demo.NETWORKS)
def test_masked_and_removed_networks_agree(name):
    model, pictures, classes = pa.demo.load(name, limit=200)
    layers = "*.mlp.1" if name == "vit" else None  # the sizes of its heads are in its code
    ranking = pa.rank(model, pictures[:1], "random", layers=layers, scope="layer", seed=3)
    units = ranking.units(0.3)
    masked = pa.ablate(model, (pictures, classes), groups=[units], audit=20)
    removal = pa.remove(model, ranking, pictures[:4], fraction=0.3)
    assert removal.units == units
    assert removal.difference < 1e-5
    with torch.no_grad():
        logits = removal.model(pictures)
    top = logits.topk(2).values
    clear = (top[:, 0] - top[:, 1]) > NEAR_TIE * logits.abs().max()
    predicted = torch.from_numpy(masked.predictions(0)[0])
    assert clear.sum() > 190
    assert (predicted[clear] == logits.argmax(1)[clear]).all()
    assert (predicted != torch.from_numpy(masked.baseline)).any()  # something was at stake


@pytest.mark.parametrize("network", [Mobile, Dense])
def test_tied_channels_are_removed_together(network):
    model = made(network)
    ranking = pa.rank(model, images(), "random", scope="layer", seed=1)
    removal = pa.remove(model, ranking, images(), fraction=0.4)
    assert removal.difference < 1e-5
    assert removal.after.parameters < removal.before.parameters
    assert removal.after.flops < removal.before.flops
    with torch.no_grad():
        changed = (removal.model(images()) - model(images())).abs().max()
    assert changed > 1e-2


def test_sizes_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5)
    ).eval()
    removal = pa.remove(model, ["1:1", "1:3"], images())
    assert removal.before.parameters == 4 * 28 + 5 * 257
    assert removal.after.parameters == 2 * 28 + 5 * 129
    assert removal.before.flops == 2 * (64 * 4 * 27 + 5 * 256)
    assert removal.after.flops == 2 * (64 * 2 * 27 + 5 * 128)
    kept = model[0].weight[[0, 2]]
    assert torch.equal(removal.model[0].weight, kept)
    assert size(removal.model, images()) == removal.after


def test_the_smaller_network_is_plain_and_the_model_untouched():
    model = pa.demo.network("resnet").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.fc.bias.requires_grad_(False)
    removal = pa.remove(model, ["stem.2:3"], pa.demo.images(2)[0])
    assert removal.units == ("stem.2:3", "stage1.0.relu2:3", "stage1.1.relu2:3")
    assert removal.model.get_submodule("stage1.0.conv2").out_channels == 15
    assert removal.model.get_submodule("stage1.0.bn2").num_features == 15
    assert removal.model.get_submodule("stage2.0.shortcut.0").in_channels == 15
    assert type(removal.model) is type(model)
    assert removal.model.training
    assert not removal.model.fc.bias.requires_grad
    assert removal.model.fc.weight.requires_grad
    assert all(not module._forward_hooks for module in removal.model.modules())
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert model.training


def test_what_turns_zero_into_something_is_reported(caplog):
    with caplog.at_level(logging.WARNING, logger="pyablate"):
        removal = pa.remove(made(Shifted), ["relu:1"], images())
    assert removal.difference > 1e-2
    assert "turns its zero into another number" in caplog.text


def _all(layer: str, count: int) -> list[str]:
    return [f"{layer}:{unit}" for unit in range(count)]


@pytest.mark.parametrize(
    ("network", "units", "message"),
    [
        (Mobile, _all("blocks.0.expand.2", 12), "at least one has to stay"),
        (Mobile, ["blocks.0.expand.2:12"], "out of range"),
        (Mobile, ["blocks.0.expand:1:2"], "no layer that holds units"),
        (Grouped, ["first.1:0"], "in groups"),
        (Grouped, ["classes.1:0"], "classes"),
        (Written, ["features.1:0"], "sizes may be written into its code"),
    ],
)
def test_bad_units(network, units, message):
    with pytest.raises(ValueError, match=message):
        pa.remove(made(network), units, images())


def test_ranking_and_fraction_belong_together():
    model = made(Mobile)
    ranking = pa.rank(model, images(), "random")
    with pytest.raises(ValueError, match="fraction"):
        pa.remove(model, ranking, images())
    with pytest.raises(ValueError, match="fraction"):
        pa.remove(model, ["blocks.1:0"], images(), fraction=0.5)
    with pytest.raises(ValueError, match="from 0 to 1"):
        pa.remove(model, ranking, images(), fraction=1.5)
    with pytest.raises(TypeError, match="units"):
        pa.remove(model, "blocks.1:0", images())


@pytest.mark.parametrize("most", [0, 1, 7, 20])
def test_as_few_go_as_meet_the_target_and_no_more_than_the_accuracy_allows(most):
    def figures(places: int) -> dict[str, float]:
        return {"flops": 1 - 0.04 * places, "accuracy": 0.9 - 0.02 * places}

    measures: dict[str, Any] = {
        name: lambda places, name=name: figures(places)[name] for name in figures(0)
    }
    for flops, floor in itertools.product((None, 0.3, 0.7, 1.0), (None, 0.6, 0.85)):
        if flops is None and floor is None:
            continue
        count, steps = search(Target(flops=flops, accuracy=floor), most, measures)
        allowed = [n for n in range(most + 1) if floor is None or figures(n)["accuracy"] >= floor]
        small = [n for n in range(most + 1) if flops is None or figures(n)["flops"] <= flops]
        expected = max(allowed)
        if flops is not None:
            expected = min([*small, most][0], max(allowed))
        assert count == expected
        assert steps["places"][steps["chosen"]].tolist() == [count]
        assert len(steps) <= 12


def test_down_to_half_of_the_operations():
    model = made(Mobile)
    ranking = pa.rank(model, images(), "random", scope="global", seed=1)
    removal = pa.remove(model, ranking, images(), flops=0.5)
    assert removal.reached
    assert removal.after.flops <= 0.5 * removal.before.flops
    assert removal.steps is not None
    places = int(removal.steps["places"][removal.steps["chosen"]].iloc[0])
    order = [unit for one in ranking.sequence[:places] for unit in one.units]
    assert removal.units == tuple(order)
    one_less = [unit for one in ranking.sequence[: places - 1] for unit in one.units]
    assert pa.remove(model, one_less, images()).after.flops > 0.5 * removal.before.flops


def test_no_further_than_the_accuracy_allows(caplog):
    model = made(Mobile)
    pictures = images()
    labels = model(pictures).argmax(1)
    ranking = pa.rank(model, pictures, "random", scope="global", seed=1)
    given: dict[str, Any] = {"accuracy": 0.9, "data": (pictures, labels)}
    removal = pa.remove(model, ranking, pictures, **given)
    agreed = (removal.model(pictures).argmax(1) == labels).float().mean()
    assert agreed >= 0.9
    assert removal.reached
    assert not caplog.messages
    removal = pa.remove(model, ranking, pictures, flops=0.01, **given)
    assert not removal.reached
    assert (removal.model(pictures).argmax(1) == labels).float().mean() >= 0.9
    assert "target not reached" in caplog.text


def test_a_target_of_time_is_measured(monkeypatch):
    """By the passes of the smaller network beside the whole one: here a clock of parameters."""

    def clock(network, sample):
        assert torch.equal(sample, images())
        return 1e-6 * sum(each.numel() for each in network.parameters())

    monkeypatch.setattr(_latency, "_timed", clock)
    model = made(Mobile)
    ranking = pa.rank(model, images(), "random", scope="global", seed=1)
    removal = pa.remove(model, ranking, images(), latency=0.6)
    assert removal.reached
    assert removal.steps is not None
    steps = removal.steps.set_index("places")
    places = int(steps.index[steps["chosen"]].item())
    assert 1 < places < len(ranking.sequence)
    share = removal.after.parameters / removal.before.parameters
    assert steps.loc[places, "latency"] == pytest.approx(share)
    assert steps.loc[places, "latency"] <= 0.6 < steps.loc[places - 1, "latency"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flops": 1.5}, "flops: expected a number from 0 to 1"),
        ({"flops": 0.5, "fraction": 0.3}, "expected a ranking as units, and no fraction"),
        ({"flops": 0.5, "units": ["a:0"]}, "flops: expected a ranking as units"),
        ({"accuracy": 0.5}, "accuracy: expected together with the data"),
        ({"flops": 0.5, "data": (images(), torch.zeros(8))}, "accuracy: expected together"),
        ({"fraction": 0.5, "data": (images(), torch.zeros(8))}, "accuracy: expected together"),
    ],
)
def test_bad_targets(options, message):
    model = made(Mobile)
    units = pa.rank(model, images(), "random", scope="layer", seed=1)
    with pytest.raises(ValueError, match=message):
        pa.remove(model, **{"units": units, "sample": images()} | options)


def test_an_accuracy_that_the_whole_network_does_not_have():
    model, pictures = made(Mobile), images()
    wrong = (model(pictures).argmax(1) + 1) % 4
    ranking = pa.rank(model, pictures, "random", scope="layer", seed=1)
    with pytest.raises(ValueError, match="that of the whole network"):
        pa.remove(model, ranking, pictures, accuracy=0.5, data=(pictures, wrong))
