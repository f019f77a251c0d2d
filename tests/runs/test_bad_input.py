"""Bad input: the engine and the oracle each say which argument, what was expected and what came."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import networks
from torch import Tensor, nn

import pyablate as pa
from pyablate.interventions import Intervention

RUNS = {"engine": pa.ablate, "oracle": pa.reference.ablate}
NAN, INFINITE = float("nan"), float("inf")


class Arguments:
    """Sound arguments, to be spoilt one at a time."""

    def __init__(self) -> None:
        model, images, labels = networks.network("residual")
        self.model: Any = copy.deepcopy(model)
        self.images, self.labels = images.clone(), labels.clone()
        self.data: Any = None
        self.layers: Any = ["body.2"]
        self.options: dict[str, Any] = {}

    def run(self, function: Callable[..., Any]) -> pa.AblationResult:
        data = (self.images, self.labels) if self.data is None else self.data
        return function(self.model, data, self.layers, progress=False, **self.options)

    @property
    def batches(self) -> list[tuple[Any, ...]]:
        return list(zip(self.images.split(8), self.labels.split(8), strict=True))


def with_data(make: Callable[[Arguments], Any]) -> Callable[[Arguments], None]:
    def spoil(arguments: Arguments) -> None:
        arguments.data = make(arguments)

    return spoil


def with_layers(layers: Any) -> Callable[[Arguments], None]:
    def spoil(arguments: Arguments) -> None:
        arguments.layers = layers

    return spoil


def with_options(**options: Any) -> Callable[[Arguments], None]:
    def spoil(arguments: Arguments) -> None:
        arguments.options = options
        if "groups" in options:
            arguments.layers = None

    return spoil


def with_model(change: Callable[[nn.Module], Any]) -> Callable[[Arguments], None]:
    def spoil(arguments: Arguments) -> None:
        changed = change(arguments.model)
        if changed is not None:
            arguments.model = changed

    return spoil


def normalise_by_batch(model: nn.Module) -> None:
    model.body.insert(3, nn.BatchNorm2d(8, track_running_stats=False))


def put(where: Callable[[Arguments], Tensor], index: Any, value: float) -> Any:
    def spoil(arguments: Arguments) -> None:
        with torch.no_grad():
            where(arguments)[index] = value

    return spoil


def wrapped(change: Callable[[Tensor], Any]) -> Callable[[nn.Module], nn.Module]:
    """The network, with its logits changed into something else."""

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.body = inner.body
            self.head = inner.head

        def forward(self, x: Tensor) -> Any:
            return change(self.head(self.body(x).mean(dim=(2, 3))))

    return Wrapped


Case = tuple[Callable[[Arguments], None], type[Exception], str]

LAYERS: dict[str, Case] = {
    "unknown layer": (with_layers("body.9"), ValueError, r"called 'body\.9'; nearest: .*body\.\d"),
    "misspelt layer": (with_layers("body.3.rel1"), ValueError, r"nearest: .*body\.3\.relu1"),
    "glob without a match": (with_layers(["x*"]), ValueError, r"layers: no layer matches 'x\*'"),
    "no layers": (with_layers([]), ValueError, r"layers: .*empty"),
    "layer of another type": (with_layers([3]), TypeError, r"layers: expected strings, got int"),
    "logits are no units": (
        with_layers("head"),
        ValueError,
        r"no layer that holds units is called 'head'",
    ),
    "unit out of range": (
        with_layers("body.2:8"),
        ValueError,
        r"unit 8 of layer 'body\.2' is out of range: the layer has 8 units \(0 to 7\)",
    ),
    "negative unit": (with_layers("body.2:-1"), ValueError, r'expected "layer:unit".*body\.2:-1'),
    "unit of an unknown layer": (with_layers("boby.2:1"), ValueError, r"nearest: .*body\.2"),
}

DATA: dict[str, Case] = {
    "empty loader": (with_data(lambda _: []), ValueError, r"data: no images"),
    "empty generator": (with_data(lambda _: iter([])), ValueError, r"data: no images"),
    "empty tensors": (with_data(lambda a: (a.images[:0], a.labels[:0])), ValueError, "no images"),
    "not iterable": (with_data(lambda _: 7), TypeError, r"data: expected .*got int"),
    "images alone": (with_data(lambda a: a.images), TypeError, r"data: expected .*got Tensor"),
    "a path": (with_data(lambda _: "images"), TypeError, r"data: expected .*got str"),
    "a dictionary": (with_data(lambda a: {"x": a.images}), TypeError, r"data: .*got dict"),
    "images without labels": (
        with_data(lambda a: [(a.images,)]),
        TypeError,
        r"data: batch 0: expected \(images, labels\), got 1 items",
    ),
    "labels missing later": (
        with_data(lambda a: [*a.batches[:2], a.batches[2][:1]]),
        TypeError,
        r"data: batch 2: expected \(images, labels\), got 1 items",
    ),
    "more images than labels": (
        with_data(lambda a: (a.images, a.labels[:5])),
        ValueError,
        r"data: batch 0: expected images \[N, \.\.\.\] and labels \[N\], got \[24, .*\[5\]",
    ),
    "labels of two dimensions": (
        with_data(lambda a: (a.images, a.labels[:, None].expand(-1, 2))),
        TypeError,
        r"labels \[24, 2\] must be one-hot",
    ),
    "batch of another size": (
        with_data(lambda a: [*a.batches, (a.images[:4, :, :10, :10], a.labels[:4])]),
        ValueError,
        r"data: batch 3: images of shape \[2, 10, 10\], but earlier ones have \[2, 12, 12\]",
    ),
    "label beyond the classes": (
        put(lambda a: a.labels, 17, 5),
        ValueError,
        r"data: label 5 of image 17 is outside the model's 5 classes \(0 to 4\)",
    ),
    "negative label": (put(lambda a: a.labels, 3, -1), ValueError, r"data: .*negative label -1"),
    "labels that are no integers": (
        with_data(lambda a: (a.images, a.labels.float())),
        TypeError,
        r"data: .*labels must be integers, got torch\.float32",
    ),
    "labels of truth values": (
        with_data(lambda a: (a.images, a.labels > 2)),
        TypeError,
        r"labels must be integers, got torch\.bool",
    ),
    "NaN in an image": (
        put(lambda a: a.images, (19, 1, 3, 3), NAN),
        ValueError,
        r"data: image 19 holds NaN or infinite values",
    ),
    "infinity in a later batch": (
        lambda a: (put(lambda b: b.images, 21, INFINITE)(a), with_data(lambda b: b.batches)(a))[0],
        ValueError,
        r"data: image 21 holds NaN or infinite values",
    ),
    "NaN in an array": (
        with_data(lambda a: (np.full((4, 2, 12, 12), np.nan), a.labels[:4].numpy())),
        ValueError,
        r"data: image 0 holds NaN",
    ),
}

MODEL: dict[str, Case] = {
    "no module": (
        with_model(lambda _: lambda x: x),
        TypeError,
        r"model: expected an nn\.Module, got function",
    ),
    "NaN in a weight": (
        put(lambda a: a.model.body[0].weight, (5, 0, 1, 2), NAN),
        ValueError,
        r"model: body\.0\.weight holds .*NaN or infinite",
    ),
    "infinity in a buffer": (
        put(lambda a: a.model.body[1].running_var, 3, INFINITE),
        ValueError,
        r"model: body\.1\.running_var holds .*NaN or infinite",
    ),
    "two outputs": (
        with_model(wrapped(lambda logits: (logits, logits))),
        TypeError,
        r"model: expected logits \[.*classes\], got tuple",
    ),
    "one logit for all": (
        with_model(wrapped(lambda logits: logits.sum(dim=1))),
        TypeError,
        r"model: expected logits \[.*classes\], got \[2",
    ),
    "one class": (
        with_model(wrapped(lambda logits: logits[:, :1])),
        ValueError,
        r"model: expected logits of at least 2 classes, got 1",
    ),
    "batch statistics": (
        with_model(normalise_by_batch),
        ValueError,
        r"model: body\.3 normalises by the statistics of each batch",
    ),
}

GROUPS: dict[str, Case] = {
    "given twice": (
        with_options(groups=[["body.2:1", "body.2:3"], ["body.2:4"], ["body.2:3", "body.2:1"]]),
        ValueError,
        r"groups: group 2 .*group 0",
    ),
    "a unit twice": (
        with_options(groups=[["body.2:1", "body.2:1"]]),
        ValueError,
        r"groups: group 0 names a unit twice",
    ),
    "no groups": (with_options(groups=[]), ValueError, r"groups: expected at least one group"),
    "an empty group": (with_options(groups=[["body.2:1"], []]), ValueError, r"groups: group 1"),
    "labels without lists": (
        with_options(groups=["body.2:1", "body.2:2"]),
        TypeError,
        r"groups: group 0: expected a list of .*'body\.2:1'",
    ),
    "one string": (with_options(groups="body.2:1"), TypeError, r"groups: expected .*got str"),
    "numbers": (with_options(groups=[[1, 2]]), TypeError, r'label: expected "layer:unit", got int'),
    "unknown layer": (
        with_options(groups=[["body.9:1"]]),
        ValueError,
        r"called 'body\.9'; nearest",
    ),
    "unit out of range": (
        with_options(groups=[["body.2:1", "body.2:99"]]),
        ValueError,
        r"unit 99 of layer 'body\.2' is out of range",
    ),
    "malformed": (with_options(groups=[["body.2"]]), ValueError, r'expected "layer:unit"'),
}

OPTIONS: dict[str, Case] = {
    "unknown intervention": (
        with_options(intervention="zreo"),
        ValueError,
        r"intervention: expected one of .*got 'zreo'; nearest: zero",
    ),
    "intervention of another type": (
        with_options(intervention=0),
        TypeError,
        r"intervention: expected a string or an Intervention, got int",
    ),
    "bad seed": (with_options(intervention="noise", seed=-3), ValueError, r"seed: .*got -3"),
    "directions for another layer": (
        with_options(intervention=Intervention("direction", directions={"x": torch.eye(8)})),
        ValueError,
        r"directions: none given for layer 'body\.2'",
    ),
    "directions of another size": (
        with_options(intervention=Intervention("direction", directions=torch.eye(5))),
        ValueError,
        r"directions: layer 'body\.2' needs a matrix \[8, directions\], got \[5, 5\]",
    ),
    "resample from nobody": (
        lambda a: (
            with_data(lambda b: (b.images[:1], b.labels[:1]))(a),
            with_options(intervention="resample")(a),
        )[0],
        ValueError,
        r"resample needs at least 2 images, got 1",
    ),
    "device out of range": (
        with_options(device="cuda:99"),
        ValueError,
        r"device: 'cuda:99' cannot",
    ),
    "no such device": (
        with_options(device="abacus"),
        ValueError,
        r"device: 'abacus' cannot be used",
    ),
    "device of another type": (with_options(device=[]), ValueError, r"device: \[\] cannot be used"),
    "too few class names": (
        with_options(class_names=["a", "b"]),
        ValueError,
        r"class_names: expected 5 names, got 2",
    ),
    "class names in one string": (
        with_options(class_names="abcde"),
        TypeError,
        r"class_names: expected a sequence of strings, got 'abcde'",
    ),
    "batch size 0": (with_options(batch_size=0), ValueError, r"batch_size: expected .*got 0"),
    "batch size 2.5": (
        with_options(batch_size=2.5),
        ValueError,
        r"batch_size: expected .*got 2\.5",
    ),
}

TABLES = {"layers": LAYERS, "data": DATA, "model": MODEL, "groups": GROUPS, "options": OPTIONS}
CASES = {
    f"{table}: {name}": case for table, cases in TABLES.items() for name, case in cases.items()
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, run: str) -> None:
    spoil, error, message = CASES[name]
    arguments = Arguments()
    spoil(arguments)
    with pytest.raises(error, match=message) as caught:
        arguments.run(RUNS[run])
    assert type(caught.value) is error
    assert "\n" not in str(caught.value), "one line, so that the shell can show it"


@pytest.mark.parametrize("run", RUNS)
def test_the_arguments_are_sound_before_they_are_spoilt(run: str) -> None:
    arguments = Arguments()
    assert len(arguments.run(RUNS[run]).units) == 8
    arguments.data = arguments.batches
    assert len(arguments.run(RUNS[run]).units) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0}, r"memory: expected a positive integer, got 0"),
        ({"memory": "4G"}, r"memory: expected a positive integer, got '4G'"),
        ({"audit": -1}, r"audit: .*got -1"),
        ({"audit": 0.5}, r"audit: .*got 0\.5"),
        ({"strategy": "fast"}, r"strategy: expected .*got 'fast'"),
        ({"precision": "int1"}, r"precision: expected one of .*got 'int1'"),
    ],
)
def test_bad_options_of_the_engine(options: dict[str, Any], message: str) -> None:
    arguments = Arguments()
    arguments.options = options
    with pytest.raises(ValueError, match=message):
        arguments.run(pa.ablate)


@pytest.mark.parametrize("run", RUNS)
def test_a_layer_without_units(run: str) -> None:
    model, images, labels = networks.network("mlp")
    with pytest.raises(ValueError, match="no layer that holds units is called '0'; nearest: "):
        RUNS[run](model, (images, labels), "0", progress=False)


@pytest.mark.parametrize("run", RUNS)
def test_a_network_without_activations(run: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    data = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(ValueError, match=r"this network has none; name the layers instead.*'0'"):
        RUNS[run](model, data, progress=False)
    assert len(RUNS[run](model, data, "0", progress=False).units) == 6


def test_planning_checks_the_same() -> None:
    for name in ("layers: unknown layer", "data: not iterable", "model: NaN in a weight"):
        spoil, error, message = CASES[name]
        arguments = Arguments()
        spoil(arguments)
        with pytest.raises(error, match=message):
            pa.plan(
                arguments.model,
                (arguments.images, arguments.labels) if arguments.data is None else arguments.data,
                arguments.layers,
            )


def test_classes_of_one_name_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """As two of ImageNet's are, so that it is no error."""
    model, images, labels = networks.network("mlp", 6)
    names = ["crane", "b", "crane", "d", "e"]
    pa.ablate(model, (images, labels), class_names=names, progress=False)
    assert "class_names: crane stand for more than one class" in caplog.text
