"""Random words on the command line: an exit code that is documented, one line, no traceback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing.budget import settings_for
from support.simulated import simulate
from typer.main import get_command
from typer.testing import CliRunner

from pyablate.cli.app import app

CODES = {0, 2, 3, 4}  # 1 and 130 would be an error nobody foresaw, and an interrupt
COMMAND = get_command(app)
COMMANDS = sorted(set(COMMAND.commands) - {"demo"})  # type: ignore[attr-defined]
WORDS = """
small_network:make small_network:plain demo:resnet demo:resnett torchvision:x missing.pt2 images.npz
units.csv run.zarr photos . - -- * 0 1: :0 1:0 1:99 zero mean noise:1 constant:nan direction 1,8,8
1,-8 0.5 -1 nan 1e999 4GB 0GB fp32 int8 cpu cuda:9 spearman accuracy_drop new.zarr out/new.csv 2 1/2
""".split()
TEXT = st.sampled_from([*WORDS, *WORDS, "", "9" * 40, "a" * 300, "\u202e"]) | st.text(max_size=4)
LEFT_OUT = {"debug", "distributed"}  # asks for a traceback; waits for other processes


@st.composite
def arguments(draw: st.DrawFn, command: str) -> list[str]:
    """Options that the command has, with any values."""
    known = COMMAND.commands[command].params  # type: ignore[attr-defined]
    options = [p for p in known if p.name not in LEFT_OUT and p.opts[0].startswith("-")]
    words: list[str] = []
    for parameter in draw(st.lists(st.sampled_from(options), max_size=3)) if options else []:
        words.append(draw(st.sampled_from([*parameter.opts, *parameter.secondary_opts])))
        if not getattr(parameter, "is_flag", False):
            words.append(draw(TEXT))
    return words


_NETWORK = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)  # the parts of a run are of one network
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(3, 3))
    model.known_as = "random words"
    return model


def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exports_kept: None) -> Path:
    (tmp_path / "small_network.py").write_text(_NETWORK)
    draw = np.random.default_rng(0)
    images = draw.random((6, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(6) % 3)
    result = simulate(np.full((3, 2), 0.5), 0.5, 4, draw, ["1"] * 3)
    result.save(tmp_path / "run.zarr")
    result.to_dataframe().to_csv(tmp_path / "units.csv", index=False)
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(arguments: list[str]) -> int:
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code in CODES, (arguments, outcome.exit_code, outcome.exception)
    assert "Traceback" not in outcome.stderr
    if outcome.exit_code:
        said = [line for line in outcome.stderr.splitlines() if line.startswith("pyablate: ")]
        assert said, (arguments, outcome.stderr)
    return outcome.exit_code


SOUND = {
    "run": ["small_network:make", "--data", "images.npz", "--output", "new.zarr"],
    "plan": ["small_network:make", "--input-shape", "1,8,8"],
    "layers": ["small_network:make", "--input-shape", "1,8,8"],
    "attributes": ["small_network:make", "--data", "images.npz", "--which", "weights"],
    "significance": ["run.zarr"],
    "correlate": ["run.zarr", "units.csv", "--attribute", "accuracy_drop", "--resamples", "10"],
    "report": ["run.zarr", "-o", "report.html"],
    "plot": ["run.zarr", "-o", "plot.svg"],
    "merge": ["part1.zarr", "part2.zarr", "-o", "merged.zarr", "--csv", "merged.csv"],
    "prune": ["small_network:make", "--data", "images.npz", "--by", "l1", "--fraction", "0.4"],
    "pairs": ["small_network:make", "--data", "images.npz", "--layer", "1", "-o", "pairs.csv"],
    "cumulative": ["small_network:make", "--data", "images.npz", "--layers", "1", "--steps", "2"],
    "compare": ["small_network:make", "small_network:make", "--data", "images.npz"],
}
EXAMPLES = {"cumulative": 1, "pairs": 1, "prune": 2, "compare": 2, "report": 2, "plot": 2}


def test_random_words(here):
    @settings_for(25)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        command = data.draw(st.sampled_from(COMMANDS))
        words = data.draw(st.lists(TEXT, max_size=3))
        invoke([command, *words, *data.draw(arguments(command))])

    check()


@pytest.mark.parametrize("command", SOUND)
def test_sound_commands_with_random_options(here, command):
    sound = SOUND[command]
    if command == "merge":
        for number in (1, 2):
            part = ["--shard", f"{number}/2", "--output", f"part{number}.zarr"]
            assert invoke(["run", "small_network:make", "--data", "images.npz", *part]) == 0
    assert invoke([command, *sound]) == 0

    @settings_for(EXAMPLES.get(command, 4))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        changed = list(sound)
        if data.draw(st.booleans()):
            changed[data.draw(st.integers(0, len(sound) - 1))] = data.draw(TEXT)
        invoke([command, *changed, *data.draw(arguments(command))])

    check()
