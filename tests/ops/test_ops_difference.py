"""perturbed and subtracted: each backend gives what the reference gives, bit for bit."""

import pytest
import torch
from support.ops_cases import (
    DTYPES,
    LAYOUTS,
    TWINS,
    index,
    on_device,
    on_reference,
    random_index,
    using_backend,
)

from pyablate import ops
from pyablate.ops.reference import compute_dtype

SHAPES = [
    (6,),
    (6, 1),
    (6, 5),
    (6, 5, 4),
    (6, 5, 4, 3),
    (6, 5, 1, 1),
    (6, 1, 4, 3),
    (6, 2, 3, 2, 2),
]


def check(backend, op, *arguments, **options):
    expected = on_reference(op, *arguments, **options)
    with using_backend(backend) as device:
        result = on_device(op, device, *arguments, **options)
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)
    return result


def ends(backend, base, delta, dtypes):
    """Check both operations on tensors of these layouts; return the results."""
    image = random_index(len(delta), len(base))
    wide = compute_dtype(dtypes[0])
    after = torch.empty_like(delta, dtype=wide).copy_(delta.to(wide) + 1)
    after[0] = base[int(image[0])].to(wide)
    joined = check(backend, ops.perturbed, base, delta, image)
    taken_off = check(backend, ops.subtracted, after, base, image, dtype=dtypes[0])
    assert (taken_off[0] == 0).all()
    return joined, taken_off


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 33, 5000])
def test_any_size_and_dtype(backend, dtypes, size):
    torch.manual_seed(size)
    base, delta = torch.randn(4, 3, size), torch.randn(9, 3, size)
    for clean, change in [(base, delta), (base[..., ::2], delta[..., ::2])]:
        ends(backend, clean.to(dtypes[1]), change.to(dtypes[0]), dtypes)


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("base_layout", LAYOUTS)
def test_any_layout(backend, layout, base_layout):
    torch.manual_seed(1)
    dtypes = torch.float32, torch.float32
    for shape in SHAPES:
        if len(shape) == 1 and {layout, base_layout} & {"transposed", "expanded"}:
            continue
        delta = LAYOUTS[layout](torch.randn(shape))
        base = LAYOUTS[base_layout](torch.randn(3, *shape[1:]))
        joined, taken_off = ends(backend, base, delta, dtypes)
        for result in (joined, taken_off):
            if layout == "channels_last" and len(shape) == 4:
                assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_heads_of_an_attention_are_read_where_they_are(backend, dtypes):
    """Queries, keys and values as views of one tensor ``[P, T, 3, H, D]``."""
    torch.manual_seed(2)
    base, delta = (torch.randn(n, 7, 3, 2, 16).permute(2, 0, 3, 1, 4) for n in (3, 5))
    for clean, change in zip(base.to(dtypes[1]), delta.to(dtypes[0]), strict=True):
        joined, _ = ends(backend, clean, change, dtypes)
        assert joined.transpose(1, 2).is_contiguous()


def test_no_pairs():
    base, delta = torch.randn(2, 4, 3), torch.randn(0, 4, 3)
    assert ops.perturbed(base, delta, index([])).shape == (0, 4, 3)
    empty = ops.subtracted(delta, base, index([]), dtype=torch.bfloat16)
    assert empty.shape == (0, 4, 3)
    assert empty.dtype == torch.bfloat16
