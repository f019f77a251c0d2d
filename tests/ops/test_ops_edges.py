"""Sizes round those of a warp and a block, and what CUDA does with indices out of range."""

import pytest
import torch
from support.ops_cases import (
    TWINS,
    index,
    on_device,
    on_reference,
    random_index,
    random_maps,
    using_backend,
)

from pyablate import ops
from pyablate.ops import Activation, _checks, _classify

SIZES = [0, 1, 31, 32, 33, 111, 1025]


def classify(size):
    logits, tolerance = torch.randn(3, 33), torch.rand(3) / 3
    return ops.classify, (logits, torch.randn(size, 33), random_index(size, 3), tolerance), {}


def classify_classes(size):
    logits, tolerance = torch.randn(3, size + 1), torch.rand(3) / 3
    return ops.classify, (logits, torch.randn(5, size + 1), random_index(5, 3), tolerance), {}


def head_flips(size):
    logits, weight = torch.randn(2, 10), torch.randn(10, size)
    baseline, tolerance = logits.argmax(1).int(), torch.rand(2) / 3
    return ops.head_flips, (logits, torch.randn(2, size), weight, baseline, tolerance), {}


def confusion_counts(size):
    prediction = torch.randint(0, 7, (3, size), dtype=torch.int32)
    return ops.confusion_counts, (prediction, random_index(size, 7), 7), {}


def confusion_counts_classes(size):
    classes = min(size, 111) + 1  # from 111 on the counts are too many for shared memory
    prediction = torch.randint(0, classes, (2, 50), dtype=torch.int32)
    return ops.confusion_counts, (prediction, random_index(50, classes), classes), {}


def masked_copies(size):
    x = torch.randn(2, 3, size)
    return ops.masked_copies, (x, random_index(5, 2), random_index(5, 3, -1), torch.randn(5)), {}


def delta_max_pool(size):
    base, delta = torch.randn(2, size, 4, 5), random_maps(3, size, 4, 5, zeros=0.5)
    delta = delta.contiguous(memory_format=torch.channels_last)
    geometry = {"kernel": 3, "stride": 2, "padding": 1, "out_size": (2, 3)}
    return ops.delta_max_pool, (base, delta, index([1, 0, 1])), geometry


def delta_max_pool_rows(size):
    base, delta = torch.randn(2, 2, 1, size + 1), random_maps(3, 2, 1, size + 1, zeros=0.5)
    geometry = {"kernel": (1, 2), "stride": 1, "padding": (0, 1), "out_size": (1, size + 2)}
    return ops.delta_max_pool, (base, delta, index([1, 0, 1])), geometry


def delta_activation(size):
    base, delta, addend = torch.randn(2, size), torch.randn(3, size), torch.randn(3, size)
    arguments = base, delta, index([1, 0, 1]), Activation("silu")
    scales = {"scale": torch.rand(3), "addend_scale": torch.rand(3)}
    return ops.delta_activation, arguments, {"addend": addend, **scales}


def perturbed(size):
    return ops.perturbed, (torch.randn(2, size), torch.randn(3, size), index([1, 0, 1])), {}


def subtracted(size):
    after, base = (torch.randn(n, 4, size + 1)[..., :size] for n in (3, 2))
    return ops.subtracted, (after, base, index([1, 0, 1])), {}


def subtracted_runs(size):
    after, base = (torch.randn(n, size, 3)[..., :2] for n in (3, 2))
    return ops.subtracted, (after, base, index([1, 0, 1])), {}


def delta_product(size):
    factors = torch.randn(2, 3, size), torch.randn(3, 3, size)
    return ops.delta_product, (*factors, *factors, index([1, 0, 1])), {}


def delta_product_of_maps(size):
    factors = torch.randn(2, 3, 1, size), torch.randn(3, 3, 1, size)
    gates = torch.randn(2, 3, 1, 1), torch.randn(3, 3, 1, 1)
    return ops.delta_product, (*factors, *gates, index([1, 0, 1])), {}


def delta_mean_positions(size):
    base, delta = torch.randn(2, 3, 1, size + 1), torch.randn(3, 3, 1, size + 1)
    arguments = base, delta, index([1, 0, 1]), Activation("relu")
    return ops.delta_mean, arguments, {"scale": torch.rand(3)}


def delta_mean_channels(size):
    base, delta, addend = (torch.randn(n, size, 3, 2) for n in (2, 3, 3))
    delta = delta.contiguous(memory_format=torch.channels_last)
    arguments = base, delta, index([1, 0, 1]), Activation("gelu")
    return ops.delta_mean, arguments, {"addend": addend, "addend_scale": torch.rand(3)}


def unit_delta(size):
    maps, weight = random_maps(2, 3, 3, 5, zeros=0.5), torch.randn(4, 3, 3, max(size, 1))
    pairs = 0 if size == 0 else 3
    indices = random_index(3, 4), random_index(pairs, 2), random_index(pairs, 3)
    return ops.unit_delta, (maps, weight, *indices), {"padding": 1, "stride": (1, 2)}


