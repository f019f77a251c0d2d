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
    model, images, labels = networks.network("residual", 60)
    options: dict[str, Any] = {"audit": 20, "progress": False}
    found = pa.minimal_sets(model, (images, labels), "body.3", seed=2, chance=0.3, **options)
    halves = split((images, labels), seed=2)
    reached = 0
    for _, line in found.table.iterrows():
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
    assert (found.table["size"] == 1).all()
    choosing = split((images, labels), seed=0).choosing
    options: dict[str, Any] = {"measures": ["loss"], "audit": 0, "progress": False}
    single = pa.ablate(model, choosing, "body.3", **options)
    for number, line in found.table.iterrows():
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
        ({"intervention": "direction"}, "not in groups"),
        ({"layers": "unit"}, "units"),
    ],
)
def test_bad_arguments(options, message):
    model, data = planted()
    with pytest.raises(ValueError, match=message):
        pa.minimal_sets(model, data, **({"layers": "units", "progress": False} | options))
