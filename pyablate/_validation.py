"""Validation of arguments: choices, counts, seeds, fractions, names; errors name the nearest."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from numbers import Integral
from typing import Any

_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BYTES |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_LEAST = 2**20  # with less no network runs: a number without a unit is not meant as bytes


def check_choice(argument: str, given: Any, known: Sequence[str] | Mapping[str, Any]) -> None:
    """Refuse what is not one of the known names; the error tells the nearest."""
    if given not in known:
        near = _alike(given, known, 1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ValueError(f"{argument}: expected one of {', '.join(known)}, got {given!r}{hint}")


def check_choices(argument: str, given: str | Sequence[str], known: Sequence[str]) -> list[str]:
    """Return one name or several as a list, each of them one of the known names."""
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        check_choice(argument, name, known)
    return names


def check_exact(given: Any, why: str) -> None:
    """Refuse another guarantee than "exact" where there is none, and say why."""
    if given != "exact":
        raise ValueError(f"guarantee: expected 'exact', since {why}; got {given!r}")


def check_count(argument: str, given: Any, least: int = 1) -> None:
    """Refuse what is no whole number, or one that is too small."""
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise ValueError(f"{argument}: expected an integer of at least {least}, got {given!r}")
    if given < least:
        raise ValueError(f"{argument}: expected at least {least}, got {given!r}")


def check_bytes(argument: str, given: Any) -> int | None:
    """Return a number of bytes, given as such or as "4GB" or "512MiB"; None stays None."""
    if given is None:
        return None
    if not isinstance(given, str):
        check_count(argument, given)
        return int(given)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", given.upper())
    if not match or match[2] not in _BYTES or float(match[1]) == 0:
        raise ValueError(f"{argument}: expected a size such as 4GB or 512MiB, got {given!r}")
    found = int(float(match[1]) * _BYTES[match[2]])
    if found < _LEAST and given.strip().replace(".", "").isdecimal():
        raise ValueError(
            f"{argument}: expected a size such as 4GB or 512MiB, got {given!r}, which is bytes; "
            f"did you mean {given.strip()}GB?"
        )
    return found


def check_seed(given: Any) -> None:
    """Refuse what no random generator takes as a seed."""
    check_count("seed", given, 0)


def check_level(argument: str, given: Any) -> None:
    """Refuse a probability or quantile that is not between 0 and 1, or one of them."""
    if not 0 < given < 1:
        raise ValueError(f"{argument}: expected a number between 0 and 1, got {given!r}")


def check_fraction(argument: str, given: Any) -> None:
    """Refuse a share of a whole that is not 0, 1 or between them."""
    if not 0 <= given <= 1:
        raise ValueError(f"{argument}: expected a number from 0 to 1, got {given!r}")


def check_names(
    argument: str, given: Sequence[str] | Mapping[Any, str] | None, count: int
) -> tuple[str, ...]:
    """Return as many names as there are things to name: by default their numbers.

    A mapping of numbers to names, such as ``id2label`` of Hugging Face, is put in order.
    """
    if given is None:
        return tuple(map(str, range(count)))
    if isinstance(given, Mapping):
        given = by_number(argument, given)
    if isinstance(given, str):
        raise TypeError(f"{argument}: expected a sequence of strings, got {given!r}")
    if len(given) != count:
        raise ValueError(f"{argument}: expected {count} names, got {len(given)}")
    return tuple(map(str, given))


def by_number(argument: str, given: Mapping[Any, Any]) -> list[Any]:
    """Return the values of a mapping with the keys 0, 1, ..., numbers or text, in their order."""
    try:
        found = {int(number): value for number, value in given.items()}
    except (TypeError, ValueError):
        key = next((key for key in given if not str(key).strip().isdecimal()), None)
        raise ValueError(f"{argument}: expected numbers from 0 as keys, got {key!r}") from None
    gap = next((number for number in range(len(given)) if number not in found), None)
    if gap is not None:
        raise ValueError(
            f"{argument}: expected the numbers 0 to {len(given) - 1}, {gap} is not among them"
        )
    return [found[number] for number in range(len(given))]


def nearest(given: object, known: Iterable[object], count: int = 3) -> str:
    """End of a message about an unknown name: those most like it, or the first that are known."""
    names = [str(name) for name in islice(known, 10_000)]  # of a million labels, some will do
    near = _alike(given, names, count) or names[:5]
    return f"; nearest: {', '.join(near)}" if near else ""


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type: those of torch may run to a page."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def optional(module: str, missing: str) -> Any:
    """Import a library that may not be there, or broken: whatever that raises.

    Raises
    ------
    ImportError
        It cannot be imported; ``missing`` tells what needs it and how to get it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(missing) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ImportError(f"{missing} (importing {module} fails: {reason})") from error


def _alike(given: object, known: Iterable[str], count: int) -> list[str]:
    return difflib.get_close_matches(str(given), list(known), n=count, cutoff=0.3)
