"""delta_winograd: every instruction set against PyTorch's convolution in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ops_cases import (
    ACTIVATIONS,
    index,
    on_reference,
    random_index,
    random_maps,
    using_backend,
)
from torch.nn import functional

from pyablate import ops
from pyablate.ops import Activation

ON_CPU = ["baseline", "avx2", "avx512"]
LAST = torch.channels_last

# Rounding errors of F(4 x 4, 3 x 3), in units of the largest sum: those of a sum in order are some
# ten times smaller.
ERROR = 1e-4


def problem(size, inputs, outputs, pairs=5, images=3, padding=1):
    torch.manual_seed(size[0] * 100 + inputs + outputs)
    weight = random_maps(outputs, inputs, 3, 3) / inputs**0.5
    result = (size[0] + 2 * padding - 2, size[1] + 2 * padding - 2)
    return {
        "delta": random_maps(pairs, inputs, *size).contiguous(memory_format=LAST),
        "weight": weight,
        "filters": ops.winograd_filters(weight),
        "padding": padding,
        "base": random_maps(images, outputs, *result).contiguous(memory_format=LAST),
        "image": random_index(pairs, images),
        "addend": random_maps(pairs, outputs, *result),
    }


def plain(case):
    return {k: v for k, v in case.items() if k not in ("base", "image", "addend")}


def truth(case):
    """Sum over taps, and what follows, in float64."""
    result = functional.conv2d(
        case["delta"].double(), case["weight"].double(), padding=case["padding"]
    )
    result = result + case.get("addend", torch.zeros(1)).double()
    activation = case.get("activation")
    if activation is None:
        return result
    rows = case["base"][case["image"].long()].double()
    return ops.delta_activation(rows, result, index(range(len(rows))), activation)


def assert_close(result, expected):
    scale = float(expected.abs().max()) + 1.0
    assert float((result.double() - expected).abs().max()) <= ERROR * scale


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(
    ("size", "inputs", "outputs", "padding"),
    [
        ((8, 8), 16, 16, 1),
        ((7, 7), 64, 48, 1),  # tiles that hang over
        ((14, 5), 3, 17, 1),  # channels that fill no vector
        ((4, 4), 130, 33, 0),
        ((3, 9), 5, 1, 0),  # a single output row
        ((1, 1), 8, 8, 1),
        ((1, 9), 20, 18, 1),
        ((14, 14), 320, 17, 1),  # blocks of more tiles
        ((9, 9), 512, 16, 1),
        ((6, 6), 7, 20, 3),  # positions that see nothing but padding
    ],
)
def test_is_the_convolution(backend, size, inputs, outputs, padding):
    case = problem(size, inputs, outputs, padding=padding)
    with using_backend(backend):
        for given_ in (
            plain(case),
            {**plain(case), "addend": case["addend"]},
            {**case, "activation": Activation("relu")},
            {**case, "activation": Activation("gelu"), "base": case["base"].bfloat16()},
        ):
            result = ops.delta_winograd(**given_)
            assert result.is_contiguous(memory_format=LAST)
            assert_close(result, truth(given_))
            assert_close(on_reference(ops.delta_winograd, **given_), truth(given_))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_activation(backend, activation):
    case = {**problem((9, 6), 12, 20), "activation": activation}
    with using_backend(backend):
        assert_close(ops.delta_winograd(**case), truth(case))


@pytest.mark.parametrize("backend", ON_CPU)
def test_where_nothing_changes_the_result_is_zero(backend):
    case = problem((24, 24), 16, 16, pairs=4)
    case["delta"][0] = 0
    case["delta"][1, :, 12:] = 0  # rows 0 to 11: outputs of tile rows 0 to 3 alone can change
    relu = Activation("relu")
    with using_backend(backend):
        bare = ops.delta_winograd(**plain(case))
        assert torch.equal(bare[0], torch.zeros_like(bare[0]))
        assert torch.equal(bare[1, :, 16:], torch.zeros_like(bare[1, :, 16:]))
        assert_close(bare, truth(plain(case)))
        added = ops.delta_winograd(**{**case, "activation": relu})
        assert_close(added, truth({**case, "activation": relu}))
        without = {k: v for k, v in case.items() if k != "addend"}
        still = ops.delta_winograd(**without, activation=relu)
        assert torch.equal(still[0], torch.zeros_like(still[0]))


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_pair_does_not_depend_on_those_beside_it(backend):
    case = {**problem((10, 10), 40, 24, pairs=37), "activation": Activation("relu")}
    with using_backend(backend):
        whole = ops.delta_winograd(**case)
        own = ("delta", "image", "addend")
        for some in (slice(0, 1), slice(3, 20), slice(20, 37)):
            part = {k: v[some] if k in own else v for k, v in case.items()}
            assert torch.equal(ops.delta_winograd(**part), whole[some])
        threads = torch.get_num_threads()
        try:
            for count in (2, 3, 64):
                torch.set_num_threads(count)
                assert torch.equal(ops.delta_winograd(**case), whole)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_in_its_pair(backend, bad):
    case = problem((8, 8), 16, 16)
    case["delta"][2, 3, 4, 4] = bad
    with using_backend(backend):
        result = ops.delta_winograd(**plain(case))
    assert not result[2, :, 3:6, 3:6].isfinite().any()
    others = [0, 1, 3, 4]
    assert result[others].isfinite().all()
    assert_close(result[others], truth(plain(case))[others])


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    padding=st.integers(1, 2),
    pairs=st.integers(1, 9),
)
def test_any_size(height, width, inputs, outputs, padding, pairs):
    case = problem((height, width), inputs, outputs, pairs=pairs, padding=padding)
    case["activation"] = Activation("relu")
    assert_close(ops.delta_winograd(**case), truth(case))


def test_no_pairs_give_nothing():
    case = {**problem((8, 8), 4, 6, pairs=0), "activation": Activation("relu")}
    assert ops.delta_winograd(**case).shape == (0, 6, 8, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": torch.zeros(5, 4, 8, 8).double()}, TypeError, "delta: expected dtype"),
        ({"delta": torch.zeros(5, 3, 8, 8)}, ValueError, "weight: expected shape"),
        ({"weight": torch.zeros(6, 4, 5, 5)}, ValueError, "weight: expected shape"),
        ({"filters": torch.zeros(36, 1, 4, 8)}, ValueError, "filters: expected shape"),
        ({"padding": -1}, ValueError, "padding: expected"),
        ({"image": index([0, 1, 2, 3, 0])}, ValueError, "image: expected indices from 0 to 2"),
        ({"image": index([0])}, ValueError, "image: expected shape"),
        ({"base": None}, ValueError, "base, image: expected tensors where activation"),
        ({"activation": None}, ValueError, "base, image: expected tensors where activation"),
        ({"base": torch.zeros(3, 6, 7, 8)}, ValueError, "base: expected shape"),
        ({"addend": torch.zeros(5, 6, 8, 7)}, ValueError, "addend: expected shape"),
        ({"delta": torch.zeros(5, 4, 2, 8), "padding": 0}, ValueError, "too small"),
    ],
)
def test_bad_arguments(change, error, message):
    case = {**problem((8, 8), 4, 6), "activation": Activation("relu")}
    with pytest.raises(error, match=message):
        ops.delta_winograd(**{**case, **change})


def test_bad_filters():
    with pytest.raises(ValueError, match="weight: expected shape"):
        ops.winograd_filters(torch.zeros(2, 3, 1, 3))
    with pytest.raises(TypeError, match="weight: expected dtype"):
        ops.winograd_filters(torch.zeros(2, 3, 3, 3, dtype=torch.int32))
