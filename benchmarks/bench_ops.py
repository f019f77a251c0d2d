"""Native operations against what one would write in plain PyTorch, one call each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest
import torch
from measure import Settings, in_turn, ratio, say, stopwatch, write
from torch import Tensor
from torch.nn import functional

from pyablate import ops

CALLS = 5  # of each per round, one after the other


@dataclass(frozen=True)
class Case:
    """Two ways to the same tensor, and whether it must be the same bit for bit."""

    shape: str
    ours: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    exact: bool
    tolerance: float = 1e-5


def random(device: str, *shape: int) -> Tensor:
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def pairs(device: str, images: int, units: int) -> tuple[Tensor, Tensor]:
    """All pairs, unit after unit: int32 image and unit."""
    image = torch.arange(images, dtype=torch.int32, device=device).repeat(units)
    unit = torch.arange(units, dtype=torch.int32, device=device).repeat_interleave(images)
    return image, unit


def unit_delta(device: str) -> Case:
    images, units, outputs, size = 64, 32, 64, 14
    delta = random(device, images, units, size, size)
    filters = random(device, outputs, units, 3, 3)
    base = random(device, images, outputs, size, size)
    image, column = pairs(device, images, units)
    channel = torch.arange(units, dtype=torch.int32, device=device)
    weight = filters.permute(1, 2, 3, 0).contiguous()
    before = base.relu()

    def plain() -> Tensor:
        """One convolution with one input channel for each unit, all images at once."""
        parts = []
        for unit in range(units):
            one = slice(unit, unit + 1)
            change = functional.conv2d(delta[:, one], filters[:, one], padding=1)
            parts.append((base + change).relu_().sub_(before))
        return torch.cat(parts)

    def ours() -> Tensor:
        return ops.unit_delta(
            delta,
            weight,
            channel,
            image,
            column,
            padding=1,
            activation=ops.Activation("relu"),
            base=base,
        )

    shape = f"{len(image):,} pairs, 1 -> {outputs} channels 3 x 3 on {size} x {size}, then ReLU"
    return Case(shape, ours, plain, exact=False)


def delta_winograd(device: str) -> Case:
    images, count, channels, size = 8, 64, 128, 14
    delta, base = (random(device, n, channels, size, size) for n in (count, images))
    weight = random(device, channels, channels, 3, 3) / (9 * channels) ** 0.5
    image = torch.arange(count, dtype=torch.int32, device=device) % images
    filters, relu = ops.winograd_filters(weight), ops.Activation("relu")

    def plain() -> Tensor:
        """PyTorch's convolution, and the activation in a pass of its own."""
        change = functional.conv2d(delta, weight, padding=1)
        return ops.delta_activation(base, change, image, relu, out=change)

    def ours() -> Tensor:
        return ops.delta_winograd(
            delta, weight, filters, padding=1, activation=relu, base=base, image=image
        )

    shape = f"{count} pairs, {channels} -> {channels} channels 3 x 3 on {size} x {size}, then ReLU"
    return Case(shape, ours, plain, exact=False, tolerance=1e-4)


def depthwise(device: str) -> Case:
    x = random(device, 8, 672, 14, 14).double()
    weight = random(device, 672, 1, 5, 5).double()
    return Case(
        "8 images x 672 channels by 5 x 5 on 14 x 14, float64",
        lambda: ops.depthwise(x, weight, padding=2),
        lambda: functional.conv2d(x, weight, padding=2, groups=672),
        exact=False,
    )


def delta_activation(device: str) -> Case:
    base, delta = random(device, 64, 64, 14, 14), random(device, 1024, 64, 14, 14)
    image = torch.arange(1024, dtype=torch.int32, device=device) % 64
    long, relu = image.long(), ops.Activation("relu")
    before = base.relu()
    return Case(
        "1,024 pairs x 64 x 14 x 14, ReLU",
        lambda: ops.delta_activation(base, delta, image, relu),
        lambda: (base[long] + delta).relu_().sub_(before[long]),
        exact=False,
    )


def ends_of_a_difference(device: str) -> Case:
    """Do what stands before and behind a function that has no rule of its own."""
    base, delta = random(device, 16, 197, 192), random(device, 128, 197, 192)
    image = torch.arange(128, dtype=torch.int32, device=device) % 16
    long = image.long()

    def plain() -> Tensor:
        after = base.index_select(0, long) + delta
        rows = base.index_select(0, long)
        return torch.where(after == rows, torch.zeros_like(after), after - rows)

    return Case(
        "128 pairs x 197 x 192: added to the intact rows and taken off again",
        lambda: ops.subtracted(ops.perturbed(base, delta, image), base, image),
        plain,
        exact=True,
    )


