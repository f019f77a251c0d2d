"""The shell: ``pyablate demo | run | attributes | significance | correlate | ...``.

The commands of a subject are in a file of its name. Torch is imported inside the commands, so
that ``pyablate --help`` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pyablate._validation import check_bytes
from pyablate.cli.attributes import attributes
from pyablate.cli.common import (
    INTERRUPTED,
    InputError,
    check_files,
    error_line,
    parse_axes,
    words,
)
from pyablate.cli.compression import compare, sensitivity
from pyablate.cli.doctor import doctor
from pyablate.cli.experiments import cumulative, minimal_sets, pairs, rotation, shapley
from pyablate.cli.options import (
    Axes,
    Bar,
    Guarantee,
    Intervention,
    Layers,
    Memory,
    Network,
    Risk,
    Sample,
    with_options,
)
from pyablate.cli.plot import plot
from pyablate.cli.pruning import finetune, prune
from pyablate.cli.report import report
from pyablate.cli.run import merge, run
from pyablate.cli.show import show_run
from pyablate.cli.statistics import correlate, significance
from pyablate.cli.summary import hook_loop_lines, screened_lines, sites_table, summary
from pyablate.cli.tables import show
from pyablate.io.atomic import write_csv
from pyablate.io.sanitize import visible


class _Shell(TyperGroup):
    """Turns every foreseeable failure into one line on standard error and an exit code."""

    def main(self, *args: Any, **options: Any) -> Any:
        given = options.get("args") or (args[0] if args else None) or sys.argv[1:]
        words.set(list(given))
        options["standalone_mode"] = False
        line: str | None
        code: Any
        try:
            helped = self._help(list(given))
            if helped is not None:
                typer.echo(helped)
            code = super().main(*args, **options) if helped is None else 0
            # Newer versions of typer turn Ctrl-C into this code themselves.
            line = "interrupted" if code == INTERRUPTED else ""
        except BaseException as error:
            line, code = error_line(error)
            if line is None or "--debug" in given:
                raise
        if line:
            typer.echo(f"pyablate: {visible(line)}", err=True)
        if line and "--json" in given and _speaks():
            typer.echo(json.dumps({"event": "error", "message": line, "exit_code": code}))
        sys.exit(code if isinstance(code, int) else 0)

    def _help(self, given: list[str]) -> str | None:
        """Return the help asked for, if any, before typer imports all that parses words."""
        if not given or not {"-h", "--help"} & set(given):
            return None
        context = self.context_class(self, info_name="pyablate", **self.context_settings)
        command = self.commands.get(given[0])
        if command is not None:
            return command.get_help(
                command.context_class(command, info_name=given[0], parent=context)
            )
        return self.get_help(context) if given[0] in ("-h", "--help") else None


def _speaks() -> bool:
    """Whether this process writes for all: the lines of the others would be a second last one."""
    if "RANK" not in os.environ:
        return True
    from pyablate.runtime.distributed import is_first  # brings torch

    return is_first()


app = typer.Typer(
    cls=_Shell,
    name="pyablate",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # in 80 columns its tables leave seventeen for the text
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from pyablate._version import __version__

        typer.echo(f"pyablate {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Switch off every unit of a trained classifier, one at a time, and see which classes suffer.

    Start with `pyablate demo`. Then your own network:

    `pyablate layers my_module:make_model --input-shape 3,224,224`

    `pyablate run my_module:make_model --weights model.safetensors --data photos/ --size 224`
    """


