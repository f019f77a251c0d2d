"""Every command runs once on a tiny job, and what it took is told and bounded."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.shelled import TINY_NETWORK, invoke_apart
from support.simulated import simulate
from typer.main import get_command

from pyablate.cli.app import app

pytest.importorskip("torch_pruning")
pytest.importorskip("matplotlib")

_DATA = "tiny_network:make --data images.npz"
COMMANDS = {
    "demo": "demo alexnet --limit 2 --output demo",
    "layers": f"layers {_DATA}",
    "plan": f"plan {_DATA}",
    "run": f"run {_DATA} -o own.zarr",
    "merge": "merge part1.zarr part2.zarr -o both.zarr",
    "attributes": f"attributes {_DATA} --which weights -o weights.csv",
    "significance": "significance run.zarr",
    "correlate": "correlate run.zarr attributes.csv --resamples 20",
    "prune": f"prune {_DATA} --fraction 0.3 --seeds 1",
    "finetune": f"finetune {_DATA} --epochs 1 --save tuned.safetensors",
    "sensitivity": f"sensitivity {_DATA} --fraction 0.3 --output layers.csv",
    "compare": "compare tiny_network:make tiny_network:make --data images.npz",
    "cumulative": f"cumulative {_DATA} --layers 1 --order random --repeats 2",
    "pairs": f"pairs {_DATA} --layer 1",
    "minimal-sets": f"minimal-sets {_DATA} --layers 1",
    "shapley": f"shapley {_DATA} --layers 1 --permutations 3 --interval student",
    "rotation": f"rotation {_DATA} --layers 1 --rotations 1 --fewest 1",
    "plot": "plot run.zarr -o drops.png",
    "report": "report run.zarr -o report.html",
    "doctor": "doctor",
    "show": "show run.zarr",
}
LONGEST = 30.0
"""CPU seconds that a tiny job may take on a busy machine, `demo` with its hook loop too: each takes
from 0.05 to 5 where nothing else is at work."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_network.py").write_text(TINY_NETWORK)
    draw = np.random.default_rng(0)
    images = draw.random((12, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(12) % 3)
    result = simulate(draw.random((4, 3)), 0.1, 20, draw, ["layer"] * 4)
    result.save(tmp_path / "run.zarr")
    units = pd.DataFrame({"unit": list(result.units["label"]), "own": [0.1, 0.4, 0.2, 0.3]})
    units.to_csv(tmp_path / "attributes.csv", index=False)
    return tmp_path


def test_no_command_is_left_out() -> None:
    assert set(COMMANDS) == set(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tiny_job_takes_seconds(here: Path, command: str) -> None:
    if command == "merge":
        for part in (1, 2):
            words = f"run {_DATA} --shard {part}/2 -o part{part}.zarr"
            assert invoke_apart(*words.split())[0] == 0
    begin, began = time.process_time(), time.perf_counter()
    code, out, err = invoke_apart(*COMMANDS[command].split())
    cpu, wall = time.process_time() - begin, time.perf_counter() - began
    assert code == 0, err
    assert out
    print(f"pyablate {command}: {cpu:.2f} s of CPU, {wall:.2f} s in all")  # pytest -rP shows it
    assert cpu < LONGEST
