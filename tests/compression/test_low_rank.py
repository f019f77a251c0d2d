"""Low-rank training with energy transfer against its definition, by hand in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.state import state_of
from torch import Tensor, nn
from torch.nn import functional

import pyablate as pa
from pyablate.compression import low_rank_training, truncated_svd
from pyablate.compression.decomposition import factors

LABELS = torch.arange(24) % 10
PICTURES = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
        nn.Linear(10, 10),
    )
    nn.init.uniform_(model[1].weight, 0.3, 3)
    nn.init.uniform_(model[1].running_var, 0.3, 3)
    return model.eval()


def projected(weight: Tensor, rank: int, scale: np.ndarray) -> Tensor:
    rows = weight.detach().double().flatten(1).numpy() * scale[:, None]
    u, s, v = np.linalg.svd(rows, full_matrices=False)
    kept = s[:rank] * np.sqrt(np.square(s).sum() / np.square(s[:rank]).sum())
    best = (u[:, :rank] * kept) @ v[:rank] / scale[:, None]
    return torch.from_numpy(best).reshape(weight.shape).float()


def scale_of(norm: nn.BatchNorm2d) -> np.ndarray:
    found = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return found.numpy()


def test_the_projection_keeps_the_energy_behind_batch_norm():
    model = network()
    first, second = factors(model[0], 3, model[1], energy_transfer=True)
    expected = projected(model[0].weight, 3, scale_of(model[1]))
    torch.testing.assert_close((second @ first).float(), expected.flatten(1), rtol=1e-5, atol=1e-6)
    scale = torch.from_numpy(scale_of(model[1]))[:, None]
    old, new = scale * model[0].weight.detach().double().flatten(1), scale * (second @ first)
    torch.testing.assert_close(new.norm(), old.norm())
    assert torch.linalg.matrix_rank(new) == 3
    # Once more: nothing changes.
    with torch.no_grad():
        model[0].weight.copy_((second @ first).reshape(model[0].weight.shape))
    first, second = factors(model[0], 3, model[1], energy_transfer=True)
    torch.testing.assert_close((second @ first).float(), expected.flatten(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rectify", [True, False])
def test_training_by_hand(rectify):
    model = network()
    before = state_of(model)
    found = low_rank_training(
        model,
        (PICTURES, LABELS),
        0.25,
        layers=["0", "5"],
        rectify=rectify,
        epochs=2,
        batch_size=24,
        learning_rate=0.2,
        weight_decay=0.0,
    )
    assert state_of(model) == before
    by_hand = network()
    velocity = [torch.zeros_like(each) for each in by_hand.parameters()]
    for rate in (0.2, 0.1):  # one step an epoch
        by_hand.train()
        loss = functional.cross_entropy(by_hand(PICTURES), LABELS)
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for each, v, g in zip(by_hand.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g)
                each -= rate * v
            scale = scale_of(by_hand[1]) if rectify else np.ones(12)
            by_hand[0].weight.copy_(projected(by_hand[0].weight, 3, scale))
            by_hand[5].weight.copy_(projected(by_hand[5].weight, 3, np.ones(10)))
    by_hand.eval()
    for place, rest in ((0, 27), (5, 12)):
        first, second = found.model[place]
        product = second.weight.detach().flatten(1) @ first.weight.detach().flatten(1)
        expected = by_hand[place].weight.detach().flatten(1)
        torch.testing.assert_close(product, expected, rtol=1e-3, atol=1e-4)
        assert (len(first.weight), expected.shape[1]) == (3, rest)
    assert isinstance(found.model[6], nn.Linear)
    with torch.no_grad():
        torch.testing.assert_close(found.model(PICTURES), by_hand(PICTURES), rtol=1e-3, atol=1e-4)
    assert found.bits == 32 * sum(p.numel() for p in found.model.parameters())
    assert found.ratio > 1
    assert found.history is not None
    assert found.history["learning_rate"].tolist() == pytest.approx([0.2, 0.1])
    assert found.history["cross_entropy"].iloc[1] == pytest.approx(float(loss.detach()), rel=1e-4)


def test_it_keeps_more_than_a_decomposition():
    data = PICTURES, LABELS
    model = pa.finetune(network(), data, epochs=40, batch_size=24, learning_rate=0.3).model
    trained = low_rank_training(model, data, 0.25, epochs=20, batch_size=24, learning_rate=0.1)
    at_once = truncated_svd(model, 0.25, energy_transfer=True, rectify=True)
    assert trained.bits == at_once.bits
    comparisons = [pa.compare(model, each.model, data) for each in (at_once, trained)]
    losses = [each.after.loss for each in comparisons]
    assert losses[1] < losses[0]


def test_bad_input():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(20, 30)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() > 0 else self.fc(-x)

    data = PICTURES, LABELS
    flat = torch.randn(24, 20), LABELS
    with pytest.raises(ValueError, match=r"rectify: torch.fx cannot trace"):
        low_rank_training(Branching(), flat, 0.3)
    assert low_rank_training(Branching(), flat, 0.3, rectify=False, epochs=1).ratio > 1
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="share"):
            low_rank_training(network(), data, share)
    with pytest.raises(ValueError, match="epochs"):
        low_rank_training(network(), data, 0.3, epochs=0)
    with pytest.raises(ValueError, match="nearest"):
        low_rank_training(network(), data, 0.3, layers="11")
    with pytest.raises(ValueError, match="no longer finite"):
        low_rank_training(network(), data, 0.3, learning_rate=1e30)
    with pytest.raises(TypeError, match="model"):
        low_rank_training(3, data, 0.3)  # type: ignore[arg-type]
