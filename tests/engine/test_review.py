"""What a critical reader of the engine found wrong once, each held by a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support import networks
from support.oracle import check
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

import pyablate as pa
from pyablate.results import store

Data = tuple[Tensor, Tensor]


class Between(nn.Module):
    """Convolution, ReLU, convolution, something, mean, linear."""

    def __init__(self, something: Callable[[Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, channels, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, 8, 3, padding=1)
        self.something = something
        self.head = nn.Linear(8, networks.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.something(self.conv2(self.relu(self.conv1(x))))
        return self.head(y.mean(dim=(2, 3)))


def data(images: int = 17) -> Data:
    return networks.network("residual", images)[1:]


def made(model: nn.Module, images: Tensor) -> nn.Module:
    networks.randomise(model, seed=1)
    networks.spread_logits(model, images)
    return model.eval()


def activate_a_chunk(y: Tensor) -> Tensor:
    first, second = y.chunk(2, dim=1)
    return torch.cat([first.relu(), second], dim=1) - 0.5 * y


SHARED: dict[str, Callable[[Tensor], Tensor]] = {
    "hard swish by hand": lambda y: 8 * y * functional.relu6(8 * y + 3) / 6,
    "activation of a copy": lambda y: functional.relu_(y.clone()) - 0.5 * y,
    "activation of a view": lambda y: y.flatten(1).relu().view(y.shape) - 0.5 * y,
    "activation of a chunk": activate_a_chunk,
    "activation of a sum": lambda y: (y + 1).relu() * (y + 1),
    "square": lambda y: y * y,
    "quotient of itself": lambda y: (y / y) + y,
    "matrix product with itself": lambda y: torch.matmul(y, y),
    "a mask alone": lambda y: torch.ones_like(y) * (y > 0.1),
    "complex": lambda y: torch.fft.irfft2(torch.fft.rfft2(y) * 2.0, s=y.shape[2:]).relu(),
    "minus infinity": lambda y: (
        y.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(3) * y
    ),
    "squeeze": lambda y: y.unsqueeze(2).squeeze(),
}


@pytest.mark.parametrize("memory", [None, 16])  # 16 bytes: one pair at a time
@pytest.mark.parametrize("name", SHARED)
def test_tensors_that_share_memory_or_repeat(name: str, memory: int | None) -> None:
    images, labels = data(7)
    model = made(Between(SHARED[name]), images)
    result = pa.ablate(model, (images, labels), "relu", memory=memory, audit=20, progress=False)
    agreement = pa.reference.compare(result, model, (images, labels), "relu")
    assert agreement.mismatches == 0, agreement
    assert len(result.flips.image) > 0
    # Before 2.7 torch could not export complex numbers.
    replayed = name == "complex" and torch.__version__ < "2.7"
    jumps = name == "a mask alone"
    expected = "replay" if replayed else "delta (float64)" if jumps else "delta"
    assert result.strategy == {"relu": expected}


class PoolsOverUnits(nn.Module):
    def __init__(self, pool: Callable[[Tensor], Tensor], flat: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool, self.flat = pool, flat
        self.head = nn.Linear(8, networks.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        y = self.pool(y.mean(dim=(2, 3)) if self.flat else y.flatten(2))
        return self.head(y if self.flat else y.mean(dim=2))


@pytest.mark.parametrize(
    ("pool", "flat"),
    [
        (lambda y: functional.max_pool2d(y, 3, 1, 1), False),
        (lambda y: functional.avg_pool2d(y, 3, 1, 1), False),
        (lambda y: functional.avg_pool1d(y, 3, 1, 1), True),
    ],
)
def test_pools_over_units(pool: Callable[[Tensor], Tensor], flat: bool) -> None:
    images, labels = data()
    check(made(PoolsOverUnits(pool, flat), images), (images, labels))


class OneMapForAll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(1, 8, 3, padding=1)
        self.head = nn.Linear(8, networks.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv1(x))
        return self.head((self.conv2(y) + y).relu().mean(dim=(2, 3)))


def test_one_map_added_to_all_channels() -> None:
    images, labels = data()
    check(made(OneMapForAll(), images), (images, labels), "relu")


class Fourier(nn.Module):
    """A complex parameter: casting it to float32 would drop its imaginary part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.relu = nn.ReLU()
        generator = torch.Generator().manual_seed(3)
        self.mix = nn.Parameter(torch.randn(8, 12, 7, dtype=torch.complex64, generator=generator))
        self.head = nn.Linear(8, networks.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft2(self.relu(self.conv(x))) * self.mix
        return self.head(torch.fft.irfft2(y, s=(12, 12)).relu().mean(dim=(2, 3)))


def test_complex_parameters_stay_complex() -> None:
    images, labels = data()
    model = Fourier().eval()
    with torch.no_grad():
        for tensor in (model.conv.weight, model.head.weight):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
        expected = model(images).argmax(dim=1)
    result = check(model, (images, labels), "relu")
    assert (result.baseline == expected.numpy()).all()


def test_an_ambient_autocast_does_not_reach_in() -> None:
    images, labels = data()
    model = networks.network("residual", 17)[0]
    expected = pa.ablate(model, (images, labels), precision="fp32", progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        result = pa.ablate(model, (images, labels), precision="fp32", progress=False)
        assert torch.is_autocast_enabled("cpu")
    assert (result.predictions() == expected.predictions()).all()


def test_rounding_is_measured_where_logits_cancel() -> None:
    images, labels = data()
    model = made(Between(lambda y: (y.relu() + 3e4) - 3e4), images)
    check(model, (images, labels), "relu")


@pytest.mark.parametrize(
    "mix", [lambda y: y * (1 + y.mean()), lambda y: y - y.mean(dim=0)], ids=["scale", "centre"]
)
def test_images_that_depend_on_one_another_are_refused(mix: Callable[[Tensor], Tensor]) -> None:
    images, labels = data()
    model = made(Between(mix), images)
    with pytest.raises(ValueError, match="other images of its batch"):
        pa.ablate(model, (images, labels), progress=False)


class Squeezes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3)
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, networks.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.adaptive_avg_pool2d(self.relu(self.conv(x)), 1).squeeze())


