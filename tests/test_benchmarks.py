"""The benchmark suite runs: one small case of it, and what the script for a GPU would do."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_case_writes_its_record_and_its_table(tmp_path):
    pytest.importorskip("pytest_benchmark")
    asked = ["--images", "16", "--rounds", "1", "--no-compile", "--results", str(tmp_path)]
    case = "benchmarks/bench_heads.py::test_shipped[resnet]"
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # Within one of several processes of tests, nothing would be measured.
    alone = {key: value for key, value in os.environ.items() if "XDIST" not in key}
    done = subprocess.run(
        [*pytest_, case, *asked], cwd=ROOT, env=alone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    ((_, record),) = json.loads(path.read_text())["cases"].items()
    assert record["images"] == 16
    assert record["audit"] == {"pairs": 300, "mismatches": 0, "mended": 0}
    assert set(record["rivals"]) == {"cached", "closed_form"}
    page = tmp_path / "page.md"
    page.write_text("<!-- results: begin -->\n<!-- results: end -->\n")
    table = [sys.executable, "benchmarks/table.py", "--results", str(tmp_path), "--page", str(page)]
    subprocess.run(table, cwd=ROOT, check=True)
    assert "last maps of resnet, 64 units x 10 classes | 16 |" in page.read_text()


# --- a visit to a GPU -----------------------------------------------------------------------------

PHASES = ["build", "ops", "exact", "sanitizer", "speed", "bench", "ncu"]


def visit(out, *arguments, **settings):
    """Run the script where there is neither git nor a virtual environment nor a GPU."""
    given = {"OUT": out, "PYTHON": sys.executable, "WHEELS": out / "none", "GIT_DIR": out / "none"}
    env = {**os.environ, **{name: str(value) for name, value in (given | settings).items()}}
    return subprocess.run(
        ["bash", "benchmarks/gpu.sh", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def findings(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_visit_says_what_it_would_do_the_most_valuable_first(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a.whl").touch()
    site = tmp_path / "site"
    out = tmp_path / "out"
    done = visit(out, "--dry-run", WHEELS=tmp_path / "wheels", SITE=site)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if ", at most " in line]
    assert list(dict.fromkeys(re.split("[,-]", line)[0] for line in lines)) == PHASES
    commands = "\n".join(lines)
    for part in ("--no-index", "PYABLATE_CUDA=ON", "-m cuda", "memcheck", "racecheck", "--device"):
        assert part in commands
    assert "git" not in commands.replace(str(ROOT), "")
    assert not out.exists()
    for word in re.findall(r"\S*(?:tests|benchmarks)/\S+\.py", commands):
        assert (ROOT / word).exists()


@pytest.mark.slow
def test_phases_of_a_visit_on_the_processor(tmp_path):
    done = visit(tmp_path, "exact", "speed", DEVICE="cpu", SMALL="1", DEADLINE="280")
    assert done.returncode == 0, done.stdout + done.stderr
    found = findings(tmp_path)
    assert [each["what"] for each in found][:2] == ["exact", "matmul bf16"]
    assert found[0]["mismatches"] == 0 < found[0]["pairs"]
    assert {"passes, GB/s", "chosen for one pass", "network", "plan's rates"} <= {
        each["what"] for each in found
    }
    assert found[-1]["how"] == "no graphs"
    assert "failed: 0" in (tmp_path / "run.log").read_text()


def test_a_visit_without_time_says_what_it_left_out(tmp_path):
    done = visit(tmp_path, "exact", "ncu", DEVICE="cpu", SMALL="1", DEADLINE="6")
    assert done.returncode == 1
    log = (tmp_path / "run.log").read_text()
    assert "exact: no time left" in log
    assert "ncu: no time left" in log
    assert "failed: 2" in log


def test_what_was_found_before_a_phase_was_cut_stays(tmp_path):
    slow = tmp_path / "python"
    slow.write_text("""#!/bin/sh
echo '{"what": "first"}' >>"$OUT/results.jsonl"
sleep 60
echo '{"what": "second"}' >>"$OUT/results.jsonl"
""")
    slow.chmod(0o755)
    out = tmp_path / "out"
    done = visit(out, "exact", "speed", PYTHON=slow, DEADLINE="20")
    assert done.returncode == 1
    assert [each["what"] for each in findings(out)] == ["first"]
    assert "cut off after" in (out / "exact.txt").read_text()
    assert "speed: no time left" in (out / "run.log").read_text()


def test_a_visit_knows_its_phases():
    done = subprocess.run(["bash", "benchmarks/gpu.sh", "sped"], cwd=ROOT, capture_output=True)
    assert done.returncode == 2
    assert b"usage" in done.stderr


def test_wheels_that_are_missing(tmp_path):
    have = tmp_path / "have.txt"
    have.write_text("torch==2.11.0+cu130\nnumpy\nScipy==1.17.0\n-e link\nxarray @ file:///x\n")
    script = [sys.executable, "benchmarks/gpu_wheels.py", str(have), "--list", "--extras", "test"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    named = re.findall(r"[\w-]+", done.stdout.removeprefix("missing:"))
    assert {"zarr", "pandas", "pytest"} <= set(named)
    assert not {"torch", "numpy", "scipy", "xarray", "pyablate"} & set(named)
