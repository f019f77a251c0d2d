"""What follows from the flips, against slow explicit loops; and the result on disk."""

from __future__ import annotations

import dataclasses
import pickle
import typing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.stores import contents

import pyablate as pa
from pyablate.io import atomic
from pyablate.result import AblationResult
from pyablate.results import store
from pyablate.results.audit import Audit
from pyablate.results.effort import Effort
from pyablate.results.flips import Flips
from pyablate.results.record import Record


def made_of(
    predictions: np.ndarray, baseline: np.ndarray, labels: np.ndarray, classes: int
) -> AblationResult:
    """A result from full predictions [unit, image], flips in shuffled pieces."""
    units = len(predictions)
    pieces = []
    for row in np.random.default_rng(0).permutation(units):
        image = np.flatnonzero(predictions[row] != baseline)[::-1]
        half = len(image) // 2
        for part in (image[:half], image[half:]):
            pieces.append((np.full(len(part), row), part, predictions[row, part]))
    return AblationResult(
        units=pd.DataFrame(
            {
                "label": [f"layer{row % 2}:{row}" for row in range(units)],
                "layer": [f"layer{row % 2}" for row in range(units)],
                "unit": np.arange(units),
            }
        ),
        labels=labels,
        baseline=baseline,
        flips=Flips.gather(units, pieces),
        class_names=tuple(f"class {k}" for k in range(classes)),
        audit=Audit(10, 1),
        strategy={"layer0": "delta", "layer1": "closed form"},
        seconds=1.5,
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Predictions, baseline and labels; some classes without images, many pairs unchanged."""
    units, images = draw(st.integers(1, 6)), draw(st.integers(1, 25))
    classes = draw(st.integers(2, 5))
    random = np.random.default_rng(draw(st.integers(0, 2**20)))
    labels = random.integers(0, draw(st.integers(1, classes)), images)
    baseline = np.where(random.random(images) < 0.7, labels, random.integers(0, classes, images))
    flipped = random.random((units, images)) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    predictions = np.where(flipped, random.integers(0, classes, (units, images)), baseline)
    return predictions, baseline, labels, classes


@given(cases())
def test_predictions_come_back(case):
    predictions, baseline, labels, classes = case
    result = made_of(*case)
    np.testing.assert_array_equal(result.predictions(), predictions)
    assert result.predictions().dtype == np.int64
    assert len(result.flips.image) == (predictions != baseline).sum()
    for row in range(len(predictions)):
        run = result.flips.image[result.flips.start[row] : result.flips.start[row + 1]]
        assert (np.diff(run) > 0).all()
    np.testing.assert_array_equal(
        result.flips.row, np.repeat(np.arange(len(predictions)), np.diff(result.flips.start))
    )
    assert result.classes == classes
    np.testing.assert_array_equal(result.labels, labels)


@settings(max_examples=60)
@given(cases())
def test_everything_derived(case):
    predictions, baseline, labels, classes = case
    result = made_of(*case)
    units, images = predictions.shape

    def share(right: int, of: int) -> float:
        return right / of if of else float("nan")

    confusion = np.zeros((units, classes, classes), dtype=np.int64)
    lost, gained = (np.zeros((units, classes), dtype=np.int64) for _ in range(2))
    for row in range(units):
        for image in range(images):
            true, before, after = labels[image], baseline[image], predictions[row, image]
            confusion[row, true, after] += 1
            lost[row, true] += before == true and after != true
            gained[row, true] += before != true and after == true
    sizes = [sum(label == k for label in labels) for k in range(classes)]
    hits = [
        sum(b == k for b, label in zip(baseline, labels, strict=True) if label == k)
        for k in range(classes)
    ]
    drop = np.array(
        [
            [share(hits[k] - confusion[row, k, k], sizes[k]) for k in range(classes)]
            for row in range(units)
        ]
    )
    accuracy = np.array([sum(confusion[row, k, k] for k in range(classes)) for row in range(units)])
    largest = [max(d for d in row if d == d) for row in drop]

    np.testing.assert_array_equal(result.confusion(), confusion)
    np.testing.assert_array_equal(result.lost, lost)
    np.testing.assert_array_equal(result.gained, gained)
    np.testing.assert_array_equal(result.class_sizes, sizes)
    assert result.baseline_accuracy == pytest.approx(sum(hits) / images, abs=1e-12)
    np.testing.assert_allclose(
        result.baseline_class_accuracy, [share(h, s) for h, s in zip(hits, sizes, strict=True)]
    )
    np.testing.assert_allclose(result.accuracy, accuracy / images, atol=1e-12)
    np.testing.assert_allclose(
        result.accuracy_drop, sum(hits) / images - accuracy / images, atol=1e-12
    )
    np.testing.assert_allclose(result.class_accuracy_drop, drop, atol=1e-12)
    np.testing.assert_allclose(result.max_class_drop, largest, atol=1e-12)
    for row, best in enumerate(result.max_class):
        assert drop[row, best] == pytest.approx(largest[row], abs=1e-12)
        assert not (drop[row, :best] > largest[row] - 1e-9).any()  # the first on equality


@given(cases(), st.randoms(use_true_random=False))
def test_flips_do_not_depend_on_the_order_of_pieces(case, random):
    predictions, baseline, *_ = case
    row, image = np.nonzero(predictions != baseline)
    new = predictions[row, image]
    order = list(range(len(row)))
    random.shuffle(order)  # type: ignore[attr-defined]
    one = Flips.gather(len(predictions), [(row, image, new)])
    single = Flips.gather(len(predictions), [([row[i]], [image[i]], [new[i]]) for i in order])
    for name in ("start", "image", "prediction"):
        np.testing.assert_array_equal(getattr(one, name), getattr(single, name))
        assert getattr(one, name).dtype == getattr(single, name).dtype
    assert (one.start.dtype, one.image.dtype, one.prediction.dtype) == (
        np.dtype("int64"),
        np.dtype("int32"),
        np.dtype("int32"),
    )


@pytest.fixture(scope="module")
def result() -> AblationResult:
    random = np.random.default_rng(3)
    labels = random.integers(0, 4, 60)
    baseline = np.where(random.random(60) < 0.8, labels, random.integers(0, 4, 60))
    flipped = random.random((7, 60)) < 0.2
    flipped[4] = False  # a unit that changes nothing
    predictions = np.where(flipped, random.integers(0, 4, (7, 60)), baseline)
    return made_of(predictions, baseline, labels, 4)


@pytest.mark.parametrize(
    ("rows", "numbers"),
    [
        (2, [2]),
        (-1, [6]),
        (np.int32(3), [3]),
        ("layer1:5", [5]),
        (["layer1:5", "layer0:0"], [5, 0]),
        (np.array(["layer1:1"]), [1]),
        ([4, 0, 4], [4, 0, 4]),
        (np.array([1, 2]), [1, 2]),
        (range(2), [0, 1]),
        (slice(1, 6, 2), [1, 3, 5]),
        (np.arange(7) > 4, [5, 6]),
        ([], []),
        (pd.Series([6, 1]), [6, 1]),
    ],
)
def test_naming_rows(result, rows, numbers):
    np.testing.assert_array_equal(result.rows(rows), numbers)  # type: ignore[arg-type]
    everything = result.predictions()
    np.testing.assert_array_equal(result.predictions(rows), everything[numbers])  # type: ignore[arg-type]
    expected = result.confusion()[numbers]
    got = result.confusion(rows)  # type: ignore[arg-type]
    single = np.ndim(rows) == 0 and not isinstance(rows, slice)
    np.testing.assert_array_equal(got, expected[0] if single else expected)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (7, r"rows: .*out of bounds.*the result has 7 units"),
        ([0, 99], r"the result has 7 units"),
        ("layer0:1", r"rows: no unit 'layer0:1' in this result"),
        (["layer0:0", "x"], r"no unit 'x'"),
        (1.5, r"the result has 7 units"),
        (np.array([True, False]), r"the result has 7 units"),
    ],
)
def test_rows_that_are_not_there(result, rows, message):
    with pytest.raises(ValueError, match=message):
        result.predictions(rows)  # type: ignore[arg-type]


def test_dataset_and_table_show_the_same_figures(result):
    data = result.data
    assert isinstance(data, xr.Dataset)
    assert dict(data.sizes) == {"image": 60, "class": 4, "unit": 7}
    assert list(data["unit"].values) == list(result.units["label"])
    assert list(data["layer"].values) == list(result.units["layer"])
    assert list(data["class"].values) == list(result.class_names)
    for name in (
        *("baseline", "accuracy", "accuracy_drop", "max_class_drop", "max_class"),
        *("class_accuracy_drop", "lost", "gained", "baseline_class_accuracy"),
    ):
        np.testing.assert_array_equal(data[name].values, getattr(result, name))
    np.testing.assert_array_equal(data["label"].values, result.labels)
    one = data["lost"].sel({"unit": "layer1:3", "class": "class 2"})
    assert int(one) == result.lost[3, 2]

    table = result.to_dataframe()
    assert len(table) == 7
    assert list(table.columns[:3]) == ["label", "layer", "unit"]
    np.testing.assert_array_equal(table["accuracy_drop"], result.accuracy_drop)
    np.testing.assert_array_equal(table["flips"], (result.predictions() != result.baseline).sum(1))
    np.testing.assert_array_equal(table["drop: class 1"], result.class_accuracy_drop[:, 1])
    assert list(table["max_class"]) == [f"class {k}" for k in result.max_class]
    assert len(table.to_csv(index=False).splitlines()) == 8


def test_repr_sums_it_up(result):
    assert "7 units, 60 images, 4 classes, zero" in repr(result)
    assert f"{len(result.flips.image)} flips" in repr(result)


# Audit


def test_a_result_is_a_record_that_cannot_be_changed(result):
    assert isinstance(result, Record)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.note = "mine"  # type: ignore[attr-defined]
    assert typing.get_type_hints(AblationResult.__init__)["flips"] is Flips


def test_pickled_under_the_documented_address(result):
    assert AblationResult.__module__ == "pyablate.result"
    again = pickle.loads(pickle.dumps(result))
    assert type(again) is AblationResult
    assert repr(again) == repr(result)


@pytest.mark.parametrize(("pairs", "mismatches"), [(1, 0), (20, 0), (300, 0), (300, 2), (50, 49)])
def test_upper_bound_is_clopper_pearson(pairs, mismatches):
    """At the bound, seeing so few mismatches has a probability of exactly 5 %."""
    bound = Audit(pairs, mismatches).upper_bound
    assert stats.binom.cdf(mismatches, pairs, bound) == pytest.approx(0.05, rel=1e-9)
    if not mismatches:
        assert bound == pytest.approx(1 - 0.05 ** (1 / pairs))


def test_upper_bound_when_nothing_is_known():
    assert Audit(0, 0).upper_bound == 1.0
    assert Audit(5, 5).upper_bound == 1.0
    assert "300 pairs recomputed by replay, 0 mismatches" in str(Audit(300, 0))
    assert "0.99%" in str(Audit(300, 0))


# On disk


def same(first: AblationResult, second: AblationResult) -> None:
    pd.testing.assert_frame_equal(first.units, second.units)
    for name in ("labels", "baseline"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).dtype == getattr(second, name).dtype
    for name in ("start", "image", "prediction"):
        one, two = getattr(first.flips, name), getattr(second.flips, name)
        np.testing.assert_array_equal(one, two)
        assert one.dtype == two.dtype
    for name in ("class_names", "intervention", "audit", "strategy"):
        assert getattr(first, name) == getattr(second, name)


def test_round_trip(result, tmp_path):
    result.save(tmp_path / "run.zarr")
    loaded = pa.load(tmp_path / "run.zarr")
    assert type(loaded) is AblationResult
    same(result, loaded)
    assert isinstance(loaded.class_names, tuple)
    assert loaded.to_dataframe().equals(result.to_dataframe())
    loaded.save(str(tmp_path / "again.zarr"))
    assert contents(tmp_path / "again.zarr") == contents(tmp_path / "run.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.zarr", "run.zarr"]


@settings(max_examples=8, deadline=None)
@given(case=cases(), names=st.lists(st.text(max_size=6), min_size=5, max_size=5))
def test_round_trip_of_anything(case, names, tmp_path_factory):
    made = dataclasses.replace(made_of(*case), class_names=tuple(names[: case[3]]), strategy={})
    path = tmp_path_factory.mktemp("store") / "run.zarr"
    made.save(path)
    same(made, pa.load(path))


def test_bytes_depend_on_the_result_only(result, tmp_path):
    result.save(tmp_path / "one.zarr")
    dataclasses.replace(result, seconds=99.0).save(tmp_path / "two.zarr")
    assert contents(tmp_path / "one.zarr") == contents(tmp_path / "two.zarr")
    dataclasses.replace(result, audit=Audit(10, 2)).save(tmp_path / "two.zarr")
    assert contents(tmp_path / "one.zarr") != contents(tmp_path / "two.zarr")


def test_xarray_opens_the_store(result, tmp_path):
    result.save(tmp_path / "run.zarr")
    data = xr.open_zarr(tmp_path / "run.zarr", consolidated=False)
    np.testing.assert_array_equal(data["baseline"].values, result.baseline)
    np.testing.assert_array_equal(data["flip_image"].values, result.flips.image)
    assert data["label"].dims == ("image",)
    assert data.attrs["class_names"] == list(result.class_names)


def test_a_result_may_be_replaced_but_nothing_else(result, tmp_path):
    result.save(tmp_path / "run.zarr")
    dataclasses.replace(result, intervention="mean").save(tmp_path / "run.zarr")
    assert pa.load(tmp_path / "run.zarr").intervention == "mean"

    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(OSError, match=f"output: .*{name} exists and is not a pyablate result"):
            result.save(tmp_path / name)
        with pytest.raises(OSError, match="exists and is not a pyablate result"):
            store.check_writable(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "run.zarr"]


def test_a_failed_save_leaves_the_old_result(result, tmp_path, monkeypatch):
    result.save(tmp_path / "run.zarr")
    before = contents(tmp_path / "run.zarr")

    def write(_result: AblationResult, path: Path) -> None:
        path.mkdir()
        (path / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write", write)
    with pytest.raises(KeyboardInterrupt):
        result.save(tmp_path / "run.zarr")
    assert contents(tmp_path / "run.zarr") == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.zarr"]


def test_places_that_cannot_be_written(result, tmp_path):
    (tmp_path / "file").write_text("")
    inside_a_file = tmp_path / "file" / "run.zarr"
    with pytest.raises(OSError, match="file"):
        result.save(inside_a_file)
    with pytest.raises(OSError, match="file"):
        store.check_writable(inside_a_file)
    store.check_writable(tmp_path / "new" / "run.zarr")
    assert not (tmp_path / "new" / "run.zarr").exists()


def test_what_cannot_be_loaded(result, tmp_path):
    with pytest.raises(OSError, match="no such result"):
        pa.load(tmp_path / "nowhere.zarr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="not a pyablate result"):
        pa.load(tmp_path / "empty")
    (tmp_path / "file.zarr").write_text("{}")
    with pytest.raises(OSError, match="not a pyablate result"):
        pa.load(tmp_path / "file.zarr")


@pytest.mark.parametrize(
    ("old", "new"), [("settled", "pairs_by_precision"), ("doubt", "error_bounds")]
)
def test_former_names_of_effort_warn(old, new):
    effort = Effort({}, {"float32": 3}, {"relu": {"float32": 1e-4}})
    with pytest.warns(DeprecationWarning, match=rf"Effort\.{old} is now Effort\.{new}") as told:
        assert getattr(effort, old) is getattr(effort, new)
    assert [warning.filename for warning in told] == [__file__]


def test_a_failed_replacement_brings_the_old_result_back(result, tmp_path, monkeypatch):
    target = tmp_path / "run.zarr"
    result.save(target)
    rename = atomic.os.rename
    calls = iter([rename, None, rename])

    def fail_second(source: object, goal: object) -> None:
        call = next(calls)
        if call is None:
            raise OSError("the disk is gone")
        call(source, goal)

    monkeypatch.setattr(atomic.os, "rename", fail_second)
    with pytest.raises(OSError, match="disk is gone"):
        result.save(target)
    same(pa.load(target), result)
