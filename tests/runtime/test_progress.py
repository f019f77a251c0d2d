"""Progress: a bar when asked or on a terminal, log lines elsewhere, nothing when told so."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import time
from types import SimpleNamespace

import pytest

from pyablate.runtime import progress


def test_a_callable_is_called_itself():
    calls: list[tuple[int, int, str]] = []
    with progress.reporting(lambda *call: calls.append(call)) as report:
        report(1, 4, "features.2")
    assert calls == [(1, 4, "features.2")]


def test_false_is_silent(capsys, caplog):
    with caplog.at_level(logging.INFO, "pyablate"), progress.reporting(False) as report:
        report(4, 4, "features.2")
    assert capsys.readouterr() == ("", "")
    assert not caplog.records


def test_true_draws_a_bar_with_the_layer_the_speed_and_the_time_left(capsys):
    with progress.reporting(True, unit="pairs") as report:
        report(1, 4, "features.2")
        report(3, 4, "features.5")
    captured = capsys.readouterr()
    assert "features.5" in captured.err
    assert "75%" in captured.err
    assert "pairs/s" in captured.err
    assert re.search(r"elapsed, \d:\d\d:\d\d left", captured.err)
    assert captured.out == ""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_lines_are_logged_now_and_then(caplog, clock):
    with (
        caplog.at_level(logging.INFO, "pyablate"),
        progress.reporting(None, unit="pairs") as report,
    ):
        report(0, 40_000, "features.2")
        for second in range(1, 41):
            clock[0] += 1
            report(1000 * second, 40_000, "features.2")
    messages = [record.message for record in caplog.records]
    assert len(messages) == 4  # at 10, 20, 30 seconds and at the end
    assert messages[0] == "features.2: 25 % done, 1,000 pairs/s, about 30 s left (10 s so far)"
    assert messages[-1] == "features.2: 100 % done, 1,000 pairs/s, about 0 s left (40 s so far)"


def test_what_was_done_before_is_no_speed(clock):
    pace = progress.Pace()
    assert pace(900, 1000) == (0.0, None)
    clock[0] += 10
    assert pace(920, 1000) == (2.0, 40.0)


def test_what_is_left_goes_by_work_where_equal_numbers_take_unequal_times(clock):
    pace = progress.Pace()
    pace(0, 1000, 0.0)
    clock[0] += 10
    assert pace(100, 1000, 500.0) == (10.0, 10.0)
    assert pace(1000, 1000, 999.9) == (100.0, 0.0)  # rounded sums leave nothing


def test_lines_come_while_nothing_is_reported(caplog, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.02)
    with caplog.at_level(logging.INFO, "pyablate"), progress.reporting(None):
        progress.stage("capturing the network")
        end = time.monotonic() + 5
        while len(caplog.records) < 2 and time.monotonic() < end:
            time.sleep(0.01)
    assert len(caplog.records) >= 2
    assert caplog.records[-1].message.startswith("capturing the network (")
    progress.stage("of no run")  # heard by nobody


def test_a_stage_keeps_the_share_done(caplog, clock):
    with caplog.at_level(logging.INFO, "pyablate"), progress.reporting(None) as report:
        report(1, 4, "features.2")
        clock[0] += 11
        progress.stage("features.2 (audit)")
    assert caplog.messages == ["features.2 (audit): 25 % done (11 s so far)"]


def test_json_lines_tell_what_is_done_before_there_is_anything_to_count():
    lines = progress.JsonLines(io.StringIO())
    with progress.reporting(lines) as report:
        progress.stage("capturing the network")
        report(1, 4, "a", 0.5)
        progress.stage("a (audit)")
    first, second = map(json.loads, lines.stream.getvalue().splitlines())
    assert first == {"event": "preparing", "what": "capturing the network"}
    assert second["done"] == 1


def test_a_notebook_has_one_output_that_ends_as_a_line(monkeypatch):
    shown: list[str] = []
    handle = SimpleNamespace(update=shown.append)
    display = SimpleNamespace(HTML=str, display=lambda text, display_id: handle)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    with progress._NotebookBar("pairs") as report:
        report.stage("capturing <the network>")
        report(2, 4, "features.2")
        report(4, 4, "features.2")  # at once: not shown by itself
    assert shown[0] == "<progress></progress> capturing &lt;the network&gt;"
    assert shown[1].startswith('<progress value="2" max="4"></progress> features.2: 50 % done')
    assert re.fullmatch(r"4 pairs in \d\.\d s", shown[2])
    assert len(shown) == 3
    assert not any("\x1b" in text or "\r" in text for text in shown)


def test_json_lines_are_one_record_a_second_and_the_end(clock):
    stream = io.StringIO()
    report = progress.JsonLines(stream)
    for eighth in range(24):
        report(eighth, 24, "a")
        clock[0] += 0.125
    report(24, 24, "b")
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [record["done"] for record in records] == [0, 8, 16, 24]
    assert records[0]["seconds_left"] is None
    assert records[1] == {
        "event": "progress",
        "done": 8,
        "total": 24,
        "layer": "a",
        "per_second": 8.0,
        "seconds_left": 2.0,
    }
    assert records[-1]["layer"] == "b"
