"""What the operations refuse, and how they say so; empty inputs."""

import re
from functools import partial

import pytest
import torch
from support.ops_cases import index, on_reference

from pyablate import ops
from pyablate.ops import Activation

RELU = Activation("relu")
MAPS, ROWS = torch.zeros(3, 2, 4, 4), torch.zeros(3, 5)


def masked(**changes):
    case = {"x": MAPS, "image": index([0, 2]), "unit": index([1, -1]), "value": 0.0}
    return ops.masked_copies(**{**case, **changes})


def flips(**changes):
    case = {
        "logits": ROWS,
        "delta": torch.zeros(3, 2),
        "weight": torch.zeros(5, 2),
        "baseline": index([0, 4, 1]),
        "tolerance": torch.zeros(3),
    }
    return ops.head_flips(**{**case, **changes})


def unit(**changes):
    case = {
        "delta": MAPS,
        "weight": torch.zeros(6, 3, 3, 7),
        "channel": index([5, 0]),
        "image": index([0, 2]),
        "column": index([1, 0]),
        "padding": 1,
    }
    return ops.unit_delta(**{**case, **changes})


def change(**changes):
    case = {"base": ROWS, "delta": torch.zeros(2, 5), "image": index([0, 2]), "activation": RELU}
    return ops.delta_activation(**{**case, **changes})


def perturb(**changes):
    case = {"base": ROWS, "delta": torch.zeros(2, 5), "image": index([0, 2])}
    return ops.perturbed(**{**case, **changes})


def subtract(**changes):
    case = {"after": torch.zeros(2, 5), "base": ROWS, "image": index([0, 2])}
    return ops.subtracted(**{**case, **changes})


def multiply(**changes):
    case = {
        "base": MAPS,
        "delta": torch.zeros(2, 2, 4, 4),
        "other_base": torch.zeros(3, 2, 1, 1),
        "other": torch.zeros(2, 2, 1, 1),
        "image": index([0, 2]),
    }
    return ops.delta_product(**{**case, **changes})


def pool(**changes):
    case = {
        "base": MAPS,
        "delta": torch.zeros(2, 2, 4, 4),
        "image": index([0, 2]),
        "kernel": 2,
        "stride": 2,
        "out_size": (2, 2),
    }
    return ops.delta_max_pool(**{**case, **changes})


def decide(**changes):
    case = {
        "logits": ROWS,
        "delta": torch.zeros(2, 5),
        "image": index([0, 2]),
        "tolerance": torch.zeros(3),
    }
    return ops.classify(**{**case, **changes})


def count(**changes):
    case = {"prediction": index([[0, 1], [2, 2]]), "label": index([0, 2]), "classes": 3}
    return ops.confusion_counts(**{**case, **changes})


