"""Passes through a user's model: copies, a batch of one, and outputs that are no logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyablate as pa
from pyablate.network.forward import check_logits, cost_of, forward, images_at_a_time
from pyablate.runtime import chunking


class Awkward(nn.Module):
    """Works in place on its images and squeezes a batch of one away."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.relu(self.conv(x.mul_(2))).mean(dim=(2, 3)).squeeze())


def _images(count: int) -> torch.Tensor:
    return torch.randn(count, 2, 5, 5, generator=torch.Generator().manual_seed(3))


def test_images_stay_and_one_image_gives_one_row() -> None:
    model, images = Awkward().eval(), _images(4)
    before = images.clone()
    together = forward(model, images)
    alone = torch.cat([forward(model, images[i : i + 1]) for i in range(4)])
    assert torch.equal(images, before)
    assert torch.allclose(together, alone, atol=1e-6)


def test_what_is_no_tensor_is_handed_on_and_refused() -> None:
    def two(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images, images

    found = forward(two, torch.zeros(1, 3))
    assert isinstance(found, tuple)
    with pytest.raises(TypeError, match=r"expected logits .* got tuple"):
        check_logits(found, 1)


@pytest.mark.parametrize("intervention", ["zero", "mean", "class_mean", "noise", "resample"])
def test_the_oracle_takes_images_one_by_one(intervention: str) -> None:
    torch.manual_seed(1)
    model, data = Awkward(), (_images(5), torch.arange(5) % 3)
    options = {"intervention": intervention, "progress": False}
    one = pa.reference.ablate(model, data, ["relu"], batch_size=1, **options)
    all_ = pa.reference.ablate(model, data, ["relu"], **options)
    assert (one.predictions() == all_.predictions()).all()


def test_the_costliest_call_limits_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    images = _images(2)
    cost = cost_of(Awkward(), images)
    monkeypatch.setattr(chunking, "LONGEST", 10**12)
    many = images_at_a_time(cost, images)
    assert images_at_a_time(cost, images.double()) == many // 2
    monkeypatch.setattr(chunking, "LONGEST", 1)
    assert images_at_a_time(cost, images) == 2 < many
