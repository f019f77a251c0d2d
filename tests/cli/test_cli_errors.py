"""Bad input and interrupts: one line that names the mistake, and an exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.shelled import DATA, error_lines, invoke_apart

import pyablate as pa

# A shell starts what runs in the background with interrupts ignored, and children inherit that.
_LISTENING = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("pyablate", run_name="__main__", alter_sys=True)
"""


def _process(arguments: Sequence[str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _LISTENING, *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(pa.__file__).parents[1])},
    )


_RUN = ("run", *DATA)
_ATTRIBUTES = ("attributes", *DATA)
_CORRELATE = ("correlate", "results/tiny.zarr", "units.csv")
_BAD_INPUT = {
    "no such option": (("run", "x:y", "--dta", "demo"), "--dta"),
    "no such command": (("rum",), "rum"),
    "no data": (("run", "demo:vgg_bn"), "--data"),
    "limit not a number": ((*_RUN, "--limit", "many"), "--limit"),
    "limit of none": ((*_RUN, "--limit", "0"), "--limit"),
    "no such network": (("run", "demo:vgg_nb", "--data", "demo"), "vgg_bn"),
    "no such shipped network": (("demo", "vgg_nb"), "vgg_bn"),
    "no such module": (("run", "no_such_module:make", "--data", "images.npz"), "no_such_module"),
    "no such library": (("run", "torchvision:no_such_net", "--data", "images.npz"), "torchvision"),
    "factory that fails": (("run", "small_network:explode", "--data", "images.npz"), "first line"),
    "module that fails": (("run", "broken_network:make", "--data", "images.npz"), "NameError"),
    "module that is no Python": (("run", "no_python:make", "--data", "images.npz"), "SyntaxError"),
    "shape of another network": (
        ("layers", "small_network:make", "--input-shape", "3,8,8"),
        "the model fails on an input of shape [3, 8, 8]",
    ),
    "networks with different inputs": (
        ("compare", "small_network:make", "small_network:wide", "--data", "images.npz"),
        "smaller: it fails on images of shape [1, 8, 8]",
    ),
    "no such weights": ((*_RUN, "--weights", "gone.safetensors"), "gone.safetensors"),
    "no such data": (("run", "small_network:make", "--data", "gone"), "gone"),
    "empty data": (("run", "small_network:make", "--data", "empty.npz"), "empty.npz"),
    "negative label": (("run", "small_network:make", "--data", "bad_labels.npz"), "-1"),
    "nan image": (("run", "small_network:make", "--data", "nan.npz"), "3"),
    "unknown layer": ((*_RUN, "--layers", "9"), "'9'"),
    "unknown intervention": ((*_RUN, "--intervention", "zreo"), "zero"),
    "constant not a number": ((*_RUN, "--intervention", "constant:big"), "big"),
    "no such device": ((*_RUN, "--device", "tpu9"), "tpu9"),
    "memory not a size": ((*_RUN, "--memory", "lots"), "lots"),
    "no such guarantee": ((*_RUN, "--guarantee", "exakt"), "exact"),
    "risk of all": ((*_RUN, "--guarantee", "screened", "--risk", "1"), "risk"),
    "screened demo of no kind": (("demo", "--guarantee", "none"), "guarantee"),
    "shard not a part": ((*_RUN, "--shard", "3/2"), "--shard"),
    "no such choice on mismatch": ((*_RUN, "--on-mismatch", "no"), "on_mismatch"),
    "merge of nothing there": (("merge", "gone.zarr"), "gone.zarr"),
    "merge of other results": (("merge", "results/tiny.zarr"), "tiny.zarr"),
    "mean not numbers": ((*_RUN, "--mean", "grey"), "--mean"),
    "output in a file": ((*_RUN, "--output", "images.npz/run.zarr"), "images.npz"),
    "output over something else": ((*_RUN, "--output", "notes"), "notes"),
    "csv over a folder": ((*_RUN, "--csv", "notes"), "notes"),
    "layers without a sample": (("layers", "small_network:make"), "--input-shape"),
    "axis not a number": ((*_RUN, "--axis", "1=last"), "--axis: expected LAYER=N"),
    "axis of no layer": ((*_RUN, "--axis", "one=1"), "axis: no layer"),
    "shape not numbers": (("layers", "small_network:make", "--input-shape", "a"), "--input-shape"),
    "no such run": (("significance", "gone.zarr"), "gone.zarr"),
    "significance of something else": (("significance", "notes"), "notes"),
    "fdr above 1": (("significance", "results/tiny.zarr", "--fdr", "5"), "fdr"),
    "pairs over a folder": (("significance", "results/tiny.zarr", "--pairs", "notes"), "notes"),
    "no such attributes": (("correlate", "results/tiny.zarr", "gone.csv"), "gone.csv"),
    "attributes of no unit": (("correlate", "results/tiny.zarr", "other.csv"), "'x:0'"),
    "attributes without labels": (("correlate", "results/tiny.zarr", "plain.csv"), "'label'"),
    "attributes in a picture": (("correlate", "results/tiny.zarr", "images.npz"), "images.npz"),
    "attributes in no group": (("correlate", "results/tiny.zarr", "notes"), "notes"),
    "no such target": ((*_CORRELATE, "--target", "gin"), "gini"),
    "no such method": ((*_CORRELATE, "--method", "pearso"), "pearson"),
    "no such attribute": ((*_CORRELATE, "--attribute", "aa"), "'aa'"),
    "attributes unknown": ((*_ATTRIBUTES, "--which", "acu"), "auc"),
    "attributes in another format": ((*_ATTRIBUTES, "-o", "a.json"), ".csv or .zarr"),
    "attributes over a folder": ((*_ATTRIBUTES, "-o", "notes.zarr"), "notes.zarr"),
    "size of no data": (
        ("plan", "small_network:make", "--input-shape", "1,8,8", "--size", "8"),
        "--size needs --data",
    ),
    "plan without a sample": (("plan", "small_network:make"), "--input-shape"),
    "no such order": (
        ("cumulative", *DATA, "--order", "dorp"),
        "--order: expected drop, class, random or a .csv",
    ),
    "no such table to order by": (("cumulative", *DATA, "--order", "missing.csv"), "missing.csv"),
    "column of no table": (("cumulative", *DATA, "--column", "l1_norm"), "--column"),
    "rows in another format": (("cumulative", *DATA, "-o", "a.txt"), "a name ending in .csv or"),
    "units not numbers": (("pairs", *DATA, "--layer", "1", "--units", "1,x"), "--units"),
    "units below 0": (("pairs", *DATA, "--layer", "1", "--units", "1,-2"), "whole numbers from 0"),
    "pairs of all layers": (("pairs", *DATA, "--layer", "*"), "expected one layer"),
    "more top units than there are": (
        ("shapley", *DATA, "--layers", "1:0", "--top", "1"),
        "fewer than all 1 units",
    ),
    "values of the loss by a bound": (
        ("shapley", *DATA, "--measure", "loss", "--interval", "bernstein"),
        "'student' for the loss",
    ),
    "rotation of no layer": (("rotation", *DATA, "--layers", "nowhere"), "nowhere"),
    "no such ranking": (("prune", *DATA, "--by", "l3"), "--by"),
    "fraction above 1": (("prune", *DATA, "--fraction", "2"), "--fraction"),
    "column of no result": (("prune", *DATA, "--column", "accuracy_drop"), "--column"),
    "column of random": (("sensitivity", *DATA, "--column", "x", "--by", "random"), "--column"),
    "sensitivity in text": (("sensitivity", *DATA, "--output", "a.txt"), "*.csv or *.json"),
    "no such other network": (("compare", *DATA[:1], "demo:vgg", *DATA[1:]), "vgg_bn"),
}