ACCEPTED = [masked, flips, unit, change, perturb, subtract, multiply, pool, decide, count]
REFUSED = [
    (masked, {"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list"),
    (masked, {"x": torch.zeros(3, 2).to_sparse()}, TypeError, "x: expected a strided tensor"),
    (masked, {"axis": 0}, ValueError, "axis: expected an axis of x other than 0"),
    (masked, {"axis": 4}, ValueError, "axis: expected an axis"),
    (masked, {"axis": -4}, ValueError, "axis: expected an axis"),
    (
        masked,
        {"unit": index([1, 2])},
        ValueError,
        "unit: expected indices from -1 to 1, got 1 to 2",
    ),
    (masked, {"image": index([0, -1])}, ValueError, "image: expected indices from 0 to 2"),
    (masked, {"image": torch.tensor([0, 1])}, TypeError, "image: expected dtype torch.int32"),
    (masked, {"unit": index([1])}, ValueError, "unit: expected shape (2,), got (1,)"),
    (masked, {"value": torch.zeros(3)}, ValueError, "value: expected a number, shape (2,) or"),
    (masked, {"unit": index([0, 0]).to("meta")}, ValueError, "unit: expected device cpu"),
    (flips, {"logits": torch.zeros(3)}, ValueError, "logits: expected 2 dimensions"),
    (flips, {"logits": ROWS.int()}, TypeError, "logits: expected dtype"),
    (flips, {"delta": torch.zeros(2, 2)}, ValueError, "delta: expected shape (3, 2)"),
    (flips, {"weight": torch.zeros(2, 5)}, ValueError, "weight: expected shape (5, 2), got (2, 5)"),
    (flips, {"baseline": index([0, 5, 1])}, ValueError, "baseline: expected indices from 0 to 4"),
    (flips, {"tolerance": torch.zeros(2)}, ValueError, "tolerance: expected shape (3,)"),
    (flips, {"logits": torch.zeros(3, 0), "weight": torch.zeros(0, 2)}, ValueError, "classes"),
    (unit, {"delta": ROWS}, ValueError, "delta: expected 4 dimensions"),
    (unit, {"delta": MAPS.int()}, TypeError, "delta: expected dtype"),
    (unit, {"weight": torch.zeros(6, 7)}, ValueError, "weight: expected 4 dimensions"),
    (unit, {"channel": index([5, 6])}, ValueError, "channel: expected indices from 0 to 5"),
    (unit, {"channel": index([5])}, ValueError, "channel: expected shape (2,)"),
    (unit, {"column": index([1, 2])}, ValueError, "column: expected indices from 0 to 1"),
    (unit, {"column": index([1])}, ValueError, "column: expected shape (2,)"),
    (unit, {"stride": 0}, ValueError, "stride: expected one or two integers >= 1"),
    (unit, {"padding": (1, 1, 1)}, ValueError, "padding: expected one or two integers >= 0"),
    (unit, {"dilation": 1.5}, ValueError, "dilation: expected one or two integers >= 1"),
    (unit, {"dilation": 4}, ValueError, "delta: maps of (4, 4) are too small"),
    (unit, {"activation": RELU}, ValueError, "base: expected a tensor because activation"),
    (unit, {"base": MAPS}, ValueError, "base: expected None because no activation"),
    (unit, {"activation": RELU, "base": MAPS}, ValueError, "base: expected shape (3, 7, 4, 4)"),
    (
        unit,
        {"activation": RELU, "base": torch.zeros(1, 7, 4, 4)},
        ValueError,
        "base_image: expected indices from 0 to 0",
    ),
    (unit, {"out": torch.zeros(2, 7, 4, 4)}, ValueError, "out: expected a torch.channels_last"),
    (unit, {"out": torch.zeros(2, 7, 4, 3)}, ValueError, "out: expected shape (2, 7, 4, 4)"),
    (change, {"delta": torch.zeros(2, 4)}, ValueError, "base: expected shape (3, 4), got (3, 5)"),
    (change, {"delta": torch.zeros(3, 5)}, ValueError, "delta: expected shape (2, 5)"),
    (change, {"delta": torch.tensor(0.0)}, ValueError, "delta: expected at least one dimension"),
    (change, {"addend": torch.zeros(2, 5).double()}, TypeError, "addend: expected dtype"),
    (change, {"addend": torch.zeros(2, 4)}, ValueError, "addend: expected shape (2, 5)"),
    (change, {"out": torch.zeros(2, 4)}, ValueError, "out: expected shape (2, 5)"),
    (change, {"image": index([0, 3])}, ValueError, "image: expected indices from 0 to 2"),
    (multiply, {"other": torch.zeros(2, 2, 1, 2)}, ValueError, "other_base: expected shape"),
    (multiply, {"other": torch.zeros(2, 2, 1, 1).double()}, TypeError, "other: expected dtype"),
    (multiply, {"other_base": torch.zeros(3, 2, 1, 1).bfloat16()}, TypeError, "other_base: exp"),
    (multiply, {"other_base": torch.zeros(4, 2, 1, 1)}, ValueError, "other_base: expected 3 rows"),
    (
        multiply,
        {"other_base": torch.zeros(3, 3, 1, 1), "other": torch.zeros(2, 3, 1, 1)},
        ValueError,
        "other: expected sizes of (2, 2, 4, 4) or 1, got (2, 3, 1, 1)",
    ),
    (perturb, {"delta": torch.zeros(2, 5).int()}, TypeError, "delta: expected dtype"),
    (perturb, {"delta": torch.zeros(3, 5)}, ValueError, "delta: expected shape (2, 5)"),
    (subtract, {"after": torch.zeros(2, 5).bfloat16()}, TypeError, "after: expected dtype"),
    (subtract, {"after": torch.zeros(2, 4)}, ValueError, "base: expected shape (3, 4)"),
    (subtract, {"after": torch.tensor(0.0)}, ValueError, "after: expected at least one"),
    (subtract, {"image": index([0, 3])}, ValueError, "image: expected indices from 0 to 2"),
    (
        subtract,
        {"dtype": torch.float64},
        TypeError,
        "dtype: expected torch.float32, or half precision beside float32, got torch.float64",
    ),
    (pool, {"base": ROWS}, ValueError, "base: expected 4 dimensions"),
    (pool, {"base": torch.zeros(3, 2, 4, 5)}, ValueError, "base: expected shape (3, 2, 4, 4)"),
    (pool, {"out_size": (3, 2)}, ValueError, "out_size: the last window must start inside"),
    (pool, {"kernel": "2"}, ValueError, "kernel: expected one or two integers >= 1, got '2'"),
    (decide, {"delta": torch.zeros(2, 4)}, ValueError, "delta: expected shape (2, 5)"),
    (decide, {"tolerance": torch.zeros(2)}, ValueError, "tolerance: expected shape (3,)"),
    (count, {"prediction": index([[0, 1], [2, 3]])}, ValueError, "prediction: expected indices"),
    (count, {"label": index([0, 3])}, ValueError, "label: expected indices from 0 to 2"),
    (count, {"label": index([0])}, ValueError, "label: expected shape (2,)"),
    (count, {"classes": 0}, ValueError, "classes: expected at least one class, got 0"),
    (count, {"prediction": torch.zeros(2, 2)}, TypeError, "prediction: expected dtype torch.int32"),
]


@pytest.mark.parametrize("call", ACCEPTED, ids=lambda f: f.__name__)
def test_the_unchanged_call_is_accepted(call):
    assert torch.isfinite(call().double()).all()
    assert torch.isfinite(on_reference(call).double()).all()


@pytest.mark.parametrize(("call", "changes", "error", "message"), REFUSED)
def test_refuses_and_names_the_argument(call, changes, error, message):
    for run in (call, partial(on_reference, call)):
        with pytest.raises(error, match=re.escape(message)):
            run(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("swish",), "activation: expected one of identity"), (("hardtanh", 2.0, 1.0), "a <= b")],
)
def test_activation_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Activation(*arguments)


