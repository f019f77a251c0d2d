"""The shell's ``doctor``."""

from __future__ import annotations

import json
import logging
from typing import Annotated

import typer

from pyablate.cli.common import NOT_WELL, log_to_stderr
from pyablate.cli.options import Debug

_TITLES = {"precisions": "precisions (billions of operations per second)"}


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Facts and findings as one JSON object.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Say what is installed and built, test it, and say what to do about what is wrong.

    Ends with 5 if something does not work, with 0 if at most something could be added.

    Try `pyablate doctor`, `pyablate doctor --json > doctor.json`
    """
    log_to_stderr(debug)
    if not debug:  # how the run of the self-test was done is of no interest
        logging.getLogger("pyablate").setLevel(logging.WARNING)
    from pyablate.cli import diagnose as examination
    from pyablate.cli.tables import summary

    known = examination.facts()
    found = examination.findings(known)
    report = examination.as_json(known, found)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        out = summary.console()
        for section, values in known.items():
            if values:
                out.print(_TITLES.get(section, section), style="bold")
                out.print(summary.facts_table(values))
        for finding in found:
            out.print(str(finding))
        out.print("Something does not work." if not report["ok"] else "Everything works.")
    raise typer.Exit(0 if report["ok"] else NOT_WELL)
