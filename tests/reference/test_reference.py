"""The oracle against cases that can be computed by hand, and the networks that use it."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import networks
from support.state import state_of
from torch import Tensor, nn
from torch.nn import functional

from pyablate import reference
from pyablate.interventions import Intervention, donors, gaussian, random_rotation

IMAGES, HIDDEN, CLASSES = 11, 6, 3


@pytest.fixture(scope="module")
def linear() -> tuple[nn.Module, Tensor, Tensor]:
    """One hidden layer: its units' effect on the logits has a closed form."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)).double()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0])
    return model, torch.randn(IMAGES, 4, dtype=torch.float64), labels


def all_logits(*arguments: object, **options: object) -> Tensor:
    """Logits of every row, the intact network first: [1 + rows, N, K]."""
    rows, values = zip(*reference.logits(*arguments, **options), strict=True)  # type: ignore[arg-type]
    assert rows == tuple(range(-1, len(rows) - 1))
    return torch.stack(values)


def stand_in(kind: str, hidden: Tensor, labels: Tensor) -> Tensor:
    """What replaces each hidden value, [N, HIDDEN], written out image by image."""
    if kind == "zero":
        return torch.zeros_like(hidden)
    if kind == "constant":
        return torch.full_like(hidden, -0.75)
    mean = hidden.numpy().mean(axis=0)
    if kind == "mean":
        return torch.from_numpy(np.tile(mean, (IMAGES, 1)))
    if kind == "class_mean":
        rows = [hidden[labels == label].mean(dim=0) for label in labels]
        return torch.stack(rows)
    if kind == "resample":
        donor = donors(5, IMAGES)
        return torch.stack([hidden[donor[i]] for i in range(IMAGES)])
    assert kind == "noise"
    deviation = hidden.numpy().std(axis=0)
    return torch.tensor(
        [
            [
                mean[u]
                + deviation[u] * float(gaussian(5, "1", torch.tensor(i), torch.tensor(u), 1))
                for u in range(HIDDEN)
            ]
            for i in range(IMAGES)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("kind", ["zero", "constant", "mean", "class_mean", "resample", "noise"])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_closed_form_of_a_hidden_layer(linear, kind, batch_size):
    model, images, labels = linear
    with torch.no_grad():
        hidden = model[1](model[0](images))
        clean = model(images)
        change = stand_in(kind, hidden, labels) - hidden
        expected = [clean] + [
            clean + change[:, u, None] * model[2].weight[:, u] for u in range(HIDDEN)
        ]
    got = all_logits(
        model,
        (images, labels),
        "1",
        intervention=Intervention(kind, value=-0.75, seed=5),  # type: ignore[arg-type]
        batch_size=batch_size,
    )
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("given", [False, True])
def test_closed_form_of_a_direction(linear, given):
    model, images, labels = linear
    matrix = torch.randn(HIDDEN, 2, dtype=torch.float64) if given else None
    intervention = Intervention("direction", seed=9, directions=matrix)
    q = intervention.matrix("1", HIDDEN)
    with torch.no_grad():
        hidden = model[1](model[0](images))
        expected = [model(images)]
        for j in range(q.shape[1]):
            along = torch.stack([h @ q[:, j] for h in hidden])
            expected.append(model[2](hidden - along[:, None] * q[:, j]))
    got = all_logits(model, (images, labels), "1", intervention=intervention)
    assert len(got) == 1 + (2 if given else HIDDEN)
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-12)


def test_ablating_all_orthogonal_directions_leaves_nothing(linear):
    model, images, labels = linear
    intervention = Intervention("direction", directions=random_rotation(HIDDEN, seed=2))
    group = [f"1:{u}" for u in range(HIDDEN)]
    values = all_logits(model, (images, labels), intervention=intervention, groups=[group])[1]
    expected = model[2].bias.detach().expand(IMAGES, CLASSES)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)


def test_zero_equals_cutting_the_next_layers_weights():
    model, images, labels = networks.network("pooling")
    rows = list(reference.logits(model, (images, labels), ["features.1", "features.4"]))[1:]
    for row, values in rows:
        layer, unit = (3, row) if row < 6 else (6, row - 6)  # the convolution that reads the unit
        cut = copy.deepcopy(model).double()
        with torch.no_grad():
            cut.features[layer].weight[:, unit] = 0
            expected = cut(images.double())
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)


def test_constant_equals_a_bias_in_the_next_layer():
    model, images, labels = networks.network("mlp")
    for row, values in list(
        reference.logits(model, (images, labels), "4", intervention="constant:2")
    ):
        moved = copy.deepcopy(model).double()
        with torch.no_grad():
            if row >= 0:
                moved[6].bias += 2 * moved[6].weight[:, row]
                moved[6].weight[:, row] = 0
            torch.testing.assert_close(values, moved(images.double()), rtol=0, atol=1e-12)


