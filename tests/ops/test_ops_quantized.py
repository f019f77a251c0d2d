"""Quantized values, scales and the mean: what 8-bit convolutions read, and what follows them."""

import pytest
import torch
from support.ops_cases import (
    DTYPES,
    TWINS,
    assert_near,
    on_device,
    on_reference,
    random_index,
    using_backend,
)

from pyablate import ops
from pyablate.ops import Activation
from pyablate.ops.quantized import Quantized, spread

RELU = Activation("relu")
POOL = {"kernel": 2, "stride": 2, "out_size": (3, 4)}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
CPU_TWINS = TWINS[:3]


def maps(*shape, dtype=torch.float32, layout=torch.channels_last):
    return torch.randn(*shape).to(dtype).contiguous(memory_format=layout)


def decoded(quantized):
    factor = quantized.scale.reshape(-1, *[1] * (quantized.values.ndim - 1))
    return factor * (quantized.values.float() - 128)


def assert_codes(quantized, result):
    """Half a step from the result, and half a unit in the last place of what is stored of it."""
    step = quantized.scale.reshape(-1, *[1] * (result.ndim - 1))
    stored = result.float().abs() * torch.finfo(result.dtype).eps
    assert ((decoded(quantized) - result.float()).abs() <= 0.5001 * step + stored).all()
    most = result.float().abs().flatten(1).amax(1)
    torch.testing.assert_close(quantized.scale, most / 127, rtol=0.01, atol=1e-30)


@pytest.mark.parametrize("backend", CPU_TWINS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 33])
def test_codes_come_within_half_a_step(backend, layout, dtype, size):
    torch.manual_seed(size)
    delta, base = maps(6, size, 7, 9, dtype=dtype, layout=layout), maps(3, size, 7, 9)
    delta[2] = 0  # no change at all
    delta[3] *= 1e-6  # a small one keeps its digits
    image = random_index(6, 3)
    with using_backend(backend):
        quantized = Quantized.empty(delta.shape, layout, "cpu")
        plain = ops.delta_activation(base, delta, image, RELU)
        result = ops.delta_activation(base, delta, image, RELU, quantized=quantized)
        assert torch.equal(result, plain)
        assert_codes(quantized, result)
        assert quantized.scale[2] == 0
        assert (quantized.values[2] == 128).all()

        pooled = ops.delta_max_pool(base, delta, image, activation=RELU, **POOL)
        quantized = Quantized.empty(pooled.shape, layout, "cpu")
        again = ops.delta_max_pool(base, delta, image, activation=RELU, quantized=quantized, **POOL)
        assert torch.equal(again, pooled)
        assert_codes(quantized, pooled)

        before = delta.clone()
        quantized = ops.encode(delta)
        assert torch.equal(delta, before)
        assert_codes(quantized, delta)


@pytest.mark.parametrize("backend", CPU_TWINS)
@pytest.mark.parametrize("activation", [None, RELU], ids=str)
@pytest.mark.parametrize("kernel", [3, 7])  # 7: a single output position
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_of_the_first_convolution(backend, activation, kernel, dtype):
    torch.manual_seed(0)
    delta, weight = maps(4, 5, 7, 7, dtype=dtype), torch.randn(5, kernel, kernel, 21)
    channel = torch.arange(5, dtype=torch.int32)
    image, column = random_index(40, 4), random_index(40, 5).sort().values
    size = 8 - kernel
    base = maps(4, 21, size, size) if activation is not None else None
    with using_backend(backend):
        plain = ops.unit_delta(
            delta, weight, channel, image, column, activation=activation, base=base
        )
        quantized = Quantized.empty(plain.shape, torch.channels_last, "cpu")
        result = ops.unit_delta(
            delta,
            weight,
            channel,
            image,
            column,
            activation=activation,
            base=base,
            quantized=quantized,
        )
    assert torch.equal(result, plain)
    assert_codes(quantized, result)


