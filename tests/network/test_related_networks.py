"""Networks of related systems: their units by name, and every prediction that of the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.oracle import check
from support.related_networks import RELATED, orthogonality_loss, related
from torch import Tensor

import pyablate as pa
from pyablate import reference
from pyablate.network.sites import select, surveyed

pytestmark = [
    pytest.mark.usefixtures("exports_kept"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

INTERVENTIONS = ["mean", "class_mean", "constant:0.3", "resample:3", "noise:3", "direction:3"]


@pytest.mark.parametrize("name", RELATED)
def test_star_has_the_units_where_they_speak(name: str) -> None:
    model, images, _ = related(name)
    seen = surveyed(model, images)
    chosen = select(seen.sites)
    assert [f"{site.name}:{site.channels}" for site in chosen] == RELATED[name].units.split()
    assert {site.axis for site in chosen} == {1}
    assert seen.left_out(chosen) == RELATED[name].left_out.split()
    assert not seen.guessed


@pytest.mark.parametrize("name", RELATED)
def test_predictions_are_the_oracles_under_all_interventions(name: str) -> None:
    model, images, labels = related(name)
    result = check(model, (images, labels), "*", ties=0)
    assert len(result.flips.image) > 20
    assert "replay" not in result.strategy.values()
    for intervention in INTERVENTIONS:
        options = {"intervention": intervention}
        other = pa.ablate(model, (images, labels), "*", audit=0, progress=False, **options)
        agreement = reference.compare(other, model, (images, labels), "*", **options)
        assert (agreement.mismatches, agreement.near_ties) == (0, 0), intervention
        assert "replay" not in other.strategy.values()


def test_what_leads_to_sampled_nodes_is_ablated_by_name() -> None:
    """Offsets move where the nodes of a RepGraph layer are read; no delta rule is linear there."""
    model, images, labels = related("repgraph")
    layers = [f"body.3.{part}" for part in ("offset", "query", "key", "value")]
    result = check(model, (images, labels), layers)
    assert set(result.strategy) == set(layers)
    assert "replay" not in result.strategy.values()
    assert len(result.flips.image) > 0


@pytest.mark.parametrize("name", ["dacnn", "dacnn_mix"])
def test_a_kernel_of_many_layers_is_one_set_of_units_that_speaks_often(name: str) -> None:
    """Everywhere at once under its own name, once by the number of the call."""
    model, images, labels = related(name)
    layers = {"anchor": 8, "anchor@2": 8}
    result = check(model, (images, labels), list(layers))
    assert result.units["layer"].value_counts().to_dict() == layers
    assert "replay" not in result.strategy.values()
    everywhere, once = result.predictions()[:8], result.predictions()[8:]
    assert (everywhere != once).any()


def test_the_penalty_makes_the_kernels_rows_orthogonal() -> None:
    """More orthogonal than as many rows of length 1 are by chance."""
    model, _, _ = related("orthogonal_resnet")
    for conv in (model.body[0], model.body[3].conv1[0], model.body[3].conv2[0]):
        weight, stride = conv.weight.detach(), conv.stride[0]
        chance = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        chance /= chance.flatten(1).norm(dim=1)[:, None, None, None]
        assert orthogonality_loss(weight, stride) < 0.3 * orthogonality_loss(chance, stride)


def test_each_label_of_several_is_a_decision_of_its_own() -> None:
    model, images, _ = related("multi_label")
    model = copy.deepcopy(model)
    del model.known_as  # exports that are kept know nothing of decisions

    def decision(label: int) -> Callable[[Tensor], Tensor]:
        return lambda p: torch.stack([1 - p[:, label], p[:, label]], dim=1)

    with torch.no_grad():
        intact = model(images) > 0.5
    assert (intact.sum(dim=1) > 1).any(), "some image has several labels"
    for label in (0, 4):
        there = intact[:, label].long()
        result = check(model, (images, there), "*", ties=0, logits=decision(label))
        assert "replay" not in result.strategy.values()
        assert "scores.head" not in result.strategy
        assert torch.equal(torch.from_numpy(result.baseline).long(), there)
        assert len(result.flips.image) > 0
