"""The commands, on a small network of the user's own and on a shipped one."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from PIL import Image
from support.screened import screen_anyway
from support.shelled import DATA, invoke_apart
from support.simulated import simulate
from support.stores import contents
from typer.main import get_command

import pyablate as pa
from pyablate.cli.app import app
from pyablate.runs.run_folder import RunStore, locked


@pytest.mark.parametrize(("logits", "classes"), [("fine", 3), ("1", 4)])
def test_another_output_is_taken_as_the_logits(here: Path, logits: str, classes: int) -> None:
    network = ("small_network:TwoHeads", "--logits", logits)
    sample, data = ("--input-shape", "1,8,8"), ("--data", "images.npz")
    for arguments in (
        ("layers", *network, *sample),
        ("plan", *network, *sample),
        ("run", *network, *data, "--output", "two.zarr"),
        ("attributes", *network, *data, "--which", "l1_norm", "-o", "two.csv"),
        ("compare", *network, "small_network:TwoHeads", *data),
        ("report", "two.zarr", "-o", "two.html", "--model", *network, *data),
    ):
        code, out, err = invoke_apart(*arguments)
        assert code == 0, (arguments, out, err)
    assert len(pa.load("two.zarr").class_names) == classes


_RUN = ("run", *DATA)


@pytest.mark.parametrize("command", get_command(app).commands)  # type: ignore[attr-defined]
def test_every_command_is_in_the_help_and_has_its_own(command: str) -> None:
    code, out, _ = invoke_apart("--help")
    assert code == 0
    assert command in out
    code, out, _ = invoke_apart(command, "--help")
    assert code == 0
    assert "--debug" in out
    assert f"pyablate {command}" in out  # an example


def test_version_is_the_package_version() -> None:
    assert invoke_apart("--version") == (0, f"pyablate {metadata.version('pyablate')}\n", "")
    assert pa.__version__ == pa.build_info()["version"] == metadata.version("pyablate")


def test_run_writes_what_the_library_finds(here: Path) -> None:
    code, out, err = invoke_apart(*_RUN, "--output", "out/small.zarr", "--csv", "tables/units.csv")
    assert code == 0, err
    saved = pa.load("out/small.zarr")

    from small_network import make  # type: ignore[import-not-found]

    from pyablate.cli.data_specs import load_data

    data = load_data("images.npz")
    expected = pa.ablate(make().eval(), data.batches, layers=["*"], progress=False)
    np.testing.assert_array_equal(saved.predictions(), expected.predictions())
    assert list(saved.units["label"]) == list(expected.units["label"])

    table = pd.read_csv("tables/units.csv")
    assert len(table) == 10
    np.testing.assert_allclose(table["accuracy_drop"], saved.accuracy_drop)
    assert f"Baseline accuracy {100 * saved.baseline_accuracy:.2f} % on 12 images" in out
    assert "Audit:" in out
    assert "Time:" in out
    assert "out/small.zarr" in out


def test_run_takes_its_options(here: Path) -> None:
    code, out, err = invoke_apart(
        *_RUN, "--layers", "3", "--limit", "6", "--intervention", "constant:-2",
        "--batch-size", "4", "--memory", "1GB", "--device", "cpu", "--seed", "3",
        "--mean", "0.5", "--std", "0.25", "--no-progress",
    )  # fmt: skip
    assert code == 0, err
    result = pa.load("run.zarr")
    assert list(result.units["label"]) == [f"3:{unit}" for unit in range(6)]
    assert len(result.labels) == 6
    assert result.intervention == "constant:-2"
    assert "replaced by: constant:-2" in out


def test_run_replaces_another_run_only_when_told_to(here: Path) -> None:
    assert invoke_apart(*_RUN, "--limit", "3")[0] == 0
    code, _, err = invoke_apart(*_RUN, "--limit", "4")
    assert code == 3
    assert "the number of images (3, now 4)" in err
    assert "--fresh" in err
    assert len(pa.load("run.zarr").labels) == 3
    assert invoke_apart(*_RUN, "--limit", "3")[0] == 0  # which is read, not done again
    assert invoke_apart(*_RUN, "--limit", "4", "--fresh")[0] == 0
    assert len(pa.load("run.zarr").labels) == 4
    code, _, err = invoke_apart(*_RUN, "--output", "notes", "--fresh")
    assert code == 2
    assert "notes" in err
    assert (here / "notes" / "a.txt").read_text() == "not a result"


def test_run_for_machines(here: Path) -> None:
    code, out, err = invoke_apart(*_RUN, "--json", "--batch-size", "4", "--audit", "7")
    assert code == 0, err
    records = [json.loads(line) for line in out.splitlines()]
    before = [record["event"] for record in records].index("progress")
    assert before > 0
    assert all(record["event"] == "preparing" and record["what"] for record in records[:before])
    assert all(record["event"] in ("preparing", "progress") for record in records[before:-1])
    assert records[before]["done"] == 0
    assert records[-2]["done"] == records[-2]["total"] == 10 * 12
    result = pa.load("run.zarr")
    assert records[-1]["event"] == "result"
    assert records[-1]["images"] == 12
    assert records[-1]["baseline_accuracy"] == result.baseline_accuracy
    assert records[-1]["audit"] | {"upper_bound": 0} == {
        "pairs": 7,
        "mismatches": 0,
        "mended": 0,
        "upper_bound": 0,
    }
    code, out, _ = invoke_apart(*_RUN, "--json", "--audit", "7", "--seed", "5")
    assert code == 3
    *before, record = map(json.loads, out.splitlines())
    assert all(one["event"] == "preparing" for one in before)
    assert record["event"] == "error"
    assert record["exit_code"] == 3
    assert "options.seed (0, now 5)" in record["message"]


def test_a_screened_run_says_so(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen_anyway(monkeypatch)
    code, out, err = invoke_apart(*_RUN, "--guarantee", "screened", "--risk", "0.001")
    assert code == 0, err
    found = pa.load("run.zarr").screening
    assert found.risk == 0.001
    assert found.pairs == 4 * 12  # what is behind the last layer has a closed form
    assert f"Screening: {found}" in " ".join(out.split())
    code, out, _ = invoke_apart(*_RUN, "--guarantee", "screened", "--risk", "0.001", "--json")
    record = json.loads(out.splitlines()[-1])
    assert record["guarantee"] == "screened"
    assert record["screening"]["upper_bound"] == found.upper_bound
    code, _, err = invoke_apart(*_RUN)
    assert code == 3
    assert "options.guarantee (screened, now None)" in err


def test_show_a_run_that_has_finished(here: Path) -> None:
    assert invoke_apart(*_RUN)[0] == 0
    code, out, err = invoke_apart("show", "run.zarr")
    assert code == 0, err
    assert "on 12 images" in out
    assert "model.weights" in out
    assert f"Made by: pyablate {shlex.join(_RUN)}" in " ".join(out.split())
    assert "Time:" not in out  # is not stored
    assert invoke_apart(*_RUN, "--seed", "5", "--fresh")[0] == 0
    assert "--seed 5 --fresh" in " ".join(invoke_apart("show", "run.zarr")[1].split())
    pa.load("run.zarr").save("run.zarr")  # replaces the folder: the command is ours
    assert "a call in Python" in invoke_apart("show", "run.zarr")[1]
    code, _, err = invoke_apart("show", "notes")
    assert code == 2
    assert "notes" in err


def test_show_how_far_an_unfinished_run_is(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = RunStore.write

    def interrupted(store: RunStore, number: int, block: Any) -> None:
        write(store, number, block)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunStore, "write", interrupted)
    given = (*_RUN, "--batch-size", "4")
    assert invoke_apart(*given)[0] == 130
    code, out, err = invoke_apart("show", "run.zarr")
    assert code == 0, err
    shown = " ".join(out.split())
    assert "run.zarr has not finished: 4 of 12 images (33%) are done" in shown
    assert f"Goes on with: pyablate {shlex.join(given)}" in shown
    with locked(here / "run.zarr"):
        assert "A process is at work on it" in invoke_apart("show", "run.zarr")[1]
    monkeypatch.setattr(RunStore, "write", write)
    assert invoke_apart(*_RUN)[0] == 0
    assert f"Made by: pyablate {shlex.join(given)}" in " ".join(
        invoke_apart("show", "run.zarr")[1].split()
    )


def test_shards_are_merged(here: Path) -> None:
    assert invoke_apart(*_RUN)[0] == 0
    for number in (1, 2):
        part = ("--shard", f"{number}/2", "--output", f"part{number}.zarr")
        assert invoke_apart(*_RUN, *part)[0] == 0
    code, out, err = invoke_apart(
        "merge", "part2.zarr", "part1.zarr", "-o", "both.zarr", "--csv", "b.csv"
    )
    assert code == 0, err
    assert "on 12 images" in out
    whole = contents(here / "run.zarr")
    del whole["command.json"]
    assert contents(here / "both.zarr") == whole
    assert len(pd.read_csv("b.csv")) == 10
    code, _, err = invoke_apart("merge", "part2.zarr", "-o", "one.zarr")
    assert code == 2
    assert "images 0 to 5 are missing" in err
    assert not (here / "one.zarr").exists()


def test_layers_are_listed_with_what_the_star_selects(here: Path) -> None:
    for sample in (("--input-shape", "1,8,8"), ("--data", "images.npz")):
        code, out, err = invoke_apart("layers", "small_network:make", *sample)
        assert code == 0, err
        rows = {line.split()[0]: line.split() for line in out.splitlines()[2:] if line.strip()}
        assert rows["1"] == ["1", "activation", "4", "4", "x", "6", "x", "6", "1", "yes"]
        assert rows["0"][1] == "layer"
        assert rows["0"][-1] != "yes"


def test_layers_say_what_star_leaves_out_and_take_an_axis(here: Path) -> None:
    (here / "own.py").write_text(
        "from torch import nn\n"
        "make = lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 5, 3), nn.ReLU(), "
        "nn.Flatten(), nn.Linear(80, 4))\n"
    )
    sample = ("own:make", "--input-shape", "1,8,8", "--axis", "2=-1")
    code, out, err = invoke_apart("layers", *sample)
    assert code == 0, err
    assert "the units of 1 modules with weights are in no chosen layer: 0;" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines()[2:] if line.strip()}
    assert rows["2"] == ["2", "activation", "4", "5", "x", "4", "x", "4", "3", "yes"]
    code, out, err = invoke_apart("plan", *sample)
    assert code == 0, err
    assert out.count("in no chosen layer: 0;") == 1


def test_layers_of_a_network_without_activations_are_listed_all_the_same(here: Path) -> None:
    class_layer = "0"
    code, out, err = invoke_apart("layers", "small_network:plain", "--input-shape", "64")
    assert code == 0, err
    assert class_layer not in {line.split()[0] for line in out.splitlines()[2:] if line.strip()}


def test_a_shipped_network_needs_no_shape() -> None:
    code, out, err = invoke_apart("layers", "demo:vgg_bn")
    assert code == 0, err
    assert "features.2" in out


def test_plan_explains_without_running(here: Path) -> None:
    code, out, err = invoke_apart(
        "plan", "small_network:make", "--input-shape", "1,8,8", "--images", "1000"
    )
    assert code == 0, err
    assert "1,000" in out or "1000" in out
    assert {path.name for path in here.glob("*.zarr")} == {"notes.zarr"}  # which was there before


def test_a_plan_is_for_all_of_the_data_unless_told_otherwise(here: Path) -> None:
    for number, name in enumerate(("ant", "bee", "cat")):
        (here / "photos" / name).mkdir(parents=True)
        for shade in range(7):
            Image.new("L", (10, 10), 30 * shade + number).save(here / f"photos/{name}/{shade}.png")
    network = ("plan", "small_network:make")
    for sample, images in (
        (("--data", "photos"), 21),
        (("--data", "images.npz"), 12),
        (("--data", "photos", "--images", "700"), 700),
        (("--input-shape", "1,8,8"), 1000),
    ):
        code, out, err = invoke_apart(*network, *sample)
        assert code == 0, err
        assert f"\n{images:,} images in batches of" in out
        assert "have no image among those read" not in err  # of all that are there none lacks


def test_plan_measures_a_screened_run_on_the_data(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen_anyway(monkeypatch)
    code, out, err = invoke_apart("plan", *_RUN[1:], "--measure", "--risk", "0.1")
    assert code == 0, err
    assert "what the stages of screening leave open" in out
    assert "if none is" not in out
    code, _, err = invoke_apart("plan", "small_network:make", "--measure")
    assert code == 2
    assert "--measure needs --data" in err


def test_the_sample_is_read_as_a_run_reads_its_data(here: Path) -> None:
    """Photographs come in all sizes."""
    for number, name in enumerate(("cat", "dog")):
        (here / "photos" / name).mkdir(parents=True)
        Image.new("L", (30 + number, 20), 9).save(here / "photos" / name / "a.png")
    for command in ("layers", "plan"):
        sample = (command, "small_network:make", "--data", "photos")
        code, _, err = invoke_apart(*sample)
        assert code == 2
        assert "give size=" in err
        code, out, err = invoke_apart(*sample, "--size", "10", "--mean", "0.5", "--std", "0.25")
        assert code == 0, err
        assert "8 x 8" in out or command == "plan"
        code, _, err = invoke_apart(*sample, "--labels", "units.csv")
        assert code == 2
        assert "labels: expected none with an image folder" in err


def test_significance_prints_and_writes_what_the_library_finds(here: Path) -> None:
    loss = np.array([[0.0, 0.9, 0.0], [0.02, 0.0, 0.5], [0.0, 0.0, 0.0]])
    simulate(loss, 0.02, 60, np.random.default_rng(0), ["a", "b", "b"]).save("planted.zarr")
    code, out, err = invoke_apart(
        "significance", "planted.zarr", "--fdr", "0.1", "--csv", "units.csv",
        "--pairs", "pairs.csv",
    )  # fmt: skip
    assert code == 0, err
    result = pa.load("planted.zarr")
    units = pd.read_csv("units.csv")
    pd.testing.assert_frame_equal(units, result.max_class_test(), check_dtype=False)
    tests = result.significance(fdr=0.1)
    pairs = pd.read_csv("pairs.csv")
    assert list(zip(pairs["label"], pairs["class"], strict=True)) == [
        ("a:0", "class 1"),
        ("b:0", "class 2"),
    ]
    np.testing.assert_allclose(pairs["q"], tests["q"].to_numpy()[[0, 1], [1, 2]])
    rows = [line.split() for line in out.splitlines()]
    assert any(row[:7] == ["a", "3", "1", "0", "0", "class", "1"] for row in rows)
    assert "false discovery rate of 0.1" in out
    assert "Written: units.csv and pairs.csv" in " ".join(out.split())


def test_correlate_prints_and_writes_what_the_library_finds(here: Path) -> None:
    assert invoke_apart(*_RUN)[0] == 0
    result = pa.load("run.zarr")
    table = pd.DataFrame({"good": result.accuracy_drop + 0.0, "number": np.arange(10.0)})
    table.set_index(pd.Index(result.units["label"], name="unit")).to_csv("attributes.csv")
    code, out, err = invoke_apart(
        "correlate", "run.zarr", "attributes.csv", "--target", "accuracy_drop", "--layers", "3",
        "--method", "kendall", "--resamples", "30", "--seed", "2", "--csv", "found.csv",
    )  # fmt: skip
    assert code == 0, err
    expected = pa.correlate(
        result,
        table.set_index(result.units["label"]),
        targets="accuracy_drop",
        layers="3",
        methods="kendall",
        resamples=30,
        seed=2,
    )
    found = pd.read_csv("found.csv", dtype={"layer": str})
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)
    assert "good" in out
    assert "number" in out
    assert "Written: found.csv" in out


# Zarr has no settled encoding of text; xarray's is the one there is.
@pytest.mark.filterwarnings("ignore:.*Zarr V3 specification")
def test_correlate_of_cells_prints_what_the_library_finds(here: Path) -> None:
    random = np.random.default_rng(0)
    result = simulate(random.random((4, 4)), 0.1, 20, random, ["layer"] * 4)
    result.save("planted.zarr")
    cells = {"mine_per_class": (("unit", "class"), random.random((4, 4)))}
    table = xr.Dataset(cells, coords={"unit": result.units["label"].to_numpy(dtype=str)})
    table.to_zarr("cells.zarr", consolidated=False)
    options = ("--cells", "--resamples", "20", "--csv", "found.csv")
    code, out, err = invoke_apart("correlate", "planted.zarr", "cells.zarr", *options)
    assert code == 0, err
    expected = pa.correlate(result, table, cells=True, resamples=20)
    pd.testing.assert_frame_equal(pd.read_csv("found.csv"), expected, check_dtype=False)
    for word in ("within_unit", "within_class", "precision", "mine", "Written: found.csv"):
        assert word in out


@pytest.mark.slow
def test_demo_prints_and_writes_everything(tmp_path: Path) -> None:
    code, out, err = invoke_apart("demo", "--limit", "64", "--output", str(tmp_path / "demo"))
    assert code == 0, err
    result = pa.load(tmp_path / "demo" / "run.zarr")
    table = pd.read_csv(tmp_path / "demo" / "units.csv")
    assert len(table) == len(result.units)
    assert len(result.labels) == 64
    for expected in ("Baseline accuracy", "Audit:", "0 mismatches", "Time:", "Plain hook loop"):
        assert expected in out
    assert "scaling" in out
    assert " 0 of " in out.partition("Its predictions")[2]  # none differs from the hook loop
    layers = dict.fromkeys(result.units["layer"])
    assert all(layer in out for layer in layers)


@pytest.mark.slow
def test_demo_compares_a_screened_run_with_an_exact_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen_anyway(monkeypatch)
    options = ("alexnet", "--limit", "48", "--output", str(tmp_path), "--guarantee", "screened")
    code, out, err = invoke_apart("demo", *options)
    assert code == 0, err
    words = " ".join(out.split())
    assert "of 36,480 predictions differ" in words  # 760 units
    assert "predicted not to change" in words


_ATTRIBUTES = ("attributes", *DATA)


def test_attributes_as_a_table(here: Path) -> None:
    code, out, _ = invoke_apart(*_ATTRIBUTES, "--which", "auc", "--which", "weights", "-o", "a.csv")
    assert code == 0
    assert "10 units" in out
    table = pd.read_csv("a.csv")
    assert table["label"].tolist() == [f"1:{u}" for u in range(4)] + [f"3:{u}" for u in range(6)]
    assert {"auc", "auc_class", "l1_norm", "bn_scale"} <= set(table.columns)
    assert set(table["auc_class"]) <= {0, 1, 2}


def test_attributes_as_zarr_replace_an_older_one(here: Path) -> None:
    for which in ("weights", "auc"):
        assert invoke_apart(*_ATTRIBUTES, "--which", which, "-o", "a.zarr")[0] == 0
    found = xr.open_zarr("a.zarr", chunks=None)
    assert found["auc_per_class"].shape == (10, 3)
    assert "l1_norm" not in found
    assert found["auc"].attrs["rescaling_invariant"] is True
    assert found["unit"].to_numpy().tolist()[-1] == "3:5"