def test_moments_are_over_images_and_positions():
    model, images, labels = networks.network("residual")
    double = copy.deepcopy(model).double()
    maps = double.body[:3](images.double()).detach()  # [N, 8, 12, 12]
    for kind in ("mean", "noise", "class_mean"):
        intervention = Intervention(kind, seed=4)  # type: ignore[arg-type]
        got = all_logits(model, (images, labels), "body.2", intervention=intervention, batch_size=7)
        for unit in range(8):
            changed = maps.clone()
            values = maps[:, unit].numpy()
            for image in range(len(images)):
                fill = values.mean()
                if kind == "class_mean":
                    fill = values[(labels == labels[image]).numpy()].mean()
                if kind == "noise":
                    draws = gaussian(4, "body.2", torch.tensor(image), torch.tensor(unit), 144)
                    fill = fill + values.std() * draws.reshape(12, 12)
                changed[image, unit] = fill
            with torch.no_grad():
                expected = double.head(double.body[3:](changed).flatten(2).mean(dim=2))
            torch.testing.assert_close(got[1 + unit], expected, rtol=0, atol=1e-11)


def test_resample_takes_the_donors_own_map():
    model, images, labels = networks.network("convnext")
    double = copy.deepcopy(model).double()
    donor = donors(6, len(images))
    hidden = networks.outputs(double, "first.gelu", images.double())
    got = all_logits(model, (images, labels), "first.gelu", intervention="resample:6")
    for unit in range(14):

        def swap(_module: nn.Module, _inputs: object, out: Tensor, unit: int = unit) -> Tensor:
            changed = out.clone()
            for image in range(len(images)):
                changed[image, :, :, unit] = hidden[donor[image], :, :, unit]
            return changed

        handle = double.first.gelu.register_forward_hook(swap)
        with torch.no_grad():
            torch.testing.assert_close(got[1 + unit], double(images.double()), rtol=0, atol=1e-11)
        handle.remove()


