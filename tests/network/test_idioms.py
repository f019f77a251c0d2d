"""What networks do between weights: the units of each idiom, by name, number and axis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.idioms import (
    IDIOMS,
    MAPS,
    Attention,
    Between,
    FunctionalNorm,
    Idiom,
    InlineResidual,
    Tokens,
)
from support.oracle import check
from torch import Tensor, nn

import pyablate as pa
from pyablate import reference
from pyablate.network.sites import select, surveyed


def images(idiom: Idiom, count: int = 3) -> Tensor:
    return torch.randn(count, *idiom.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", IDIOMS)
def test_star_has_the_units_behind_all_weights(name: str) -> None:
    idiom = IDIOMS[name]
    seen = surveyed(idiom.build(), images(idiom))
    chosen = select(seen.sites)
    assert [f"{site.name}:{site.channels}" for site in chosen] == idiom.units.split()
    assert seen.left_out(chosen) == idiom.left_out.split()
    assert not seen.guessed.intersection(site.name for site in chosen)


@pytest.mark.parametrize("name", MAPS)
def test_units_lie_along_the_axis_that_the_weights_make(name: str) -> None:
    idiom = MAPS[name]
    seen = surveyed(idiom.build(), images(idiom))
    found = {f"{site.name}:{site.channels}@{site.axis}" for site in seen.sites}
    assert set(idiom.units.split()) <= found, found
    named = {unit.partition(":")[0] for unit in idiom.units.split()}
    assert not seen.guessed & named


@pytest.mark.parametrize("name", IDIOMS)
def test_predictions_are_the_oracles(name: str) -> None:
    idiom = IDIOMS[name]
    x = images(idiom, 12)
    result = check(idiom.build(), (x, torch.arange(len(x)) % 4), intervention="mean")
    assert "replay" not in result.strategy.values()


@pytest.mark.parametrize(
    ("name", "site", "spelt", "layer"),
    [
        ("functional_norm", "conv.relu", lambda: FunctionalNorm(nn.ReLU()), "act"),
        ("inline_residual", "bn2.relu", lambda: InlineResidual(nn.ReLU()), "act"),
        ("glu", "conv2.glu", lambda: Between(nn.GLU(1), halves=True), "between@2"),
    ],
)
@pytest.mark.parametrize("intervention", ["zero", "mean", "resample"])
def test_the_result_of_a_function_is_ablated_like_a_modules_output(
    name: str, site: str, spelt: Callable[[], nn.Module], layer: str, intervention: str
) -> None:
    """Two ways to the same tensor, one of which needs hooks of modules only."""
    model, x = IDIOMS[name].build(), images(IDIOMS[name], 6)
    data = (x, torch.arange(6) % 4)
    inner = reference.logits(model, data, [site], intervention=intervention)
    twin = spelt().eval()
    twin.load_state_dict(model.state_dict())
    outer = reference.logits(twin, data, [layer], intervention=intervention)
    compared = 0
    for (row, ours), (again, theirs) in zip(inner, outer, strict=True):
        assert row == again
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        compared += 1
    assert compared > 5


def test_hooks_of_functions_are_gone_after_a_failure() -> None:
    idiom = IDIOMS["inline_residual"]
    model = idiom.build()
    list(reference.logits(model, (images(idiom), torch.zeros(3).long()), ["bn2.relu"]))
    with pytest.raises(ValueError, match="the model fails on an input of shape"):
        list(
            reference.logits(model, (torch.randn(3, 2, 8, 8), torch.zeros(3).long()), ["bn2.relu"])
        )
    assert torch.overrides._get_current_function_mode() is None


def test_what_is_left_out_is_said_once_and_planned(caplog: pytest.LogCaptureFixture) -> None:
    idiom = IDIOMS["vit"]
    x = images(idiom, 4)
    data, said = (x, torch.arange(4)), "1 modules with weights are in no chosen layer: blocks.0.qkv"
    pa.ablate(idiom.build(), data, audit=0)
    assert [said in record.message for record in caplog.records].count(True) == 1
    caplog.clear()
    planned = pa.plan(idiom.build(), data)
    assert said in planned.explain()
    pa.ablate(idiom.build(), data, ["blocks.0", "blocks.1"], audit=0)  # chosen by name: no news
    assert "no chosen layer" not in caplog.text


def test_layers_left_out_are_told_by_their_common_form() -> None:
    model = Tokens(*(Attention(16, 2) for _ in range(12)))
    seen = surveyed(model, torch.randn(1, 1, 8, 8))
    (remark,) = seen.remarks(select(seen.sites), everything=True)
    assert "units of 12 modules" in remark
    assert ": blocks.*.qkv (12);" in remark


def test_an_axis_is_set_by_who_knows_better() -> None:
    model, x = IDIOMS["vit"].build(), images(IDIOMS["vit"], 6)
    data, axis = (x, torch.arange(6) % 4), {"blocks.0": 1}
    found = {site.name: site for site in pa.sites(model, x, axis=axis)}
    assert (found["blocks.0"].axis, found["blocks.0"].channels) == (1, 16)
    tokens = check(model, data, ["blocks.0"], axis=axis)
    features = check(model, data, ["blocks.0"])
    assert not np.array_equal(tokens.predictions(), features.predictions())
    assert pa.sites(model, x, axis={"blocks.0": -1}) == pa.sites(model, x)


def test_an_axis_is_taken_wherever_layers_are() -> None:
    model, x = IDIOMS["vit"].build(), images(IDIOMS["vit"], 12)
    data, axis = (x, torch.arange(12) % 4), {"blocks.0": 1}
    table = pa.attributes(model, data, ["blocks.0"], ["mean"], axis=axis)
    with torch.no_grad():
        by_token = model.blocks[0](model.norm(model.patches(x).flatten(2).transpose(1, 2)))
    assert table["mean"].values == pytest.approx(by_token.mean((0, 2)).numpy(), abs=1e-5)
    curve = pa.cumulative(model, data, ["blocks.0"], axis=axis, order="random", steps=1, repeats=1)
    assert curve.to_dataframe()["removed"].max() == 16
    found = pa.directions.principal_components(
        model, data, ["blocks.1.act"], axis={"blocks.1.act": 1}
    )
    assert found["blocks.1.act"].shape == (16, 16)  # tokens, not the 24 hidden features


@pytest.mark.parametrize(
    ("axis", "error", "message"),
    [
        ({"blocks.O": 1}, ValueError, "axis: no layer .* 'blocks.O'; nearest: .*blocks.0"),
        ({"blocks.0": 3}, ValueError, "axis: expected 1 to 2 for 'blocks.0', got 3"),
        ({"blocks.0": 0}, ValueError, "axis: expected 1 to 2 for 'blocks.0', got 0"),
        ({"blocks.0": "1"}, TypeError, "axis: expected an integer for 'blocks.0', got '1'"),
    ],
)
def test_bad_axes(axis: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pa.sites(IDIOMS["vit"].build(), images(IDIOMS["vit"]), axis=axis)


def test_a_run_with_another_axis_is_another_run(tmp_path: Path) -> None:
    model, x = IDIOMS["channels_last"].build(), images(IDIOMS["channels_last"], 4)
    options = {"layers": ["act"], "audit": 0, "output": tmp_path / "run.zarr"}
    pa.ablate(model, (x, torch.arange(4)), **options)
    with pytest.raises(ValueError, match="axis"):
        pa.ablate(model, (x, torch.arange(4)), axis={"act": 1}, **options)


def test_an_axis_that_was_guessed_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc = nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            heads = self.act(self.fc1(x.flatten(1)).unflatten(1, (3, 4)))
            return self.fc(heads.flatten(1))

    x = images(IDIOMS["vit"], 4)
    pa.ablate(Split().eval(), (x, torch.arange(4)), audit=0)
    assert "is a guess (batch counts as 0) for act [3, 4]: 1" in caplog.text
    caplog.clear()
    pa.ablate(Split().eval(), (x, torch.arange(4)), audit=0, axis={"act": 2})
    assert "guess" not in caplog.text


def test_a_block_whose_features_are_split_is_no_layer_of_the_star() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x).relu()).unflatten(2, (4, 4)).transpose(1, 2)

    class Joined(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(1, 2).flatten(2)

    seen = surveyed(Tokens(Heads(), Joined()).eval(), torch.randn(1, 1, 8, 8))
    chosen = select(seen.sites)
    assert [site.name for site in chosen] == ["blocks.0.fc1"]
    assert seen.left_out(chosen) == ["patches", "blocks.0.fc2"]


def test_recording_hooks_see_real_tensors_only() -> None:
    model, x = IDIOMS["inline_residual"].build(), images(IDIOMS["inline_residual"], 4)
    seen: list[type] = []
    model.conv2.register_forward_hook(lambda _m, _i, output: seen.append(type(output)))
    model.conv2.register_forward_hook(lambda _m, _i, output: 2 * output)  # a part of the network
    model.bn2.register_forward_pre_hook(lambda _m, inputs: seen.append(type(inputs[0])))
    result = check(model, (x, torch.arange(4)))
    assert "replay" not in result.strategy.values()
    assert set(seen) == {Tensor}
    assert len(model.conv2._forward_hooks) == 2


class Product(nn.Module):
    """Two layers whose product is a tensor of no module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x) * self.b(x))


def test_functions_that_draw_a_replacement_are_not_the_networks() -> None:
    """Noise for a unit of ``b`` multiplies, too, before the network does."""
    torch.manual_seed(0)
    model, data = Product().eval(), (torch.randn(40, 6), torch.arange(40) % 3)
    groups = [["a.mul:0", "b:1"]]
    options = {"groups": groups, "intervention": "noise"}
    for strategy in ("auto", "replay"):
        result = pa.ablate(model, data, strategy=strategy, progress=False, **options)
        assert pa.reference.compare(result, model, data, **options).mismatches == 0
