"""What the shell prints about a result, on a result small enough to check by hand."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from pyablate.cli import summary, tables
from pyablate.network.sites import Site
from pyablate.reference.timing import HookLoopTiming
from pyablate.result import AblationResult
from pyablate.results.audit import Audit
from pyablate.results.flips import Flips


@pytest.fixture
def result() -> AblationResult:
    """Ten images of two classes, all right at first; seven units of one layer, one of another.

    Unit k of layer "a" loses the first k images of class 0; "b" gains nothing and loses nothing.
    """
    labels = np.repeat([0, 1], 5)
    lost = [0, 1, 2, 3, 4, 5, 1, 0]
    pieces = [(np.full(n, row), np.arange(n), np.ones(n)) for row, n in enumerate(lost)]
    units = pd.DataFrame({"layer": ["a"] * 7 + ["b"], "unit": [*range(7), 0]})
    units["label"] = units["layer"] + ":" + units["unit"].astype(str)
    return AblationResult(
        units=units[["label", "layer", "unit"]],
        labels=labels,
        baseline=labels.copy(),
        flips=Flips.gather(8, pieces),
        class_names=("[red] hat", "shoe"),
        audit=Audit(200, 0),
        strategy={"a": "delta", "b": "replay"},
        seconds=2.0,
    )


def _rendered(*printed: object) -> str:
    out = Console(file=io.StringIO(), width=120)
    for one in printed:
        out.print(one)
    return out.file.getvalue()  # type: ignore[attr-defined]


def test_summary_names_the_worst_units_and_the_class_they_hurt(result: AblationResult) -> None:
    rows = [line.split() for line in _rendered(summary.summary_table(result)).splitlines()]
    rows = [row for row in rows if row and ("hat" in row or "shoe" in row)]
    assert rows[0][:10] == "a 7 50.00 (unit 5) 5 [red] hat 5 100.00".split()
    # Five of the seven units, by q and then worst first; equal drops in unit order.
    tests = result.max_class_test(splits=1).iloc[:7]
    order = np.lexsort([np.arange(7), -tests["max_class_drop"], tests["q"]])[:5]
    assert [int(row[-7]) for row in rows] == order.tolist()
    assert [row[-1] for row in rows] == [f"{q:.2g}" for q in tests["q"].iloc[order]]
    assert [row[-2] for row in rows] == [f"{100 * n:.2f}" for n in tests["noise_floor"][order]]


def test_summary_says_what_is_not_in_the_table(result: AblationResult) -> None:
    text = _rendered(*summary.summary(result))
    assert "No prediction changes without any one unit of: b" in text
    assert "Up to 5 units a layer, by q" in text
    assert "Computed by: delta (1 layer), replay (1 layer)" in text
    nothing = Flips.gather(8, [])
    text = _rendered(*summary.summary(dataclasses.replace(result, flips=nothing)))
    assert "No prediction changes without any one unit of: a, b" in text
    assert "hurts most" not in text


def test_summary_has_accuracy_audit_and_time(result: AblationResult) -> None:
    text = _rendered(*summary.summary(result))
    assert "Baseline accuracy 100.00 % on 10 images; 8 units" in text
    assert "replaced by: zero" in text
    assert "200 pairs" in text
    assert "0 mismatches" in text
    assert "Time: 2.0 s for 80 (unit, image) pairs" in text


def test_a_frame_as_a_table() -> None:
    frame = pd.DataFrame(
        {
            "a": ["x", "x", "x", "y", "y"],
            "b": ["p", "p", "q", "q", "\x1b[31mred"],
            "c": [0.5, np.nan, -1.0, 0.25, 1000.0],
        }
    )
    shown = (*tables.columns(str, "One=a", "b"), *tables.columns("{:.1f}".format, "three=c"))
    text = _rendered(tables.frame_table(frame, shown, grouped=2))
    head, _, *lines = (line.strip() for line in text.strip().splitlines())
    assert head.split() == ["One", "b", "three"]
    # Said once while all to the left stays the same; an empty line where the first changes.
    assert [line.split() for line in lines] == [
        *(["x", "p", "0.5"], ["-"], ["q", "-1.0"], []),
        *(["y", "q", "0.2"], ["\\x1b[31mred", "1000.0"]),
    ]
    assert len({len(line.rstrip()) for line in text.splitlines() if line.strip()}) == 1  # right


def test_ratio_says_that_it_is_scaled(result: AblationResult) -> None:
    timing = HookLoopTiming(
        seconds=30.0,
        measured_seconds=1.5,
        units_timed=2,
        units=8,
        images_timed=5,
        images=10,
        batch_size=64,
        channels_last=True,
        pairs_compared=9,
        near_ties=1,
        disagreements=0,
    )
    text = " ".join(summary.hook_loop_lines(result, timing))
    assert "2 of 8 units on 5 of 10 images" in text
    assert "scaling" in text
    assert "15.0 times" in text
    assert "0 of 9 differ from this run (1 near ties left out)" in text


def test_layers_say_what_the_star_selects() -> None:
    sites = [
        Site("features.0", "features.0", None, 4, 1, (4, 8, 8), "layer"),
        Site("features.1", "features.1", None, 4, 1, (4, 8, 8), "activation"),
    ]
    text = _rendered(summary.sites_table(sites, sites[1:]))
    rows = [line.split() for line in text.splitlines() if "features" in line]
    assert rows[0] == ["features.0", "layer", "4", "4", "x", "8", "x", "8", "1"]
    assert rows[1] == ["features.1", "activation", "4", "4", "x", "8", "x", "8", "1", "yes"]


@pytest.mark.parametrize(
    ("value", "shown"), [(True, "yes"), (False, "no"), (None, "-"), ([], "-"), (["a", "b"], "a, b")]
)
def test_facts_are_shown_plainly(value: object, shown: str) -> None:
    assert _rendered(tables.facts_table({"fact": value})).split(maxsplit=1)[1].strip() == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(1.26, "1.3 s"), (240.0, "4.0 min"), (7200.0, "2.0 h")]
)
def test_times_are_readable(result: AblationResult, seconds: float, shown: str) -> None:
    timing = HookLoopTiming(seconds, seconds, 1, 1, 1, 1, 64, False)
    lines = summary.hook_loop_lines(result, timing)
    assert lines[0].startswith(f"Plain hook loop on this machine: {shown}, estimated")
    assert len(lines) == 2  # nothing was compared, nothing is said about it


def test_names_stay_whole_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "_PIPED_WIDTH", 60)
    names = ["blocks.4.1.conv_pwl.activation:12", "blocks.4.1.conv_pwl.activation:13"]
    frame = pd.DataFrame({"first": names, "second": names[::-1], "class": "great white shark"})
    frame = frame.assign(drop=0.1)
    named = tables.columns(str, "Unit=first", "and unit=second", "class")
    shown = (*named, *tables.columns(tables.points, "drop"))
    tables.show(tables.frame_table(frame, shown))
    printed = capsys.readouterr().out
    for name in names:
        assert printed.count(name) == 2
    assert "\u2026" not in printed  # no figure is cut
    assert "great white shark" not in printed  # folded between its words, to save room
