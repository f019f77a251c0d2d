"""Checks of arguments that many functions share, and how their errors read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any


def check_choice(argument: str, given: Any, known: Sequence[str] | Mapping[str, Any]) -> None:
    """Refuse what is not one of the known names.

    Raises
    ------
    ValueError
        Names the argument, what was expected, what came, and the nearest.
    """
    if given not in known:
        near = difflib.get_close_matches(str(given), list(known), n=1) or list(known)
        raise ValueError(
            f"{argument}: expected one of {', '.join(known)}, got {given!r}; nearest: {near[0]}"
        )
