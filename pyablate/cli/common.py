"""What the commands of the shell share: values, networks and images, error lines, messages."""

from __future__ import annotations

import errno
import logging
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyablate.io.sanitize import visible

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from pyablate.cli.specs import Data

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


def parse_axes(given: list[str] | None) -> dict[str, int]:
    """Turn ``["layer=1"]`` into axes by layer.

    Raises
    ------
    InputError
        Not a name and a number, or a layer twice.
    """
    axes: dict[str, int] = {}
    for text in given or ():
        match = re.fullmatch(r"(.+)=(-?\d+)", text)
        if match is None or match[1] in axes:
            raise InputError(f"--axis: expected LAYER=N such as layer1=1, once each, got {text!r}")
        axes[match[1]] = int(match[2])
    return axes


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


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """Turn ``"2/8"`` into numbers; None stays None.

    Raises
    ------
    InputError
        Not two whole numbers, or not the first of them from 1 to the second.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--shard: expected i/n with i from 1 to n, such as 2/8, got {text!r}")
    return int(match[1]), int(match[2])


def say_written(out: Console, *paths: Path | None) -> None:
    """Name the files written; None is one that was not asked for."""
    written = [str(path) for path in paths if path is not None]
    if written:
        out.print(f"Written: {' and '.join(written)}")


def network_from(spec: str, weights: str | None, device: str | None) -> nn.Module:
    """Load the network that a command line names (see `pyablate.cli.specs.load_model`)."""
    from pyablate.cli.specs import load_model

    return load_model(spec, weights=weights, device=device)


def images_from(
    spec: str,
    labels: str | None = None,
    limit: int | None = None,
    size: int | None = None,
    mean: str | None = None,
    std: str | None = None,
    batch_size: int | None = None,
) -> Data:
    """Load the images that a command line names (see `pyablate.cli.specs.load_data`)."""
    from pyablate.cli.specs import load_data

    options: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
    return load_data(
        spec,
        labels=labels,
        limit=limit,
        size=size,
        mean=parse_numbers("--mean", mean),
        std=parse_numbers("--std", std),
        **options,
    )


def sample_input(
    spec: str, network: nn.Module, data: str | None, shape: str | None, **options: str | int | None
) -> Tensor:
    """Make one input for the network: from the data, of the shape given, or a shipped image.

    Further options are those of :func:`images_from`; they belong to the data.
    """
    import torch

    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given and data is None:
        raise InputError(f"{given[0]}: expected only with --data, whose images it is about")
    if shape is not None:
        sizes = [int(number) for number in parse_numbers("--input-shape", shape, whole=True) or ()]
        # Noise, not zeros: a constant input can hide which tensors are alive.
        sample = torch.rand(1, *sizes, generator=torch.Generator().manual_seed(0))
    elif data is not None or spec.startswith("demo:"):
        batches = images_from(data or "demo", limit=2, **options).batches  # type: ignore[arg-type]
        sample = batches[0][:1] if isinstance(batches, tuple) else next(iter(batches))[0][:1]
    else:
        raise InputError("give --input-shape C,H,W or --data, so that the network can be run once")
    first = next(iter(network.parameters()), None)
    return sample if first is None else sample.to(first.device)


def error_line(error: BaseException) -> tuple[str | None, int]:
    """Tell what to print for an exception and which exit code to end with.

    Returns
    -------
    line : str or None
        One line; empty for nothing at all; None for an exception nobody foresaw, which deserves
        its traceback.
    code : int
        One of those in :data:`EXIT_CODES`.
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
