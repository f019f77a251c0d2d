"""Minimal sets: planted sets are found, every figure is that of a full forward pass."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from support import networks
from torch import nn

import pyablate as pa
from pyablate import reference
from pyablate.experiments.split import split

pytestmark = pytest.mark.usefixtures("exports_kept")


def planted() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Class 0 rests on units 1 and 4, either of which is enough; class 1 on unit 2 alone."""
    weight = torch.zeros(3, 6)
    weight[0, 1], weight[0, 4], weight[1, 2], weight[0, 0] = 1.0, 1.1, 1.0, 0.01
    labels = torch.arange(3).repeat_interleave(8)
    images = torch.zeros(24, 6)
    images[labels == 0] = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    images[labels == 1] = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    return networks.on_inputs(weight, torch.tensor([0.0, 0.0, 0.5])), (images, labels)


def test_planted_sets_are_found_and_nothing_else():
    model, data = planted()
    found = pa.minimal_sets(model, data, "units", audit=0, progress=False)
    table = found.table.set_index("class")
    assert set(table.loc["0", "units"]) == {"units:1", "units:4"}
    assert table.loc["1", "units"] == ("units:2",)
    assert table["reached"].tolist() == [True, True, False], "class 2 rests on no unit"
    assert table["size"].tolist()[:2] == [2, 1]
    assert table["accuracy"].tolist()[:2] == [0.0, 0.0]
    assert table["others_drop"].tolist()[:2] == [0.0, 0.0]
    assert found.chance == pytest.approx(1 / 3)


def test_where_no_unit_alone_harms_the_class_they_are_added_by_its_loss():
    model, data = planted()
    found = pa.minimal_sets(model, data, "units", classes="0", prune=False, audit=0, progress=False)
    # Their drops are all 0; unit 4 has the larger weight, and unit 0 hardly any.
    assert found.table["units"][0] == ("units:4", "units:1")


def misleading() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Class 0 falls by units 2 and 3 together, neither of which costs it an image alone.

    Of units 0, 1 and 4 each costs a quarter of its images: unit 5 speaks against these.
    """
    weight = torch.zeros(2, 6)
    weight[0] = torch.tensor([2.0, 2.0, 1.0, 1.0, 2.0, -2.5])
    images = torch.zeros(64, 6)
    images[:32, 2:4] = 1.0
    for start, unit in ((0, 0), (8, 1), (16, 4)):
        images[start : start + 8, [unit, 5]] = 1.0
    labels = torch.arange(2).repeat_interleave(32)
    return networks.on_inputs(weight, torch.tensor([0.0, 0.3])), (images, labels)


def test_all_pairs_are_tried_and_a_smaller_set_is_taken():
    model, data = misleading()
    options: dict[str, Any] = {"chance": 0.0, "prune": False, "audit": 0, "progress": False}
    plain = pa.minimal_sets(model, data, "units", classes="0", **options)
    line = plain.table.iloc[0]
    assert (line["size"], line["at_least"], line["minimal"]) == (5, 2, False)
    assert plain.shown["minimal"].tolist() == ["at least 2"]
    found = pa.minimal_sets(model, data, "units", classes="0", exhaust=2, **options)
    line = found.table.iloc[0]
    assert set(line["units"]) == {"units:2", "units:3"}
    assert (line["at_least"], line["minimal"], line["accuracy"]) == (2, True, 0.0)
    assert found.shown["minimal"].tolist() == ["yes"]


def agreed(images: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return a network and images with its own predictions for labels."""
    model, x, _ = networks.network("residual", images)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def test_the_least_size_is_that_of_all_subsets():
    model, images, labels = agreed(60)
    options: dict[str, Any] = {"audit": 0, "progress": False}
    found = pa.minimal_sets(
        model, (images, labels), "body.3", seed=2, chance=0.3, exhaust=3, **options
    )
    choosing = split((images, labels), seed=2).choosing
    (site,) = pa.select(pa.sites(model, images[:1]), "body.3")
    units = [site.label(unit) for unit in range(site.channels)]
    sets = [each for n in (1, 2, 3) for each in itertools.combinations(units, n)]
    every = reference.ablate(model, choosing, groups=sets, progress=False)
    accuracy = every.baseline_class_accuracy - every.class_accuracy_drop
    sizes = np.array([len(each) for each in sets])
    told_apart = found.table[found.table["told_apart"]]
    assert len(told_apart) >= 2
    for _, line in told_apart.iterrows():
        fits = sizes[accuracy[:, int(line["class"])] <= 0.3]
        least = int(fits.min()) if len(fits) else 4
        assert line["at_least"] == least
        assert line["minimal"] == (line["reached"] and line["size"] == least)
        assert not line["minimal"] or line["size"] <= 4


def test_a_failed_search_is_not_shown_as_a_set():
    model, data = planted()
    found = pa.minimal_sets(model, data, "units", audit=0, progress=False)
    assert repr(found) == "MinimalSets(2 sets for 3 classes)"
    shown = found.shown.set_index("class")
    assert shown.loc["1", "units"] == "units:2"
    size = found.table["size"][2]
    assert shown.loc["2", "units"] == f"none found: {size} units leave 100.00 %"
    assert shown.loc["2", ["size", "accuracy", "others_drop"]].isna().all()
    assert "none found" in found._repr_html_()


