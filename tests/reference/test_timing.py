"""The timing of the plain hook loop: what it picks, what it checks, that it leaves no trace."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from support.state import state_of
from torch import Tensor, nn

from pyablate import reference
from pyablate.network.sites import Site, select, sites
from pyablate.reference.timing import hook_loop_seconds
from pyablate.result import AblationResult
from pyablate.results.flips import Flips


def _network() -> nn.Module:
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 5, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 4),
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, generator=generator)  # wide enough that ablation flips classes
    return network


def _data(images: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 1, 6, 6, generator=generator), torch.arange(images) % 4


def test_all_units_agree_with_a_right_result_and_not_with_a_wrong_one():
    model, data = _network(), _data()
    chosen = select(sites(model, data[0]), "*")
    right = reference.ablate(model, data, "*")
    assert len(right.flips.image) > 0
    timing = hook_loop_seconds(model, data, chosen, units=100, result=right)
    assert timing.units_timed == timing.units == 8
    assert timing.pairs_compared + timing.near_ties == 8 * 24
    assert timing.disagreements == 0
    assert timing.seconds == pytest.approx(timing.measured_seconds)

    baseline = right.baseline.copy()
    baseline[5] = (baseline[5] + 1) % 4
    wrong = AblationResult(right.units, right.labels, baseline, right.flips, right.class_names)
    assert hook_loop_seconds(model, data, chosen, units=100, result=wrong).disagreements > 0


def test_few_units_and_images_are_scaled_to_all():
    model, data = _network(), _data()
    chosen = select(sites(model, data[0]), "*")
    timing = hook_loop_seconds(model, data, chosen, units=2, images=6)
    assert (timing.units_timed, timing.units) == (2, 8)
    assert (timing.images_timed, timing.images) == (6, 24)
    assert timing.seconds == pytest.approx(timing.measured_seconds * 4 * 4)
    assert timing.pairs_compared == 0


def test_batches_count_like_tensors():
    model, data = _network(), _data()
    chosen = select(sites(model, data[0]), "*")
    result = reference.ablate(model, data, "*")
    batches = list(zip(data[0].split(10), data[1].split(10), strict=True))
    timing = hook_loop_seconds(model, batches, chosen, units=3, images=13, result=result)
    assert (timing.images_timed, timing.images) == (13, 24)
    assert timing.pairs_compared + timing.near_ties == 3 * 13
    assert timing.disagreements == 0


def test_the_model_is_untouched():
    model, data = _network().train(), _data()
    before = state_of(model)
    strides = [parameter.stride() for parameter in model.parameters()]
    hook_loop_seconds(model, data, select(sites(model, data[0]), "*"), units=2)
    assert state_of(model) == before
    assert strides == [parameter.stride() for parameter in model.parameters()]


class _Aliases(nn.Module):
    """A module returns its own input, which is read again afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.same(x) + x


def test_silencing_an_alias_leaves_the_original_alone():
    x = torch.tensor([[-1.0, -5.0, -2.0]] * 4)
    site = Site("same", "same", None, 3, 1, (3,), "layer")
    units = pd.DataFrame({"label": ["same:1"], "layer": ["same"], "unit": [1]})
    labels = np.zeros(4, dtype=np.int64)
    # Without unit 1 the logits are (-2, -5, -4), class 0 as before. Were the original silenced
    # as well, they would be (-2, 0, -4), class 1.
    result = AblationResult(units, labels, labels, Flips.gather(1, []), ("a", "b", "c"))
    timing = hook_loop_seconds(_Aliases(), (x, torch.arange(4) % 3), [site], units=3, result=result)
    assert timing.pairs_compared == 4
    assert timing.disagreements == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": []}, "sites: expected at least one layer, got none"),
        ({"units": 0}, "units: expected at least 1, got 0"),
        ({"images": 0}, "images: expected at least 1, got 0"),
        ({"data": []}, "data: no images"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    model, data = _network(), _data()
    given = {"data": data, "sites": select(sites(model, data[0]), "*"), **arguments}
    with pytest.raises(ValueError, match=message):
        hook_loop_seconds(model, **given)  # type: ignore[arg-type]
