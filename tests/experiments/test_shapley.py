"""Shapley values of units: those of all subsets, each a plain forward pass without its units."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from support import networks
from support.games import Game, shapley_values
from support.screened import careless_thresholds, layers_case
from torch import Tensor, nn
from torch.nn import functional

import pyablate as pa

pytestmark = pytest.mark.usefixtures("exports_kept")

QUIET: dict[str, Any] = {"audit": 10, "progress": False}
Case = tuple[nn.Module, Tensor, Tensor]


@functools.cache
def ten() -> Case:
    """One hidden layer of ten units."""
    generator = torch.Generator().manual_seed(3)
    layers = OrderedDict(first=nn.Linear(6, 10), units=nn.ReLU(), head=nn.Linear(10, 3))
    model = nn.Sequential(layers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model, *_labelled(model, torch.randn(120, 6, generator=generator), generator)


@functools.cache
def two_layers() -> Case:
    """A convolutional network with five units in either of two layers."""
    generator = torch.Generator().manual_seed(8)
    layers = OrderedDict(
        conv=nn.Conv2d(1, 5, 3, padding=1),
        early=nn.ReLU(),
        mix=nn.Conv2d(5, 5, 3, padding=1),
        late=nn.ReLU(),
        pool=nn.AdaptiveMaxPool2d(1),
        flat=nn.Flatten(),
        head=nn.Linear(5, 3),
    )
    model = nn.Sequential(layers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model, *_labelled(model, torch.randn(60, 1, 6, 6, generator=generator), generator)


def _labelled(model: nn.Module, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Balance the three classes, and give labels that the network mostly gets right."""
    with torch.no_grad():
        model.get_submodule("head").bias -= model(images).mean(dim=0)
        labels = model(images).argmax(dim=1)
    wrong = torch.rand(len(labels), generator=generator) < 0.1
    return images, torch.where(wrong, (labels + 1) % 3, labels)


def all_subsets(
    case: Case, layers: Mapping[str, int], *, measure: str = "accuracy", target: int | None = None
) -> Game:
    """What is lost without each subset of the units, by 2^10 forward passes with hooks."""
    model, images, labels = case
    sizes = list(layers.values())
    kept: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda module, given, out: out * kept[name].view(-1, *[1] * (out.ndim - 2))

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
    own = labels == labels if target is None else labels == target
    found = []
    try:
        for bits in range(2 ** sum(sizes)):
            here = 1.0 - torch.tensor([bits >> unit & 1 for unit in range(sum(sizes))]).float()
            kept.update(zip(layers, here.split(sizes), strict=True))
            with torch.no_grad():
                logits = model(images).double()[own]
            if measure == "loss":
                found.append(functional.cross_entropy(logits, labels[own]).item())
            else:
                found.append(-(logits.argmax(dim=1) == labels[own]).double().mean().item())
    finally:
        for handle in handles:
            handle.remove()
    return Game(np.array(found) - found[0])


ROUNDING = 1e-6
"""Of losses in float32."""


def near(found: pa.Shapley, exact: np.ndarray) -> bool:
    distance = np.abs(found.data["value"].to_numpy() - exact)
    return bool((distance <= 4.5 * found.data["standard_error"].to_numpy() + ROUNDING).all())


def within(found: pa.Shapley, exact: np.ndarray) -> bool:
    lower, upper = (found.data[name].to_numpy() for name in ("lower", "upper"))
    return bool(((lower - ROUNDING <= exact) & (exact <= upper + ROUNDING)).all())


