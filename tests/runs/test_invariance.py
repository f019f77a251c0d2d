"""Batch size, memory, threads, order of layers and form of the data change no byte of a result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import networks
from support.stores import contents
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import pyablate as pa
from pyablate.engine import int8_conv

pytestmark = pytest.mark.usefixtures("exports_kept")

INTERVENTIONS = ["zero", "class_mean", "resample:1", "noise:1", "direction:1"]
GROUPS = [["body.2:0", "body.4:3"], ["body.2:5", "body.2:1"]]


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Tensor, Tensor, list[str]]:
    return (*networks.network("residual", 40), ["body.2", "body.3.relu1", "body.4"])


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """Run, save, and give every file of the store with its bytes."""
    numbers = iter(range(1000))

    def run(model: nn.Module, data: Any, layers: Any, **options: Any) -> dict[str, bytes]:
        folder = tmp_path / f"{next(numbers)}.zarr"
        pa.ablate(model, data, layers, audit=30, progress=False, **options).save(folder)
        files = contents(folder)
        assert len(files) >= 8
        return files

    return run


Stored = Callable[..., dict[str, bytes]]


@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_batch_size_and_memory(case, stored, intervention):
    model, images, labels, layers = case
    options: dict[str, Any] = {"intervention": intervention}
    if intervention != "direction:1":
        options["groups"] = GROUPS
    plain = stored(model, (images, labels), layers, **options)
    for batch_size, memory in ((1, None), (7, None), (13, 1 << 16), (40, 1), (None, 1 << 20)):
        other = stored(
            model, (images, labels), layers, batch_size=batch_size, memory=memory, **options
        )
        assert other == plain, (batch_size, memory)


@pytest.mark.parametrize("name", ["vit", "inception", "used_twice", "routed"])
def test_batch_size_on_other_networks(stored, name):
    model, images, labels = networks.network(name)
    plain = stored(model, (images, labels), ["*"])
    assert stored(model, (images, labels), ["*"], batch_size=5, memory=1 << 16) == plain


def test_threads(case, stored):
    model, images, labels, layers = case
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = stored(model, (images, labels), layers, intervention="noise")
        torch.set_num_threads(2)
        assert stored(model, (images, labels), layers, intervention="noise") == one
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_precision(case, stored, precision):
    if precision == "int8" and not int8_conv.available():
        pytest.skip("this processor has no exact 8-bit products")
    model, images, labels, layers = case
    plain = stored(model, (images, labels), layers)
    assert stored(model, (images, labels), layers, precision=precision) == plain


def test_order_of_layers(case, stored):
    model, images, labels, layers = case
    plain = stored(model, (images, labels), layers)
    assert stored(model, (images, labels), layers[::-1]) == plain
    assert stored(model, (images, labels), ["body.4", *layers, "body.3.relu[1]"]) == plain
    units = [f"body.4:{unit}" for unit in reversed(range(12))]
    assert stored(model, (images, labels), [*units, "body.2", "body.3.relu1"]) == plain


@pytest.mark.parametrize("intervention", ["zero", "mean", "resample:1"])
def test_form_of_the_data(case, stored, intervention):
    model, images, labels, layers = case

    def generator() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(images.split(9), labels.split(9), strict=True)

    class Iterable:
        def __iter__(self) -> Iterator[Any]:
            return iter([[images[:3], labels[:3]], (images[3:].numpy(), labels[3:].int().numpy())])

    forms: dict[str, Any] = {
        "list": [images, labels],
        "arrays": (images.numpy(), labels.numpy()),
        "small integers": (images, labels.to(torch.uint8)),
        "double images": (images.double(), labels),
        "loader": DataLoader(TensorDataset(images, labels), batch_size=11),
        "generator": generator(),
        "batches": list(generator()),
        "iterable": Iterable(),
    }
    plain = stored(model, (images, labels), layers, intervention=intervention)
    for form, data in forms.items():
        assert stored(model, data, layers, intervention=intervention) == plain, form


def test_history(case, stored, monkeypatch):
    """Neither earlier runs nor random states, modes, layouts or an ambient autocast matter."""
    monkeypatch.undo()  # each run exports for itself
    model, images, labels, layers = case
    plain = stored(model, (images, labels), layers, intervention="resample")
    pa.ablate(model, (images, labels), ["*"], progress=False)
    torch.manual_seed(123)
    model.train()
    try:
        assert stored(model, (images, labels), layers, intervention="resample") == plain
    finally:
        model.eval()
    strided = images.to(memory_format=torch.channels_last)
    assert stored(model, (strided, labels), layers, intervention="resample") == plain
    with torch.enable_grad():
        assert stored(model, (images, labels), layers, intervention="resample") == plain
    with torch.inference_mode():
        assert stored(model, (images, labels), layers, intervention="resample") == plain
    with torch.autocast("cpu", torch.bfloat16):
        assert stored(model, (images, labels), layers, intervention="resample") == plain
        assert torch.is_autocast_enabled("cpu")


def test_seeds_matter(case, stored):
    """The comparison of bytes sees a different draw; the audit's seed is provenance, no more."""
    model, images, labels, layers = case
    plain = stored(model, (images, labels), layers, intervention="noise:1")
    other = stored(model, (images, labels), layers, intervention="noise:2")
    audited = stored(model, (images, labels), layers, intervention="noise:1", seed=5)
    assert json.loads(plain.pop("zarr.json")) != json.loads(audited.pop("zarr.json"))
    assert other.pop("zarr.json")
    assert other != plain
    assert audited == plain


def test_shipped_network(stored):
    model, images, labels = networks.demo("alexnet", 60)
    layers = ["features.9", "classifier.1"]
    plain = stored(model, (images, labels), layers)
    assert stored(model, (images, labels), layers, batch_size=17, memory=1 << 22) == plain


class Squeezes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3)
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, networks.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.adaptive_avg_pool2d(self.relu(self.conv(x)), 1).squeeze())


@pytest.mark.parametrize("strategy", ["auto", "replay"])
@pytest.mark.parametrize("images", [1, 17])
def test_a_last_batch_of_one_image(images, strategy):
    _, x, labels = networks.network("residual", 17)
    model = networks.made(Squeezes(), x)
    x, labels = x[:images], labels[:images]
    result = pa.ablate(model, (x, labels), batch_size=16, strategy=strategy)
    with torch.no_grad():
        expected = model(torch.cat([x, x])).argmax(dim=1)[:images]
    assert (result.baseline == expected.numpy()).all()
    assert result.audit.mismatches + result.audit.mended == 0
