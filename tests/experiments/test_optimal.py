"""Optimal ablation: planted constants, a slow search with hooks, what is judged on which images."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy import optimize
from support import networks
from torch import Tensor, nn
from torch.nn import functional

import pyablate as pa
from pyablate.experiments.split import split
from pyablate.interventions import Intervention
from pyablate.runs.run_folder import StoreMismatch

# Replay: a search makes dozens of runs, and these networks take longer to capture than to run.
QUIET = {"progress": False, "audit": 0, "strategy": "replay"}


class Told(nn.Module):
    """Two classes, told apart by unit 0 alone; unit 1 is read by nobody."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.head = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[weight, 0.0], [0.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(x))


@pytest.mark.parametrize(("share", "weight"), [(0.75, 2.0), (0.25, -1.0)])
def test_a_unit_that_tells_the_class_leaves_the_classes_shares(share, weight):
    """Without the unit the best answer is how frequent the classes are: logit(share) / weight."""
    labels = (torch.arange(80) >= 80 * share).long()
    images = torch.stack([2.0 * (labels == 0), torch.rand(80)], dim=1)
    found = pa.optimal_constants(Told(weight), (images, labels), "act", rounds=8, **QUIET)
    expected = math.log(share / (1 - share)) / weight
    assert found.values["act"][0].item() == pytest.approx(expected, abs=2e-3)
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    intact = functional.cross_entropy(Told(weight)(images), labels).item()
    # The halves have the same shares, so what was chosen on one is right on the other.
    row = found.table.iloc[0]
    assert row["optimal"] == pytest.approx(entropy - intact, abs=1e-5)
    assert row["optimal"] < min(row["zero"], row["mean"])
    assert found.table.iloc[1][["zero", "mean", "optimal"]].tolist() == [0, 0, 0]


def hooked_loss(model: nn.Module, layer: str, unit: int, data: tuple[Tensor, Tensor]):
    """Mean loss as a function of the constant of one unit, by a plain hook."""
    images, labels = data

    def loss(constant: float) -> float:
        def replace(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, unit] = constant
            return output

        handle = model.get_submodule(layer).register_forward_hook(replace)
        with torch.no_grad():
            found = functional.cross_entropy(model(images), labels).item()
        handle.remove()
        return found

    return loss


def test_against_a_search_unit_by_unit():
    layer = "body.3"
    model, images, labels = networks.network("residual", 60)
    # A copy: the network is shared by the tests of a process.
    model, images = copy.deepcopy(model).double(), images.double()
    found = pa.optimal_constants(model, (images, labels), layer, rounds=6, seed=3, **QUIET)
    halves = split((images, labels), seed=3)
    intact = [
        functional.cross_entropy(model(part[0]), part[1]).item()
        for part in (halves.choosing, halves.measuring)
    ]
    for unit, row in found.table.iterrows():
        chosen = hooked_loss(model, layer, unit, halves.choosing)
        measured = hooked_loss(model, layer, unit, halves.measuring)
        near = optimize.minimize_scalar(
            chosen, bracket=(row["constant"] - 0.1, row["constant"], row["constant"] + 0.1)
        )
        assert chosen(row["constant"]) <= near.fun + 1e-5
        assert row["optimal_chosen"] == pytest.approx(chosen(row["constant"]) - intact[0], abs=1e-9)
        assert row["optimal_chosen"] <= min(row["zero_chosen"], row["mean_chosen"])
        for how, constant in (("zero", 0.0), ("mean", row["mean_activation"])):
            assert row[how] == pytest.approx(measured(constant) - intact[1], abs=1e-9)
        assert row["optimal"] == pytest.approx(measured(row["constant"]) - intact[1], abs=1e-9)


def test_several_layers_and_the_intervention_kept(tmp_path):
    model, images, labels = networks.network("residual", 40)
    data = images, labels
    found = pa.optimal_constants(model, data, ["body.2", "body.3"], rounds=2, **QUIET)
    assert list(found.values) == ["body.2", "body.3"]
    assert found.table["layer"].value_counts().to_dict() == {"body.2": 8, "body.3": 8}
    joined = torch.cat(list(found.values.values())).numpy()
    np.testing.assert_array_equal(joined, found.table["constant"])
    # The means are those of the half on which the constants were chosen.
    halves = split(data, seed=0)
    seen: list[Tensor] = []
    handle = model.get_submodule("body.3").register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        model(halves.choosing[0])
    handle.remove()
    mean = found.table["mean_activation"][8:].to_numpy()
    np.testing.assert_allclose(mean, seen[0].mean((0, 2, 3)), rtol=1e-5)
    # A run with them is kept, found again, and told from one with others.
    options = {"intervention": found.intervention, "measures": ["loss"], **QUIET}
    path = tmp_path / "run.zarr"
    result = pa.ablate(model, halves.measuring, list(found.values), output=path, **options)
    np.testing.assert_array_equal(result.loss_change, found.table["optimal"])
    loaded = pa.load(path)
    assert loaded.intervention == found.results["optimal"].intervention == "constant:given"
    assert loaded.provenance["options"]["values"] == result.provenance["options"]["values"]
    np.testing.assert_array_equal(loaded.predictions(), result.predictions())
    values = {**found.values, "body.2": found.values["body.2"] + 1}
    with pytest.raises(StoreMismatch, match=r"options\.values"):
        pa.ablate(
            model,
            halves.measuring,
            list(values),
            output=path,
            **{**options, "intervention": Intervention("constant", values=values)},
        )


def test_units_that_never_change():
    """A dead unit has no spread to step by; its constant may still be found."""
    labels = torch.arange(40) % 2
    images = torch.stack([-torch.ones(40), 1.0 * labels], dim=1)
    found = pa.optimal_constants(Told(1.0), (images, labels), "act", rounds=5, **QUIET)
    assert found.table["mean_activation"][0] == 0
    assert abs(found.values["act"][0].item()) < 0.05  # equal shares: zero is best


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds: expected at least 1"),
        ({"layers": "body.99"}, "layers: no layer"),
        ({"guarantee": "screened"}, "guarantee"),
        ({"guarantee": "estimated"}, "guarantee"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_input(options, message):
    model, images, labels = networks.network("residual", 10)
    given = {"layers": "body.2", **QUIET} | options
    with pytest.raises(ValueError, match=message):
        pa.optimal_constants(model, (images, labels), **given)


def test_attention_heads_have_no_single_constant():
    model, images, labels = networks.network("vit", 8)
    heads = next(site.name for site in pa.sites(model, images[:2]) if site.width > 1)
    with pytest.raises(ValueError, match="holds attention heads"):
        pa.optimal_constants(model, (images, labels), heads, **QUIET)