def demo(
    name: Annotated[
        str,
        typer.Argument(
            help="alexnet, alexnet_dropout, alexnet_bn, vgg_bn, resnet, vit or convnext."
        ),
    ] = "vgg_bn",
    limit: Annotated[int, typer.Option(min=1, help="How many of the 10,000 images.")] = 2000,
    output: Annotated[Path, typer.Option(help="Folder for run.zarr and units.csv.")] = Path("demo"),
    guarantee: Guarantee = "exact",
    progress: Bar = None,
) -> None:
    """Ablate every unit of a shipped network over the shipped test images.

    Takes minutes at most, then times the plain hook loop on a few units for comparison.

    With `--guarantee screened` it does so once more, screened, and compares the two.

    Try `pyablate demo`, `pyablate demo resnet --limit 500 --output resnet_demo`

    `pyablate demo alexnet --guarantee screened`
    """
    import pyablate as pa
    from pyablate._validation import check_choice
    from pyablate.reference.timing import hook_loop_seconds
    from pyablate.results.store import check_writable

    model, images, labels = pa.demo.load(name, limit=limit)
    check_writable(output / "run.zarr")
    check_files(output=output / "units.csv")
    check_choice("guarantee", guarantee, ("exact", "screened"))
    sites = pa.select(pa.sites(model, images[:1]), "*")
    result = pa.ablate(
        model, (images, labels), layers=["*"], class_names=pa.demo.CLASSES, progress=progress
    )
    result.save(output / "run.zarr")
    write_csv(result.to_dataframe(), output / "units.csv", "--output")
    show(*summary(result))
    timing = hook_loop_seconds(model, (images, labels), sites, result=result)
    lines = hook_loop_lines(result, timing)
    if guarantee != "exact":
        screened = pa.ablate(
            model, (images, labels), ["*"], guarantee=guarantee, audit=0, progress=progress
        )
        lines += screened_lines(result, screened)
    show(*lines, written=[output / "run.zarr", output / "units.csv"])


def layers(*, network: Network, sample: Sample, axis: Axes = None) -> None:
    """List the layers that hold units: their names, how many units, and whether `*` has them.

    Try `pyablate layers demo:resnet`, `pyablate layers net:make --input-shape 3,224,224`

    `pyablate layers net:make --data photos/ --size 224`
    """
    import pyablate as pa
    from pyablate.network.sites import surveyed

    model = network.load()
    seen = surveyed(model, sample.load(network, model), parse_axes(axis))
    try:
        selected = pa.select(seen.sites, "*")
    except ValueError:  # a network without nonlinearities: all its layers go by name
        selected = []
    show(sites_table(seen.sites, selected))
    for remark in seen.remarks(selected, everything=True):
        typer.echo(visible(remark))


_IMAGES = 1000
"""Images of a plan where nothing says how many there will be."""

_FEW = 16
"""Images that are read at a time of a plan's data: it looks at the first ones only."""


def plan(
    *,
    network: Network,
    sample: Sample,
    images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Number of images of the run: by default all of the data, {_IMAGES:,} where only "
            "their shape is given.",
            show_default=False,
        ),
    ] = None,
    layers: Layers = ["*"],  # noqa: B006  # typer copies it
    intervention: Intervention = "zero",
    axis: Axes = None,
    memory: Memory = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Compute some thousand pairs of each layer, to see how many a screened run of the "
            "data would leave open.",
        ),
    ] = False,
    risk: Risk = 1e-5,
) -> None:
    """Say how a run would be done and what it would cost, without running it.

    Try `pyablate plan demo:vgg_bn --images 10000 --memory 2GB`

    `pyablate plan my_module:make_model --data photos/ --size 224 --images 10000`

    `pyablate plan demo:vit --data demo --layers blocks.2 --measure`
    """
    import pyablate as pa

    budget = check_bytes("--memory", memory)
    model = network.load()
    if measure and sample.data is None and not network.model.startswith("demo:"):
        raise InputError("--measure needs --data, got none")
    data: Any = None if measure else sample.noise(_FEW)
    if data is not None:
        images = images or _IMAGES
    else:
        data = sample.images(network, model, batch_size=_FEW).batches
    made = pa.plan(
        model,
        data,
        layers,
        images=images,
        intervention=intervention,
        axis=parse_axes(axis),
        memory=budget,
        measure=measure,
        risk=risk,
    )
    typer.echo(visible(made.explain(), keep="\n"))


def _first_words(command: Callable[..., None]) -> str:
    """Return the first line of a command's help, which the list of all would cut off."""
    return (command.__doc__ or "").partition("\n")[0]


for _command in (
    demo,
    layers,
    plan,
    run,
    merge,
    attributes,
    significance,
    correlate,
    prune,
    finetune,
    sensitivity,
    compare,
    cumulative,
    pairs,
    minimal_sets,
    shapley,
    rotation,
    plot,
    report,
    doctor,
):
    app.command(short_help=_first_words(_command))(with_options(_command))
app.command("show", short_help=_first_words(show_run))(with_options(show_run))


def main() -> None:
    """Entry point of the ``pyablate`` command."""
    app(prog_name="pyablate")