def delta_product(device: str) -> Case:
    """Multiply maps by the gates of squeeze and excite, where both change."""
    base, delta = random(device, 16, 96, 14, 14), random(device, 256, 96, 14, 14)
    gate, other = random(device, 16, 96, 1, 1), random(device, 256, 96, 1, 1)
    image = torch.arange(256, dtype=torch.int32, device=device) % 16
    long, before = image.long(), base * gate

    def plain() -> Tensor:
        after = (base[long] + delta) * (gate[long] + other)
        return after - before[long]

    return Case(
        "256 pairs x 96 x 14 x 14 by 96 gates",
        lambda: ops.delta_product(base, delta, gate, other, image),
        plain,
        exact=False,
    )


def delta_max_pool(device: str) -> Case:
    base, delta = random(device, 64, 64, 14, 14), random(device, 1024, 64, 14, 14)
    image = torch.arange(1024, dtype=torch.int32, device=device) % 64
    long, relu = image.long(), ops.Activation("relu")
    before = functional.max_pool2d(base.relu(), 2)
    return Case(
        "1,024 pairs x 64 x 14 x 14, ReLU, then 2 x 2",
        lambda: ops.delta_max_pool(
            base, delta, image, kernel=2, stride=2, out_size=(7, 7), activation=relu
        ),
        lambda: functional.max_pool2d((base[long] + delta).relu_(), 2).sub_(before[long]),
        exact=False,
    )


def head_flips(device: str) -> Case:
    images, units, classes = 64, 512, 1000
    logits, weight = 3 * random(device, images, classes), 0.05 * random(device, classes, units)
    delta = -random(device, images, units).relu()
    baseline = logits.argmax(1).int()
    tolerance = torch.zeros(images, device=device)
    columns = weight.t().contiguous()

    def plain() -> Tensor:
        out = torch.empty(images, units, dtype=torch.int32, device=device)
        for n in range(images):
            out[n] = torch.addcmul(logits[n], delta[n, :, None], columns).argmax(1)
        return out

    return Case(
        f"{images} images x {units} units x {classes:,} classes",
        lambda: ops.head_flips(logits, delta, weight, baseline, tolerance),
        plain,
        exact=True,
    )


def classify(device: str) -> Case:
    logits, delta = random(device, 64, 10), random(device, 65536, 10)
    image = torch.arange(65536, dtype=torch.int32, device=device) % 64
    long, tolerance = image.long(), torch.full((64,), 1e-3, device=device)

    def plain() -> Tensor:
        top = (logits[long] + delta).topk(2, dim=1)
        clear = top.values[:, 0] - top.values[:, 1] > tolerance[long]
        return torch.where(clear, top.indices[:, 0], -1).int()

    return Case(
        "65,536 pairs x 10 classes",
        lambda: ops.classify(logits, delta, image, tolerance),
        plain,
        exact=True,
    )


def masked_copies(device: str) -> Case:
    x = random(device, 64, 64, 14, 14)
    image, unit = pairs(device, 64, 16)
    row, long_image, long_unit = torch.arange(1024, device=device), image.long(), unit.long()

    def plain() -> Tensor:
        out = x[long_image]
        out[row, long_unit] = 0
        return out

    return Case(
        "1,024 pairs x 64 x 14 x 14", lambda: ops.masked_copies(x, image, unit, 0.0), plain, True
    )


def confusion_counts(device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(10, (256, 10_000), generator=generator).int().to(device)
    label = torch.randint(10, (10_000,), generator=generator).int().to(device)
    row = torch.arange(256, device=device).unsqueeze(1) * 100

    def plain() -> Tensor:
        cell = label.long() * 10 + prediction.long() + row
        return torch.bincount(cell.flatten(), minlength=25_600).int().view(256, 10, 10)

    return Case(
        "256 units x 10,000 images x 10 classes",
        lambda: ops.confusion_counts(prediction, label, 10),
        plain,
        exact=True,
    )


CASES = (
    unit_delta,
    delta_winograd,
    depthwise,
    delta_activation,
    ends_of_a_difference,
    delta_product,
    delta_max_pool,
    head_flips,
    classify,
    masked_copies,
    confusion_counts,
)


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_op(benchmark: Any, settings: Settings, make: Callable[[str], Case]) -> None:
    case = make(settings.device)
    if case.exact:
        assert torch.equal(case.ours(), case.plain())
    else:
        torch.testing.assert_close(
            case.ours(), case.plain(), rtol=case.tolerance, atol=case.tolerance
        )
    ours, theirs = in_turn(
        benchmark,
        lambda: stopwatch(case.ours, settings.device, CALLS),
        {"torch": lambda: stopwatch(case.plain, settings.device, CALLS)},
        3 * settings.rounds,
    )
    found = ratio(theirs["torch"], ours)
    name = make.__name__
    rivals = {"torch": {"seconds": theirs["torch"], **found}}
    record = {"group": "ops", "shape": case.shape, "seconds": ours, "rivals": rivals}
    write(f"op {name}", record, settings)
    benchmark.extra_info["torch"] = round(found["ratio"], 2)
    say(f"{name}: {1e3 * median(ours):.2f} ms, plain torch {found['ratio']:.1f} x")