@pytest.mark.parametrize(
    "options",
    [{}, {"target": 1}, {"measure": "loss"}, {"measure": "loss", "target": 0}],
    ids=["accuracy", "a class", "loss", "loss of a class"],
)
def test_values_of_ten_units_are_those_of_all_subsets(options):
    model, images, labels = ten()
    game = all_subsets(ten(), {"units": 10}, **options)
    exact = shapley_values(game)
    options = {
        **options,
        "precision": "fp32",
    }  # losses are as exact as what decides the predictions
    found = pa.shapley(model, (images, labels), "units", permutations=300, **options, **QUIET)
    assert np.abs(exact).max() > 0.05, "units that do not matter prove nothing"
    assert within(found, exact)
    assert near(found, exact)
    assert found.data.attrs["total"] == pytest.approx(game.table[-1], abs=ROUNDING)
    assert float(found.data["value"].sum()) == pytest.approx(found.data.attrs["total"], abs=1e-12)
    assert found.data.attrs["evaluations"] <= 2**10 - 1
    assert found.audit.pairs > 0 == found.audit.mismatches


def test_units_of_several_layers_share_what_is_lost():
    model, images, labels = two_layers()
    exact = shapley_values(all_subsets(two_layers(), {"early": 5, "late": 5}))
    found = pa.shapley(model, (images, labels), ["early", "late"], permutations=150, **QUIET)
    assert found.data["layer"].to_numpy().tolist() == ["early"] * 5 + ["late"] * 5
    assert np.abs(exact[:5]).max() > 0.03 < np.abs(exact[5:]).max()
    assert within(found, exact)
    assert near(found, exact)


def test_chosen_units_play_among_themselves():
    model, images, labels = two_layers()
    every = all_subsets(two_layers(), {"early": 5, "late": 5}).table
    chosen = [1, 3, 7]  # early:1, early:3, late:2
    bits = [sum(1 << unit for unit, one in zip(chosen, f"{n:03b}"[::-1], strict=True) if one == "1")
            for n in range(8)]  # fmt: skip
    exact = shapley_values(Game(every[bits]))
    units = ["late:2", "early:3", "early:1"]
    found = pa.shapley(model, (images, labels), units, permutations=60, **QUIET)
    assert found.data["unit"].to_numpy().tolist() == ["early:1", "early:3", "late:2"]
    assert near(found, exact)
    assert float(found.data["value"].sum()) == pytest.approx(every[bits[-1]], abs=1e-12)


@pytest.mark.parametrize("intervention", ["mean", "noise"])
def test_other_replacements_are_those_of_ablate(intervention):
    model, images, labels = ten()
    options: dict[str, Any] = {"intervention": intervention, "seed": 5, **QUIET}
    units = [f"units:{unit}" for unit in (0, 4, 7)]
    found = pa.shapley(model, (images, labels), units, permutations=40, **options)
    sets = [[u for n, u in enumerate(units) if bits >> n & 1] for bits in range(1, 8)]
    result = pa.ablate(model, (images, labels), groups=sets, **options)
    exact = shapley_values(Game(np.array([0.0, *result.accuracy_drop])))
    assert near(found, exact)
    assert found.data.attrs["intervention"] == result.intervention


