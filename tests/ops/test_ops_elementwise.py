"""delta_activation and delta_max_pool: the backends against the reference and against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ops_cases import (
    ACTIVATIONS,
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

NAMES = [f"{a.name}({a.a:g},{a.b:g})" for a in ACTIVATIONS]
SIZES = [0, 1, 30, 31, 32, 33, 111, 1025, 4097]


def activation_truth(base, delta, image, activation, addend=None):
    change = delta.double() if addend is None else delta.double() + addend.double()
    return on_reference(ops.delta_activation, base.double(), change, image, activation)


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=NAMES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_activation_matches_float64(backend, activation, dtypes):
    torch.manual_seed(0)
    delta = (2 * torch.randn(9, 3, 5, 7)).to(dtypes[0])
    base = (3 * torch.randn(4, 3, 5, 7)).to(dtypes[1])
    image = random_index(9, 4)
    plain = on_reference(ops.delta_activation, base, delta, image, activation)
    with using_backend(backend) as device:
        result = on_device(ops.delta_activation, device, base, delta, image, activation)
    truth = activation_truth(base, delta, image, activation)
    assert_near(result, plain, truth, "elementwise")


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("size", SIZES)
def test_activation_of_any_size_writes_all_and_only_its_output(backend, size):
    torch.manual_seed(size)
    delta, base, image = torch.randn(3, size), torch.randn(2, size), index([1, 0, 1])
    with using_backend(backend) as device:
        memory = torch.full((5, size), 77.0, device=device)
        out = memory[1:4]
        returned = ops.delta_activation(
            base.to(device), delta.to(device), image.to(device), Activation("relu"), out=out
        )
        assert returned is out
    expected = on_reference(ops.delta_activation, base, delta, image, Activation("relu"))
    torch.testing.assert_close(memory[1:4].cpu(), expected, rtol=1e-6, atol=1e-6)
    assert (memory[[0, 4]] == 77.0).all()


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("base_layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize(
    "shape", [(6, 5, 4, 3), (6, 1, 4, 3), (6, 5, 1, 1), (6, 5), (6, 2, 3, 2, 2)]
)
def test_activation_of_any_layout(backend, layout, base_layout, shape):
    torch.manual_seed(1)
    delta = LAYOUTS[layout](torch.randn(shape))
    addend = LAYOUTS[base_layout](torch.randn(shape))
    base = LAYOUTS[base_layout](torch.randn(3, *shape[1:]))
    image = random_index(6, 3)
    truth = activation_truth(base, delta, image, Activation("silu"), addend)
    with using_backend(backend) as device:
        result = on_device(
            ops.delta_activation, device, base, delta, image, Activation("silu"), addend=addend
        )
        in_place = delta.clone(memory_format=torch.preserve_format).to(device)
        ops.delta_activation(
            base.to(device),
            in_place,
            image.to(device),
            Activation("silu"),
            addend=addend.to(device),
            out=in_place,
        )
    torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(in_place.cpu(), result, rtol=0, atol=0)
    if layout == "channels_last" and len(shape) == 4:
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize(
    "activation",
    [Activation("relu"), Activation("hardtanh", -1e3, 1e3), Activation("leaky_relu", 0.5)],
    ids=lambda a: a.name,
)
def test_small_changes_of_large_activations_keep_their_precision(backend, activation):
    delta = torch.full((1, 40), 1.0e-4)
    base = torch.full((1, 40), 700.0)
    with using_backend(backend) as device:
        result = on_device(ops.delta_activation, device, base, delta, index([0]), activation)
    assert torch.equal(result, delta)  # forming 700.0001 in float32 would be 22 % off


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=NAMES)
def test_no_change_stays_exactly_none(backend, activation):
    torch.manual_seed(8)
    base, delta = 3 * torch.randn(5, 199), torch.zeros(5, 199)
    with using_backend(backend) as device:
        for rows in (base, base.double(), base.bfloat16()):
            change = delta.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
            result = on_device(
                ops.delta_activation, device, rows, change, index(range(5)), activation
            )
            assert (result == 0).all()


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=NAMES)
def test_extreme_values_saturate_and_nan_stays(backend, activation):
    values = torch.tensor(
        [-1e4, -100.0, -88.0, -20.0, -1.0, -0.0, 0.0, 1.0, 20.0, 88.0, 100.0, 1e4]
    )
    base = values.repeat(2, 2)
    delta = torch.stack([values.repeat_interleave(2), values.flip(0).repeat_interleave(2)])
    with using_backend(backend) as device:
        result = on_device(ops.delta_activation, device, base, delta, index([0, 1]), activation)
        bad = on_device(
            ops.delta_activation, device, base, delta * torch.nan, index([0, 1]), activation
        )
    truth = activation_truth(base, delta, index([0, 1]), activation)
    torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=2e-5)
    assert bad.isnan().all()


# Largest errors in units of 2^-24: of a function that grows with its argument, for each of the
# argument's own; PyTorch's GELU in float32 is off by 5.8.
UNITS = {"gelu": 2.2, "gelu_tanh": 2.5, "silu": 3, "sigmoid": 2, "tanh": 3, "elu": 1}


@pytest.mark.parametrize("backend", [twin for twin in TWINS if twin.values != ("cuda",)])
@pytest.mark.parametrize("name", UNITS)
def test_smooth_functions_are_right_to_the_last_digits(backend, name):
    near = torch.logspace(-7, 0, 100_001)
    z = torch.cat([torch.linspace(-12, 12, 1_000_001), near, -near]).unsqueeze(0)
    none, activation = torch.zeros_like(z), Activation(name, 1.0 if name == "elu" else 0.0)
    with using_backend(backend):
        result = ops.delta_activation(none, z, index([0]), activation)
    error = (result - activation_truth(none, z, index([0]), activation)).abs()
    growing = name in ("gelu", "gelu_tanh", "silu")
    assert float((error / (z.abs() + (z == 0) if growing else 1)).max()) < UNITS[name] * 2**-24
    if name == "gelu":  # erf has come to 1
        large = z.abs() > 6
        assert torch.equal(result[large], z[large].relu())


@pytest.mark.cuda
def test_float16_is_read_and_rounded_as_pytorch_does():
    """All its numbers, subnormal and infinite ones among them, and factors that lead beyond."""
    scale = torch.tensor([1.0, 1 / 3, 1e-4, 3e3])
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).repeat(4, 1)
    expected = (every.float() * scale.unsqueeze(1)).half()
    arguments = every[:1], every, index([0] * 4), Activation("identity")
    with using_backend("cuda") as device:
        result = on_device(ops.delta_activation, device, *arguments, scale=scale)
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def pool_truth(base, delta, image, activation, out_size, **window):
    activation = activation or Activation("identity")
    rows = base[image.long()].double()
    zeros = torch.zeros_like(rows)
    before = rows if activation.name == "identity" else None
    if before is None:
        origin = on_reference(
            ops.delta_activation, zeros, rows, index(range(len(rows))), activation
        )
        before = origin + value_at_zero(activation)
    after = before + activation_truth(base, delta, image, activation)
    height, width = out_size
    pooled = [
        functional.max_pool2d(z, ceil_mode=True, **window)[:, :, :height, :width]
        for z in (after, before)
    ]
    return pooled[0] - pooled[1]


def value_at_zero(activation):
    if activation.name in {"sigmoid", "hardsigmoid"}:
        return 0.5
    if activation.name == "hardtanh":
        return min(max(0.0, activation.a), activation.b)
    return 0.0


WINDOWS = [
    {"kernel_size": 2, "stride": 2, "padding": 0, "dilation": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1},
    {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1},
    {"kernel_size": (3, 2), "stride": (1, 3), "padding": (1, 0), "dilation": (2, 1)},
]


def pool(op_device, base, delta, image, window, out_size, activation=None):
    return on_device(
        ops.delta_max_pool,
        op_device,
        base,
        delta,
        image,
        kernel=window["kernel_size"],
        stride=window["stride"],
        padding=window["padding"],
        dilation=window["dilation"],
        out_size=out_size,
        activation=activation,
    )


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_pool_matches_float64(backend, channels_last, window, dtypes):
    torch.manual_seed(2)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for channels, activation in [(1, None), (5, Activation("relu")), (33, Activation("silu"))]:
        delta = random_maps(7, channels, 9, 11, dtype=dtypes[0], zeros=0.5)
        delta = delta.contiguous(memory_format=layout)
        base = random_maps(3, channels, 9, 11, dtype=dtypes[1])  # of the other layout, at times
        image = random_index(7, 3)
        out_size = functional.max_pool2d(base.float(), ceil_mode=True, **window).shape[2:]
        truth = pool_truth(base, delta, image, activation, out_size, **window)
        plain = on_reference(
            pool, torch.device("cpu"), base, delta, image, window, out_size, activation
        )
        with using_backend(backend) as device:
            result = pool(device, base, delta, image, window, out_size, activation)
        assert result.is_contiguous(memory_format=layout)
        assert_near(result, plain, truth, "elementwise")


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_pool_window_outside_the_map_changes_nothing(backend, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    base = torch.randn(1, 2, 1, 1).contiguous(memory_format=layout)
    delta = torch.ones(1, 2, 1, 1).contiguous(memory_format=layout)
    window = {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 2}
    with using_backend(backend) as device:
        result = pool(device, base, delta, index([0]), window, (1, 1))
    assert torch.equal(result, torch.zeros(1, 2, 1, 1))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_pool_of_any_geometry(data):
    kernel = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    window = {
        "kernel_size": kernel,
        "stride": data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        "padding": tuple(data.draw(st.integers(0, k // 2)) for k in kernel),
        "dilation": data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
    }
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, window["dilation"], strict=True)]
    size = [data.draw(st.integers(r, r + 20)) for r in reach]
    channels = data.draw(st.integers(1, 20))
    base, delta = torch.randn(2, channels, *size), random_maps(3, channels, *size, zeros=0.5)
    if data.draw(st.booleans()):
        delta = delta.contiguous(memory_format=torch.channels_last)
    image = index([1, 0, 1])
    ceil_mode = data.draw(st.booleans())
    out_size = functional.max_pool2d(base, ceil_mode=ceil_mode, **window).shape[2:]
    after = functional.max_pool2d(
        (base[image.long()] + delta).relu(), ceil_mode=ceil_mode, **window
    )
    before = functional.max_pool2d(base[image.long()].relu(), ceil_mode=ceil_mode, **window)
    result = pool(torch.device("cpu"), base, delta, image, window, out_size, Activation("relu"))
    torch.testing.assert_close(result, after - before, rtol=1e-5, atol=1e-5)
