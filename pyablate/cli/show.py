"""The shell's ``show``: what is in the folder of a run, finished or not."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyablate.cli.summary import summary
from pyablate.cli.tables import facts_table, show

if TYPE_CHECKING:
    from pyablate.runs.run_folder import Unfinished


def show_run(
    *,
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="The folder of `pyablate run`, finished or not.", show_default=False
        ),
    ],
) -> None:
    """Show a run: what came out, how it was made, or how far it is and how to go on.

    Try `pyablate show run.zarr`
    """
    import pyablate as pa
    from pyablate.io.own_files import read_command
    from pyablate.report.numbers import flat
    from pyablate.runs.run_folder import unfinished

    words = read_command(run)
    command = None if words is None else shlex.join(["pyablate", *words])
    begun = unfinished(run)
    if begun is not None:
        show(_how_far(run, begun), facts_table(flat(begun.identity)))
        show(_goes_on(begun, command))
        return
    result = pa.load(run)
    show(*summary(result), facts_table(flat(result.provenance)))
    show(f"Made by: {command or 'a call in Python, merge, or an older version'}")


def _how_far(run: Path, begun: Unfinished) -> str:
    further = f"; {begun.jobs} layers of the next block" if begun.jobs else ""
    return (
        f"{run} has not finished: {begun.done:,} of {begun.images:,} images "
        f"({begun.done / begun.images:.0%}) are done{further}"
    )


def _goes_on(begun: Unfinished, command: str | None) -> str:
    if begun.at_work:
        return "A process is at work on it"
    return f"Goes on with: {command or 'the call of pa.ablate that began it'}"