@pytest.mark.parametrize(
    "run", [lambda call, **c: call(**c), on_reference], ids=["backend", "reference"]
)
def test_empty_inputs_give_empty_results(run):
    none = index([])
    assert run(masked, image=none, unit=none).shape == (0, 2, 4, 4)
    assert run(unit, image=none, column=none).shape == (0, 7, 4, 4)
    assert run(change, delta=torch.zeros(0, 5), image=none).shape == (0, 5)
    assert run(perturb, delta=torch.zeros(0, 5), image=none).shape == (0, 5)
    assert run(subtract, after=torch.zeros(0, 5), image=none).shape == (0, 5)
    assert run(subtract, after=torch.zeros(2, 0), base=torch.zeros(3, 0)).shape == (2, 0)
    assert run(pool, delta=torch.zeros(0, 2, 4, 4), image=none).shape == (0, 2, 2, 2)
    assert run(pool, out_size=(0, 2)).shape == (2, 2, 0, 2)
    assert run(decide, delta=torch.zeros(0, 5), image=none).shape == (0,)
    assert run(flips, delta=torch.zeros(3, 0), weight=torch.zeros(5, 0)).shape == (3, 0)
    assert run(count, prediction=torch.zeros(2, 0, dtype=torch.int32), label=none).sum() == 0
    nothing = torch.zeros(0, 5)
    empty = run(
        flips, logits=nothing, delta=torch.zeros(0, 2), baseline=none, tolerance=nothing[:, 0]
    )
    assert empty.shape == (0, 2)


def test_no_gradients_are_recorded():
    weight = torch.zeros(6, 3, 3, 7, requires_grad=True)
    base = torch.zeros(3, 5, requires_grad=True)
    for run in (lambda call, **c: call(**c), on_reference):
        assert not run(unit, weight=weight, delta=MAPS.clone().requires_grad_()).requires_grad
        assert not run(change, base=base).requires_grad
        assert not run(perturb, base=base).requires_grad
        assert not run(subtract, base=base).requires_grad
        assert not run(masked, x=MAPS.clone().requires_grad_()).requires_grad
