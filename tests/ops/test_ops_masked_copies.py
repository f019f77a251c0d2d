"""masked_copies: bits are moved, so every backend gives exactly the reference."""

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
    using_backend,
)

from pyablate import ops


def copies_one_by_one(x, image, unit, value, axis):
    """Copy in plain indexing, one pair after the other."""
    out = torch.stack([x[i] for i in image.tolist()]) if len(image) else x[:0].clone()
    for p, u in enumerate(unit.tolist()):
        if u >= 0:
            out[p].select(axis - 1, u)[...] = value if value.dim() == 0 else value[p]
    return out


def values_for(x, pairs, axis):
    others = [size for i, size in enumerate(x.shape) if i not in (0, axis)]
    return [torch.tensor(0.25), torch.randn(pairs), torch.randn(pairs, *others)]


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_matches_plain_indexing(backend, layout, axis):
    torch.manual_seed(0)
    x = LAYOUTS[layout](torch.randn(4, 5, 6, 7))
    image, unit = random_index(9, 4), random_index(9, x.shape[axis], low=-1)
    for value in values_for(x, 9, axis):
        expected = copies_one_by_one(x, image, unit, value, axis)
        assert torch.equal(
            on_reference(ops.masked_copies, x, image, unit, value, axis=axis), expected
        )
        with using_backend(backend) as device:
            result = on_device(ops.masked_copies, device, x, image, unit, value, axis=axis)
            assert torch.equal(result, expected)
            last = on_device(ops.masked_copies, device, x, image, unit, value, axis=axis - 4)
            assert torch.equal(last, expected)


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8], ids=str
)
@pytest.mark.parametrize("shape", [(3, 8), (3, 33, 5), (3, 2, 3, 4, 5)])
def test_any_dtype_and_dimensions(backend, dtype, shape):
    x = torch.arange(3 * 33 * 40)[: torch.Size(shape).numel()].view(shape).to(dtype)
    image, unit = random_index(7, 3), random_index(7, shape[1], low=-1)
    value = torch.arange(7).to(dtype)
    with using_backend(backend) as device:
        result = on_device(ops.masked_copies, device, x, image, unit, value)
    assert torch.equal(result, copies_one_by_one(x, image, unit, value, 1))


def test_keeps_channels_last_and_takes_numbers():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    result = ops.masked_copies(x, index([1, 0]), index([2, -1]), 0.0)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert (result[0, 2] == 0).all()
    assert torch.equal(result[1], x[0])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    shape = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4).map(tuple))
    images, pairs = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 5))
    axis = data.draw(st.integers(1, len(shape)))
    x = torch.randn(images, *shape)
    image, unit = random_index(pairs, images), random_index(pairs, x.shape[axis], low=-1)
    value = data.draw(st.sampled_from(values_for(x, pairs, axis)))
    result = ops.masked_copies(x, image, unit, value, axis=axis)
    assert torch.equal(result, copies_one_by_one(x, image, unit, value, axis))
