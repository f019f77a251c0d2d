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

pytestmark = pytest.mark.usefixtures("exports_kept")

RUNS = {"engine": pa.ablate, "oracle": pa.reference.ablate}
NAN, INFINITE = float("nan"), float("inf")
TWO_DIRECTIONS = Intervention("direction", directions=torch.eye(8)[:, :2])


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


Spoil = Callable[[Arguments], object]


def with_data(make: Callable[[Arguments], Any]) -> Spoil:
    return lambda arguments: setattr(arguments, "data", make(arguments))


def with_layers(layers: Any) -> Spoil:
    return lambda arguments: setattr(arguments, "layers", layers)


def with_options(**options: Any) -> Spoil:
    def spoil(arguments: Arguments) -> None:
        arguments.options = options
        if "groups" in options:
            arguments.layers = None

    return spoil


def with_model(change: Callable[[nn.Module], Any]) -> Spoil:
    return lambda arguments: setattr(arguments, "model", change(arguments.model))


def normalise_by_batch(model: nn.Module) -> nn.Module:
    model.body.insert(3, nn.BatchNorm2d(8, track_running_stats=False))
    return model


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


def both(first: Spoil, second: Spoil) -> Spoil:
    return lambda arguments: (first(arguments), second(arguments))


def logits(change: Callable[[Tensor], Any]) -> Spoil:
    return with_model(wrapped(change))


Cases = dict[str, tuple[Spoil, str]]