class Twice(nn.Module):
    """``act`` is called twice, so its unit speaks twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.act = nn.Tanh()
        self.outer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.act(self.inner(self.act(x))))


@pytest.mark.parametrize("layer", ["act", "act@1", "act@2"])
@pytest.mark.parametrize("kind", ["zero", "mean", "resample", "noise"])
def test_a_module_called_twice(layer, kind):
    torch.manual_seed(0)
    model = Twice().double()
    x, labels = torch.randn(9, 4, dtype=torch.float64), torch.zeros(9, dtype=torch.int64)
    donor = torch.from_numpy(donors(0, 9))

    def change(values: Tensor, clean: Tensor, unit: int, call: int) -> Tensor:
        if layer not in ("act", f"act@{call}"):
            return values
        draws = gaussian(0, layer, torch.arange(9), torch.tensor(unit), 1).reshape(9)
        column = clean[:, unit]
        fill = {
            "zero": torch.zeros(9, dtype=torch.float64),
            "mean": column.mean().expand(9),
            "resample": column[donor],
            "noise": column.mean() + column.std(correction=0) * draws,
        }[kind]
        return torch.cat([values[:, :unit], fill[:, None], values[:, unit + 1 :]], dim=1)

    got = all_logits(model, (x, labels), layer, intervention=kind)
    with torch.no_grad():
        first = x.tanh()
        second = model.inner(first).tanh()
        for unit in range(4):
            y = change(first, first, unit, 1)
            z = change(model.inner(y).tanh(), second, unit, 2)
            torch.testing.assert_close(got[1 + unit], model.outer(z), rtol=0, atol=1e-12)


def test_rows_follow_execution_order_and_units_ascend():
    model, images, labels = networks.network("mlp")
    result = reference.ablate(model, (images, labels), ["7:3", "2:15", "2:1", "4", "4:0"])
    expected = ["2:1", "2:15", *[f"4:{u}" for u in range(12)], "7:3"]
    assert list(result.units["label"]) == expected
    assert list(result.units["layer"]) == ["2"] * 2 + ["4"] * 12 + ["7"]
    assert list(result.units["unit"]) == [1, 15, *range(12), 3]


def test_groups_replace_together_also_across_layers():
    model, images, labels = networks.network("mlp")
    groups = [["2:1", "2:5"], ["7:0", "2:3"]]
    got = all_logits(model, (images, labels), groups=groups)
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        for number, cuts in enumerate([[(3, 1), (3, 5)], [(8, 0), (3, 3)]]):
            cut = copy.deepcopy(double)
            for layer, unit in cuts:
                cut[layer].weight[:, unit] = 0
            torch.testing.assert_close(got[1 + number], cut(images.double()), rtol=0, atol=1e-12)
    result = reference.ablate(model, (images, labels), "7:1", groups=groups)
    assert list(result.units["label"]) == ["7:1", "2:1+2:5", "7:0+2:3"]
    assert list(result.units["layer"]) == ["7", "2", "7+2"]
    assert list(result.units["unit"]) == [1, -1, -1]
    only = reference.ablate(model, (images, labels), groups=groups)
    np.testing.assert_array_equal(only.predictions(), result.predictions([1, 2]))


def test_predictions_are_the_argmax_of_the_logits():
    model, images, labels = networks.network("vit")
    result = reference.ablate(model, (images, labels), "blocks.1", batch_size=10)
    values = all_logits(model, (images, labels), "blocks.1")
    np.testing.assert_array_equal(result.baseline, values[0].argmax(dim=1).numpy())
    np.testing.assert_array_equal(result.predictions(), values[1:].argmax(dim=2).numpy())
    np.testing.assert_array_equal(result.labels, labels.numpy())
    clean = copy.deepcopy(model).double()(images.double()).detach()
    torch.testing.assert_close(values[0], clean, rtol=0, atol=1e-12)


def test_first_class_wins_on_equality_and_near_ties_are_told():
    values = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0 - 1e-5, 0.0], [2.0, 2.0 - 3e-5, 0.0]])
    np.testing.assert_array_equal(reference.predictions(values), [1, 0, 0])
    np.testing.assert_array_equal(reference.near_ties(values.double()), [True, True, False])
    scaled = torch.tensor([[5.0, 5.0 - 4e-5, -7.0], [5.0, 5.0 - 4e-5, 3.0], [0.0, 0.1, 0.05]])
    # What all classes share, 3 in the second row, is off the scale.
    np.testing.assert_array_equal(reference.near_ties(scaled.double()), [True, False, False])
    assert not reference.near_ties(torch.ones(4, 1)).any()


def test_it_sees_evaluation_mode_and_leaves_training_mode():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.9), nn.Linear(6, 3)
    )
    x, labels = torch.randn(8, 4), torch.zeros(8, dtype=torch.int64)
    model.train()
    before = state_of(model)
    first, second = (all_logits(model, (x, labels), "2") for _ in range(2))
    assert torch.equal(first, second)
    assert state_of(model) == before


def test_progress_counts_rows():
    model, images, labels = networks.network("mlp")
    seen: list[tuple[int, int, str]] = []
    reference.ablate(model, (images, labels), "7", progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == list(range(13))
    assert {total for _, total, _ in seen} == {12}


def test_comparing_finds_what_differs():
    model, images, labels = networks.network("mlp")
    result = reference.ablate(model, (images, labels), "7")
    good = reference.compare(result, model, (images, labels), "7")
    assert good == reference.Agreement(pairs=13 * 24, near_ties=0, mismatches=0)

    wrong = result.flips.prediction.copy()
    wrong[0] = (wrong[0] + 1) % networks.CLASSES
    spoilt = replace(result, flips=replace(result.flips, prediction=wrong))
    found = reference.compare(spoilt, model, (images, labels), "7")
    unit = result.units["label"][result.flips.row[0]]
    assert found.mismatches == 1
    assert found.examples[0].startswith(
        f"{unit}, image {result.flips.image[0]}: {wrong[0]}, oracle"
    )

    baseline = result.baseline.copy()
    baseline[4] = (baseline[4] + 1) % networks.CLASSES
    found = reference.compare(replace(result, baseline=baseline), model, (images, labels), "7")
    assert found.mismatches >= 1
    assert "the intact network, image 4" in found.examples[0]
    assert (good + found).pairs == 2 * 13 * 24


@pytest.mark.parametrize("layers", ["4", ["7", "4"], "7:0"])
def test_comparing_needs_the_same_rows(layers):
    model, images, labels = networks.network("mlp")
    result = reference.ablate(model, (images, labels), ["7", "2:1"])
    with pytest.raises(ValueError, match="do not give the result's 13 rows"):
        reference.compare(result, model, (images, labels), layers)
    with pytest.raises(ValueError, match="9 images, but the result has 24"):
        reference.compare(result, model, (images[:9], labels[:9]), ["7", "2:1"])


@pytest.mark.parametrize("name", networks.ARCHITECTURES)
def test_the_networks_are_worth_ablating(name):
    """Several classes are predicted, each layer has a unit that matters and one that does not."""
    model, images, labels = networks.network(name)
    layers = networks.ARCHITECTURES[name].layers
    result = reference.ablate(model, (images, labels), list(layers))
    assert len(np.unique(result.baseline)) >= 3
    assert set(result.units["layer"]) == set(layers)
    flips = np.diff(result.flips.start)
    for layer in layers:
        assert flips[(result.units["layer"] == layer).to_numpy()].sum() > 0


def test_randomise_reaches_every_parameter_and_both_signs():
    model = networks.ARCHITECTURES["norm_after_relu"].build()
    networks.randomise(model, seed=1)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    networks.randomise(model, seed=1)
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    networks.randomise(model, seed=2)
    for name, value in model.named_parameters():
        assert not torch.equal(value, first[name]), name
    scales = torch.cat([first[f"body.{i}.weight"] for i in (2, 5, 8)])
    assert (scales > 0.4).any()
    assert (scales < -0.4).any()
    assert functional.relu(first["body.2.running_var"] - 0.4).min() > 0
