"""Progress: a bar when asked or on a terminal, log lines elsewhere, nothing when told so."""

from __future__ import annotations

import logging

import pytest

from pyablate import progress


def test_a_callable_is_called_itself() -> None:
    calls: list[tuple[int, int, str]] = []
    with progress.reporting(lambda *call: calls.append(call)) as report:
        report(1, 4, "features.2")
    assert calls == [(1, 4, "features.2")]


def test_false_is_silent(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pyablate"), progress.reporting(False) as report:
        report(4, 4, "features.2")
    assert capsys.readouterr() == ("", "")
    assert not caplog.records


def test_true_draws_a_bar_with_the_layer_and_the_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress.reporting(True) as report:
        report(1, 4, "features.2")
        report(3, 4, "features.5")
    captured = capsys.readouterr()
    assert "features.5" in captured.err
    assert "75%" in captured.err
    assert "left" in captured.err
    assert captured.out == ""


def test_without_a_terminal_lines_are_logged_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO, "pyablate"), progress.reporting(None) as report:
        for second in range(1, 41):
            now[0] += 1
            report(second, 40, "features.2")
    messages = [record.message for record in caplog.records]
    assert len(messages) == 4  # at 10, 20, 30 seconds and at the end
    assert messages[0] == "features.2: 25 % done, about 30 s left"
    assert messages[-1] == "features.2: 100 % done, about 0 s left"
