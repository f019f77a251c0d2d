"""The benchmark suite runs: one small case of it, and what the script for a GPU would do."""

import json
import os
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


def test_the_script_for_a_gpu_says_what_it_would_do():
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--dry-run"],
        cwd=ROOT,
        env={**os.environ, "VENV": str(Path(sys.prefix))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for part in ("PYABLATE_CUDA=ON", "-m cuda", "memcheck", "racecheck", "--device cuda"):
        assert part in done.stdout