VALUES: Cases = {
    "labels missing later": (
        with_data(lambda a: [*a.batches[:2], a.batches[2][:1]]),
        r"data: batch 2: expected labels for all images or for none",
    ),
    # layers
    "unknown layer": (with_layers("body.9"), r"called 'body\.9'; nearest: .*body\.\d"),
    "misspelt layer": (with_layers("body.3.rel1"), r"nearest: .*body\.3\.relu1"),
    "glob without a match": (with_layers(["x*"]), r"layers: no layer matches 'x\*'"),
    "no layers": (with_layers([]), r"layers: .*empty"),
    "logits are no units": (with_layers("head"), r"no layer that holds units is called 'head'"),
    "unit out of range": (
        with_layers("body.2:8"),
        r"unit 8 of layer 'body\.2' is out of range: the layer has 8 units \(0 to 7\)",
    ),
    "negative unit": (with_layers("body.2:-1"), r'expected "layer:unit".*body\.2:-1'),
    "unit of an unknown layer": (with_layers("boby.2:1"), r"nearest: .*body\.2"),
    # data
    "empty loader": (with_data(lambda _: []), r"data: no images"),
    "empty generator": (with_data(lambda _: iter([])), r"data: no images"),
    "empty tensors": (with_data(lambda a: (a.images[:0], a.labels[:0])), "no images"),
    "more images than labels": (
        with_data(lambda a: (a.images, a.labels[:5])),
        r"data: batch 0: expected images \[N, \.\.\.\] and labels \[N\], got \[24, .*\[5\]",
    ),
    "batch of another size": (
        with_data(lambda a: [*a.batches, (a.images[:4, :, :10, :10], a.labels[:4])]),
        r"data: batch 3: images of shape \[2, 10, 10\], but earlier ones have \[2, 12, 12\]",
    ),
    **{
        f"label beyond the classes, {intervention}": (
            both(put(lambda a: a.labels, 17, 5), with_options(intervention=intervention)),
            r"data: label 5 of image 17 is outside the model's 5 classes \(0 to 4\)",
        )
        for intervention in ("zero", "mean", "class_mean", "noise")
    },
    "negative label": (put(lambda a: a.labels, 3, -1), r"data: .*negative label -1"),
    "NaN in an image": (
        put(lambda a: a.images, (19, 1, 3, 3), NAN),
        r"data: image 19 holds NaN or infinite values",
    ),
    "infinity in a later batch": (
        both(put(lambda a: a.images, 21, INFINITE), with_data(lambda a: a.batches)),
        r"data: image 21 holds NaN or infinite values",
    ),
    "NaN in an array": (
        with_data(lambda a: (np.full((4, 2, 12, 12), np.nan), a.labels[:4].numpy())),
        r"data: image 0 holds NaN",
    ),
    # model
    "NaN in a weight": (
        put(lambda a: a.model.body[0].weight, (5, 0, 1, 2), NAN),
        r"model: body\.0\.weight holds .*NaN or infinite",
    ),
    "infinity in a buffer": (
        put(lambda a: a.model.body[1].running_var, 3, INFINITE),
        r"model: body\.1\.running_var holds .*NaN or infinite",
    ),
    "one class": (logits(lambda z: z[:, :1]), "expected logits of at least 2 classes, got 1"),
    "one logit": (logits(lambda z: z.sum(dim=1)), r'got 1; .* two classes by logits="binary"'),
    "batch statistics": (
        with_model(normalise_by_batch),
        r"model: body\.3 normalises by the statistics of each batch",
    ),
    # groups
    "group given twice": (
        with_options(groups=[["body.2:1", "body.2:3"], ["body.2:4"], ["body.2:3", "body.2:1"]]),
        r"groups: group 2 .*group 0",
    ),
    "unit twice": (
        with_options(groups=[["body.2:1", "body.2:1"]]),
        r"groups: group 0 names a unit twice",
    ),
    "no groups": (with_options(groups=[]), r"groups: expected at least one group"),
    "an empty group": (with_options(groups=[["body.2:1"], []]), r"groups: group 1"),
    "group of an unknown layer": (
        with_options(groups=[["body.9:1"]]),
        r"called 'body\.9'; nearest",
    ),
    "group out of range": (
        with_options(groups=[["body.2:1", "body.2:99"]]),
        r"unit 99 of layer 'body\.2' is out of range",
    ),
    "malformed group": (with_options(groups=[["body.2"]]), r'expected "layer:unit"'),
    # options
    "unknown intervention": (
        with_options(intervention="zreo"),
        r"intervention: expected one of .*got 'zreo'; nearest: zero",
    ),
    "bad seed": (with_options(intervention="noise", seed=-3), r"seed: .*got -3"),
    "directions for another layer": (
        with_options(intervention=Intervention("direction", directions={"x": torch.eye(8)})),
        r"directions: none given for layer 'body\.2'",
    ),
    "directions of another size": (
        with_options(intervention=Intervention("direction", directions=torch.eye(5))),
        r"directions: layer 'body\.2' needs a matrix \[8, directions\], got \[5, 5\]",
    ),
    "direction beyond the matrix": (
        both(with_options(intervention=TWO_DIRECTIONS), with_layers("body.2:5")),
        r"2 units \(0 to 1\)|2 directions were given",
    ),
    "resample from nobody": (
        both(
            with_data(lambda a: (a.images[:1], a.labels[:1])), with_options(intervention="resample")
        ),
        r"resample needs at least 2 images, got 1",
    ),
    "device out of range": (with_options(device="cuda:99"), r"device: 'cuda:99' cannot"),
    "no such device": (with_options(device="abacus"), r"device: 'abacus' cannot be used"),
    "device of another type": (with_options(device=[]), r"device: \[\] cannot be used"),
    "too few class names": (
        with_options(class_names=["a", "b"]),
        r"class_names: expected 5 names, got 2",
    ),
    "unknown measure": (
        with_options(measures=["los"]),
        "expected one of loss, margin, got 'los'; nearest: loss",
    ),
    "batch size 0": (with_options(batch_size=0), r"batch_size: expected .*got 0"),
    "batch size 2.5": (with_options(batch_size=2.5), r"batch_size: expected .*got 2\.5"),
}

TYPES: Cases = {
    "labels of two dimensions": (
        with_data(lambda a: (a.images, a.labels[:, None].expand(-1, 2))),
        r"labels \[24, 2\] must be one-hot",
    ),
    "layer of another type": (with_layers([3]), r"layers: expected strings, got int"),
    "not iterable": (with_data(lambda _: 7), r"data: expected .*got int"),
    "a path": (with_data(lambda _: "images"), r"data: expected .*got str"),
    "three things in a batch": (
        with_data(lambda a: [(a.images, a.labels, a.labels)]),
        r"data: batch 0: expected \(images, labels\), got 3 items",
    ),
    "labels that are no integers": (
        with_data(lambda a: (a.images, a.labels.float())),
        r"data: .*labels must be integers, got torch\.float32",
    ),
    "labels of truth values": (
        with_data(lambda a: (a.images, a.labels > 2)),
        r"labels must be integers, got torch\.bool",
    ),
    "no module": (
        with_model(lambda _: lambda x: x),
        r"model: expected an nn\.Module, got func",
    ),
    "two outputs": (
        logits(lambda z: {"a": z, "b": z}),
        r"model: expected logits \[.*classes\], got dict of 'a' \[.*; logits= of ablate or",
    ),
    "labels without lists": (
        with_options(groups=["body.2:1", "body.2:2"]),
        r"groups: group 0: expected a list of .*'body\.2:1'",
    ),
    "one string": (with_options(groups="body.2:1"), r"groups: expected .*got str"),
    "numbers": (with_options(groups=[[1, 2]]), r'label: expected "layer:unit", got int'),
    "intervention of another type": (
        with_options(intervention=0),
        r"intervention: expected a string or an Intervention, got int",
    ),
    "measures in one string": (with_options(measures="loss"), "measures"),
    "class names in one string": (
        with_options(class_names="abcde"),
        r"class_names: expected a sequence of strings, got 'abcde'",
    ),
}

