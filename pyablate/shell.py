"""What the commands of the shell share: parsing of values, error lines, messages."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
from pathlib import Path

INTERRUPTED = 130
BAD_INPUT = 2
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class InputError(ValueError):
    """A value on the command line that cannot be used."""


def parse_bytes(option: str, text: str | None) -> int | None:
    """Turn ``"4GB"``, ``"512MiB"`` or a plain number into bytes; None stays None.

    Raises
    ------
    InputError
        Not a size, or not above zero.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    units = _UNITS | _BINARY_UNITS
    if not match or match[2] not in units or float(match[1]) == 0:
        raise InputError(f"{option}: expected a size such as 4GB or 512MiB, got {text!r}")
    return int(float(match[1]) * units[match[2]])


def parse_numbers(
    option: str, text: str | None, *, whole: bool = False
) -> tuple[float, ...] | None:
    """Turn ``"0.5,0.25"`` into numbers; None stays None.

    Parameters
    ----------
    option : str
        Name for the error message.
    text : str or None
        Numbers with commas between.
    whole : bool
        Whether they must be whole and above zero.

    Raises
    ------
    InputError
        Something between the commas is not such a number.
    """
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    good = bool(numbers) and all(map(math.isfinite, numbers))
    if whole:
        good = good and all(number >= 1 and number == int(number) for number in numbers)
    if not good:
        kind = "whole numbers above 0" if whole else "numbers"
        raise InputError(f"{option}: expected {kind} with commas between, got {text!r}")
    return numbers


def check_file(path: Path) -> None:
    """Fail now rather than after the run if a file cannot be written.

    Raises
    ------
    OSError
        The path is a folder, or its folder cannot be made or written to.
    """
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write to, {path} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written")


def error_line(error: BaseException) -> tuple[str | None, int]:
    """Tell what to print for an exception and which exit code to end with.

    Returns
    -------
    line : str or None
        One line; empty for nothing at all; None for an exception nobody foresaw, which deserves
        its traceback.
    code : int
        2 for bad input, 130 after Ctrl-C.
    """
    if hasattr(error, "format_message"):  # usage errors of the argument parser
        # The message is empty where the help itself was the answer.
        return " ".join(error.format_message().split()), getattr(error, "exit_code", BAD_INPUT)
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return "interrupted", INTERRUPTED
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone: `| head`
        return "", 1
    if isinstance(error, ValueError | TypeError | OSError | ImportError):
        return " ".join(str(error).split()) or type(error).__name__, BAD_INPUT
    return None, 1


def log_to_stderr(debug: bool = False) -> None:
    """Send the library's messages to standard error, once."""
    logger = logging.getLogger("pyablate")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())


class _Stderr(logging.Handler):
    """Looks standard error up at each message: a progress bar replaces it for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"pyablate: {self.format(record)}\n")
        except (OSError, ValueError):
            self.handleError(record)
