"""What the commands of the shell share: values, files, error lines, messages."""

from __future__ import annotations

import errno
import logging
import math
import re
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path

from pyablate.io.atomic import check_file
from pyablate.io.sanitize import visible

BAD_INPUT = 2
OTHER_RUN = 3
NO_ROOM = 4
NOT_WELL = 5
AUDIT = 6
INTERRUPTED = 130
EXIT_CODES = (
    "Exit codes, of all commands: 0 done; 1 an error nobody foresaw; 2 bad input; 3 the output "
    "holds another run (other model, data or options); 4 no room on the disk or in memory; 5 "
    "`doctor` found something that does not work; 6 predictions that the audit recomputed differ, "
    "whatever was tried; 130 interrupted. After 1, 4, 6, 130 and after a kill, `run` goes on where "
    "it stopped when the same command is given again."
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


words: ContextVar[list[str]] = ContextVar("words")
"""The command line, without the name of the program."""


class InputError(ValueError):
    """A value on the command line that cannot be used."""


def parse_axes(given: list[str] | None) -> dict[str, int]:
    """Turn ``["layer=1"]`` into axes by layer, each named once."""
    axes: dict[str, int] = {}
    for text in given or ():
        match = re.fullmatch(r"(.+)=(-?\d+)", text)
        if match is None or match[1] in axes:
            raise InputError(f"--axis: expected LAYER=N such as layer1=1, once each, got {text!r}")
        axes[match[1]] = int(match[2])
    return axes


def parse_numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Turn ``"0.5,0.25"`` into finite numbers; None stays None."""
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise InputError(f"{option}: expected numbers with commas between, got {text!r}")
    return numbers


def parse_integers(option: str, text: str, least: int) -> list[int]:
    """Turn ``"3,224,224"`` into whole numbers that are not below `least`."""
    numbers = parse_numbers(option, text) or ()
    if any(number < least or number != int(number) for number in numbers):
        expected = f"whole numbers from {least} with commas between"
        raise InputError(f"{option}: expected {expected}, got {text!r}")
    return [int(number) for number in numbers]


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Turn ``"256,224"`` or ``"224"`` into the shorter side and the crop; None stays None."""
    if text is None:
        return None
    numbers = parse_integers("--size", text, least=1)
    if len(numbers) > 2 or numbers[-1] > numbers[0]:
        raise InputError(f"--size: expected N, or N,CROP with CROP up to N, got {text!r}")
    return numbers[0], numbers[-1]


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """Turn ``"2/8"`` into two whole numbers, the first from 1 to the second; None stays None."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--shard: expected i/n with i from 1 to n, such as 2/8, got {text!r}")
    return int(match[1]), int(match[2])


def check_files(**paths: Path | None) -> None:
    """Fail before the work if a file that an option names cannot be written; None is no file."""
    for option, path in paths.items():
        if path is not None:
            check_file(path, f"--{option}")


def check_suffix(path: Path, suffixes: Sequence[str], option: str = "--output") -> None:
    """Refuse a file whose name does not tell one of the known formats."""
    if path.suffix not in suffixes:
        expected = f"a name ending in {', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise InputError(f"{option}: expected {expected}, got {str(path)!r}")


def error_line(error: BaseException) -> tuple[str | None, int]:
    """Tell what to print for an exception, one line, and which of :data:`EXIT_CODES` to end with.

    The line is empty for nothing at all, and None for an exception nobody foresaw, which deserves
    its traceback.
    """
    if hasattr(error, "format_message"):  # usage errors of the argument parser
        # The message is empty where the help itself was the answer.
        return " ".join(error.format_message().split()), getattr(error, "exit_code", BAD_INPUT)
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return "interrupted", INTERRUPTED
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone: `| head`
        return "", 1
    if _out_of_memory(error):
        text = " ".join(str(error).split())[:200]
        return f"not enough memory{f' ({text})' if text else ''}", NO_ROOM
    # By name and number: importing what raises them would cost every command its time.
    if type(error).__name__ == "AuditError":
        return str(error), AUDIT
    if isinstance(error, ValueError | TypeError | OSError | ImportError):
        code = BAD_INPUT
        if type(error).__name__ == "StoreMismatch":
            code = OTHER_RUN
        elif isinstance(error, OSError) and error.errno in _FULL:
            code = NO_ROOM
        ours = isinstance(error, OSError) and error.strerror and error.filename is None
        text = str(error.strerror if ours else error)  # type: ignore[union-attr]
        return " ".join(text.split()) or type(error).__name__, code
    return None, 1


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if "torch" not in sys.modules or not isinstance(error, RuntimeError):
        return False  # nothing else raises it, and importing torch takes seconds
    from pyablate.runtime.out_of_memory import is_shortage

    return is_shortage(error)


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
            message = visible(self.format(record), keep="\n")  # a traceback has lines
            sys.stderr.write(f"pyablate: {message}\n")
        except (OSError, ValueError):
            self.handleError(record)
