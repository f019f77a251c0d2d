"""The shell's prune, sensitivity and compare print and write what the library finds."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from support.shelled import invoke

import pyablate as pa
from pyablate.cli.model_specs import load_model

pytest.importorskip("torch_pruning")
pytestmark = pytest.mark.usefixtures("empty_folder")

DATA = ["--data", "demo", "--limit", "40"]


def test_prune() -> None:
    model, images, labels = pa.demo.load("alexnet", limit=40)
    units = [f"features.1:{unit}" for unit in range(24)]
    pd.DataFrame({"unit": units, "own": range(24)}).astype({"own": float}).to_csv("own.csv")
    code, out = invoke(
        "prune", "demo:alexnet", *DATA, "--by", "l2", "--by", "own.csv", "--column", "own",
        "--fraction", "0.2", "--seeds", "1", "--csv", "curves.csv",
    )  # fmt: skip
    assert code == 0, out
    found = pd.read_csv("curves.csv")
    assert found["ranking"].unique().tolist() == ["l2", "own.csv", "random"]
    ranking = pa.compression.filter_ranking(model, images[:2], "l2")
    expected = pa.prune_curve(
        model, (images, labels), ranking, fractions=[0.2], seeds=0, class_names=pa.demo.CLASSES
    )
    pd.testing.assert_frame_equal(found[:2], expected, check_dtype=False)
    assert f"{100 * expected['accuracy'][1]:.2f}" in out
    assert "Written: curves.csv" in out


def test_prune_by_a_result() -> None:
    model, images, labels = pa.demo.load("alexnet", limit=40)
    pa.ablate(model, (images, labels), layers=["features.11"], audit=0).save("run.zarr")
    code, out = invoke(
        "prune", "demo:alexnet", *DATA, "--by", "run.zarr", "--column", "max_class_drop",
        "--fraction", "0.01", "--seeds", "0",
    )  # fmt: skip
    assert code == 0, out
    assert "run.zarr" in out


def test_sensitivity() -> None:
    code, out = invoke(
        "sensitivity", "demo:alexnet", *DATA, "--fraction", "0.5", "--output", "layers.csv"
    )
    assert code == 0, out
    found = pd.read_csv("layers.csv")
    assert found["layer"].tolist()[0] == "features.1"
    assert len(found) == 7
    assert "classifier.3" in out
    # The file is resumed: the table comes again, with a line on standard error.
    code, again = invoke(
        "sensitivity", "demo:alexnet", *DATA, "--fraction", "0.5", "--output", "layers.csv"
    )
    assert code == 0, again
    assert "7 rows are in layers.csv already" in again
    pd.testing.assert_frame_equal(pd.read_csv("layers.csv"), found)


def test_a_screened_sensitivity_says_so() -> None:
    command = ("sensitivity", "demo:alexnet", "--data", "demo", "--limit", "20")
    more = ("--fraction", "0.1", "--by", "l1", "--guarantee", "screened", "--risk", "0.01")
    code, out = invoke(*command, *more, "--output", "s.csv")
    assert code == 0, out
    assert "wrong at most" in out
    found = pd.read_csv("s.csv")
    assert set(found["guarantee"]) <= {"exact", "screened"}
    assert found["upper_bound"].between(0, 1).all()
    code, out = invoke(*command, "--guarantee", "none")
    assert code == 2
    assert "guarantee" in out


def test_compare() -> None:
    code, out = invoke(
        "compare", "demo:alexnet", "demo:vgg_bn", *DATA, "--csv", "classes.csv", "--images",
        "images.csv",
    )  # fmt: skip
    assert code == 0, out
    model, images, labels = pa.demo.load("alexnet", limit=40)
    expected = pa.compare(
        model, pa.demo.network("vgg_bn"), (images, labels), class_names=pa.demo.CLASSES
    )
    pd.testing.assert_frame_equal(pd.read_csv("classes.csv"), expected.classes())
    assert pd.read_csv("images.csv")["image"].tolist() == expected.differing.tolist()
    assert "Ankle boot" in out
    assert "calibration error" in out
    assert "first: demo:alexnet; second: demo:vgg_bn" in out
    assert "before" not in out  # neither was made from the other


def test_the_smaller_network_is_saved_and_read_again() -> None:
    code, out = invoke(
        "prune", "demo:alexnet", *DATA, "--fraction", "0.2", "--seeds", "0", "--save", "small.pt2"
    )
    assert code == 0, out
    assert "small.pt2" in out
    model, images, _ = pa.demo.load("alexnet", limit=40)
    ranking = pa.compression.filter_ranking(model, images[:2], "l1")
    removal = pa.remove(model, ranking, images[:2], fraction=0.2)
    with torch.no_grad():
        torch.testing.assert_close(load_model("small.pt2")(images), removal.model(images))
    code, out = invoke("compare", "demo:alexnet", "small.pt2", *DATA)
    assert code == 0, out
    for options in (
        ("--by", "l1", "--by", "l2", "--fraction", "0.2"),
        (),
        ("--fraction", "0.2", "--flops", "50%"),
    ):
        code, out = invoke("prune", "demo:alexnet", *DATA, *options, "--save", "two.pt2")
        assert code != 0
        assert "--save: expected one --by, and one --fraction or a target" in out
    code, out = invoke("prune", "demo:alexnet", *DATA, "--fraction", "0.2", "--save", "small.pth")
    assert code != 0
    assert "--save" in out
    assert "small.pth" in out
    assert "done" not in out, "refused before the work, not behind it"


def test_saving_runs_nothing_that_was_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyablate.compression import _prune_curve

    monkeypatch.setattr(_prune_curve, "prune_curve", None)  # would raise
    code, out = invoke("prune", "demo:alexnet", *DATA, "--fraction", "0.2", "--save", "small.pt2")
    assert code == 0, out
    assert "FLOPs of one image" in out
    assert "units are gone" in out


def test_down_to_a_target_saved_as_weights_and_code_then_fine_tuned() -> None:
    code, out = invoke(
        "prune", "demo:alexnet", *DATA, "--flops", "-50%", "--save", "small_alexnet.safetensors",
        "--csv", "tried.csv",
    )  # fmt: skip
    assert code == 0, out
    assert "Written: tried.csv and small_alexnet.safetensors and small_alexnet.py" in out
    model, images, labels = pa.demo.load("alexnet", limit=40)
    ranking = pa.compression.filter_ranking(model, images[:2], "l1")
    expected = pa.remove(model, ranking, images[:2], flops=0.5)
    small = load_model("small_alexnet:make_model", "small_alexnet.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(small(images), expected.model(images))
    pd.testing.assert_frame_equal(pd.read_csv("tried.csv"), expected.steps)
    network = ("small_alexnet:make_model", "--weights", "small_alexnet.safetensors", *DATA)
    code, out = invoke(
        "finetune", *network, "--epochs", "1", "--batch-size", "20", "--learning-rate", "0.001",
        "--save", "tuned.safetensors", "--csv", "epochs.csv",
    )  # fmt: skip
    assert code == 0, out
    tuned = load_model("small_alexnet:make_model", "tuned.safetensors")
    again = pa.finetune(
        small, (images, labels), epochs=1, batch_size=20, learning_rate=0.001, progress=False
    )
    with torch.no_grad():
        torch.testing.assert_close(tuned(images), again.model(images))
    assert len(pd.read_csv("epochs.csv")) == 1
    assert f"{again.history['loss'][0]:.4f}" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("prune demo:alexnet --data demo --flops 120%", "--flops: expected a share such as 50%"),
        ("prune demo:alexnet --data demo --accuracy -5%", "--accuracy: expected a share"),
        (
            "prune demo:alexnet --data demo --by l1 --by l2 --flops 50%",
            "targets: expected one --by",
        ),
        ("prune small.pt2 --data demo --fraction 0.1 --save a.safetensors", "expected a .pt2 file"),
        ("finetune demo:alexnet --data demo --save a.pth", "--save: expected a name ending in"),
        ("finetune demo:alexnet --data demo --save a.pt2 --original-weights w", "--original"),
    ],
)
def test_what_cannot_be_is_refused(words: str, message: str) -> None:
    code, out = invoke(*words.split())
    assert code == 2
    assert message in out


def test_compare_attributions() -> None:
    pytest.importorskip("captum")
    pytest.importorskip("skimage")
    code, out = invoke(
        "compare", "demo:alexnet", "demo:alexnet_dropout", "--data", "demo", "--limit", "12",
        "--attributions",
    )  # fmt: skip
    assert code == 0, out
    for word in ("grad_cam", "lrp", "collapsed", "ssim"):
        assert word in out
