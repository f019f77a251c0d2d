"""CUDA kernels take 16 bytes at a time where they can: sizes and addresses that allow it or not."""

import pytest
import torch
from support.ops_cases import (
    DTYPES,
    ROUGH,
    index,
    on_reference,
    random_index,
    random_maps,
    using_backend,
)

from pyablate import ops
from pyablate.ops import Activation, reference

pytestmark = pytest.mark.cuda

ACTIVATIONS = [Activation("relu"), Activation("hardtanh", -0.5, 0.7), Activation("silu")]
NAMES = [f"{str(d)[6:]}-{str(b)[6:]}" for d, b in DTYPES]


def shifted(tensor):
    """Copy a tensor to memory that starts one element behind an address of 16 bytes."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.empty(reach + 2, dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


def results(op, *arguments, shift=(), **options):
    """Call an operation on CUDA; ``shift`` tells which tensors do not lie at 16 bytes."""
    with using_backend("cuda") as device:
        given = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
        named = {
            key: a.to(device) if isinstance(a, torch.Tensor) else a for key, a in options.items()
        }
        for where in shift:
            held = given if isinstance(where, int) else named
            held[where] = shifted(held[where])
        return op(*given, **named).cpu()


def check(op, *arguments, shift, exact=False, **options):
    """Compare aligned and shifted memory with the reference."""
    expected = on_reference(op, *arguments, **options)
    rough = 2 * ROUGH.get(expected.dtype, 5e-6)
    for moved in ((), *[(where,) for where in shift]):
        found = results(op, *arguments, shift=moved, **options)
        assert found.dtype == expected.dtype
        if exact:
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected, rtol=rough, atol=rough)


@pytest.mark.parametrize("dtypes", DTYPES, ids=NAMES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
@pytest.mark.parametrize("width", [16, 20, 2056])
def test_activation(dtypes, activation, width):
    torch.manual_seed(0)
    delta, addend = (torch.randn(3, width).to(dtypes[0]) for _ in range(2))
    base = torch.randn(2, width).to(dtypes[1])
    options = {"addend": addend, "scale": torch.rand(3), "addend_scale": torch.rand(3)}
    arguments = base, delta, index([1, 0, 1]), activation
    check(ops.delta_activation, *arguments, shift=(0, 1, "addend"), **options)


@pytest.mark.parametrize("dtypes", DTYPES, ids=NAMES)
@pytest.mark.parametrize("width", [16, 20, 2056])
@pytest.mark.parametrize("gap", [0, 8, 3])
def test_ends_of_a_difference(dtypes, width, gap):
    """Runs that lie apart, by a multiple of 16 bytes or not."""
    torch.manual_seed(4)
    wide = reference.compute_dtype(dtypes[0])
    base, change, after = (torch.randn(n, 4, width + gap)[..., :width] for n in (2, 3, 3))
    base, image = base.to(dtypes[1]), index([1, 0, 1])
    check(ops.perturbed, base, change.to(dtypes[0]), image, shift=(0, 1), exact=True)
    options = {"dtype": dtypes[0]}
    check(ops.subtracted, after.to(wide), base, image, shift=(0, 1), exact=True, **options)


@pytest.mark.parametrize("dtypes", DTYPES, ids=NAMES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(24, 4, 4), (16, 1, 1), (520, 1, 3)])
@pytest.mark.parametrize("gates", [False, True])
def test_product(dtypes, layout, shape, gates):
    torch.manual_seed(5)
    sizes = shape, (shape[0], 1, 1) if gates else shape
    tensors = [
        torch.randn(n, *size).to(dtype).contiguous(memory_format=layout)
        for size in sizes
        for n, dtype in ((2, dtypes[1]), (3, dtypes[0]))
    ]
    check(ops.delta_product, *tensors, index([1, 0, 1]), shift=(0, 1, 2, 3), exact=True)


@pytest.mark.parametrize("dtypes", DTYPES, ids=NAMES)
@pytest.mark.parametrize("name", ["relu", "gelu"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(24, 6, 4), (16, 1, 1), (520, 2, 4)])
def test_mean(dtypes, name, layout, shape):
    torch.manual_seed(1)
    delta = torch.randn(3, *shape).to(dtypes[0]).contiguous(memory_format=layout)
    base = torch.randn(2, *shape).to(dtypes[1]).contiguous(memory_format=layout)
    check(ops.delta_mean, base, delta, index([1, 0, 1]), Activation(name), shift=(0, 1))


@pytest.mark.parametrize("dtypes", DTYPES, ids=NAMES)
@pytest.mark.parametrize("channels", [16, 20])
def test_max_pool(dtypes, channels):
    torch.manual_seed(2)
    delta = random_maps(3, channels, 7, 5, zeros=0.3).to(dtypes[0])
    delta = delta.contiguous(memory_format=torch.channels_last)
    base = torch.randn(2, channels, 7, 5).to(dtypes[1])
    base = base.contiguous(memory_format=torch.channels_last)
    options = {"kernel": 3, "stride": 2, "padding": 1, "out_size": (4, 3)}
    for activation in (Activation("relu"), Activation("tanh")):
        arguments = base, delta, index([1, 0, 1])
        check(ops.delta_max_pool, *arguments, activation=activation, shift=(0, 1), **options)


@pytest.mark.parametrize("dtypes", DTYPES, ids=NAMES)
@pytest.mark.parametrize("outputs", [16, 20, 264])
def test_first_convolution(dtypes, outputs):
    torch.manual_seed(3)
    maps = random_maps(2, 3, 5, 9, zeros=0.3).to(dtypes[0])
    double = dtypes[0] == torch.float64
    weight = torch.randn(4, 3, 3, outputs, dtype=torch.float64 if double else torch.float32)
    indices = random_index(3, 4), random_index(5, 2), random_index(5, 3)
    base = torch.randn(2, outputs, 5, 9).to(dtypes[1]).contiguous(memory_format=torch.channels_last)
    for name in ("relu", "silu"):
        after = {"activation": Activation(name), "base": base}
        arguments = maps, weight, *indices
        check(ops.unit_delta, *arguments, padding=1, shift=(1, "base"), **after)
    check(ops.unit_delta, maps, weight, *indices, padding=1, shift=(1,))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(32, 3, 16), (4, 8, 16), (64, 1, 1), (5, 3, 1)])
def test_copies(dtype, shape):
    torch.manual_seed(4)
    x = (20 * torch.rand(2, *shape)).to(dtype)
    image, unit = random_index(6, 2), random_index(6, shape[0], -1)
    values = [(9 * torch.rand(size)).to(dtype) for size in ((), (6,), (6, *shape[1:]))]
    for layout in (torch.contiguous_format, torch.channels_last):
        for value in values:
            laid = x.contiguous(memory_format=layout)
            check(ops.masked_copies, laid, image, unit, value, shift=(0,), exact=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [4, 40, 42])
def test_decisions(dtype, classes):
    torch.manual_seed(5)
    logits, delta = (torch.randn(n, classes, dtype=dtype) for n in (3, 9))
    tolerance = torch.rand(3, dtype=dtype) / 3
    arguments = logits, delta, random_index(9, 3), tolerance
    check(ops.classify, *arguments, shift=(0, 1), exact=True)
    for units in (36, 37) if classes == 40 else (36,):
        change, weight = torch.randn(3, units, dtype=dtype), torch.randn(classes, units)
        given = logits, change, weight.to(dtype), logits.argmax(1).int(), tolerance
        check(ops.head_flips, *given, shift=(1,), exact=True)


@pytest.mark.parametrize("classes", [3, 4, 120])
@pytest.mark.parametrize("images", [64, 63])
def test_counts(classes, images):
    torch.manual_seed(6)
    prediction = torch.randint(0, classes, (3, images), dtype=torch.int32)
    label = random_index(images, classes)
    check(ops.confusion_counts, prediction, label, classes, shift=(0, 1), exact=True)