def test_outputs_that_are_no_logits_are_named(here: Path) -> None:
    code, _, err = invoke_apart("run", "small_network:TwoHeads", "--data", "images.npz")
    assert code == 2
    (line,) = error_lines(err)
    assert "got dict of 'fine' [2, 3], 'coarse' [2, 4]; logits=" in line


@pytest.mark.parametrize("case", _BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(here: Path, case: str) -> None:
    arguments, named = _BAD_INPUT[case]
    code, _, err = invoke_apart(*arguments)
    assert code == 2
    lines = error_lines(err)
    assert len(lines) == 1
    assert lines[0].startswith("pyablate: ")
    assert named in lines[0]


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0), (None, 1)])
def test_of_several_processes_the_first_writes_the_error(
    here: Path, monkeypatch: pytest.MonkeyPatch, rank: str | None, lines: int
) -> None:
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = invoke_apart("run", "net:nope", "--data", "images.npz", "--json")
    assert code == 2
    assert len(error_lines(err)) == 1
    assert len(out.splitlines()) == lines


def test_debug_shows_the_traceback(here: Path) -> None:
    process = _process(["run", "demo:vgg_nb", "--data", "demo", "--debug"], here)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Traceback" in err
    assert "ValueError" in err


def test_a_process_ends_with_2_and_one_line(here: Path) -> None:
    process = _process(["run", "demo:vgg_nb", "--data", "demo"], here)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    assert len(error_lines(err)) == 1


@pytest.mark.skipif(os.name == "nt", reason="signals as on POSIX")
def test_interrupt_ends_with_130_and_one_line(here: Path) -> None:
    process = _process(["run", "small_network:sleep", "--data", "images.npz"], here)
    assert process.stdout is not None
    assert process.stdout.readline() == "sleeping\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error_lines(err) == ["pyablate: interrupted"]
    assert not list(here.glob(".run.zarr*"))