@pytest.mark.parametrize("backend", [*CPU_TWINS, "reference"])
def test_codes_alone_are_the_same_and_nothing_else_is_written(backend):
    torch.manual_seed(0)
    delta, base = maps(40, 21, 6, 8, dtype=torch.bfloat16), maps(4, 21, 6, 8)
    image = random_index(40, 4)
    weight, channel = torch.randn(21, 3, 3, 17), torch.arange(21, dtype=torch.int32)
    first = maps(4, 17, 6, 8)
    column = random_index(40, 21).sort().values

    def activated(quantized, **out):
        return ops.delta_activation(base, delta, image, RELU, quantized=quantized, **out)

    def pooled(quantized, **out):
        return ops.delta_max_pool(
            base, delta, image, activation=RELU, quantized=quantized, **POOL, **out
        )

    def convolved(quantized, **out):
        given = {"activation": RELU, "base": first, "padding": 1, "quantized": quantized, **out}
        return ops.unit_delta(delta[:4], weight, channel, image, column, **given)

    def run(op, *arguments, **options):
        if backend == "reference":
            return on_reference(op, *arguments, **options)
        with using_backend(backend):
            return op(*arguments, **options)

    for op in (activated, pooled, convolved):
        shape = run(op, None).shape
        both = Quantized.empty(shape, torch.channels_last, "cpu")
        run(op, both)
        alone = Quantized.empty(shape, torch.channels_last, "cpu", alone=True)
        out = torch.full(shape, 7.0, dtype=torch.bfloat16).contiguous(
            memory_format=torch.channels_last
        )
        result = run(op, alone, out=out)
        assert torch.equal(alone.values, both.values)
        assert torch.equal(alone.scale, both.scale)
        assert result.shape == (0,)
        assert torch.equal(alone.spell(torch.float32), decoded(both))
        if backend != "reference":
            assert (out == 7.0).all()


@pytest.mark.parametrize("backend", CPU_TWINS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_pair_and_no_other(backend, bad):
    delta = torch.ones(3, 50)
    delta[1, 37] = bad
    with using_backend(backend):
        quantized = ops.encode(delta)
    assert quantized.scale.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(decoded(quantized)[[0, 2]], delta[[0, 2]])


def test_the_reference_encodes_alike():
    torch.manual_seed(0)
    delta = torch.randn(5, 300) * torch.tensor([1.0, 1e-3, 0.0, 1e4, 1.0]).unsqueeze(1)
    compiled, plain = ops.encode(delta), on_reference(ops.encode, delta)
    torch.testing.assert_close(compiled.scale, plain.scale, rtol=1e-6, atol=0)
    # a product rounded otherwise may fall on the other side of a half
    assert (compiled.values.int() - plain.values.int()).abs().max() <= 1
    assert (compiled.values == plain.values).float().mean() > 0.99


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [Activation("identity"), RELU, Activation("gelu")], ids=str)
def test_scales_and_addends(backend, layout, dtypes, activation):
    torch.manual_seed(0)
    delta, addend = (maps(9, 5, 6, 8, dtype=dtypes[0], layout=layout) for _ in range(2))
    base = maps(4, 5, 6, 8, dtype=dtypes[1], layout=layout)
    image, scale, addend_scale = random_index(9, 4), torch.rand(9), torch.rand(9)
    options = {"scale": scale, "addend": addend, "addend_scale": addend_scale}
    exact = {**options, "addend": addend.double()}
    for op in (ops.delta_activation, ops.delta_mean):
        plain = on_reference(op, base, delta, image, activation, **options)
        truth = on_reference(op, base.double(), delta.double(), image, activation, **exact)
        with using_backend(backend) as device:
            result = on_device(op, device, base, delta, image, activation, **options)
        assert_near(result, plain, truth, "reduction")
    with using_backend(backend) as device:
        scaled = on_device(ops.delta_max_pool, device, base, delta, image, scale=scale, **POOL)
    plain = on_reference(ops.delta_max_pool, base, delta, image, scale=scale, **POOL)
    truth = on_reference(
        ops.delta_max_pool, base.double(), delta.double(), image, scale=scale, **POOL
    )
    assert_near(scaled, plain, truth, "elementwise")


