"""The paper's questions (``paper/``): data set, networks, figures and page."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy import stats
from support.simulated import simulate

import pyablate as pa
from paper import analysis, document, findings, glyphs, markdown, measure, train
from paper.networks import FAMILIES, FOLDER, Network, balanced, known
from pyablate.analysis.targets import gini

ROOT = Path(__file__).parent.parent
CLASSES, UNITS = 4, 12


# --- the rendered characters ----------------------------------------------------------------------


def test_the_same_seed_draws_the_same_characters():
    images, labels = glyphs.images(2)
    again, _ = glyphs.images(2)
    fewer, _ = glyphs.images(1)
    other, _ = glyphs.images(1, seed=3)
    assert torch.equal(images, again)
    assert torch.equal(fewer, images[: len(glyphs.GLYPHS)])
    assert not torch.equal(fewer, other)
    assert images.shape == (2 * len(glyphs.GLYPHS), 1, 28, 28)
    assert (images.min(), images.max()) == (0, 1)
    assert labels.bincount().tolist() == [2] * len(glyphs.GLYPHS)


def test_every_face_has_every_character():
    masters = glyphs.masters()
    assert len(set(glyphs.GLYPHS)) == len(glyphs.GLYPHS) >= 100
    assert masters.shape[:2] == (len(glyphs.GLYPHS), len(glyphs.FACES))
    border = torch.cat([masters[..., 0], masters[..., -1], masters[..., 0, :], masters[..., -1, :]])
    assert border.max() == 0  # nothing is cut off
    # What a face lacks is drawn as one and the same box.
    for face in range(len(glyphs.FACES)):
        assert len(torch.unique(masters[:, face].flatten(1), dim=0)) == len(glyphs.GLYPHS)


def test_characters_are_moved_and_lit_at_random():
    labels = torch.zeros(200, dtype=torch.int64)
    drawn = glyphs.draw(labels, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.uint8
    assert len(torch.unique(drawn.flatten(1), dim=0)) == 200
    assert drawn.float().mean((1, 2)).std() > 5


def test_no_images_of_a_class():
    with pytest.raises(ValueError, match="per_class: expected at least 1, got 0"):
        glyphs.images(0)


# --- the networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("network", known(), ids=lambda network: network.name)
def test_networks_read_their_images(network):
    images, labels = network.images(600)
    with torch.inference_mode():
        predicted = network.model()(images).argmax(1)
    measured = (predicted == labels).double().mean().item()
    training = network.training()
    assert training["seed"] == network.seed
    assert measured >= 0.85
    assert measured == pytest.approx(training["accuracy"], abs=0.04)  # 3 standard errors
    assert network.family.top in {site.name for site in pa.select(pa.sites(*_shown(network)), "*")}


def _shown(network: Network) -> tuple[torch.nn.Module, torch.Tensor]:
    return network.model(), network.images(12)[0][:1]


def test_weights_are_small_and_described():
    files = sorted(FOLDER.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 20e6
    assert (FOLDER / "glyphs-0.safetensors").stat().st_size < 4e6
    text = (FOLDER / "README.md").read_text()
    assert text == train.readme()
    for file in files:
        assert f"| `{file.stem}` |" in text


def test_seeds_of_a_family_are_different_networks():
    for name in FAMILIES:
        found = known((name,))
        assert [network.seed for network in found] == list(range(len(found)))
        assert len({network.digest for network in found}) == len(found) >= 1


def test_what_is_missing_is_trained(tmp_path, monkeypatch):
    asked: list[list[str]] = []
    monkeypatch.setattr(train, "known", lambda: [Network(FAMILIES["alexnet"], 0)])
    monkeypatch.setattr(train, "EPOCHS", {"alexnet": 8, "glyphs": 5})
    monkeypatch.setattr(train, "FOLDER", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda words, **_: asked.append(words[1:]))
    monkeypatch.setattr(sys, "argv", ["train"])
    train.main()
    assert len(asked) == 5
    assert train.command("alexnet", 2, 8) in asked
    assert train.command("alexnet", 0, 8) not in asked
    glyphs = "--seed 0 --epochs 5 --threads 1 --output paper/networks/glyphs-0.safetensors"
    assert ["-m", "paper.glyph_network", *glyphs.split()] in asked  # two threads ask, in any order
    assert (tmp_path / "README.md").exists()


def test_balanced_takes_the_first_of_each_class():
    labels = torch.tensor([1, 0, 0, 0, 1, 1])
    images, chosen = balanced(torch.arange(6), labels, 4)
    assert images.tolist() == [0, 1, 2, 4]
    assert chosen.tolist() == [1, 0, 0, 1]
    assert torch.equal(balanced(torch.arange(6), labels, 6)[0], torch.arange(6))


# --- figures against slow formulas ----------------------------------------------------------------


@pytest.fixture(scope="module")
def result() -> pa.AblationResult:
    random = np.random.default_rng(0)
    layers = ["one"] * 5 + ["two"] * (UNITS - 5)
    rates = random.uniform(0, 0.4, (UNITS, CLASSES))
    rates[np.arange(0, UNITS, 2), random.integers(0, CLASSES, UNITS // 2)] = 0.9
    return simulate(rates, 0.1, 40, random, layers)


@pytest.fixture(scope="module")
def attributes(result: pa.AblationResult) -> pd.DataFrame:
    random = np.random.default_rng(1)
    values = random.normal(size=(UNITS, 2))
    values[7, 0] = np.nan
    return pd.DataFrame(values, columns=["a", "b"], index=result.units["label"])


def test_drops_of_a_layer(result):
    table = analysis.drops(result).set_index("layer")
    rows = [unit for unit in range(UNITS) if result.units["layer"][unit] == "two"]
    correct = [(result.predictions(unit)[0] == result.labels).mean() for unit in rows]
    drop = result.baseline_accuracy - np.array(correct)
    assert table.loc["two", "units"] == len(rows)
    assert table.loc["two", "overall_median"] == pytest.approx(np.median(drop))
    assert table.loc["two", "overall_largest"] == pytest.approx(drop.max())
    assert table.loc["two", "harmless"] == pytest.approx((drop < 0.01).mean())
    assert table.loc["two", "class_largest"] == result.max_class_drop[rows].max()
    q = result.max_class_test()["q"].to_numpy()[rows]
    assert table.loc["two", "damaged"] == (q <= 0.05).mean() > 0


def test_summary_weighs_layers_by_units():
    columns = ["units", "harmless", "damaged", "damaged_5", "overall_largest", "split_half_largest"]
    table = pd.DataFrame([[10, 0.0, 1, 1, 0.3, 0.5], [30, 1.0, 0, 0, 0.1, 0.2]], columns=columns)
    found = analysis.summary(table)
    assert found["harmless"] == 0.75
    assert found["damaged"] == 0.25
    assert found["overall_largest"] == 0.3
    assert found["units_upper"] == 30
    assert found["overall_largest_upper"] == 0.1


def test_part_of_the_images(result):
    chosen = np.random.default_rng(2).random(len(result.labels)) < 0.4
    part = analysis.on_images(result, chosen)
    assert np.array_equal(part.labels, result.labels[chosen])
    assert np.array_equal(part.predictions(), result.predictions()[:, chosen])


def test_targets_agree_with_themselves_where_damage_is_real():
    random = np.random.default_rng(3)
    harmful = np.zeros((20, CLASSES))
    harmful[np.arange(20), random.integers(0, CLASSES, 20)] = np.linspace(0, 0.9, 20)
    real = simulate(harmful, 0.0, 400, random)
    chance = simulate(np.full((20, CLASSES), 0.2), 0.2, 400, random)
    found = analysis.reliability(real).iloc[0]
    assert found["accuracy_drop"] > 0.9
    assert found["split_half_drop"] > 0.9
    noise = analysis.reliability(chance, splits=20).iloc[0]
    assert abs(noise["split_half_drop"]) < 0.3


def cells_of(result: pa.AblationResult, **attributes: np.ndarray) -> xr.Dataset:
    over = {f"{name}_per_class": (("unit", "class"), a) for name, a in attributes.items()}
    return xr.Dataset(over, coords={"unit": result.units["label"].to_numpy(dtype=str)})


def test_cells_take_drops_from_the_other_half(result, monkeypatch):
    random = np.random.default_rng(5)
    half = analysis.half_of(result.labels, 0)
    other = analysis.on_images(result, ~half).class_accuracy_drop
    monkeypatch.setattr(analysis, "OF_CELLS", ("same", "noise"))
    table = cells_of(result, same=other, noise=random.random(other.shape), more=other)
    found = analysis.cells(result, table, half, resamples=5, shuffles=9)
    assert set(found["attribute"]) == {"same", "noise"}
    exact = found[(found["attribute"] == "same") & (found["figure"] != "precision")]
    assert exact["value"].tolist() == pytest.approx([1.0] * 4)
    assert (np.bincount(result.labels[half]) == 20).all()


def test_families_join_the_cells_of_their_networks():
    def network(level: float) -> pd.DataFrame:
        lines = itertools.product(["one", "two"], ["a", "b"], analysis.CELL_FIGURES)
        frame = pd.DataFrame(lines, columns=["layer", "attribute", "figure"])
        second = np.where(frame["layer"] == "two", 0.1, 0.0)
        return frame.assign(value=level + second, q=second, halves=0.3, ceiling=0.6)

    first, second = network(0.1), network(0.5)
    second.loc[second["layer"] == "two", ["value", "q"]] = np.nan
    row = analysis.joined_cells([first, second]).loc[("b", "within_class")]
    assert row["value"] == pytest.approx((0.15 + 0.5) / 2)
    assert (row["value_least"], row["value_most"]) == pytest.approx((0.15, 0.5))
    assert (row["layers"], row["told"]) == (3, 2)
    assert row["ceiling"] == pytest.approx(0.6)


class Joined:
    """A family of which only the cells are known."""

    def __init__(self, title: str, values: dict[str, float]) -> None:
        self.family = SimpleNamespace(title=title, top="top")
        lines = itertools.product(analysis.OF_CELLS, analysis.CELL_FIGURES)
        frame = pd.DataFrame(lines, columns=["attribute", "figure"]).assign(layer="top")
        frame["value"] = frame["attribute"].map(values)
        figures = {"q": 0.01, "halves": 0.4, "ceiling": 0.8, "low": 0.0, "high": 1.0, "units": 9}
        cells = frame.assign(**figures)
        self.members = [SimpleNamespace(cells=cells)]
        self.cells = analysis.joined_cells([cells])


def test_the_verdict_on_cells_follows_the_rules():
    well = Joined("good", dict.fromkeys(analysis.OF_CELLS, 0.6))
    poor = Joined("poor", dict.fromkeys(analysis.OF_CELLS, 0.1))
    half = Joined("half", {"class_selectivity": 0.7, "class_correlation": 0.3, "lrp": 0.4})
    none = Joined("none", {})
    assert findings._tell({"a": well}, "within_unit")[0] == "agrees"
    assert findings._tell({"a": poor}, "within_unit")[0] == "does not agree"
    word, figures = findings._tell({"a": half, "b": poor, "c": none}, "within_class")
    assert word == "partly"
    assert figures.startswith("well in 1 of 4 pairs of attribute and family; from 0.10")
    assert figures.endswith(
        "0.70 (`class_selectivity`, half, ceiling 0.80); more than the shuffles in 4 of 4 layers"
    )
    assert findings._tell({"c": none}, "within_unit")[0] == "not seen"
    text = "\n\n".join(document.cells_section({"a": half, "b": well, "c": none}))
    assert "within a unit `class_selectivity` (1) and `lrp` (1), at 75 to 87 % of" in text
    assert "nan" not in text


def test_measured_correlations_are_scipys(result, attributes):
    draws = analysis.prediction_draws(
        result, attributes, names=["a", "b"], targets=["accuracy_drop"], resamples=20
    )
    assert len(draws) == 21 * 2
    complete = attributes["a"].notna().to_numpy()
    expected = [
        stats.spearmanr(
            attributes["b"][complete & in_layer], result.accuracy_drop[complete & in_layer]
        ).statistic
        for layer in ("one", "two")
        for in_layer in [(result.units["layer"] == layer).to_numpy()]
    ]
    measured = draws[(draws["draw"] == -1) & (draws["attribute"] == "b")]["accuracy_drop"]
    assert measured.item() == pytest.approx(np.mean(expected))


def test_families_join_the_draws_of_their_networks():
    def draws(level: float) -> pd.DataFrame:
        frame = pd.DataFrame(itertools.product(range(-1, 100), ["x", "y"]))
        frame.columns = ["draw", "attribute"]
        number = np.arange(len(frame)) // 2 / 100
        return frame.assign(accuracy_drop=level, split_half_drop=level + number)

    found = analysis.predicted([draws(0.1), draws(0.3)])
    assert list(found.index) == ["x", "y"]
    assert found.loc["y", "accuracy_drop"] == pytest.approx(0.2)
    assert found.loc["y", "accuracy_drop_least"] == pytest.approx(0.1)
    assert found.loc["y", "accuracy_drop_most"] == pytest.approx(0.3)
    assert found.loc["x", "difference"] == 0  # draw -1 is the measurement itself
    assert 0 < found.loc["x", "difference_low"] < 0.05
    assert 0.95 < found.loc["x", "difference_high"] < 1.01


def test_axes_leave_out_units_that_lose_few(result):
    lost = result.lost.sum(axis=1)
    fewest = int(np.median(lost))
    found = analysis.axes(result, fewest=fewest)
    assert found["lost"].tolist() == lost[lost >= fewest].tolist()
    assert np.allclose(found["gini"], gini(result.class_accuracy_drop)[lost >= fewest])
    assert len(found) < UNITS


def test_concentration_at_equal_harm():
    random = np.random.default_rng(4)

    def side(shift: float, scale: float) -> pd.DataFrame:
        lost = random.integers(10, 200, 80) * scale
        noise = random.normal(scale=0.02, size=80)
        return pd.DataFrame({"lost": lost, "gini": 0.9 - 0.1 * np.log(lost) + shift + noise})

    # One side loses ten times as many images: the means differ by 0.2, at equal harm by nothing.
    many, few = [side(0.0, 10.0)], [side(0.0, 1.0)]
    assert few[0]["gini"].mean() - many[0]["gini"].mean() > 0.15
    middle, low, high = analysis.at_equal_harm(many, few, resamples=200)
    assert low < 0 < high
    assert abs(middle) < 0.03
    planted, low, _ = analysis.at_equal_harm([side(0.1, 10.0)], few, resamples=200)
    assert planted == pytest.approx(0.1, abs=0.03)
    assert low > 0.05
    assert np.isnan(analysis.at_equal_harm(many, [few[0].iloc[:0]])[0])


def test_pairs_of_networks_that_differ_alike():
    first = [pd.DataFrame({"gini": [level]}) for level in (0.5, 0.7, 0.9)]
    second = [pd.DataFrame({"gini": [level]}) for level in (0.4, 0.6)]
    assert analysis.agreeing_pairs(first, second) == "5 of 6"
    assert analysis.agreeing_pairs(second, first) == "5 of 6"
    assert analysis.agreeing_pairs(first, [second[0].iloc[:0]]) == "0 of 0"


def test_area_under_a_curve():
    curve = {"removed": [0, 1, 4], "accuracy": [1.0, 0.5, 0.0]}
    parts = [
        pd.DataFrame(curve | {"order": "random", "repeat": 0}),
        pd.DataFrame(curve | {"order": "random", "repeat": 1, "accuracy": [1.0, 1.0, 1.0]}),
        pd.DataFrame(curve | {"order": "drop", "repeat": 0}),
    ]
    found = measure.areas(pd.concat(parts))
    by_hand = 0.75 * 0.25 + 0.25 * 0.75
    assert found["drop"] == pytest.approx(by_hand)
    assert found["random"] == pytest.approx((by_hand + 1) / 2)


# --- writing --------------------------------------------------------------------------------------


def test_figures_as_text():
    minus = "\N{MINUS SIGN}"
    assert markdown.number(-0.004) == "0.00"
    assert markdown.number(-1.25, 1) == f"{minus}1.2"
    assert markdown.number(float("nan")) == "\N{EN DASH}"
    assert markdown.points(0.0123) == "1.2"
    assert markdown.spread(0.5, 0.5, 0.5) == "0.50"
    assert markdown.spread(0.5, 0.25, 0.75, digits=1, scale=100) == "50.0 (25.0 to 75.0)"
    assert markdown.interval(0.1, -0.1, 0.3) == f"0.10 [{minus}0.10, 0.30]"
    nan = float("nan")
    assert markdown.interval(nan, nan, nan) == "\N{EN DASH}"
    assert markdown.listed([]) == "none"
    assert markdown.listed(["a", "b", "c"]) == "a, b and c"
    assert markdown.table(["x"], [[1], [2]]).splitlines() == ["| x |", "| --- |", "| 1 |", "| 2 |"]
    with pytest.raises(ValueError, match="expected 2 cells as in the head"):
        markdown.table(["x", "y"], [[1]])


def test_measurements_are_made_once(tmp_path, monkeypatch):
    network = Network(FAMILIES["alexnet"], 0)
    calls: list[int] = []

    def attributes(model: object, data: object, sample: int) -> object:
        calls.append(sample)
        if len(calls) == 1:
            raise KeyboardInterrupt
        labels = [f"features.1:{unit}" for unit in range(3)]
        return (
            pd.DataFrame({"l1_norm": [1.5, 1 / 3, np.nan]}, index=labels)
            .rename_axis("unit")
            .to_xarray()
        )

    monkeypatch.setattr(pa, "attributes", attributes)
    with pytest.raises(KeyboardInterrupt):
        _ = measure.Measured(network, measure.QUICK, tmp_path).attributes
    first = measure.Measured(network, measure.QUICK, tmp_path).attributes
    again = measure.Measured(network, measure.QUICK, tmp_path).attributes
    pd.testing.assert_frame_equal(first, again)
    assert first["l1_norm"].iloc[1] == 1 / 3
    assert len(calls) == 2
    _ = measure.Measured(network, measure.FULL, tmp_path).attributes  # another extent: made anew
    assert calls == [16, 16, measure.FULL.sample]


@pytest.mark.slow
def test_a_quick_run_writes_the_page(tmp_path):
    page, cache = tmp_path / "paper.md", tmp_path / "cache"
    command = [sys.executable, "-W", "error", "-m", "paper", "--quick", "--seeds", "1"]
    command += ["--families", "alexnet", "alexnet_bn", "--output", str(page), "--cache", str(cache)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    for picture in re.findall(r"\]\((images/.*?\.png)\)", text):
        assert (tmp_path / picture).stat().st_size > 10_000
    result = pa.load(next(cache.glob("alexnet_bn-0-*")) / "ablation.zarr")
    rows = [line for line in text.splitlines() if line.startswith("| batch norm |")]
    below = markdown.points((result.accuracy_drop < 0.01).mean())
    assert rows[0].split(" | ")[1] == below
    assert "nan" not in text.replace("glyph", "")


@pytest.mark.slow
def test_a_table_of_the_page_is_what_is_measured_now():
    """A layer with a closed form; drops of the committed page are rounded to hundredths."""
    layer, extent, found = "features.16", measure.FULL, []
    for network in known(("vgg_bn",)):
        data = network.images(extent.images)
        result = pa.ablate(network.model(), data, layer, audit=0, progress=False)
        found.append(analysis.drops(result, seed=measure.SEED).set_index("layer").loc[layer])
    mean = pd.DataFrame(found).mean()
    text = (ROOT / "docs" / "results" / "paper.md").read_text()
    table = text[text.index("### VGG-like") :].splitlines()
    row = next(line for line in table if line.startswith(f"| `{layer}` |"))
    cells = [cell.replace("\N{MINUS SIGN}", "-").strip() for cell in row.strip("|").split("|")]
    assert mean["units"] == int(cells[1])
    places = {"overall_median": 2, "overall_largest": 3, "class_median": 4, "class_largest": 7}
    for name, place in places.items():
        assert 100 * mean[name] == pytest.approx(float(cells[place]), abs=0.0051), name


def test_the_page_is_of_these_networks():
    text = (ROOT / "docs" / "results" / "paper.md").read_text()
    for name, family in FAMILIES.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        members = known((name,))
        assert cells[1] == family.title
        assert cells[2] == str(len(members))
        assert cells[3] == ", ".join(str(member.training()["epochs"]) for member in members)
