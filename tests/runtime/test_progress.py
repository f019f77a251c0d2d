"""Progress: a bar when asked or on a terminal, log lines elsewhere, nothing when told so."""

from __future__ import annotations

import io
import json
import logging

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
    assert "left" in captured.err
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
    assert messages[0] == "features.2: 25 % done, 1,000 pairs/s, about 30 s left"
    assert messages[-1] == "features.2: 100 % done, 1,000 pairs/s, about 0 s left"


def test_what_was_done_before_is_no_speed(clock):
    pace = progress.Pace()
    assert pace(900, 1000) == (0.0, None)
    clock[0] += 10
    assert pace(920, 1000) == (2.0, 40.0)


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
