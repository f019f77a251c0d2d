"""class_moments and joint_histogram: reference against loops, twins against the reference."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from ops_cases import CORE, TWINS, index, random_index, random_maps, using_twin, without_native
from torch import Tensor

from pyablate.moments import ClassMoments, class_moments, joint_histogram

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


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def by_loops(x: Tensor, label: Tensor, classes: int, axis: int) -> dict[str, np.ndarray]:
    maps = np.moveaxis(x.double().numpy(), axis, 1)
    images, units = maps.shape[:2]
    maps = maps.reshape(images, units, -1)
    total, square = np.zeros((2, units, classes))
    maximum = np.full((units, classes), -np.inf)
    active = np.zeros((units, classes), dtype=np.int64)
    for n in range(images):
        for c in range(units):
            k, mean = int(label[n]), maps[n, c].mean()
            total[c, k] += mean
            square[c, k] += mean**2
            maximum[c, k] = max(maximum[c, k], mean)
            active[c, k] += bool((maps[n, c] > 0).any())
    return {
        "pooled": maps.mean(axis=2),
        "least": maps.min(axis=(0, 2)),
        "positive": (maps > 0).sum(axis=(0, 2)),
        "total": total,
        "square": square,
        "maximum": maximum,
        "active": active,
        "count": np.bincount(label.numpy(), minlength=classes),
    }


def check(found: ClassMoments, expected: dict[str, np.ndarray], *, rtol: float) -> None:
    for name, values in expected.items():
        got = getattr(found, name).cpu().numpy()
        if np.issubdtype(values.dtype, np.integer):
            np.testing.assert_array_equal(got, values, err_msg=name)
        else:
            np.testing.assert_allclose(got, values, rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_reference_is_the_formula(shape, axis, dtype):
    x, label = random_maps(*shape, dtype=dtype, zeros=0.3), random_index(shape[0], 4)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    with without_native():
        found = class_moments(x, label, 4, axis=axis)
    check(found, by_loops(x, label, 4, axis), rtol=rtol)
    assert found.positions == x[0].numel() // x.shape[axis]


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_twins(twin, shape, axis, dtype):
    x, label = random_maps(*shape, dtype=dtype, zeros=0.3), random_index(shape[0], 4)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    with using_twin(twin) as device:
        found = class_moments(x.to(device), label.to(device), 4, axis=axis)
    check(found, by_loops(x, label, 4, axis), rtol=rtol)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_least_of_one_sign(twin, sign):
    x, label = sign * random_maps(5, 40, 3, 3).abs(), random_index(5, 2)
    with using_twin(twin) as device:
        found = class_moments(x.to(device), label.to(device), 2)
    assert torch.equal(found.least.cpu(), x.amin(dim=(0, 2, 3)))


@pytest.mark.parametrize("twin", TWINS)
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
def test_layouts(twin, layout):
    x = layout(random_maps(4, 70, 9, 11, zeros=0.2))
    label = random_index(len(x), 3)
    with using_twin(twin) as device:
        found = class_moments(x.to(device), label.to(device), 3)
    check(found, by_loops(x, label, 3, 1), rtol=1e-5)


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
            found.append(class_moments(x, label, 3))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for field in fields(ClassMoments):
            a, b = getattr(found[0], field.name), getattr(other, field.name)
            assert a == b if isinstance(a, int) else torch.equal(a, b)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize(("units", "images", "bins"), [(1, 1, 1), (3, 0, 2), (5, 37, 4)])
def test_joint_histogram(units, images, bins, classes):
    code = torch.randint(bins, (units, images), dtype=torch.int32)
    label = random_index(images, classes)
    expected = np.zeros((units, bins, classes), dtype=np.int32)
    for u in range(units):
        for n in range(images):
            expected[u, code[u, n], label[n]] += 1
    found = joint_histogram(code, label, bins, classes)
    assert found.dtype == torch.int32
    np.testing.assert_array_equal(found.numpy(), expected)


X, LABEL = torch.zeros(2, 3, 4), index([0, 1])


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor"),
        ({"x": X.int()}, TypeError, "x: expected dtype"),
        ({"x": X[:, :0]}, ValueError, "x: expected images"),
        ({"x": X[:0], "label": LABEL[:0]}, ValueError, "x: expected images"),
        ({"axis": 0}, ValueError, "axis"),
        ({"axis": 3}, ValueError, "axis"),
        ({"classes": 0}, ValueError, "classes"),
        ({"classes": 1}, ValueError, "label: expected indices from 0 to 0"),
        ({"label": LABEL.long()}, TypeError, "label: expected dtype"),
        ({"label": LABEL[:1]}, ValueError, "label: expected shape"),
    ],
)
def test_bad_arguments(change, error, named):
    arguments = {"x": X, "label": LABEL, "classes": 2, "axis": 1, **change}
    with pytest.raises(error, match=named):
        class_moments(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"code": LABEL}, ValueError, "code: expected 2 dimensions"),
        ({"bins": 0}, ValueError, "bins"),
        ({"bins": 1}, ValueError, "code: expected indices from 0 to 0"),
        ({"label": LABEL[:1]}, ValueError, "label: expected shape"),
    ],
)
def test_bad_histogram_arguments(change, error, named):
    arguments = {"code": LABEL.unsqueeze(0), "label": LABEL, "bins": 2, "classes": 2, **change}
    with pytest.raises(error, match=named):
        joint_histogram(**arguments)
