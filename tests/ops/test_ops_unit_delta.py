"""unit_delta: the backends against the reference, float64 and PyTorch's convolution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ops_cases import (
    DTYPES,
    LAYOUTS,
    TWINS,
    assert_near,
    index,
    on_device,
    on_reference,
    random_index,
    random_maps,
    using_backend,
)
from torch.nn import functional

from pyablate import ops
from pyablate.ops import Activation
from pyablate.ops.reference import output_size

# map size, kernel, stride, padding, dilation, output channels
GEOMETRIES = [
    ((7, 7), (3, 3), (1, 1), (1, 1), (1, 1), 64),
    ((9, 8), (3, 3), (2, 2), (1, 1), (1, 1), 40),
    ((28, 28), (5, 5), (1, 1), (2, 2), (1, 1), 7),
    ((14, 3), (1, 1), (1, 1), (0, 0), (1, 1), 129),
    ((12, 12), (3, 2), (2, 1), (0, 1), (2, 3), 33),
    ((20, 20), (9, 9), (1, 1), (4, 4), (1, 1), 20),  # more taps than are listed at a time
    ((6, 6), (6, 6), (1, 1), (0, 0), (1, 1), 50),  # a single output position
    ((10, 10), (10, 10), (1, 1), (0, 0), (1, 1), 17),
    ((1, 1), (1, 1), (1, 1), (0, 0), (1, 1), 32),  # a linear map
    ((2, 2), (5, 5), (3, 3), (2, 2), (1, 1), 3),
]


def problem(geometry, dtype, pairs=24, images=3, units=4, inputs=5, sort=True):
    size, kernel, stride, padding, dilation, outputs = geometry
    column = random_index(pairs, units)
    return {
        "delta": random_maps(images, units, *size, dtype=dtype, zeros=0.6),
        "weight": random_maps(inputs, *kernel, outputs, dtype=dtype),
        "channel": random_index(units, inputs),
        "image": random_index(pairs, images),
        "column": column.sort().values if sort else column,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }


def with_base(case, geometry, dtype, activation, images=3):
    size = output_size(geometry[0], *geometry[1:5])
    base = random_maps(images, geometry[5], *size, dtype=dtype)
    return {**case, "activation": activation, "base": base}


def truth_of(case):
    wide = {
        k: v.double() if getattr(v, "is_floating_point", bool)() else v for k, v in case.items()
    }
    return on_reference(ops.unit_delta, **wide)


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_matches_float64(backend, geometry, dtypes, activation):
    torch.manual_seed(3)
    case = problem(geometry, dtypes[0])
    if activation is not None:
        case = with_base(case, geometry, dtypes[1], Activation(activation))
    with using_backend(backend) as device:
        result = on_device(ops.unit_delta, device, **case)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert_near(result, on_reference(ops.unit_delta, **case), truth_of(case), "reduction")


def test_is_the_convolution_of_one_changed_channel():
    torch.manual_seed(4)
    conv = torch.nn.Conv2d(5, 16, 3, stride=2, padding=1, dilation=1)
    x = torch.randn(2, 5, 11, 9)
    unit = 3
    changed = x.clone()
    changed[:, unit] = 0
    with torch.no_grad():
        expected = conv(changed) - conv(x)
    result = ops.unit_delta(
        -x[:, unit : unit + 1],
        conv.weight.permute(1, 2, 3, 0),
        index([unit]),
        index([0, 1]),
        index([0, 0]),
        stride=2,
        padding=1,
    )
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert not result.requires_grad


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_maps_and_base(backend, layout):
    torch.manual_seed(5)
    geometry = GEOMETRIES[1]
    case = with_base(problem(geometry, torch.float32), geometry, torch.float32, Activation("relu"))
    for name in ("delta", "base", "weight"):
        case[name] = LAYOUTS[layout](case[name])
    with using_backend(backend) as device:
        result = on_device(ops.unit_delta, device, **case)
    torch.testing.assert_close(result.double(), truth_of(case), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", TWINS)
def test_base_rows_may_have_an_index_of_their_own(backend):
    torch.manual_seed(6)
    geometry = GEOMETRIES[0]
    case = problem(geometry, torch.float32)
    case = with_base(case, geometry, torch.float32, Activation("tanh"), images=9)
    case["base_image"] = random_index(24, 9)
    with using_backend(backend) as device:
        result = on_device(ops.unit_delta, device, **case)
    torch.testing.assert_close(result.double(), truth_of(case), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", TWINS)
def test_no_pairs_and_maps_of_zeros(backend):
    case = problem(GEOMETRIES[0], torch.float32, pairs=0)
    with using_backend(backend) as device:
        assert on_device(ops.unit_delta, device, **case).shape == (0, 64, 7, 7)
        case = problem(GEOMETRIES[0], torch.float32)
        case["delta"] = torch.zeros_like(case["delta"])
        assert (on_device(ops.unit_delta, device, **case) == 0).all()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_each_pair_is_computed_alike_in_any_company(geometry):
    torch.manual_seed(7)
    case = problem(geometry, torch.float32, pairs=40)
    together = ops.unit_delta(**case)
    order = torch.randperm(40)
    shuffled = ops.unit_delta(
        **{**case, "image": case["image"][order], "column": case["column"][order]}
    )
    assert torch.equal(shuffled, together[order])
    alone = ops.unit_delta(**{**case, "image": case["image"][7:8], "column": case["column"][7:8]})
    assert torch.equal(alone, together[7:8])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_geometry_is_torchs_convolution(data):
    kernel = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    stride = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    dilation = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    size = tuple(
        data.draw(st.integers(max(1, (k - 1) * d + 1 - 2 * p), 24))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    )
    outputs = data.draw(st.integers(1, 70))
    case = problem((size, kernel, stride, padding, dilation, outputs), torch.float64, pairs=5)
    expected = torch.cat(
        [
            functional.conv2d(
                case["delta"][n, u][None, None],
                case["weight"][case["channel"][u]].permute(2, 0, 1).unsqueeze(1),
                stride=stride,
                padding=padding,
                dilation=dilation,
            )
            for n, u in zip(case["image"].tolist(), case["column"].tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(ops.unit_delta(**case), expected, rtol=1e-12, atol=1e-12)
