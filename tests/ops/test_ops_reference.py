"""The reference operations against PyTorch's own layers, written out plainly."""

import pytest
import torch
from support.ops_cases import ACTIVATIONS, index, on_reference
from torch import nn
from torch.nn import functional

from pyablate import ops
from pyablate.ops import Activation

LAYERS = {
    "identity": lambda a: nn.Identity(),
    "relu": lambda a: nn.ReLU(),
    "hardtanh": lambda a: nn.Hardtanh(a.a, a.b),
    "leaky_relu": lambda a: nn.LeakyReLU(a.a),
    "elu": lambda a: nn.ELU(a.a),
    "gelu": lambda a: nn.GELU(),
    "gelu_tanh": lambda a: nn.GELU(approximate="tanh"),
    "silu": lambda a: nn.SiLU(),
    "hardswish": lambda a: nn.Hardswish(),
    "hardsigmoid": lambda a: nn.Hardsigmoid(),
    "sigmoid": lambda a: nn.Sigmoid(),
    "tanh": lambda a: nn.Tanh(),
}
NEAR = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activation_is_the_layers_difference(activation):
    torch.manual_seed(0)
    layer = LAYERS[activation.name](activation)
    base = 4 * torch.randn(3, 5, 6, 7, dtype=torch.float64)
    delta, addend = torch.randn(2, 4, 5, 6, 7, dtype=torch.float64)
    image = [2, 0, 1, 2]
    result = on_reference(ops.delta_activation, base, delta, index(image), activation)
    expected = layer(base[image] + delta) - layer(base[image])
    torch.testing.assert_close(result, expected, **NEAR)
    result = on_reference(
        ops.delta_activation, base, delta, index(image), activation, addend=addend
    )
    expected = layer(base[image] + delta + addend) - layer(base[image])
    torch.testing.assert_close(result, expected, **NEAR)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=str)
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pool_is_the_layers_difference(activation, ceil_mode):
    torch.manual_seed(1)
    layer = nn.Identity() if activation is None else LAYERS[activation.name](activation)
    pool = nn.MaxPool2d(3, 2, 1, ceil_mode=ceil_mode)
    base = torch.randn(3, 4, 8, 11, dtype=torch.float64)
    delta, image = torch.randn(5, 4, 8, 11, dtype=torch.float64), [2, 0, 1, 1, 0]
    expected = pool(layer(base[image] + delta)) - pool(layer(base[image]))
    result = on_reference(
        ops.delta_max_pool,
        base,
        delta,
        index(image),
        kernel=3,
        stride=2,
        padding=1,
        out_size=expected.shape[2:],
        activation=activation,
    )
    torch.testing.assert_close(result, expected, **NEAR)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (3, {"padding": 1}),
        (1, {}),
        ((3, 2), {"stride": (2, 1), "padding": (0, 1), "dilation": (2, 3)}),
        ((8, 9), {}),
    ],
)
@pytest.mark.parametrize("activation", [None, Activation("silu")], ids=str)
def test_unit_delta_is_what_a_changed_channel_does_to_the_layer(kernel, options, activation):
    torch.manual_seed(2)
    conv = nn.Conv2d(6, 10, kernel, **options).double()
    x = torch.randn(3, 6, 8, 9, dtype=torch.float64)
    delta = torch.randn(3, 2, 8, 9, dtype=torch.float64)
    channel, image, column = [4, 1], [0, 2, 1, 2], [1, 0, 0, 1]
    changed = x[image].clone()
    for p, (n, c) in enumerate(zip(image, column, strict=True)):
        changed[p, channel[c]] += delta[n, c]
    apply = functional.silu if activation else nn.Identity()
    with torch.no_grad():
        base = conv(x)
        expected = apply(conv(changed)) - apply(base[image])
    result = on_reference(
        ops.unit_delta,
        delta,
        conv.weight.permute(1, 2, 3, 0),
        index(channel),
        index(image),
        index(column),
        activation=activation,
        base=base if activation else None,
        **options,
    )
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