def planted() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Class 0 rests on units 0 and 1, either of which is enough; class 1 on unit 2; 3 to 9 idle."""
    weight = torch.zeros(3, 10)
    weight[0, 0] = weight[0, 1] = weight[1, 2] = 1.0
    labels = torch.arange(3).repeat_interleave(8)
    images = torch.zeros(24, 10)
    images[:, 3:] = torch.rand(24, 7, generator=torch.Generator().manual_seed(0))
    images[labels == 0, 0] = images[labels == 0, 1] = images[labels == 1, 2] = 1.0
    return networks.on_inputs(weight, torch.tensor([0.0, 0.0, 0.5])), (images, labels)


def test_planted_units_have_their_shares():
    model, data = planted()
    found = pa.shapley(model, data, "units", permutations=400, **QUIET)
    value = found.data["value"].to_numpy()
    # One after the other goes: a third is lost with the second of units 0 and 1, and with unit 2.
    assert value[2] == pytest.approx(1 / 3, abs=1e-12)
    assert value[0] + value[1] == pytest.approx(1 / 3, abs=1e-12)
    assert within(found, np.array([1 / 6, 1 / 6, 1 / 3, *[0.0] * 7]))
    assert abs(value[0] - value[1]) < 6 * found.data["standard_error"][0], "units that are alike"
    assert (value[3:] == 0).all()
    single = pa.ablate(model, data, ["units:0", "units:1"], **QUIET)
    assert (single.accuracy_drop == 0).all(), "each backs the other up"


def test_the_top_units_are_found_with_fewer_ablations():
    model, data = planted()
    options: dict[str, Any] = {"permutations": 400, "interval": "student", **QUIET}
    some = pa.shapley(model, data, "units", top=1, **options)
    whole = pa.shapley(model, data, "units", **options)
    assert some.data["decided"].all()
    assert int(some.data["value"].to_numpy().argmax()) == 2
    assert some.data.attrs["permutations"] < whole.data.attrs["permutations"] == 400
    assert some.data.attrs["evaluations"] < whole.data.attrs["evaluations"]
    assert (some.data["samples"] < 400).all()
    assert not whole.data["decided"].any(), "nothing was asked"


def test_orders_end_near_what_nothing_reaches():
    model, images, labels = ten()
    game = all_subsets(ten(), {"units": 10})
    common: dict[str, Any] = {"permutations": 60, **QUIET}
    cut = pa.shapley(model, (images, labels), "units", truncation=0.05, **common)
    whole = pa.shapley(model, (images, labels), "units", **common)
    assert cut.data.attrs["evaluations"] < whole.data.attrs["evaluations"]
    assert abs(float(cut.data["value"].sum()) - game.table[-1]) <= 0.05
    with pytest.raises(ValueError, match=r"truncation: expected less than 0\.\d+"):
        pa.shapley(model, (images, labels), "units", truncation=1.0, **common)


def test_a_seed_decides_and_portions_do_not(monkeypatch):
    model, images, labels = two_layers()
    options: dict[str, Any] = {"permutations": 4, "truncation": 0.02, **QUIET}
    first = pa.shapley(model, (images, labels), ["early", "late"], seed=3, **options)
    again = pa.shapley(model, (images, labels), ["early", "late"], seed=3, batch_size=32, **options)
    other = pa.shapley(model, (images, labels), ["early", "late"], seed=4, **options)
    monkeypatch.setattr("pyablate.experiments._shapley.PAIRS", 60 * 8)
    small = pa.shapley(model, (images, labels), ["early", "late"], seed=3, **options)
    assert first.to_dataframe().equals(again.to_dataframe())
    assert first.to_dataframe().equals(small.to_dataframe())
    assert not first.to_dataframe().equals(other.to_dataframe())


def test_what_is_found_is_told():
    model, images, labels = ten()
    names = ["one", "two", "three"]
    seen: list[tuple[int, int, str]] = []
    found = pa.shapley(
        model,
        (images, labels),
        "units",
        target="two",
        permutations=5,
        audit=0,
        class_names=names,
        progress=lambda *given: seen.append(given),
    )
    frame = found.to_dataframe()
    assert list(frame) == [
        "unit", "layer", "value", "standard_error", "lower", "upper", "samples", "decided",
    ]  # fmt: skip
    assert frame["unit"].tolist() == [f"units:{unit}" for unit in range(10)]
    assert frame["samples"].tolist() == [5] * 10
    assert repr(found).startswith("Shapley(10 units, accuracy of two, 5 permutations, ")
    assert found.data.attrs["target"] == "two"
    assert seen[-1] == (50, 50, "units")
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    with pytest.raises(AttributeError):
        found.audit = None  # type: ignore[misc]


def test_an_interrupt_comes_through_and_leaves_the_model_alone():
    model, images, labels = ten()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def stop(done: int, total: int, layer: str) -> None:
        if done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pa.shapley(model, (images, labels), "units", audit=0, progress=stop)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert pa.shapley(model, (images, labels), "units", permutations=1, **QUIET) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "nowhere"}, "nowhere"),
        ({"layers": "units:10"}, "unit 10 of layer 'units'"),
        ({"top": 0}, "top: expected at least 1"),
        ({"top": 10}, "top: expected fewer than all 10 units"),
        ({"target": "9"}, "target: no class '9'"),
        ({"target": 3}, "target: expected numbers 0 to 2"),
        ({"measure": "margin"}, "measure: expected one of accuracy, loss"),
        ({"permutations": 0}, "permutations: expected at least 1"),
        ({"truncation": -0.1}, "truncation: expected a number of at least 0"),
        ({"tolerance": float("nan")}, "tolerance: expected a number of at least 0"),
        ({"confidence": 1.0}, "confidence: expected a number between 0 and 1"),
        ({"interval": "normal"}, "interval: expected one of bernstein, student"),
        ({"interval": "bernstein", "measure": "loss"}, "interval: expected 'student'"),
        ({"seed": -1}, "seed: expected at least 0"),
        ({"guarantee": "screend"}, "guarantee: expected one of exact, screened"),
        ({"guarantee": "screened", "measure": "loss"}, "guarantee.*needs the logits"),
        ({"intervention": "direction"}, "not in groups"),
    ],
)
def test_bad_arguments(options, message):
    model, data = planted()
    with pytest.raises(ValueError, match=message):
        pa.shapley(model, data, **({"layers": "units", "progress": False} | options))


def test_a_class_without_images_and_options_of_one_run():
    model, (images, labels) = planted()
    some = labels < 2
    with pytest.raises(ValueError, match="target: no images of class '2'"):
        pa.shapley(model, (images[some], labels[some]), "units", target=2, **QUIET)
    for name in ("output", "groups", "measures", "shard"):
        with pytest.raises(TypeError, match=f"{name}: expected no such option"):
            pa.shapley(model, (images, labels), "units", **{name: None})


def test_a_screened_value_carries_the_certificate_of_all_runs(monkeypatch):
    careless_thresholds(monkeypatch, 0.1)
    monkeypatch.setattr("pyablate.experiments._shapley.PAIRS", 30 * 200)  # two runs
    model, data = layers_case(200)
    options: dict[str, Any] = {"permutations": 4, "audit": 0, "progress": False}
    exact = pa.shapley(model, data, "act", **options)
    found = pa.shapley(model, data, "act", **options, guarantee="screened")
    assert exact.screening is None
    assert exact.data.attrs["guarantee"] == "exact"
    assert found.data.attrs["guarantee"] == "screened"
    known = found.screening
    assert known.pairs == found.data.attrs["evaluations"] * 200
    assert known.settled > 0
    assert known.sampled > 50
    assert 0 < known.upper_bound < 0.1
    assert "screened: at most" in repr(found)
    off = (found.data["value"] - exact.data["value"]).to_numpy()  # means over sets
    assert np.abs(off).max() * 200 <= known.missed_bound


def test_runs_behind_screened_values_draw_samples_of_their_own(monkeypatch):
    """Else a wrong pair would be found in all of them or in none, and no bound be right."""
    monkeypatch.setattr("pyablate.experiments._shapley.PAIRS", 10 * 100)
    model, data = layers_case(100)
    seeds = []

    def noted(*given: Any, **options: Any) -> pa.AblationResult:
        seeds.append(options["seed"])
        assert options["intervention"].seed == 5
        return pa.ablate(*given, **options)

    monkeypatch.setattr("pyablate.experiments._shapley.ablate", noted)
    options: dict[str, Any] = {"intervention": "noise", "seed": 5, **QUIET}
    pa.shapley(model, data, "act", permutations=2, **options)
    assert len(seeds) > 1
    assert seeds == [5 + 2 * run for run in range(len(seeds))]
