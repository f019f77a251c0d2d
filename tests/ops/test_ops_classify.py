"""head_flips, classify and confusion_counts: the same integers from every backend."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ops_cases import (
    LAYOUTS,
    TWINS,
    index,
    on_device,
    on_reference,
    random_index,
    random_maps,
    using_backend,
)

from pyablate import ops

CLASSES = [1, 2, 3, 10, 16, 17, 33, 1000]
REAL = [torch.float32, torch.float64]


def decide_one_by_one(values, limit):
    """Decide in plain Python: the lowest class among the largest values, -1 if not clear."""
    best = max(range(len(values)), key=lambda k: (values[k], -k))
    others = [v for k, v in enumerate(values) if k != best]
    clear = not others or values[best] - max(others) > limit
    return best if clear else -1


def test_reference_decides_as_plain_python_does():
    torch.manual_seed(0)
    logits = torch.randint(-3, 4, (6, 5)).float()  # many equal values
    delta = torch.randint(-1, 2, (40, 5)).float()
    image, tolerance = random_index(40, 6), torch.tensor([0.0, -1.0, 0.5, 1.0, 1.5, -0.5])
    result = on_reference(ops.classify, logits, delta, image, tolerance)
    expected = [
        decide_one_by_one((logits[i] + delta[p]).tolist(), float(tolerance[i]))
        for p, i in enumerate(image.tolist())
    ]
    assert result.tolist() == expected
    assert -1 in expected
    assert 0 in expected


def test_reference_head_flips_is_the_formula():
    torch.manual_seed(1)
    logits, delta, weight = torch.randn(4, 7), torch.randn(4, 6), torch.randn(7, 6)
    tolerance = torch.tensor([0.0, 0.2, 0.5, -1.0])
    baseline = logits.argmax(1).int()
    result = on_reference(ops.head_flips, logits, delta, weight, baseline, tolerance)
    for n in range(4):
        for u in range(6):
            values = logits[n] + delta[n, u] * weight[:, u]
            assert result[n, u] == decide_one_by_one(values.tolist(), float(tolerance[n]))


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_head_flips_equals_reference(backend, dtype, classes):
    torch.manual_seed(classes)
    logits = torch.randn(9, classes).to(dtype)
    delta = random_maps(9, 300, dtype=dtype, zeros=0.3) / 2
    weight = torch.randn(classes, 300).to(dtype)
    baseline, tolerance = logits.argmax(1).int(), torch.rand(9).to(dtype) / 4
    baseline[3] = (baseline[3] + 1) % classes  # not the winner: nothing may be taken for settled
    expected = on_reference(ops.head_flips, logits, delta, weight, baseline, tolerance)
    with using_backend(backend) as device:
        result = on_device(ops.head_flips, device, logits, delta, weight, baseline, tolerance)
    assert torch.equal(result, expected)
    assert classes < 3 or len(expected.unique()) > 2


@pytest.mark.parametrize("backend", TWINS)
def test_head_flips_is_right_at_the_very_tolerance(backend):
    # Margins within a few roundings of the tolerance: the shortcut must leave them to the scan.
    torch.manual_seed(2)
    logits = torch.randn(500, 12) * 100
    delta, weight = torch.randn(500, 8), torch.randn(12, 8)
    values = logits.unsqueeze(1) + delta.unsqueeze(2) * weight.t()
    top = values.topk(2).values
    tolerance = (top[..., 0] - top[..., 1])[:, 0] * (1 + torch.randint(-3, 4, (500,)) * 1e-7)
    baseline = logits.argmax(1).int()
    expected = on_reference(ops.head_flips, logits, delta, weight, baseline, tolerance)
    with using_backend(backend) as device:
        result = on_device(ops.head_flips, device, logits, delta, weight, baseline, tolerance)
    assert torch.equal(result, expected)
    assert {True, False} == set((expected[:, 0] == -1).tolist())


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_classify_equals_reference(backend, dtype, classes):
    torch.manual_seed(classes)
    logits, delta = torch.randn(7, classes).to(dtype), torch.randn(311, classes).to(dtype)
    image, tolerance = random_index(311, 7), torch.rand(7).to(dtype) / 3
    with using_backend(backend) as device:
        for relative in (0.0, 0.03):
            expected = on_reference(
                ops.classify, logits, delta, image, tolerance, relative=relative
            )
            result = on_device(
                ops.classify, device, logits, delta, image, tolerance, relative=relative
            )
            assert torch.equal(result, expected)


@pytest.mark.parametrize("backend", TWINS)
def test_ties_take_the_lowest_class_and_nan_decides_nothing(backend):
    logits = torch.zeros(3, 40)
    logits[1, [5, 39]] = 1.0
    logits[2, 17] = torch.nan
    delta, image = torch.zeros(3, 40), index([0, 1, 2])
    with using_backend(backend) as device:
        loose = on_device(ops.classify, device, logits, delta, image, torch.full((3,), -1.0))
        strict = on_device(ops.classify, device, logits, delta, image, torch.zeros(3))
        flips = on_device(
            ops.head_flips,
            device,
            logits,
            torch.zeros(3, 2),
            torch.zeros(40, 2),
            index([0, 5, 0]),
            torch.full((3,), -1.0),
        )
    assert loose.tolist() == [0, 5, -1]
    assert strict.tolist() == [-1, -1, -1]
    assert flips.tolist() == [[0, 0], [5, 5], [-1, -1]]


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed", "expanded", "offset"])
def test_decisions_of_any_layout(backend, layout):
    torch.manual_seed(3)
    arrange = LAYOUTS[layout]
    logits, delta = arrange(torch.randn(5, 9)), arrange(torch.randn(8, 9))
    weight, pooled = arrange(torch.randn(9, 6)), arrange(torch.randn(5, 6))
    baseline, image = logits.argmax(1).int(), random_index(8, 5)
    tolerance = torch.full((10,), 0.1)[::2]
    with using_backend(backend) as device:
        for op, arguments in [
            (ops.classify, (logits, delta, image, tolerance)),
            (ops.head_flips, (logits, pooled, weight, baseline, tolerance)),
        ]:
            assert torch.equal(on_device(op, device, *arguments), on_reference(op, *arguments))


def test_bfloat16_logits_are_raised():
    logits, delta = torch.randn(3, 9).bfloat16(), torch.randn(4, 9)
    image, tolerance = index([0, 1, 2, 0]), torch.zeros(3)
    result = ops.classify(logits, delta, image, tolerance)
    assert torch.equal(result, ops.classify(logits.float(), delta, image, tolerance))


def count_one_by_one(prediction, label, classes):
    counts = np.zeros((len(prediction), classes, classes), dtype=np.int32)
    for u, row in enumerate(prediction.tolist()):
        for true, predicted in zip(label.tolist(), row, strict=True):
            counts[u, true, predicted] += 1
    return torch.from_numpy(counts)


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize(
    ("units", "images", "classes"), [(3, 100, 10), (0, 5, 2), (2, 0, 3), (2, 300, 150), (40, 33, 1)]
)
def test_confusion_counts(backend, units, images, classes):
    torch.manual_seed(4)
    prediction = torch.randint(0, classes, (units, images), dtype=torch.int32)
    label = random_index(images, classes)
    expected = count_one_by_one(prediction, label, classes)
    assert torch.equal(on_reference(ops.confusion_counts, prediction, label, classes), expected)
    strided = torch.full((images, units), -7, dtype=torch.int32)
    strided[:] = prediction.t()
    with using_backend(backend) as device:
        for rows in (prediction, strided.t()):
            result = on_device(ops.confusion_counts, device, rows, label, classes)
            assert torch.equal(result, expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(0, 20), st.integers(0, 2**31), st.booleans())
def test_head_flips_of_any_shape(classes, units, seed, wide):
    torch.manual_seed(seed)
    dtype = torch.float64 if wide else torch.float32
    logits = torch.randint(-4, 5, (6, classes)).to(dtype)  # exact ties are common
    delta = torch.randint(-2, 3, (6, units)).to(dtype)
    weight = torch.randint(-2, 3, (classes, units)).to(dtype)
    tolerance = torch.randint(-1, 3, (6,)).to(dtype)
    baseline = random_index(6, classes)
    arguments = (logits, delta, weight, baseline, tolerance)
    assert torch.equal(ops.head_flips(*arguments), on_reference(ops.head_flips, *arguments))
