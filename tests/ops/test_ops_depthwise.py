"""depthwise: every instruction set, and a GPU's kernels, against PyTorch's convolution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ops_cases import assert_near, on_device, on_reference, random_maps, using_backend
from torch.nn import functional

from pyablate import ops

ON_CPU = ["baseline", "avx2", "avx512"]
LAST = torch.channels_last


def problem(size, channels, kernel, images=3):
    torch.manual_seed(size[0] * 100 + channels)
    x = random_maps(images, channels, *size).double()
    return x, random_maps(channels, 1, *kernel).double()


def check(result, x, weight, **geometry):
    expected = functional.conv2d(x, weight, groups=len(weight), **geometry)
    assert result.is_contiguous(memory_format=LAST)
    scale = float(expected.abs().max()) + 1.0 if expected.numel() else 1.0
    assert result.shape == expected.shape
    assert torch.allclose(result, expected, rtol=0, atol=1e-13 * scale)


ON_A_GPU = [
    ((9, 6), 32, (3, 3), {"stride": 2, "padding": 1}),
    ((7, 9), 16, (5, 5), {"padding": 2}),
    ((11, 14), 24, (5, 5), {"stride": 2, "padding": 2}),
    ((8, 10), 8, (7, 7), {"padding": 3}),
    ((8, 10), 16, (5, 3), {"stride": (1, 2), "padding": (0, 1)}),
]
"""Filters with kernels of their own."""

GEOMETRIES = [
    ((8, 8), 16, (3, 3), {"padding": 1}),
    ((9, 14), 19, (3, 3), {"padding": 1}),  # channels that fill no vector
    ((9, 9), 33, (5, 5), {"padding": 2, "stride": 2}),
    ((12, 11), 5, (5, 5), {"padding": 4, "dilation": 2}),
    ((10, 10), 8, (7, 3), {"padding": (0, 3)}),
    ((12, 13), 6, (11, 11), {"padding": 5}),  # more taps than are summed in one go
    ((6, 7), 24, (3, 3), {"stride": (1, 3)}),
    ((1, 1), 9, (3, 3), {"padding": 1}),
    ((2, 3), 12, (1, 1), {"padding": 9}),  # positions that see nothing but padding
    ((5, 9), 7, (1, 1), {}),
]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(("size", "channels", "kernel", "geometry"), GEOMETRIES)
def test_is_the_convolution(backend, size, channels, kernel, geometry):
    x, weight = problem(size, channels, kernel)
    with using_backend(backend):
        check(ops.depthwise(x, weight, **geometry), x, weight, **geometry)
        last = x.contiguous(memory_format=LAST)
        check(ops.depthwise(last, weight, **geometry), x, weight, **geometry)
    check(on_reference(ops.depthwise, x, weight, **geometry), x, weight, **geometry)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize(("size", "channels", "kernel", "geometry"), [*GEOMETRIES, *ON_A_GPU])
def test_is_the_convolution_on_a_gpu(dtype, size, channels, kernel, geometry):
    x, weight = (made.to(dtype) for made in problem(size, channels, kernel))
    truth, plain = (
        functional.conv2d(x.to(as_), weight.to(as_), groups=channels, **geometry)
        for as_ in (torch.float64, torch.promote_types(dtype, torch.float32))
    )
    with using_backend("cuda") as device:
        for given in (x, x.contiguous(memory_format=LAST)):
            result = on_device(ops.depthwise, device, given, weight, **geometry)
            assert_near(result, plain.to(dtype), truth, "reduction")
            assert result.is_contiguous(memory_format=LAST)


@pytest.mark.cuda
def test_no_position_of_a_gpu_depends_on_what_it_does_not_see():
    x, weight = (made.half() for made in problem((10, 13), 40, (3, 3), images=23))
    x[4, 7, 3, 3] = float("nan")
    with using_backend("cuda") as device:
        lost = on_device(ops.depthwise, device, x, weight, padding=1).isnan().nonzero().tolist()
    assert lost == [[4, 7, y, x] for y in (2, 3, 4) for x in (2, 3, 4)]


@pytest.mark.parametrize("backend", ON_CPU)
def test_an_image_does_not_depend_on_those_beside_it(backend):
    x, weight = problem((10, 13), 40, (3, 3), images=23)
    x[4, 7, 3, 3] = float("nan")
    with using_backend(backend):
        whole = ops.depthwise(x, weight, padding=1)
        for some in (slice(0, 1), slice(3, 20), slice(20, 23)):
            part = ops.depthwise(x[some], weight, padding=1)
            assert torch.equal(part.nan_to_num(7.0), whole[some].nan_to_num(7.0))
        threads = torch.get_num_threads()
        try:
            for count in (2, 3, 64):
                torch.set_num_threads(count)
                again = ops.depthwise(x, weight, padding=1)
                assert torch.equal(again.nan_to_num(7.0), whole.nan_to_num(7.0))
        finally:
            torch.set_num_threads(threads)
    lost = whole.isnan().nonzero().tolist()
    assert lost == [[4, 7, y, x] for y in (2, 3, 4) for x in (2, 3, 4)]


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    channels=st.integers(1, 40),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    images=st.integers(0, 4),
)
def test_any_size(height, width, channels, kernel, stride, dilation, images):
    x, weight = problem((height, width), channels, kernel, images)
    geometry = {"stride": stride, "dilation": dilation, "padding": 4}
    check(ops.depthwise(x, weight, **geometry), x, weight, **geometry)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 6, 8, 8)}, TypeError, "x: expected dtype"),
        ({"weight": torch.zeros(6, 1, 3, 3)}, TypeError, "weight: expected dtype"),
        ({"x": torch.zeros(2, 5, 8, 8).double()}, ValueError, "weight: expected shape"),
        ({"weight": torch.zeros(6, 2, 3, 3).double()}, ValueError, "weight: expected shape"),
        ({"x": torch.zeros(2, 6, 2, 8).double()}, ValueError, "x: maps of"),
        ({"stride": 0}, ValueError, "stride: expected"),
        ({"padding": -1}, ValueError, "padding: expected"),
        ({"dilation": (1, 0)}, ValueError, "dilation: expected"),
    ],
)
def test_bad_arguments(change, error, message):
    x, weight = problem((8, 8), 6, (3, 3))
    with pytest.raises(error, match=message):
        ops.depthwise(**{"x": x, "weight": weight, **change})