CASES = [
    classify,
    classify_classes,
    head_flips,
    confusion_counts,
    confusion_counts_classes,
    masked_copies,
    delta_max_pool,
    delta_max_pool_rows,
    delta_activation,
    perturbed,
    subtracted,
    subtracted_runs,
    delta_product,
    delta_product_of_maps,
    delta_mean_positions,
    delta_mean_channels,
    unit_delta,
]


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_equals_reference_at_any_size(backend, size, case):
    torch.manual_seed(size)
    op, arguments, options = case(size)
    expected = on_reference(op, *arguments, **options)
    with using_backend(backend) as device:
        result = on_device(op, device, *arguments, **options)
    assert result.shape == expected.shape
    exact = not expected.is_floating_point() or op is ops.masked_copies
    torch.testing.assert_close(
        result, expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5
    )


@pytest.fixture
def cuda(monkeypatch):
    """Give the CUDA backend's device; indices are not looked at beforehand, wherever it runs."""
    for module in (_checks, _classify):
        monkeypatch.setattr(module, "check_range", lambda *_: None)
    with using_backend("cuda") as device:
        yield device


BAD = index([0, 2, -1, 1, 2**31 - 1])  # of two rows
GOOD = [0, 3]


def check_rows(result, expected):
    """Check that only the rows in GOOD were computed; the others are NaN."""
    torch.testing.assert_close(result[GOOD], expected[GOOD], rtol=1e-5, atol=1e-5)
    assert result[[1, 2, 4]].isnan().all()


def in_range(values):
    return values.clamp(0, 1)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_rows_out_of_range_are_nan(cuda, dtype):
    torch.manual_seed(1)
    base, delta = torch.randn(2, 3, 4, 5), torch.randn(5, 3, 4, 5).to(dtype)
    base = base.double() if dtype == torch.float64 else base
    for op, options in [
        (ops.delta_activation, {"activation": Activation("gelu")}),
        (ops.perturbed, {}),
        (ops.delta_mean, {"activation": Activation("relu")}),
        (ops.delta_max_pool, {"kernel": 2, "stride": 2, "out_size": (2, 2)}),
    ]:
        expected = on_reference(op, base, delta, in_range(BAD), **options)
        check_rows(on_device(op, cuda, base, delta, BAD, **options).float(), expected.float())


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_differences_out_of_range_are_nan(cuda, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    base, after = torch.randn(2, 3, 5, dtype=wide), torch.randn(5, 3, 5, dtype=wide)
    expected = on_reference(ops.subtracted, after, base, in_range(BAD), dtype=dtype)
    result = on_device(ops.subtracted, cuda, after, base, BAD, dtype=dtype)
    check_rows(result.float(), expected.float())
    factors = (base, after.to(dtype)) * 2
    expected = on_reference(ops.delta_product, *factors, in_range(BAD))
    check_rows(on_device(ops.delta_product, cuda, *factors, BAD).float(), expected.float())


@pytest.mark.cuda
def test_copies_out_of_range_are_nan(cuda):
    x = torch.randn(2, 2, 7)
    for image, unit in [(BAD, in_range(BAD)), (in_range(BAD), index([0, 2, -2, 1, 2**31 - 1]))]:
        expected = on_reference(ops.masked_copies, x, in_range(BAD), in_range(unit), 0.5)
        check_rows(on_device(ops.masked_copies, cuda, x, image, unit, 0.5), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("wrong", ["image", "column", "base_image", "channel"])
def test_convolutions_out_of_range_are_nan(cuda, wrong):
    torch.manual_seed(2)
    good = in_range(BAD)
    case = {
        "delta": torch.randn(2, 5, 4, 4),
        "weight": torch.randn(2, 3, 3, 33),
        "channel": in_range(BAD),
        "image": good,
        "column": index(range(5)) if wrong == "channel" else good,
        "base_image": good,
        "base": torch.randn(2, 33, 4, 4),
        "padding": 1,
        "activation": Activation("relu"),
    }
    expected = on_reference(ops.unit_delta, **case)
    if wrong == "column":
        case["delta"], case["channel"] = case["delta"][:, :2], case["channel"][:2]
        expected = on_reference(ops.unit_delta, **case)
    check_rows(on_device(ops.unit_delta, cuda, **{**case, wrong: BAD}), expected)


@pytest.mark.cuda
def test_decisions_out_of_range(cuda):
    torch.manual_seed(3)
    logits, delta, tolerance = torch.randn(2, 40), torch.randn(5, 40), torch.zeros(2)
    expected = on_reference(ops.classify, logits, delta, in_range(BAD), tolerance)
    expected[[1, 2, 4]] = -1
    assert torch.equal(on_device(ops.classify, cuda, logits, delta, BAD, tolerance), expected)
    # the baseline is only a hint: without a sensible one every class is looked at
    arguments = logits, torch.randn(2, 300), torch.randn(40, 300)
    baseline = index([-1, 2**31 - 1])
    expected = on_reference(ops.head_flips, *arguments, baseline, tolerance)
    result = on_device(ops.head_flips, cuda, *arguments, baseline, tolerance)
    assert torch.equal(result, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("classes", [3, 120])
def test_what_is_out_of_range_is_not_counted(cuda, classes):
    label = index([0, 1, 2, classes, -1])
    prediction = index([[0, classes, 1, 1, 1], [2, 1, -5, 0, 2**31 - 1]])
    result = on_device(ops.confusion_counts, cuda, prediction, label, classes)
    cells = {tuple(cell) for cell in result.nonzero().tolist()}
    assert cells == {(0, 0, 0), (0, 2, 1), (1, 0, 2), (1, 1, 1)}
    assert result.sum() == 4
