"""The shell's ``doctor``."""

from __future__ import annotations

from pyablate.options import Debug
from pyablate.shell import log_to_stderr


def doctor(debug: Debug = False) -> None:
    """Say what is installed, what was built, and what is missing with the way to get it."""
    log_to_stderr(debug)
    from pyablate import table
    from pyablate.doctor import advice, facts

    out = table.console()
    known = facts()
    out.print(table.facts_table(known))
    for line in advice(known):
        out.print(line)
