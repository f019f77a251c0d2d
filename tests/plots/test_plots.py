"""Pictures show what the result says: the data in the artists, not pixels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.shelled import invoke
from support.simulated import from_predictions, simulate

import pyablate as pa

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

LAYERS = ["first"] * 6 + ["second"] * 9


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    pyplot.close("all")


@pytest.fixture(scope="module")
def result() -> pa.AblationResult:
    """Unit first:2 breaks class 3, second:1 breaks class 0; the others do next to nothing."""
    rates = np.full((15, 4), 0.02)
    rates[2, 3], rates[7, 0] = 0.9, 0.6
    return simulate(rates, 0.02, 100, np.random.default_rng(0), LAYERS)


def points(axes: Any) -> dict[str, np.ndarray]:
    """All dots of the axes by the beginning of their label."""
    return {
        c.get_label(): np.asarray(c.get_offsets()) for c in axes.collections if len(c.get_offsets())
    }


def names(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_drops_are_in_their_layers_and_the_damaging_stand_out(result):
    axes = result.plot.drops()
    found = points(axes)
    beyond, within = found["unit beyond chance (q ≤ 0.05)"], found["unit within chance"]
    assert sorted(beyond[:, 1]) == pytest.approx(sorted(100 * result.max_class_drop[[2, 7]]))
    everything = np.concatenate([beyond, within])
    for number, layer in enumerate(("first", "second")):
        mine = everything[np.rint(everything[:, 0]) == number]
        drops = 100 * result.max_class_drop[(result.units["layer"] == layer).to_numpy()]
        assert sorted(mine[:, 1]) == pytest.approx(sorted(drops))
    assert names(axes.xaxis) == ["first", "second"]
    assert "percentage points" in axes.get_ylabel()
    texts = {text.get_text() for text in axes.texts}
    assert texts == {"unit 2:\nclass 3", "unit 1:\nclass 0"}


def test_the_noise_floor_is_the_band(result):
    (band,) = result.plot.drops(layers="second", names=0).containers
    (bar,) = band.patches
    floor = 100 * result.noise_floor()[6:]
    low, high = np.quantile(floor, [0.05, 0.95])
    assert bar.get_y() == pytest.approx(low)
    assert bar.get_y() + bar.get_height() == pytest.approx(high)
    lines = [c for c in pyplot.gca().collections if c.__class__.__name__ == "LineCollection"]
    assert lines[0].get_segments()[0][:, 1] == pytest.approx(np.median(floor))


def test_overall_drops_have_their_own_test(result):
    axes = result.plot.drops("accuracy_drop", fdr=0.01)
    beyond = points(axes)["unit beyond chance (q ≤ 0.01)"]
    assert sorted(beyond[:, 1]) == pytest.approx(sorted(100 * result.accuracy_drop[[2, 7]]))
    assert not axes.containers  # no floor: a harmless unit's overall drop is 0 on average


def test_heat_map(result):
    axes = result.plot.heat_map(3)
    # Where classes tie, by the drop of all images.
    rows = np.lexsort((-result.accuracy_drop, -result.max_class_drop))[:3]
    (image,) = axes.images
    drops = 100 * result.class_accuracy_drop
    np.testing.assert_allclose(image.get_array(), drops[rows])
    assert names(axes.yaxis) == result.units["label"].iloc[rows].tolist()
    assert names(axes.xaxis) == list(result.class_names)
    low, high = image.get_clim()
    assert -low == high == pytest.approx(np.abs(drops[rows]).max())
    significant = result.significance()["significant"].to_numpy()[rows]
    dots = np.asarray(axes.collections[0].get_offsets())
    assert {(int(y), int(x)) for x, y in dots} == set(zip(*np.nonzero(significant), strict=True))
    assert "percentage points" in axes.figure.axes[1].get_ylabel()


def test_heat_map_in_other_orders(result):
    chosen = ["second:1", "first:2", "first:0"]
    layer = names(result.plot.heat_map(chosen, order="layer").yaxis)
    assert layer == ["first:0", "first:2", "second:1"]
    few = np.zeros((4, 40), dtype=np.int64)
    labels = np.repeat([0, 1], 20)
    few[:] = labels
    few[[0, 2], :10] = 1  # units 0 and 2 do the same, 1 and 3 do the same
    few[[1, 3], 20:32] = 0
    alike = from_predictions(few, labels, labels, 2)
    rows = names(alike.plot.heat_map(4, order="cluster").yaxis)
    pairs = {frozenset(rows[:2]), frozenset(rows[2:])}
    assert pairs == {frozenset({"layer:0", "layer:2"}), frozenset({"layer:1", "layer:3"})}
    axes = result.plot.heat_map(5, limit=7)
    assert axes.images[0].get_clim() == (-7, 7)
    assert len(result.plot.heat_map("first:2").images[0].get_array()) == 1


def test_profile(result):
    axes = result.plot.profile("first:2")
    lost, gained = axes.containers
    np.testing.assert_allclose([bar.get_width() for bar in lost], result.lost[2])  # of 100 images
    np.testing.assert_allclose([-bar.get_width() for bar in gained], result.gained[2])
    found = points(axes)
    assert found["drop, q ≤ 0.05"].tolist() == [[100 * result.class_accuracy_drop[2, 3], 3]]
    np.testing.assert_allclose(found["drop"][:, 0], 100 * result.class_accuracy_drop[2, :3])
    assert names(axes.yaxis) == list(result.class_names)
    assert "first:2" in axes.get_title()


def test_profile_of_the_classes_that_change_most(result):
    axes = result.plot.profile(2, classes=2)
    changed = result.lost[2] + result.gained[2]
    most = sorted(np.argsort(-changed, kind="stable")[:2])
    assert names(axes.yaxis) == [f"class {k}" for k in most]


def test_a_class_without_images_is_not_drawn():
    labels = np.array([0, 0, 2, 2])
    empty = from_predictions(np.array([[1, 0, 2, 2]]), labels, labels, 3)
    assert names(empty.plot.profile(0).yaxis) == ["class 0", "class 2"]
    axes = empty.plot.heat_map()
    assert names(axes.xaxis) == ["class 0", "class 2"]
    assert np.isfinite(axes.images[0].get_array()).all()
    assert axes.get_xlabel() == "class (the 2 of 3 with images)"
    empty.plot.drops()


def test_of_a_thousand_classes_those_that_change_are_drawn_and_named():
    labels = np.repeat([3, 500, 700, 999], [40, 40, 40, 1])
    ablated = np.tile(labels, (2, 1))
    ablated[0, :30] = 5
    ablated[1, 80:] = 6  # all of class 700, and the one image of class 999
    axes = from_predictions(ablated, labels, labels, 1000).plot.heat_map(classes=2)
    assert names(axes.xaxis) == ["class 3", "class 700"]
    assert axes.get_xlabel() == "class (2 of 4 with images, those of which most change)"
    (image,) = axes.images
    assert image.get_array().tolist() == [[0, 100], [75, 0]]
    assert image.get_interpolation() == "nearest"  # cells are not blended
    many = from_predictions(np.zeros((1, 200), int), np.arange(200), np.arange(200), 200)
    axes = many.plot.heat_map(classes=200)
    assert names(axes.xaxis) == [f"class {k}" for k in range(0, 200, 2)]


@pytest.fixture(scope="module")
def outlier() -> pa.AblationResult:
    """One unit of forty breaks a class, the others do next to nothing."""
    rates = np.full((40, 4), 0.02)
    rates[5, 3] = 0.9
    return simulate(rates, 0.02, 100, np.random.default_rng(0))


def test_an_outlier_does_not_squeeze_the_rest(outlier, result):
    axes = outlier.plot.drops()
    assert axes.get_yscale() == "symlog"
    assert axes.get_ylabel().endswith("(logarithmic beyond ±1)")
    axes.figure.canvas.draw()
    written = [label.get_text() for label in axes.yaxis.get_ticklabels()]
    assert {"0", "1", "2", "5", "10", "20"} <= set(written)
    assert outlier.plot.drops(log=False).get_yscale() == "linear"
    assert result.plot.drops().get_yscale() == "linear"  # two stand out, one has no half by itself
    assert result.plot.drops(log=True).get_yscale() == "symlog"
    axes = outlier.plot.heat_map(10)
    assert type(axes.images[0].norm).__name__ == "SymLogNorm"
    assert axes.figure.axes[1].get_ylabel().endswith("(logarithmic beyond ±1)")
    assert type(outlier.plot.heat_map(10, log=False).images[0].norm).__name__ == "Normalize"
    assert type(outlier.plot.heat_map(10, limit=9).images[0].norm).__name__ == "Normalize"


def test_units_beyond_the_limit_are_marked_where_the_axis_ends(outlier):
    axes = outlier.plot.drops(limit=20)
    assert axes.get_ylim()[1] == 20
    assert axes.get_yscale() == "linear"
    found = points(axes)
    assert found["_beyond"].tolist() == [[pytest.approx(0, abs=0.3), 20]]
    drawn = sum(len(found[name]) for name in found if name.startswith(("unit", "_beyond")))
    assert drawn == len(outlier.units)


def test_attributes_are_drawn_with_their_formula_and_outliers_aside(outlier):
    values = np.r_[1e4, np.linspace(1, 9, 39)]
    table = pd.DataFrame({"size": values}, index=outlier.units["label"]).rename_axis("unit")
    data = table.to_xarray()
    data["size"].attrs["formula"] = "sum |w|"
    axes = outlier.plot.scatter(data, "size", "accuracy_drop")
    assert axes.get_xlabel() == "size: sum |w|\n(logarithmic beyond ±1)"
    assert axes.get_xscale() == "symlog"
    table.iloc[3] = np.inf  # which takes no part
    assert outlier.plot.scatter(table, "size", "accuracy_drop").get_xscale() == "symlog"
    assert outlier.plot.scatter(data, "size", log=False).get_xscale() == "linear"


def test_nothing_flips():
    labels = np.array([0, 1])
    still = from_predictions(labels[None].repeat(2, 0), labels, labels, 2)
    still.plot.drops().figure.canvas.draw()
    still.plot.heat_map(order="cluster").figure.canvas.draw()
    still.plot.profile(0).figure.canvas.draw()


@pytest.mark.parametrize("kind", ["frame", "dataset"])
def test_scatter(result, kind):
    values = np.random.default_rng(1).normal(size=15)
    table: Any = pd.DataFrame({"size": values}, index=result.units["label"])
    if kind == "dataset":
        table = table.rename_axis("unit").to_xarray()
    axes = result.plot.scatter(table, "size", "accuracy_drop", method="pearson")
    found = pa.correlate(result, table, targets="accuracy_drop", methods="pearson")
    for layer, line in found.set_index("layer").iterrows():
        (label,) = [name for name in points(axes) if name.startswith(f"{layer}:")]
        assert f"{line.correlation:+.2f} [{line.low:+.2f}, {line.high:+.2f}]" in label
        rows = (result.units["layer"] == layer).to_numpy()
        expected = np.stack([values[rows], 100 * result.accuracy_drop[rows]], axis=1)
        np.testing.assert_allclose(points(axes)[label], expected)
    assert axes.get_xlabel() == "size"
    only = result.plot.scatter(table, "size", layers="second")
    assert [name.split(":")[0] for name in points(only)] == ["second"]


@pytest.fixture(scope="module")
def cumulative() -> pd.DataFrame:
    steps = {"removed": [0, 1, 2], "kept": [2, 1, 0]}
    parts = [
        pd.DataFrame(
            steps | {"order": order, "repeat": repeat, "target": target, "accuracy": accuracy}
        )
        for order, repeat, target, accuracy in (
            ("norm", 0, "", [0.9, 0.8, 0.1]),
            ("random", 0, "", [0.9, 0.5, 0.1]),
            ("random", 1, "", [0.9, 0.7, 0.1]),
            ("class", 0, "Bag", [0.9, 0.3, 0.1]),
        )
    ]
    table = pd.concat(parts, ignore_index=True)
    table["target_accuracy"] = np.where(table["target"] == "Bag", table["accuracy"] / 2, np.nan)
    return table


def test_cumulative_curves(cumulative):
    axes = pa.plots.cumulative_curves(cumulative)
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(lines) == ["norm", "random (mean, range)", "class: Bag"]
    np.testing.assert_allclose(lines["norm"], [90, 80, 10])
    np.testing.assert_allclose(lines["random (mean, range)"], [90, 60, 10])
    (band,) = axes.collections
    vertices = band.get_paths()[0].vertices
    assert sorted({y for x, y in vertices.round(6) if x == 1}) == [50, 70]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("units removed", "accuracy (%)")
    own = pa.plots.cumulative_curves(cumulative, x="kept", y="target_accuracy")
    assert [line.get_label() for line in own.lines] == ["class: Bag"]
    assert own.lines[0].get_xdata().tolist() == [2, 1, 0]


def test_many_curves_can_be_told_apart():
    table = pd.DataFrame(
        {"ranking": [f"r{n}" for n in range(14)], "fraction": 0.0, "accuracy": 1.0}
    )
    lines = pa.plots.prune_curves(table).lines
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(looks) == 14


def test_a_cumulative_draws_itself(cumulative):
    curves = pa.Cumulative.plot(SimpleNamespace(to_dataframe=lambda: cumulative))  # type: ignore[arg-type]
    assert len(curves.lines) == 3


@pytest.fixture(scope="module")
def pruned() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "ranking": ["l1"] * 2 + ["random"] * 4,
            "seed": [-1, -1, 0, 0, 1, 1],
            "fraction": [0, 0.5] * 3,
            "flops": [100, 40, 100, 50, 100, 60],
            "accuracy": [0.9, 0.6, 0.9, 0.2, 0.9, 0.4],
            "worst_class": list("abcabc"),
        }
    )


def test_prune_curves(pruned):
    axes = pa.plots.prune_curves(pruned, x="flops")
    lines = {line.get_label(): line.get_xydata().round(6).tolist() for line in axes.lines}
    assert lines == {"l1": [[100, 90], [40, 60]], "random (mean, range)": [[100, 90], [55, 30]]}
    assert len(axes.collections) == 1
    assert axes.get_xlabel() == "FLOPs of one image"


@pytest.mark.parametrize(
    ("column", "factor", "label", "largest"),
    [
        ("flops", 1, "FLOPs of one image", 100),
        ("flops", 3e6, "MFLOPs of one image", 300),
        ("flops", 3e8, "GFLOPs of one image", 30),
        ("parameters", 2e4, "parameters (millions)", 2),
        ("fraction", 1, "share of units removed (%)", 50),
    ],
)
def test_axes_have_units(pruned, column, factor, label, largest):
    table = pruned.assign(
        flops=pruned["flops"] * factor, parameters=pruned["flops"] * factor, loss=1.0
    )
    axes = pa.plots.prune_curves(table, x=column)
    assert axes.get_xlabel() == label
    assert max(axes.lines[0].get_xdata()) == pytest.approx(largest)


def test_chance_is_a_line(pruned, cumulative):
    def level(axes: Any) -> list[float]:
        return [line.get_ydata()[0] for line in axes.lines if line.get_label() == "chance"]

    assert level(pa.plots.prune_curves(pruned)) == []  # an older table does not say it
    known = pruned.assign(chance=0.1, loss=1.0)
    assert level(pa.plots.prune_curves(known)) == [pytest.approx(10)]
    assert level(pa.plots.prune_curves(known, y="loss")) == [pytest.approx(np.log(10))]
    assert level(pa.plots.prune_curves(known, y="flops")) == []
    assert level(pa.plots.cumulative_curves(cumulative.assign(chance=0.25))) == [25]
    balanced = cumulative.assign(target_balanced_accuracy=cumulative["target_accuracy"])
    assert level(pa.plots.cumulative_curves(balanced, y="target_balanced_accuracy")) == [50]


def test_curves_by_a_logarithmic_scale(cumulative):
    table = cumulative.assign(removed=10 ** cumulative["removed"])
    assert pa.plots.cumulative_curves(table, log=True).get_xscale() == "symlog"
    assert pa.plots.cumulative_curves(table).get_xscale() == "linear"


def test_the_axes_given_are_used(result, pruned):
    table = pd.DataFrame({"size": np.arange(15.0)}, index=result.units["label"])
    drawings: list[Callable[[Any], Any]] = [
        lambda ax: result.plot.drops(ax=ax),
        lambda ax: result.plot.heat_map(ax=ax),
        lambda ax: result.plot.profile(0, ax=ax),
        lambda ax: result.plot.scatter(table, "size", ax=ax),
        lambda ax: pa.plots.prune_curves(pruned, ax=ax),
    ]
    _, panels = pyplot.subplots(1, len(drawings))
    figures = len(pyplot.get_fignums())
    for draw, ax in zip(drawings, panels, strict=True):
        assert draw(ax) is ax
    assert len(pyplot.get_fignums()) == figures


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda r: r.plot.drops("loss"), ValueError, "drop: expected"),
        (lambda r: r.plot.drops(fdr=0), ValueError, "fdr"),
        (lambda r: r.plot.drops(layers="third"), ValueError, "no layer 'third'"),
        (lambda r: r.plot.heat_map(0), ValueError, "units: expected at least 1"),
        (lambda r: r.plot.heat_map([]), ValueError, "units: expected at least 1"),
        (lambda r: r.plot.heat_map("first:9"), ValueError, "no unit 'first:9'"),
        (lambda r: r.plot.heat_map(order="size"), ValueError, "order: expected"),
        (lambda r: r.plot.heat_map(limit=0), ValueError, "limit"),
        (lambda r: r.plot.heat_map(classes=0), ValueError, "classes"),
        (lambda r: r.plot.drops(limit=-1), ValueError, "limit"),
        (lambda r: r.plot.profile("first:9"), ValueError, "no unit 'first:9'"),
        (lambda r: r.plot.profile(0, classes=0), ValueError, "classes"),
        (lambda r: pa.plots.prune_curves([1]), TypeError, "pa.prune_curve"),
        (lambda r: pa.plots.prune_curves(r.units), ValueError, "column 'ranking'"),
        (lambda r: pa.plots.cumulative_curves(r.units), ValueError, "column 'order'"),
    ],
)
def test_bad_input(result, draw, error, message):
    with pytest.raises(error, match=message):
        draw(result)
    assert not pyplot.get_fignums()  # refused before a figure was made


def test_columns_that_cannot_be_drawn(pruned, cumulative):
    with pytest.raises(ValueError, match="y: expected one of"):
        pa.plots.prune_curves(pruned, y="worst_class")
    with pytest.raises(ValueError, match="y: no curve has"):
        pa.plots.cumulative_curves(cumulative[cumulative["target"] == ""], y="target_accuracy")


def test_without_matplotlib(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"pip install 'pyablate\[plot\]'"):
        result.plot.drops()


# The shell


@pytest.fixture
def here(
    result: pa.AblationResult,
    pruned: pd.DataFrame,
    cumulative: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    monkeypatch.chdir(tmp_path)
    result.save("run.zarr")
    pruned.to_csv("pruned.csv", index=False)
    cumulative.to_csv("cumulative.csv", index=False)
    table = pd.DataFrame({"unit": result.units["label"], "size": np.arange(15.0)})
    table.to_csv("table.csv", index=False)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        "run.zarr",
        "run.zarr --kind drops --target accuracy_drop --layers first",
        "run.zarr --kind heat-map --units 4 --order cluster",
        "run.zarr --log --width 4",
        "run.zarr --kind heat-map --classes 2 --limit 9 --linear",
        "run.zarr --kind profile --unit first:2 --classes 3",
        "run.zarr --kind scatter --attributes table.csv --attribute size --target gini --limit 2",
        "pruned.csv --kind prune --x flops --log",
        "cumulative.csv --kind cumulative",
    ],
)
def test_plot_on_the_shell(here, words):
    for name in ("one.png", "two.png"):
        code, said = invoke("plot", *words.split(), "-o", name, "--dpi", "40")
        assert code == 0, said
        assert f"Written: {name}" in said
    first = (here / "one.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert first == (here / "two.png").read_bytes()  # equal results, equal pictures


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run.zarr --kind drop", "nearest: drops"),
        ("run.zarr -o run.txt", "--output: expected"),
        ("run.zarr --kind profile", "needs --unit"),
        ("run.zarr --unit nope", "--unit: is for --kind profile, got --kind drops"),
        ("run.zarr --kind heat-map --layers no", "--layers: is for --kind drops and scatter"),
        ("run.zarr --kind heat-map --target gini", "--target: is for --kind drops and scatter"),
        ("run.zarr --kind profile --unit first:2 --attribute a", "--attribute: is for --kind scat"),
        ("run.zarr --kind profile --unit first:2 --x a", "--x: is for --kind cumulative and prune"),
        ("run.zarr --units 20", "--units: is for --kind heat-map"),
        ("run.zarr --classes 3", "--classes: is for --kind heat-map and profile"),
        ("run.zarr --kind profile --unit first:2 --log", "--log: is for --kind drops, heat-map"),
        ("pruned.csv --kind prune --limit 3", "--limit: is for --kind drops, heat-map and scatter"),
        ("run.zarr --limit -1", "limit: expected a number above 0"),
        ("nowhere.zarr -o new/plot.png", "nowhere.zarr"),
        ("run.zarr --kind profile --unit third:1", "no unit 'third:1'"),
        ("run.zarr --kind scatter --attribute size", "needs --attributes FILE"),
        ("run.zarr --kind prune", "expected the CSV file"),
        ("table.csv --kind prune", "expected a column 'ranking'"),
        ("nowhere.zarr", "nowhere.zarr"),
    ],
)
def test_bad_input_on_the_shell(here, words, message):
    code, said = invoke("plot", *words.split())
    assert code != 0
    assert message in said
    assert "Traceback" not in said
    assert not (here / "plot.png").exists()
    assert not (here / "new").exists()


def test_a_picture_has_the_width_asked_for(here):
    code, said = invoke("plot", "run.zarr", "--width", "5", "--dpi", "40")
    assert code == 0, said
    assert pyplot.imread(here / "plot.png").shape[1] == 200


def test_capitals_name_a_format_too(here):
    code, said = invoke("plot", "run.zarr", "-o", "new/H.PNG", "--dpi", "40")
    assert code == 0, said
    assert (here / "new" / "H.PNG").read_bytes().startswith(b"\x89PNG")
