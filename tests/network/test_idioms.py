"""What networks do between weights: the units of each idiom, by name, number and axis."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.idioms import IDIOMS, MAPS, Between, FunctionalNorm, Idiom, InlineResidual
from support.oracle import check
from torch import Tensor, nn

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
    with pytest.raises(RuntimeError):
        list(
            reference.logits(model, (torch.randn(3, 2, 8, 8), torch.zeros(3).long()), ["bn2.relu"])
        )
    assert torch.overrides._get_current_function_mode() is None
