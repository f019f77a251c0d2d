"""Runs without labels: the intact network's predictions stand in, and words say agreement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import networks
from support.stores import contents
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pyablate as pa
from pyablate.data.dataset import Data, gathered
from pyablate.runs.run_folder import StoreMismatch

pytestmark = pytest.mark.usefixtures("exports_kept")

COUNT = 14
LAYERS = ["body.2", "body.3.relu2"]
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "pair": lambda x: (x, None),
    "list": lambda x: [x, None],
    "array": lambda x: x.numpy(),
    "tensor": lambda x: x,
    "loader": lambda x: DataLoader(TensorDataset(x), batch_size=4),
    "loader of images": lambda x: DataLoader(x, batch_size=4),  # type: ignore[arg-type]
    "batches": lambda x: [x[:5], x[5:]],
    "three batches": lambda x: list(x.split(5)),
    "pairs": lambda x: [(x[:5], None), (x[5:], None)],
    "generator": lambda x: (part for part in x.split(5)),
}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return networks.residual().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(COUNT, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def _labelled(model: torch.nn.Module, images: Tensor, **options: Any) -> pa.AblationResult:
    return pa.ablate(model, (images, model(images).argmax(dim=1)), progress=False, **options)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_images_alone(images: Tensor, form: str) -> None:
    data = Data(
        FORMS[form](images), dtype=torch.float32, device=torch.device("cpu"), unlabelled=True
    )
    data.hold_if_read_once()
    for _ in range(2):
        batches = list(data.batches(6))
        assert torch.equal(torch.cat([batch.images for batch in batches]), images)
        assert all((batch.labels == -1).all() for batch in batches)
        assert not data.labelled
        data.hold()
        assert torch.equal(data.at(torch.tensor([9, 2])), images[[9, 2]])
    with pytest.raises(
        TypeError, match=r"batch 0: expected \(images, labels\), got images without"
    ):
        gathered(FORMS[form](images))


@pytest.mark.parametrize(
    ("form", "intervention"), [("pair", "zero"), ("loader", "mean"), ("generator", "resample")]
)
def test_the_result_is_that_of_the_predictions_as_labels(
    model: torch.nn.Module, images: Tensor, form: str, intervention: str
) -> None:
    options: dict[str, Any] = {"intervention": intervention, "measures": ["loss"], "audit": 30}
    options["layers"] = LAYERS
    expected = _labelled(model, images, **options)
    found = pa.ablate(model, FORMS[form](images), progress=False, **options)
    assert np.array_equal(found.labels, expected.labels)
    assert np.array_equal(found.baseline, found.labels)
    assert np.array_equal(found.predictions(), expected.predictions())
    np.testing.assert_allclose(found.loss_change, expected.loss_change, rtol=1e-9)
    assert np.array_equal(found.gained, np.zeros_like(found.gained))
    assert (found.labelled, expected.labelled) == (False, True)


@pytest.mark.parametrize("intervention", ["zero", "noise"])
def test_the_oracle_agrees(model: torch.nn.Module, images: Tensor, intervention: str) -> None:
    options: dict[str, Any] = {"intervention": intervention, "measures": ["loss"]}
    options["layers"] = LAYERS
    found = pa.ablate(model, images, progress=False, precision="fp32", **options)
    slow = pa.reference.ablate(model, images, progress=False, **options)
    assert not slow.labelled
    assert np.array_equal(found.labels, slow.labels)
    assert np.array_equal(found.predictions(), slow.predictions())
    np.testing.assert_allclose(found.loss_change, slow.loss_change, atol=1e-5)


@pytest.mark.parametrize("run", [pa.ablate, pa.reference.ablate])
def test_class_means_need_labels(
    model: torch.nn.Module, images: Tensor, run: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match="intervention: class_mean needs labels"):
        run(model, images, intervention="class-mean", progress=False)


@pytest.mark.parametrize(
    ("work", "source"),
    [
        (pa.attributes, "tensor"),
        (pa.cumulative, "batches"),
        (pa.pairs, "pair"),
    ],
)
def test_what_needs_labels_says_so(
    model: torch.nn.Module, images: Tensor, work: Callable[..., Any], source: str
) -> None:
    layer = () if work is pa.attributes else (pa.sites(model, images[:1])[0].name,)
    with pytest.raises(TypeError, match=r"expected \(images, labels\), got images without labels"):
        work(model, FORMS[source](images), *layer)


def test_labels_for_some_of_the_images(model: torch.nn.Module, images: Tensor) -> None:
    labels = torch.zeros(5, dtype=torch.int64)
    for source in ([(images[:5], labels), images[5:]], [images[5:], (images[:5], labels)]):
        with pytest.raises(ValueError, match="batch 1: expected labels for all images or for none"):
            pa.ablate(model, source, progress=False)


def test_it_is_stored_and_loaded(model: torch.nn.Module, images: Tensor, tmp_path: Path) -> None:
    result = pa.ablate(model, images, LAYERS, output=tmp_path / "a.zarr", progress=False)
    loaded = pa.load(tmp_path / "a.zarr")
    assert not loaded.labelled
    loaded.save(tmp_path / "b.zarr")
    assert contents(tmp_path / "a.zarr") == contents(tmp_path / "b.zarr")
    again = pa.ablate(model, images, LAYERS, output=tmp_path / "a.zarr", progress=False)
    assert np.array_equal(again.predictions(), result.predictions())
    labels = torch.from_numpy(result.labels)
    with pytest.raises(StoreMismatch, match="whether there are labels"):
        pa.ablate(model, (images, labels), LAYERS, output=tmp_path / "a.zarr", progress=False)
    labelled = pa.ablate(
        model, (images, labels), LAYERS, output=tmp_path / "c.zarr", progress=False
    )
    assert labelled.labelled
    assert "labels" not in labelled.provenance["data"]
    assert pa.load(tmp_path / "c.zarr").labelled


def test_shards_are_merged(model: torch.nn.Module, images: Tensor, tmp_path: Path) -> None:
    whole = tmp_path / "whole.zarr"
    pa.ablate(model, images, LAYERS, output=whole, progress=False)
    parts = [tmp_path / "1.zarr", tmp_path / "2.zarr"]
    for number, part in enumerate(parts, 1):
        pa.ablate(model, images, LAYERS, shard=(number, 2), output=part, progress=False)
    assert not pa.merge(parts, tmp_path / "merged.zarr").labelled
    assert contents(whole) == contents(tmp_path / "merged.zarr")
    labels = torch.from_numpy(pa.load(whole).labels)
    other = tmp_path / "other.zarr"
    pa.ablate(model, (images, labels), LAYERS, shard=(2, 2), output=other, progress=False)
    with pytest.raises(StoreMismatch, match=r"what differs: .*whether there are labels"):
        pa.merge([parts[0], other])


def test_networks_are_compared_by_agreement(model: torch.nn.Module, images: Tensor) -> None:
    torch.manual_seed(5)
    other = networks.residual().eval()
    other.load_state_dict(
        {
            k: v + 0.05 * torch.randn(v.shape)
            for k, v in model.state_dict().items()
            if v.is_floating_point()
        },
        strict=False,
    )
    truth = model(images).argmax(dim=1)
    found, expected = pa.compare(model, other, images), pa.compare(model, other, (images, truth))
    assert np.array_equal(found.before.labels, truth.numpy())
    assert np.array_equal(found.after.labels, truth.numpy())
    assert found.summary().equals(expected.summary())
    assert repr(found).startswith("Comparison(agreement 1.0000 -> ")
    assert repr(expected).startswith("Comparison(accuracy 1.0000 -> ")


def test_words(model: torch.nn.Module, images: Tensor, tmp_path: Path) -> None:
    found = pa.ablate(model, images, LAYERS, progress=False)
    labelled = _labelled(model, images, layers=LAYERS)
    assert "no labels" in repr(found)
    assert "accuracy" not in repr(found)
    assert (found.word, labelled.word) == ("agreement", "accuracy")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    assert found.plot.drops().get_ylabel().startswith("largest class agreement drop")
    assert labelled.plot.drops().get_ylabel().startswith("largest class accuracy drop")
    found.report(tmp_path / "report.html", data=images, model=model)
    assert '"word":"agreement"' in (tmp_path / "report.html").read_text()