@pytest.mark.parametrize("strategy", ["auto", "replay"])
@pytest.mark.parametrize("images", [1, 17])
def test_a_last_batch_of_one_image(images: int, strategy: str) -> None:
    x, labels = data(17)
    model = made(Squeezes(), x)
    x, labels = x[:images], labels[:images]
    result = pa.ablate(model, (x, labels), batch_size=16, strategy=strategy, progress=False)
    with torch.no_grad():
        expected = model(torch.cat([x, x])).argmax(dim=1)[:images]
    assert (result.baseline == expected.numpy()).all()
    assert result.audit.mismatches + result.audit.mended == 0


def test_old_weight_norm_after_training() -> None:
    images, labels = data()
    model = made(Between(torch.relu), images)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.conv1)
    model(images).sum().backward()  # leaves conv1.weight with a history
    assert len(pa.ablate(model, (images, labels), progress=False).units) == 16


def test_planning_draws_nothing() -> None:
    images, labels = data()
    before = torch.get_rng_state()
    pa.plan(networks.network("residual", 17)[0], (images, labels))
    assert torch.equal(before, torch.get_rng_state())


def test_a_layer_that_reaches_no_logit_can_be_planned_and_run() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.head = nn.ReLU(), nn.Linear(288, networks.CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.flatten(1)) + 0 * self.idle(x).detach().shape[0]

    images, labels = data()
    model = made(Idle(), images)
    assert pa.plan(model, (images, labels), "idle").table["live"].tolist() == [0.0]
    assert len(pa.ablate(model, (images, labels), "idle", progress=False).flips.image) == 0


def test_a_loader_with_batches_of_its_own() -> None:
    images, labels = data(17)
    sampler = BatchSampler(SequentialSampler(range(6)), 4, drop_last=False)
    loader = DataLoader(TensorDataset(images, labels), batch_sampler=sampler)
    result = pa.ablate(networks.network("residual", 17)[0], loader, audit=40, progress=False)
    assert len(result.labels) == 6
    assert result.audit.pairs == 40


def test_an_iterable_that_gives_the_same_iterator_twice() -> None:
    class Stubborn:
        def __init__(self, pieces: Iterator[Data]) -> None:
            self.pieces = pieces

        def __iter__(self) -> Iterator[Data]:
            return self.pieces

    images, labels = data(17)
    pieces = iter([(images[:10], labels[:10]), (images[10:], labels[10:])])
    result = pa.ablate(networks.network("residual", 17)[0], Stubborn(pieces), progress=False)
    assert (result.labels == labels.numpy()).all()


def test_a_direction_beyond_the_matrix() -> None:
    images, labels = data()
    two = pa.Intervention("direction", directions=torch.eye(8)[:, :2])
    model = made(Between(torch.relu), images)
    with pytest.raises(ValueError, match=r"2 units \(0 to 1\)"):
        pa.ablate(model, (images, labels), "relu:5", intervention=two, progress=False)


@pytest.mark.parametrize("intervention", ["zero", "mean", "class_mean", "noise"])
def test_a_label_beyond_the_classes(intervention: str) -> None:
    images, labels = data()
    labels = labels.clone()
    labels[9] = 99
    with pytest.raises(ValueError, match="label 99 of image 9"):
        pa.ablate(
            networks.network("residual", 17)[0],
            (images, labels),
            intervention=intervention,
            progress=False,
        )


def test_a_failed_replacement_brings_the_old_result_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = pa.ablate(networks.network("residual", 17)[0], data(), progress=False)
    target = tmp_path / "run.zarr"
    result.save(target)
    rename = store.os.rename
    calls = iter([rename, None, rename])

    def fail_second(source: object, goal: object) -> None:
        call = next(calls)
        if call is None:
            raise OSError("the disk is gone")
        call(source, goal)

    monkeypatch.setattr(store.os, "rename", fail_second)
    with pytest.raises(OSError, match="disk is gone"):
        result.save(target)
    assert np.array_equal(pa.load(target).baseline, result.baseline)


def test_images_that_the_model_cannot_take() -> None:
    images, labels = data()
    with pytest.raises(ValueError, match=r"the model fails on images of shape \[4, 12, 12\]"):
        pa.ablate(networks.network("residual", 17)[0], (images.repeat(1, 2, 1, 1), labels))


def test_a_group_of_one_unit_is_a_group() -> None:
    model = networks.network("residual", 17)[0]
    result = check(model, data(), groups=[["body.2:1"], ["body.2:1", "body.2:2"]])
    assert result.units["unit"].tolist() == [-1, -1]