@pytest.mark.parametrize("backend", TWINS)
@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 65])
def test_mean_over_maps_of_any_size(backend, size):
    torch.manual_seed(size)
    image = random_index(5, 2)
    for shape in [(3, size, 1), (size, 2, 3)]:
        for layout in LAYOUTS:
            delta, base = maps(5, *shape, layout=layout), maps(2, *shape, layout=layout)
            with using_backend(backend) as device:
                result = on_device(ops.delta_mean, device, base, delta, image, RELU)
            rows = base[image.long()].double()
            truth = ((rows + delta.double()).relu() - rows.relu()).mean((2, 3))
            torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": torch.ones(3)}, r"scale: expected shape \(4,\), got \(3,\)"),
        ({"scale": torch.ones(4).double()}, "scale: expected dtype torch.float32"),
        ({"addend_scale": torch.ones(4, 1)}, "addend_scale: expected 1 dimensions"),
    ],
)
def test_bad_scales(options, message):
    image = torch.zeros(4, dtype=torch.int32)
    with pytest.raises((ValueError, TypeError), match=message):
        ops.delta_activation(torch.ones(1, 2), torch.ones(4, 2), image, RELU, **options)


def test_codes_of_another_shape_are_refused():
    delta, image = maps(4, 3, 5, 5), torch.zeros(4, dtype=torch.int32)
    quantized = Quantized.empty((4, 3, 5, 6), torch.channels_last, "cpu")
    with pytest.raises(ValueError, match="quantized: expected shape"):
        ops.delta_activation(delta[:1], delta, image, RELU, quantized=quantized)
    quantized = Quantized.empty((4, 3, 5, 5), torch.contiguous_format, "cpu")
    with pytest.raises(ValueError, match="quantized: expected the layout of the result"):
        ops.delta_activation(delta[:1], delta, image, RELU, quantized=quantized)


def positions(quantized):
    return quantized.scale.unsqueeze(1) * (quantized.values.float() - 128)