def test_figures_are_those_of_full_forward_passes():
    model, images, labels = agreed(60)
    options: dict[str, Any] = {"audit": 20, "progress": False}
    found = pa.minimal_sets(model, (images, labels), "body.3", seed=2, chance=0.3, **options)
    halves = split((images, labels), seed=2)
    reached = 0
    for _, line in found.table[found.table["told_apart"]].iterrows():
        number = int(line["class"])
        sets = [line["units"]]
        if line["reached"] and line["size"] > 1:
            sets += list(itertools.combinations(line["units"], line["size"] - 1))
        choosing = reference.ablate(model, halves.choosing, groups=sets, progress=False)
        after = choosing.baseline_class_accuracy[number] - choosing.class_accuracy_drop[:, number]
        assert line["chosen_accuracy"] == pytest.approx(after[0])
        assert (after[0] <= 0.3) == line["reached"]
        assert (after[1:] > 0.3).all(), "a unit could have been put back"
        measuring = reference.ablate(model, halves.measuring, groups=sets[:1], progress=False)
        truth, predicted = halves.measuring[1].numpy(), measuring.predictions()[0]
        own = truth == number
        assert line["accuracy"] == pytest.approx((predicted[own] == number).mean())
        before = (measuring.baseline == truth)[~own].mean()
        rest = before - (predicted == truth)[~own].mean()
        assert line["others_drop"] == pytest.approx(rest)
        reached += line["reached"]
    assert reached >= 2, "nothing was found"
    assert found.result.audit.mismatches + found.result.audit.mended == 0


def test_what_cannot_be_lost_says_so_with_the_most_harmful_set():
    model, images, labels = networks.network("residual", 40)
    found = pa.minimal_sets(
        model, (images, labels), "body.3", chance=0.0, largest=1, audit=0, progress=False
    )
    assert not found.table["reached"].all()
    told_apart = found.table[found.table["told_apart"]]
    assert (told_apart["size"] == 1).all()
    assert len(told_apart) >= 2
    choosing = split((images, labels), seed=0).choosing
    options: dict[str, Any] = {"measures": ["loss"], "audit": 0, "progress": False}
    single = pa.ablate(model, choosing, "body.3", **options)
    for number, line in told_apart.iterrows():
        harm = single.class_accuracy_drop[:, number]
        if not (harm > 0).any():  # no unit alone costs the class an image
            harm = single.class_loss_change[:, number]
        assert line["units"] == (single.units["label"][int(np.argmax(harm))],)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": "9"}, r"classes: no class '9'"),
        ({"classes": [0, 5]}, "numbers 0 to 2"),
        ({"classes": []}, "at least one class"),
        ({"chance": 1.0}, "chance: expected"),
        ({"largest": 0}, "largest: expected"),
        ({"exhaust": 0}, "exhaust: expected"),
        ({"intervention": "direction"}, "not in groups"),
        ({"layers": "unit"}, "units"),
    ],
)
def test_bad_arguments(options, message):
    model, data = planted()
    with pytest.raises(ValueError, match=message):
        pa.minimal_sets(model, data, **({"layers": "units", "progress": False} | options))


def test_more_sets_than_can_be_tried_are_refused():
    model = networks.on_inputs(torch.zeros(2, 700), torch.zeros(2))
    data = torch.zeros(4, 700), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="exhaust: 244,650 sets of up to 2 of 700 units"):
        pa.minimal_sets(model, data, "units", exhaust=2, audit=0, progress=False)


def hesitant() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Class 2 is taken for class 0, class 1 rests on unit 2."""
    model, (images, labels) = planted()
    images[labels == 2] = images[0].clone()
    return model, (images, labels)


def test_a_class_that_is_not_told_apart_has_no_set():
    model, data = hesitant()
    found = pa.minimal_sets(model, data, "units", audit=0, progress=False)
    table = found.table.set_index("class")
    assert table["told_apart"].tolist() == [True, True, False]
    assert table["reached"].tolist() == [True, True, False]
    assert table.loc["2", "units"] == ()
    assert table.loc["2", ["size", "at_least", "accuracy", "baseline_accuracy"]].tolist() == [0] * 4
    assert table.loc["2", "balanced_accuracy"] == 0.5
    assert repr(found) == "MinimalSets(2 sets for 3 classes)"
    shown = found.shown.set_index("class")
    assert shown.loc["2", "units"] == "not told apart before anything is removed"
    assert shown.loc["2", "minimal"] == ""
    assert shown.loc["1", "units"] == "units:2"


def test_a_class_that_everything_is_taken_for_is_not_told_apart():
    data = planted()[1]
    model = networks.on_inputs(torch.zeros(3, 6), torch.tensor([1.0, 0.0, 0.0]))
    found = pa.minimal_sets(model, data, "units", audit=0, progress=False)
    assert not found.table["told_apart"].any()
    assert found.table["baseline_accuracy"].tolist() == [1.0, 0.0, 0.0]
    assert found.table["balanced_accuracy"].tolist() == [0.5] * 3
    assert found.table["units"].tolist() == [()] * 3