# Of the engine alone.
ENGINE: Cases = {
    "no memory": (with_options(memory=0), r"memory: expected at least 1, got 0"),
    "memory as text": (
        with_options(memory="lots"),
        r"memory: expected a size such as 4GB or 512MiB, got 'lots'",
    ),
    "negative audit": (with_options(audit=-1), r"audit: .*got -1"),
    "half an audit": (with_options(audit=0.5), r"audit: .*got 0\.5"),
    "unknown strategy": (with_options(strategy="fast"), r"strategy: expected .*got 'fast'"),
    "unknown precision": (with_options(precision="int1"), r"precision: expected .*got 'int1'"),
    "images that the model cannot take": (
        with_data(lambda a: (a.images.repeat(1, 2, 1, 1), a.labels)),
        r"the model fails on images of shape \[4, 12, 12\]",
    ),
    "NaN in the logits": (logits(lambda z: z + NAN), "logits of image 0 are NaN or infinite"),
    "infinite logits": (logits(lambda z: z + INFINITE), "logits of image 0 are NaN or infinite"),
    "measures in one string": TYPES["measures in one string"],
    "NaN by replay": (
        both(logits(lambda z: z + NAN), with_options(strategy="replay")),
        "logits of image 0 are NaN or infinite",
    ),
    "scaled by its batch": (logits(lambda z: z * (1 + z.mean())), "other images of its batch"),
    "centred on its batch": (logits(lambda z: z - z.mean(dim=0)), "other images of its batch"),
}

CASES = {**VALUES, **TYPES, **ENGINE}


@pytest.mark.parametrize(
    ("run", "name"), [(r, n) for n in CASES for r in (RUNS if n not in ENGINE else ["engine"])]
)
def test_bad_input(run, name):
    spoil, message = CASES[name]
    error = TypeError if name in TYPES else ValueError
    arguments = Arguments()
    spoil(arguments)
    with pytest.raises(error, match=message) as caught:
        arguments.run(RUNS[run])
    assert type(caught.value) is error
    assert "\n" not in str(caught.value), "one line, so that the shell can show it"


@pytest.mark.parametrize("run", RUNS)
def test_the_arguments_are_sound_before_they_are_spoilt(run):
    arguments = Arguments()
    assert len(arguments.run(RUNS[run]).units) == 8
    arguments.data = arguments.batches
    assert len(arguments.run(RUNS[run]).units) == 8


@pytest.mark.parametrize("run", RUNS)
def test_a_layer_without_units(run):
    model, images, labels = networks.network("mlp")
    with pytest.raises(ValueError, match="no layer that holds units is called '0'; nearest: "):
        RUNS[run](model, (images, labels), "0", progress=False)


@pytest.mark.parametrize("run", RUNS)
def test_a_network_without_activations(run):
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    data = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(ValueError, match=r"this network has none; name the layers instead.*'0'"):
        RUNS[run](model, data, progress=False)
    assert len(RUNS[run](model, data, "0", progress=False).units) == 6


def test_planning_checks_the_same():
    for name in ("unknown layer", "not iterable", "NaN in a weight"):
        spoil, message = CASES[name]
        arguments = Arguments()
        spoil(arguments)
        with pytest.raises((TypeError, ValueError), match=message):
            pa.plan(
                arguments.model,
                (arguments.images, arguments.labels) if arguments.data is None else arguments.data,
                arguments.layers,
            )


def test_classes_of_one_name_are_told(caplog):
    """As two of ImageNet's are, so that it is no error."""
    model, images, labels = networks.network("mlp", 6)
    names = ["crane", "b", "crane", "d", "e"]
    pa.ablate(model, (images, labels), class_names=names, progress=False)
    assert "class_names: crane stand for more than one class" in caplog.text