@pytest.mark.parametrize("backend", CPU_TWINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alone", [False, True])
def test_positions_may_have_factors_of_their_own(backend, dtype, alone):
    torch.manual_seed(7)
    delta, base = maps(6, 21, 5, 9, dtype=dtype), maps(3, 21, 5, 9)
    delta[2] = 0
    delta[:, :, 2, 3] *= 1e-5  # beside large ones
    delta[1, :, 4, 4] = 0
    delta[3, 4, 1, 1] = torch.nan
    image = random_index(6, 3)
    with using_backend(backend):
        quantized = Quantized.empty(delta.shape, LAYOUTS[1], "cpu", alone=alone, by_position=True)
        plain = ops.delta_activation(base, delta, image, RELU)
        result = ops.delta_activation(base, delta, image, RELU, quantized=quantized)
    assert (
        result.numel() == 0 if alone else torch.equal(result.nan_to_num(7.0), plain.nan_to_num(7.0))
    )
    assert quantized.scale.shape == (6, 5, 9)
    assert quantized.scale.isnan().nonzero().tolist() == [[3, 1, 1]]
    most = plain.float().abs().amax(1)
    near = torch.finfo(dtype).eps  # codes are of the changes before they are rounded
    torch.testing.assert_close(
        quantized.scale, most / 127, rtol=2 * near, atol=1e-30, equal_nan=True
    )
    stored = plain.float().abs() * near
    error = (positions(quantized) - plain.float()).abs()
    fine = error <= 0.5001 * quantized.scale.unsqueeze(1) + stored
    fine[3, :, 1, 1] = True
    assert fine.all()
    assert torch.equal(
        quantized.spell(torch.float32).nan_to_num(7.0), positions(quantized).nan_to_num(7.0)
    )


@pytest.mark.parametrize("backend", CPU_TWINS)
def test_encode_by_position(backend):
    torch.manual_seed(8)
    for layout in LAYOUTS:
        delta = maps(4, 6, 3, 5, layout=layout)
        with using_backend(backend):
            quantized = ops.encode(delta, by_position=True)
        assert quantized.values.is_contiguous(memory_format=LAYOUTS[1])
        error = (positions(quantized) - delta).abs()
        assert (error <= 0.5001 * quantized.scale.unsqueeze(1)).all()
    by_pytorch = on_reference(ops.encode, delta, by_position=True)
    torch.testing.assert_close(by_pytorch.scale, quantized.scale)
    assert ((by_pytorch.values.int() - quantized.values.int()).abs() <= 1).all()


@pytest.mark.parametrize("backend", CPU_TWINS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("fine", ["delta", "addend", "both"])
@pytest.mark.parametrize("coded", [None, "pairs", "positions"])
def test_factors_of_positions_multiply(backend, layout, fine, coded):
    torch.manual_seed(9)
    delta, addend = maps(5, 17, 4, 6, layout=layout), maps(5, 17, 4, 6, layout=layout)
    base, image = maps(3, 17, 4, 6, layout=layout), random_index(5, 3)
    scale = torch.rand(5, 4, 6) if fine != "addend" else torch.rand(5)
    addend_scale = torch.rand(5, 4, 6) if fine != "delta" else torch.rand(5)
    whole = delta * spread(scale, 4) + addend * spread(addend_scale, 4)
    expected = ops.delta_activation(base, whole.contiguous(memory_format=layout), image, RELU)
    quantized = None
    if coded:
        quantized = Quantized.empty(
            delta.shape,
            LAYOUTS[1] if coded == "positions" else layout,
            "cpu",
            by_position=coded == "positions",
        )
    kept = delta.clone(memory_format=torch.preserve_format)
    with using_backend(backend):
        result = ops.delta_activation(
            base,
            kept,
            image,
            RELU,
            scale=scale,
            addend=addend,
            addend_scale=addend_scale,
            out=kept,
            quantized=quantized,
        )
    assert result.data_ptr() == kept.data_ptr()
    torch.testing.assert_close(result, expected)
    if quantized is not None:
        step = spread(quantized.scale, 4)
        assert ((quantized.spell(torch.float32) - expected).abs() <= 0.501 * step + 1e-6).all()


def test_factors_of_positions_have_to_fit():
    delta, image = maps(5, 7, 4, 6), random_index(5, 5)
    with pytest.raises(ValueError, match="scale: expected shape"):
        ops.delta_activation(delta, delta, image, RELU, scale=torch.rand(5, 6, 4))
    flat = delta[:, 0].contiguous()
    with pytest.raises(ValueError, match="scale: expected"):
        ops.delta_activation(flat, flat, image, RELU, scale=torch.rand(5, 4, 6))
    with pytest.raises(TypeError, match="scale: expected dtype"):
        ops.delta_activation(delta, delta, image, RELU, scale=torch.rand(5, 4, 6).double())
    with pytest.raises(ValueError, match="addend: expected shape"):
        ops.delta_activation(
            delta, delta, image, RELU, scale=torch.rand(5, 4, 6), addend=maps(5, 7, 6, 4)
        )
    for shape, layout in (((5, 7, 6, 4), LAYOUTS[1]), ((5, 7, 4, 6), LAYOUTS[0])):
        quantized = Quantized.empty(shape, layout, "cpu", by_position=True)
        with pytest.raises(ValueError, match="quantized: expected"):
            ops.delta_activation(delta, delta, image, RELU, quantized=quantized)
        if layout == LAYOUTS[0]:
            with pytest.raises(ValueError, match="quantized: expected channels_last"):
                quantized.fill(delta)
    with pytest.raises(ValueError, match="delta: expected maps"):
        ops.encode(flat, by_position=True)


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (4, 1, 3, 2), (3, 6, 1, 1), (2, 9, 1, 5)])
def test_small_maps_by_position(shape):
    delta = maps(*shape)
    quantized = ops.encode(delta, by_position=True)
    error = (quantized.spell(torch.float32) - delta).abs()
    assert (error <= 0.5001 * quantized.scale.unsqueeze(1)).all()
    assert quantized.scale.shape == (shape[0], *shape[2:])
