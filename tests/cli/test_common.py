"""Values, errors and messages of the command line, without running a network."""

from __future__ import annotations

import logging

import pytest
import torch

import pyablate as pa
from pyablate._validation import check_bytes
from pyablate.cli.common import (
    InputError,
    error_line,
    log_to_stderr,
    parse_integers,
    parse_numbers,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("4GB", 4 * 10**9),
        ("4 gb", 4 * 10**9),
        ("1.5G", 15 * 10**8),
        ("512MiB", 512 * 2**20),
        ("2KiB", 2048),
        ("2000000", 2_000_000),
        ("7B", 7),
    ],
)
def test_sizes_are_read(text: str | None, expected: int | None) -> None:
    assert check_bytes("--memory", text) == expected


@pytest.mark.parametrize("text", ["", "GB", "4XB", "-1GB", "0", "0GB", "four", "1,5GB", "4IB"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--memory: expected a size such as 4GB .*, got"):
        check_bytes("--memory", text)


def test_a_number_of_bytes_with_which_nothing_runs_is_asked_about() -> None:
    with pytest.raises(ValueError, match="got '3', which is bytes; did you mean 3GB"):
        check_bytes("--memory", "3")
    assert check_bytes("memory", 3) == 3  # bytes, in Python


@pytest.mark.parametrize(
    ("text", "expected"), [(None, None), ("224", (224, 224)), ("256,224", (256, 224))]
)
def test_size_and_crop_are_read(text: str | None, expected: tuple[int, int] | None) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "0", "2.5", "224,256", "9,8,7", "big"])
def test_bad_size_and_crop_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"--size: expected .* got {text!r}"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"), [(None, None), ("0.5", (0.5,)), ("0.5,-0.25, 1", (0.5, -0.25, 1.0))]
)
def test_numbers_are_read(text: str | None, expected: tuple[float, ...] | None) -> None:
    assert parse_numbers("--mean", text) == expected


def test_integers_are_read() -> None:
    assert parse_integers("--units", "0,224, 3", least=0) == [0, 224, 3]


@pytest.mark.parametrize("text", ["", "a", "1,,2", "nan", "1,inf", "0,2", "1.5", "-3"])
def test_bad_numbers_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--units: expected .*numbers.* with commas between, got"):
        parse_integers("--units", text, least=1)


class _UsageError(Exception):
    exit_code = 2

    def format_message(self) -> str:
        return "no such\n option"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("two\n lines"), ("two lines", 2)),
        (TypeError(""), ("TypeError", 2)),
        (FileNotFoundError("gone"), ("gone", 2)),
        (ImportError("no timm"), ("no timm", 2)),
        (KeyboardInterrupt(), ("interrupted", 130)),
        (BrokenPipeError(), ("", 1)),
        (_UsageError(), ("no such option", 2)),
        (ZeroDivisionError("a bug"), (None, 1)),
        (MemoryError(), ("not enough memory", 4)),
        (MemoryError("64 GiB\n wanted"), ("not enough memory (64 GiB wanted)", 4)),
        (torch.OutOfMemoryError("of the GPU"), ("not enough memory (of the GPU)", 4)),
        (RuntimeError("a bug"), (None, 1)),
        (pa.AuditError("audit: layer 1"), ("audit: layer 1", 6)),
    ],
)
def test_errors_become_one_line_and_a_code(
    error: BaseException, expected: tuple[str | None, int]
) -> None:
    assert error_line(error) == expected


def test_messages_go_to_standard_error_once(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("pyablate")
    before, level = list(logger.handlers), logger.level
    try:
        log_to_stderr()
        log_to_stderr()
        logger.info("half way")
        logger.debug("too much")
        log_to_stderr(debug=True)
        logger.debug("asked for")
    finally:
        logger.handlers[:] = before
        logger.setLevel(level)
    captured = capsys.readouterr()
    assert captured.err == "pyablate: half way\npyablate: asked for\n"
    assert captured.out == ""
