"""The shell's ``doctor``."""

from __future__ import annotations

import json
import logging
from typing import Annotated

import typer

from pyablate.cli.common import NOT_WELL
from pyablate.cli.tables import console, facts_table

_TITLES = {"precisions": "precisions (billions of operations per second)"}


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Facts and findings as one JSON object.")
    ] = False,
) -> None:
    """Say what is installed and built, test it, and say what to do about what is wrong.

    Measures this machine anew: plans and the choice of precisions rest on what was measured once
    and is kept in the user's cache (`PYABLATE_CACHE` names another folder, empty keeps nothing).

    Ends with 5 if something does not work, with 0 if at most something could be added.

    Try `pyablate doctor`, `pyablate doctor --json > doctor.json`
    """
    logger = logging.getLogger("pyablate")
    if not logger.isEnabledFor(logging.DEBUG):  # how the self-test was run is of no interest
        logger.setLevel(logging.WARNING)
    from pyablate.cli import diagnose

    known = diagnose.facts()
    found = diagnose.findings(known)
    report = diagnose.as_json(known, found)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        out = console()
        for section, values in known.items():
            if values:
                out.print(_TITLES.get(section, section), style="bold")
                out.print(facts_table(values))
        for finding in found:
            out.print(str(finding))
        out.print("Something does not work." if not report["ok"] else "Everything works.")
    raise typer.Exit(0 if report["ok"] else NOT_WELL)
