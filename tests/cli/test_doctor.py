"""What ``pyablate doctor`` finds out about an installation, and what it advises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import pyablate as pa
from pyablate._validation import optional
from pyablate.cli import diagnose
from pyablate.cli.app import app


@pytest.fixture(scope="module")
def known() -> diagnose.Facts:
    return diagnose.facts()


def _with(known: diagnose.Facts, section: str, **values: Any) -> diagnose.Facts:
    return {**known, section: {**known[section], **values}}


def _problems(known: diagnose.Facts) -> list[str]:
    return [str(finding) for finding in diagnose.findings(known) if finding.problem]


def _doctor(*words: str, preamble: str = "", **environment: str) -> tuple[int, str]:
    script = (
        f"import sys\n{preamble}\nfrom pyablate.cli.app import app\napp({['doctor', *words]!r})"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(pa.__file__).parents[1]), **environment},
    )
    assert "Traceback" not in run.stderr
    return run.returncode, run.stdout


def test_facts_are_those_of_this_installation(known: diagnose.Facts) -> None:
    info = pa.build_info()
    assert known["versions"]["pyablate"] == info["version"]
    assert known["versions"]["torch"] == metadata.version("torch")
    assert known["extras"]["compression"].keys() == {"torch-pruning"}
    assert known["native module"]["in use"] == info["native"]
    assert known["native module"]["instruction set"] == info["cpu_isa"]
    assert known["CPU"]["threads of torch"] == torch.get_num_threads()
    assert known["precisions"]["fp32"] > 0
    assert len(known["CUDA"]["GPUs"]) == torch.cuda.device_count()
    assert known["self-test"] == {"pairs": 8 * (4 + 8 + 1), "mismatches": 0}


def test_nothing_is_wrong_here_and_the_shell_says_so() -> None:
    outcome = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(outcome.stdout)
    assert outcome.exit_code == 0
    assert report["ok"]
    assert not any(finding["problem"] for finding in report["findings"])
    words = " ".join(CliRunner().invoke(app, ["doctor"]).stdout.split())
    assert f"pyablate {pa.build_info()['version']}" in words
    assert "Everything works." in words


def test_a_native_module_that_is_missing_is_a_problem(known: diagnose.Facts) -> None:
    broken = _with(known, "native module", **{"in use": False, "not in use because": "import"})
    assert any("the native module is not in use (import)" in line for line in _problems(broken))


def test_a_native_module_that_is_switched_off_is_a_choice() -> None:
    code, out = _doctor("--json", PYABLATE_NATIVE="0")
    report = json.loads(out)
    assert code == 0
    assert report["facts"]["native module"]["in use"] is False
    assert any("switched off by PYABLATE_NATIVE" in each["what"] for each in report["findings"])


def test_a_torch_that_cannot_be_imported_is_told() -> None:
    code, out = _doctor("--json", preamble="sys.modules['torch'] = None")
    report = json.loads(out)
    assert code == 5
    assert not report["ok"]
    assert any("torch" in each["what"] and each["problem"] for each in report["findings"])
    code, out = _doctor(preamble="sys.modules['torch'] = None")
    assert code == 5
    assert "Something does not work." in out
    assert "--force-reinstall torch" in out


@pytest.mark.parametrize("version", [None, "2.5.1"])
def test_packages_that_are_missing_or_too_old(known: diagnose.Facts, version: str | None) -> None:
    [line] = _problems(_with(known, "versions", torch=version))
    assert "pip install 'torch>=2.6'" in line
    assert str(version or "not installed") in line


def test_missing_extras_and_libraries_are_remarks(known: diagnose.Facts) -> None:
    without = _with(known, "extras", compression={"torch-pruning": None})
    without = _with(without, "model libraries", timm=None)
    assert _problems(without) == _problems(known) == []
    lines = " ".join(map(str, diagnose.findings(without)))
    assert "pip install 'pyablate[compression]'" in lines
    assert "pip install timm" in lines


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"compiled in": False}, "built without CUDA kernels"),
        ({"driver": "12.8"}, "the driver serves CUDA 12.8, the kernels need 13.0.88"),
        ({"compute capabilities": [(7, 5)]}, "(compute capability 7.5) has no kernels"),
        ({}, None),
    ],
)
def test_a_gpu_that_cannot_be_used(
    known: diagnose.Facts, changes: dict[str, Any], expected: str | None
) -> None:
    machine = {
        **{"compiled in": True, "architectures": "80-real 90-real 90-virtual"},
        **{"toolkit": "13.0.88", "driver": "13.0", "of torch": "13.0"},
        **{"GPUs": ["A GPU"], "compute capabilities": [(9, 0)]},
    }
    lines = _problems(_with(known, "CUDA", **{**machine, **changes}))
    assert [expected in line for line in lines] == ([True] if expected else [])


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 5), False), ((8, 0), True), ((8, 6), True), ((9, 0), True), ((10, 0), True)],
)
def test_which_gpus_have_code(capability: tuple[int, int], runs: bool) -> None:
    assert diagnose.has_code_for("80-real 90-real 90-virtual", capability) == runs
    assert not diagnose.has_code_for("90-real", (10, 0))


def test_wrong_predictions_and_slow_arithmetic_are_told(known: diagnose.Facts) -> None:
    [line] = _problems(_with(known, "self-test", mismatches=3))
    assert "3 of 104 predictions" in line
    slow = {"fp32": 100.0, "bf16": 20.0, "int8": 0.0}
    lines = " ".join(map(str, diagnose.findings({**known, "precisions": slow})))
    assert "neither bfloat16 nor 8-bit integers are faster" in lines


def test_optional_libraries_are_tried(
    known: diagnose.Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("captum")
    assert known["installed but broken"] == {}
    (tmp_path / "captum.py").write_text("raise RuntimeError('operator is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [name for name in sys.modules if name.partition(".")[0] == "captum"]:
        monkeypatch.delitem(sys.modules, module)
    found = diagnose._broken()
    assert found == {"captum": "RuntimeError: operator is missing"}
    (problem,) = _problems({**known, "installed but broken": found})
    assert "captum is installed but cannot be imported" in problem
    with pytest.raises(ImportError, match=r"what it is for .importing captum fails: RuntimeError"):
        optional("captum", "what it is for")


def test_it_reads_like_a_page_for_people() -> None:
    out = CliRunner().invoke(app, ["doctor"]).output  # with standard error
    assert "precisions (billions of operations per second)" in out
    assert "torch-pruning" in out
    assert "{" not in out
    assert "settled" not in out
