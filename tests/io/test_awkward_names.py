"""Names of layers and classes that nobody would choose: drawn, printed, written as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.shelled import invoke
from support.simulated import simulate

import pyablate as pa
from pyablate.io.sanitize import visible

NAMES = (
    "$\\frac{$",
    "$x^2$",
    "\\$5 and $6",
    "\x1b[31mred\x07",
    "two\nlines",
    "bad\udcff",
    "猫",
    "_under",
)
LAYERS = ["_$\\frac{$"] * 6 + ["second$_$"] * 9


@pytest.fixture(scope="module")
def result() -> pa.AblationResult:
    """Every class is broken by some unit, so that every name is shown."""
    rates = np.full((15, len(NAMES)), 0.02)
    rates[np.arange(len(NAMES)), np.arange(len(NAMES))] = 0.9
    made = simulate(rates, 0.02, 40, np.random.default_rng(0), LAYERS)
    return replace(made, class_names=NAMES)


def _table(result: pa.AblationResult) -> pd.DataFrame:
    return pd.DataFrame({"$\\frac{$": np.arange(15.0)}, index=result.units["label"])


def _curves(column: str) -> pd.DataFrame:
    rows = [
        {column: name, "target": "", "removed": n, "fraction": n / 2, "accuracy": 1 - n / 2}
        for name in NAMES
        for n in range(3)
    ]
    return pd.DataFrame(rows)


DRAWN: dict[str, Callable[[pa.AblationResult], Any]] = {
    "drops": lambda r: r.plot.drops(names=6),
    "heat map": lambda r: r.plot.heat_map(15),
    "profile": lambda r: r.plot.profile(0),
    "scatter": lambda r: r.plot.scatter(_table(r), "$\\frac{$", "accuracy_drop"),
    "cumulative": lambda r: pa.plots.cumulative_curves(_curves("order")),
    "prune": lambda r: pa.plots.prune_curves(_curves("ranking")),
}


@pytest.fixture
def pyplot() -> Iterator[Any]:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("kind", DRAWN)
def test_names_are_drawn_as_they_are(result, pyplot, kind, tmp_path):
    from matplotlib.text import Text

    axes = DRAWN[kind](result)
    for suffix in ("png", "svg"):
        axes.figure.savefig(tmp_path / f"drawn.{suffix}")
    texts = [text for text in axes.figure.findobj(Text) if "$" in text.get_text()]
    assert texts
    for text in texts:
        drawn, formula = text._preprocess_math(text.get_text())
        assert formula is False
        assert "$" in drawn
        assert "\\$\\frac" not in drawn
    if axes.get_legend() is not None and kind not in ("drops", "profile"):
        shown = [text.get_text().strip() for text in axes.get_legend().get_texts()]
        assert sum(name.startswith("_") for name in shown) == 1  # matplotlib would leave it out


def test_what_the_font_lacks_is_one_line(result, pyplot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = tuple("猫犬" if name == "猫" else name for name in NAMES if "\udcff" not in name)
    replace(result, class_names=(*saved, "last")).save("run.zarr")
    code, out = invoke("plot", "run.zarr", "--kind", "heat-map")
    assert code == 0, out
    told = [line for line in out.splitlines() if "no sign for" in line]
    assert len(told) == 1
    assert "猫" in told[0]
    assert "犬" in told[0]
    assert "Glyph" not in out


def test_what_cannot_be_seen_is_written_out():
    assert visible("\x1b[31mé\x9b猫\u202e\n\t\udcff") == "\\x1b[31mé\\x9b猫\\u202e\\n\\t\\udcff"
    assert visible("a\nb\x07", keep="\n") == "a\nb\\x07"


@pytest.mark.parametrize("command", ["significance", "report", "plot"])
def test_no_control_character_of_a_name_reaches_the_terminal(
    result, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    units = result.units.assign(
        label=result.units["label"].str.replace("second", "\x1b]0;title\x07"),
        layer=result.units["layer"].str.replace("second", "\x1b]0;title\x07"),
    )
    replace(result, units=units).save("run.zarr")
    for words in ([], ["-o", "\x1b[31m.html"], ["-o", "gone/\x1b[31m"], ["\x1b[2J"]):
        _, out = invoke(command, "run.zarr", *words)
        assert out
        assert not [character for character in out if character < " " and character != "\n"]
    if command == "significance":
        _, out = invoke(command, "run.zarr")
        assert "\\x1b[31mre" in out  # folded
        assert "\\x1b]0;title" in out


def test_no_control_character_goes_through_the_console(capsys):
    from pyablate.cli.tables import console

    console().print("a\x1b[31m[b]c\nd")
    assert capsys.readouterr().out == "a\\x1b[31m[b]c\nd\n"


def test_names_that_are_not_unicode_are_written_with_backslashes(result, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result.save("run.zarr")
    code, out = invoke("significance", "run.zarr", "--csv", "units.csv", "--pairs", "pairs.csv")
    assert code == 0, out
    assert "bad\\udcff" in Path("units.csv").read_text(encoding="utf-8")
    assert set(pd.read_csv("pairs.csv")["class"]) >= {"bad\\udcff", "猫", "$x^2$"}
