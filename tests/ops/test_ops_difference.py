"""perturbed, subtracted, delta_product: backends give what the reference gives, bit for bit."""

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


SECOND = [(6, 5, 4, 3), (6, 5, 1, 1), (6, 1, 4, 3), (6, 5, 1, 3), (6, 1, 1, 1), (6, 5, 4, 1)]


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("shape", SECOND, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("base_layout", ["contiguous", "channels_last"])
def test_products_of_any_layout(backend, shape, layout, base_layout):
    torch.manual_seed(3)
    first, other = LAYOUTS[layout](torch.randn(6, 5, 4, 3)), torch.randn(shape)
    bases = (LAYOUTS[base_layout](torch.randn(3, *size[1:])) for size in (first.shape, shape))
    base, other_base = bases
    image = random_index(6, 3)
    change = check(backend, ops.delta_product, base, first, other_base, other, image)
    rows, beside = base[image.long()].double(), other_base[image.long()].double()
    truth = (rows + first) * (beside + other) - rows * beside
    torch.testing.assert_close(change.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 33])
def test_products_of_any_dtype(backend, dtypes, gates, layout, channels):
    torch.manual_seed(4)
    size = (1, 1) if gates else (5, 2)
    delta, base = (torch.randn(n, channels, 5, 2) for n in (7, 2))
    other, other_base = (torch.randn(n, channels, *size) for n in (7, 2))
    delta[0], other[0] = 0.0, 0.0
    tensors = (
        base.to(dtypes[1]),
        delta.to(dtypes[0]),
        other_base.to(dtypes[1]),
        other.to(dtypes[0]),
    )
    tensors = [x.contiguous(memory_format=layout) for x in tensors]
    change = check(backend, ops.delta_product, *tensors, random_index(7, 2))
    assert (change[0] == 0).all()
    assert change.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("backend", ["reference", *TWINS])
@pytest.mark.parametrize("gates", [False, True])
def test_products_of_what_is_not_finite(backend, gates):
    """As the difference of the products has it, but that infinity which stays is no change."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -2.0, 0.0, 1.0, 3e38])
    a, da, b, db = torch.cartesian_prod(*[values] * 4).t().unsqueeze(-1).expand(-1, -1, 5)
    if gates:
        b, db = b[:, :1], db[:, :1]
    arguments = a, da, b, db, index(range(len(a)))
    if backend == "reference":
        change = on_reference(ops.delta_product, *arguments)
    else:
        with using_backend(backend) as device:
            change = on_device(ops.delta_product, device, *arguments)
    before, after = a * b, (a + da) * (b + db)
    formula = da * (b + db) + a * db
    difference = torch.where(after == before, 0.0, after - before)
    expected = torch.where(formula.isfinite(), formula, difference)
    torch.testing.assert_close(change, expected, equal_nan=True)


def test_no_pairs():
    base, delta = torch.randn(2, 4, 3), torch.randn(0, 4, 3)
    assert ops.perturbed(base, delta, index([])).shape == (0, 4, 3)
    empty = ops.subtracted(delta, base, index([]), dtype=torch.bfloat16)
    assert empty.shape == (0, 4, 3)
    assert empty.dtype == torch.bfloat16
    assert ops.delta_product(base, delta, base, delta, index([])).shape == (0, 4, 3)
