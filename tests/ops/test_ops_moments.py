"""Moments of maps, moments and ranks by class: reference against loops, backends against loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support.ops_cases import (
    CORE,
    TWINS,
    index,
    random_index,
    random_maps,
    using_backend,
    without_native,
)
from torch import Tensor

from pyablate.ops.moments import MapMoments, class_moments, class_ranks, map_moments

# images, units, the other axes, axis of the units
SHAPES = [
    ((1, 1), 1),
    ((7, 33), 1),
    ((5, 3, 1), 1),
    ((6, 31, 4), 1),
    ((4, 9, 65), 2),
    ((3, 5, 7, 9), 1),
    ((2, 2, 32, 33), 1),
    ((3, 6, 5, 111), 3),
    ((2, 3, 4, 2, 5), 2),
    ((2, 3, 1, 1025), 1),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
CLASSES = 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def agree(found: Any, expected: dict[str, np.ndarray], *, rtol: float) -> None:
    for name, values in expected.items():
        got = getattr(found, name).cpu().numpy()
        if np.issubdtype(values.dtype, np.integer):
            np.testing.assert_array_equal(got, values, err_msg=name)
        else:
            np.testing.assert_allclose(got, values, rtol=rtol, atol=rtol, err_msg=name)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 1e-5


# --- map_moments ----------------------------------------------------------------------------------


def maps_by_loops(x: Tensor, axis: int) -> dict[str, np.ndarray]:
    maps = np.moveaxis(x.double().numpy(), axis, 0)
    maps = maps.reshape(*maps.shape[:2], -1)
    return {
        "pooled": maps.mean(axis=2),
        "active": (maps > 0).any(axis=2).astype(np.uint8),
        "least": maps.min(axis=(1, 2)),
        "positive": (maps > 0).sum(axis=(1, 2)),
    }


def reduced(x: Tensor, axis: int = 1) -> MapMoments:
    into = MapMoments.empty(x.shape[axis], len(x), x.dtype, x.device)
    map_moments(x, into, axis=axis)
    return into


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_reference_of_maps_is_the_formula(shape, axis, dtype):
    x = random_maps(*shape, dtype=dtype, zeros=0.3)
    with without_native():
        found = reduced(x, axis)
    agree(found, maps_by_loops(x, axis), rtol=tolerance(dtype))


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_maps(backend, shape, axis, dtype):
    x = random_maps(*shape, dtype=dtype, zeros=0.3)
    with using_backend(backend) as device:
        found = reduced(x.to(device), axis)
    agree(found, maps_by_loops(x, axis), rtol=tolerance(dtype))


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_least_of_one_sign(backend, sign):
    x = sign * random_maps(5, 40, 3, 3).abs()
    with using_backend(backend) as device:
        found = reduced(x.to(device))
    assert torch.equal(found.least.cpu(), x.amin(dim=(0, 2, 3)))
    assert torch.equal(found.active.cpu(), torch.full((40, 5), int(sign > 0), dtype=torch.uint8))


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: x[:, ::2],
        lambda x: x[1:],
        lambda x: x[:, :1].expand(-1, 5, -1, -1),
    ],
    ids=["channels_last", "transposed", "sliced", "offset", "expanded"],
)
def test_layouts(backend, layout):
    x = layout(random_maps(4, 70, 9, 11, zeros=0.2))
    with using_backend(backend) as device:
        found = reduced(x.to(device))
    agree(found, maps_by_loops(x, 1), rtol=1e-5)


@pytest.mark.parametrize("backend", [None, *TWINS])
def test_batch_after_batch_into_the_same_tables(backend):
    x = random_maps(11, 37, 5, 3, zeros=0.5)
    with without_native() if backend is None else using_backend(backend) as device:
        x = x.to(device or "cpu")
        whole = MapMoments.empty(37, 11, x.dtype, x.device)
        whole.pooled.fill_(torch.nan)
        for first, last in ((4, 11), (0, 1), (1, 4)):
            map_moments(x[first:last], whole.part(first, last - first))
    agree(whole, maps_by_loops(x.cpu(), 1), rtol=1e-5)


# --- class_moments --------------------------------------------------------------------------------


def moments_by_loops(pooled: Tensor, active: Tensor, label: Tensor) -> dict[str, np.ndarray]:
    units, images = pooled.shape
    total, square = np.zeros((2, units, CLASSES))
    maximum = np.full((units, CLASSES), -np.inf)
    active_images = np.zeros((units, CLASSES), dtype=np.int64)
    for u in range(units):
        for n in range(images):
            k, value = int(label[n]), float(pooled[u, n])
            total[u, k] += value
            square[u, k] += value**2
            maximum[u, k] = max(maximum[u, k], value)
            active_images[u, k] += int(active[u, n])
    return {"total": total, "square": square, "maximum": maximum, "active_images": active_images}


@pytest.mark.parametrize("backend", [None, *TWINS])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("units", "images"), [(1, 1), (3, 0), (0, 5), (33, 7), (2, 1025)])
def test_class_moments(backend, dtype, units, images):
    pooled, active = torch.randn(units, images, dtype=dtype), torch.rand(units, images) < 0.5
    label = random_index(images, CLASSES - 1)  # the last class has no images
    arguments = pooled, active.to(torch.uint8), label
    with without_native() if backend is None else using_backend(backend) as device:
        found = class_moments(*(a.to(device or "cpu") for a in arguments), CLASSES)
    agree(found, moments_by_loops(*arguments), rtol=1e-12)


# --- class_ranks ----------------------------------------------------------------------------------


@dataclass
class Ranking:
    """Images, what is asked for, and how many units."""

    x: Tensor
    label: Tensor
    bins: int = 5
    top: int = 7


def ranks_by_loops(case: Ranking) -> dict[str, np.ndarray]:
    x, label, bins = case.x.double().numpy(), case.label.numpy(), case.bins
    units, images = x.shape
    rank_sum, gain, first = np.zeros((3, units, CLASSES), dtype=np.int64)
    quantiles, widths = np.zeros((units, bins, CLASSES), int), np.zeros((units, bins), int)
    for u in range(units):
        best = sorted(range(images), key=lambda n, u=u: (-x[u, n], n))[: case.top]
        for n in best:
            first[u, label[n]] += 1
        low, high = x[u].min(initial=np.inf), x[u].max(initial=-np.inf)
        for n in range(images):
            k, a = label[n], x[u, n]
            at_least = int((x[u] >= a).sum())
            rank_sum[u, k] += int((x[u] > a).sum()) + at_least
            hits = int((x[u, label == k] >= a).sum())
            gain[u, k] = max(gain[u, k], images * hits - int((label == k).sum()) * at_least)
            quantiles[u, (images - at_least) * bins // images, k] += 1
            place = int((a - low) / (high - low) * bins) if high > low else 0
            widths[u, min(place, bins - 1)] += 1
    found = {"rank_sum": rank_sum, "gain": gain, "first": first}
    return {**found, "quantiles": quantiles, "widths": widths}


def ranking(name: str, dtype: torch.dtype) -> Ranking:
    torch.manual_seed(len(name))
    x = torch.randn(9, 90, dtype=torch.float64)
    if name == "ties":
        x = x.clamp(min=0).round(decimals=1)
    elif name == "zeros of both signs":
        x = torch.where(x > 0.5, x, torch.where(x > 0, 0.0, -0.0))
    elif name == "constant":
        x = x[:, :1].expand(-1, 90)
    elif name == "of all sizes":
        x = x * 10.0 ** torch.randint(-40, 30, x.shape)
    elif name.endswith("images"):
        x = torch.randn(3, int(name.split()[0]), dtype=torch.float64).round(decimals=1)
    return Ranking(x.to(dtype), random_index(x.shape[1], CLASSES - 1))


RANKINGS = ["distinct", "ties", "zeros of both signs", "constant", "of all sizes"]
RANKINGS += ["0 images", "1 images", "2 images", "33 images", "255 images", "257 images"]


def ranks(case: Ranking, device: Any = None) -> Any:
    x, label = case.x.to(device or "cpu"), case.label.to(device or "cpu")
    return class_ranks(x, label, CLASSES, bins=case.bins, top=case.top).cpu()


@pytest.mark.parametrize("backend", [None, *TWINS])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", RANKINGS)
def test_class_ranks(backend, dtype, name):
    case = ranking(name, dtype)
    with without_native() if backend is None else using_backend(backend) as device:
        found = ranks(case, device)
    agree(found, ranks_by_loops(case), rtol=0)


@pytest.mark.parametrize("backend", [None, *TWINS])
@pytest.mark.parametrize(("bins", "top"), [(1, 0), (2, 1), (90, 90), (1000, 10**6)])
def test_any_number_of_bins_and_first_images(backend, bins, top):
    case = ranking("ties", torch.float32)
    case.bins, case.top = bins, top
    with without_native() if backend is None else using_backend(backend) as device:
        found = ranks(case, device)
    agree(found, ranks_by_loops(case), rtol=0)


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_counted_within_the_tables(backend, dtype, bad):
    case = ranking("distinct", dtype)
    case.x[:, ::7] = bad
    with using_backend(backend) as device:
        found = ranks(case, device)
    count = torch.bincount(case.label, minlength=CLASSES)
    assert torch.equal(found.quantiles.sum(dim=1), count.int().expand(9, -1))
    assert found.widths.sum(dim=1).tolist() == [90] * 9
    assert found.first.sum(dim=1).tolist() == [case.top] * 9


@pytest.mark.cuda
def test_labels_out_of_range_are_not_counted(monkeypatch):
    case = ranking("distinct", torch.float32)
    case.label[::3], case.label[1::3] = CLASSES, -1
    monkeypatch.setattr("pyablate.ops.moments.check_pairs", lambda *_, **__: None)
    monkeypatch.setattr(torch, "bincount", lambda *_, **__: torch.full((CLASSES,), 30))
    with using_backend("cuda") as device:
        found = ranks(case, device)
    assert int(found.quantiles.sum()) == 9 * 30
    assert int(found.first.sum()) <= 9 * case.top


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.skipif(CORE is None, reason="no native module")
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_number_of_threads_gives_the_same_bytes(channels_last):
    x, label = random_maps(9, 130, 17, 5), random_index(9, 3)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            maps = reduced(x)
            by_class = class_moments(maps.pooled, maps.active, label, 3)
            order = class_ranks(maps.pooled, label, 3, bins=4, top=2)
            found.append([t for part in (maps, by_class, order) for t in vars(part).values()])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


X, INTO, LABEL = torch.zeros(2, 3, 4), MapMoments.empty(3, 2, torch.float32), index([0, 1])


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor"),
        ({"x": X.int()}, TypeError, "x: expected dtype"),
        ({"x": X[:, :0]}, ValueError, "x: expected images"),
        ({"x": X[:0]}, ValueError, "x: expected images"),
        ({"axis": 0}, ValueError, "axis"),
        ({"axis": 3}, ValueError, "axis"),
        ({"x": X[:1]}, ValueError, "into: expected shape"),
        ({"axis": 2}, ValueError, "into: expected shape"),
        ({"x": X.double()}, TypeError, "into: expected dtype"),
    ],
)
def test_bad_arguments_of_maps(change, error, named):
    with pytest.raises(error, match=named):
        map_moments(**{"x": X, "into": INTO, "axis": 1, **change})


POOLED, ACTIVE = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"pooled": X}, ValueError, "pooled: expected 2 dimensions"),
        ({"pooled": POOLED.bfloat16()}, TypeError, "pooled: expected dtype"),
        ({"active": ACTIVE.bool()}, TypeError, "active: expected dtype"),
        ({"active": ACTIVE[:1]}, ValueError, "active: expected shape"),
        ({"classes": 0}, ValueError, "classes"),
        ({"classes": 1}, ValueError, "label: expected indices from 0 to 0"),
        ({"label": LABEL.long()}, TypeError, "label: expected dtype"),
        ({"label": LABEL[:1]}, ValueError, "label: expected shape"),
    ],
)
def test_bad_arguments_of_moments(change, error, named):
    arguments = {"pooled": POOLED, "active": ACTIVE, "label": LABEL, "classes": 2}
    with pytest.raises(error, match=named):
        class_moments(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"x": X}, ValueError, "x: expected 2 dimensions"),
        ({"x": POOLED.int()}, TypeError, "x: expected dtype"),
        ({"bins": 0}, ValueError, "bins"),
        ({"top": -1}, ValueError, "top"),
        ({"classes": 1}, ValueError, "label: expected indices from 0 to 0"),
        ({"label": LABEL[:1]}, ValueError, "label: expected shape"),
    ],
)
def test_bad_arguments_of_ranks(change, error, named):
    arguments = {"x": POOLED, "label": LABEL, "classes": 2, "bins": 2, "top": 1}
    with pytest.raises(error, match=named):
        class_ranks(**{**arguments, **change})
