"""Images in a report: those that flip, that activate a unit most, that are relevant to it."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from support.report_pages import data_of, shaded
from torch import nn

import pyablate as pa
from pyablate.report.activating import most_activating
from pyablate.report.examples import FLIPPED


def test_images_that_flip_and_their_pictures(result, tmp_path):
    images = shaded(result)
    result.report(tmp_path / "r.html", data=(images, torch.from_numpy(result.labels)))
    found = data_of((tmp_path / "r.html").read_text())["examples"]
    for row in range(len(result.units)):
        run = slice(found["start"][row], found["start"][row + 1])
        numbers = found["image"][run].astype(int)
        after = result.predictions(row)[0]
        assert len(numbers) == min(FLIPPED, (after != result.baseline).sum())
        np.testing.assert_array_equal(found["after"][run], after[numbers])
        assert (after[numbers] != result.baseline[numbers]).all()
        label = result.labels[numbers]
        worst = (result.baseline[numbers] == label) & (label == result.max_class[row])
        assert (np.diff(worst.astype(int)) <= 0).all()  # those stand first
    shown = found["shown"]
    np.testing.assert_array_equal(found["label"], result.labels[shown])
    assert set(found["pictures"]) == {str(number) for number in shown}
    for number, uri in found["pictures"].items():
        picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("L")
        assert picture.size == (48, 80)
        low, high = images[shown.min()].min(), images[shown.max()].max()
        expected = 255 * float((images[int(number), 0, 0, 0] - low) / (high - low))
        assert np.asarray(picture).mean() == pytest.approx(expected, abs=4)


def test_pictures_stay_within_their_budget(result, tmp_path, monkeypatch):
    monkeypatch.setattr("pyablate.report.examples.BUDGET", 600)
    data = (shaded(result), torch.from_numpy(result.labels))
    result.report(tmp_path / "r.html", data=data)
    found = data_of((tmp_path / "r.html").read_text())["examples"]
    assert 0 < sum(map(len, found["pictures"].values())) <= 600
    first = result.max_class_drop.argmax()
    run = slice(found["start"][first], found["start"][first + 1])
    assert set(found["pictures"]) <= {str(number) for number in found["image"][run]}


def test_pictures_give_way_in_a_large_report(result, tmp_path, monkeypatch, caplog):
    data = (shaded(result), torch.from_numpy(result.labels))
    place = tmp_path / "r.html"

    def written() -> dict[str, Any]:
        result.report(place, data=data)
        return data_of(place.read_text())

    whole = written()
    pictures = list(whole["examples"]["pictures"])
    most = place.stat().st_size - 100
    monkeypatch.setattr("pyablate.report._write.MOST", most)
    some = written()
    assert place.stat().st_size <= most
    # The last one is of the least harmful unit.
    assert list(some["examples"]["pictures"]) == pictures[: len(some["examples"]["pictures"])]
    assert len(some["examples"]["pictures"]) in (len(pictures) - 1, len(pictures) - 2)
    assert "MB" not in caplog.text
    monkeypatch.setattr("pyablate.report._write.MOST", 1000)
    none = written()
    assert none["examples"]["pictures"] == {}
    assert none["units"]["label"] == whole["units"]["label"]
    assert "a few layers at a time" in caplog.text


class _Twice(nn.Module):
    """A ReLU that is called twice, on maps of two sizes, and a layer of features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.relu = nn.ReLU()
        self.again = nn.Conv2d(6, 6, 1)
        self.hidden = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
        self.out = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.conv(x))
        x = self.relu(self.again(x))
        return self.out(self.hidden(x.mean(dim=(2, 3))))


def test_most_activating_images_equal_a_plain_search():
    torch.manual_seed(0)
    model = _Twice()
    images = torch.randn(129, 1, 6, 6)  # a batch and a single image
    images[119:] = images[:10]  # equal activations: the first image stands
    labels = torch.arange(129) % 3
    result = pa.ablate(model, (images, labels), ["relu", "hidden.1"], audit=0)
    found = most_activating(model, (images, labels), result, count=7)
    sums: dict[str, torch.Tensor] = {}
    for name in ("relu", "hidden.1"):

        def hook(_m: Any, _i: Any, output: torch.Tensor, name: str = name) -> None:
            pooled = output.flatten(2).mean(2) if output.ndim > 2 else output
            sums[name] = sums.get(name, 0) + pooled

        model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        model.eval()(images)
    for row, (layer, unit) in enumerate(result.units[["layer", "unit"]].itertuples(index=False)):
        values = sums[layer][:, unit].double().numpy()
        # The batches differ, so equal up to rounding: compare values, and the order of repeats.
        np.testing.assert_allclose(values[found[row]], np.sort(values)[::-1][:7], atol=1e-6)
        assert len(set(found[row])) == 7


def test_most_activating_images_of_units_along_an_axis_of_ones_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)).eval()
    data = torch.randn(12, 1, 8, 8), torch.arange(12) % 3
    result = pa.ablate(model, data, "1", axis={"1": 2}, audit=0, progress=False)
    found = most_activating(model, data, result, count=2)
    with torch.no_grad():
        rows = model[:2](data[0]).mean(dim=(1, 3))  # of the six rows, not of the six channels
    assert (found == rows.argsort(dim=0, descending=True)[:2].t().numpy()).all()


def test_relevant_images_stand_in_the_order_of_the_units(result, tmp_path):
    labels = result.units["label"].tolist()
    images = np.arange(3 * len(labels[1:])).reshape(-1, 3) % len(result.labels)
    found = xr.Dataset(
        {"relevant_image": (("unit", "rank"), images[::-1])}, coords={"unit": labels[:0:-1]}
    )
    path = tmp_path / "r.html"
    result.report(path, relevant=found)
    shown = data_of(path.read_text())["examples"]
    assert shown["relevant"].tolist() == [[-1, -1, -1], *images.tolist()]
    assert set(images.ravel()) <= set(shown["shown"].tolist())
    assert shown["heat"] == {}
    heat = np.zeros((*images.shape, 48, 60), dtype=np.float32)
    heat[0, 1, :, :20], heat[0, 1, :, 40:] = 4, -4
    result.report(
        path, relevant=found.assign(relevant_map=(("unit", "rank", "y", "x"), heat[::-1]))
    )
    drawn = data_of(path.read_text())["examples"]["heat"]
    assert len(drawn) == images.size
    raw = base64.b64decode(drawn[f"{labels[1]}/1"].split(",")[1])
    pixels = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))
    red, white, blue = (pixels[:, column].mean(0).tolist() for column in (8, 30, 52))
    assert [red, white, blue] == [
        pytest.approx(colour, abs=25) for colour in ([255, 0, 0], [255] * 3, [0, 0, 255])
    ]
    others = found.assign_coords(unit=[f"x:{unit}" for unit in range(len(images))])
    for wrong in (others, found + 10**6):
        with pytest.raises(ValueError, match="relevant: expected units and images"):
            result.report(path, relevant=wrong)
    with pytest.raises(TypeError, match="relevant: expected what relmax returns"):
        result.report(path, relevant=xr.Dataset())


def test_groups_have_no_most_activating_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    data = torch.randn(10, 1, 6, 6), torch.arange(10) % 3
    result = pa.ablate(model, data, groups=[["1:0", "1:2"]], audit=0)
    assert (most_activating(model, data, result, count=3) == -1).all()
