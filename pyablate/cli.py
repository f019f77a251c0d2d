"""The shell: ``pyablate demo | run | attributes | significance | correlate | ...``.

``prune``, ``sensitivity`` and ``compare`` are in ``cli_compression.py``, experiments in
``cli_experiments.py``.

Torch is imported inside the commands, so that ``pyablate --help`` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pyablate.cli_compression import compare, prune, sensitivity
from pyablate.cli_experiments import cumulative, minimal_sets, pairs, rotation
from pyablate.options import (
    Bar,
    BatchSize,
    Csv,
    DataSpec,
    Debug,
    Device,
    InputShape,
    Intervention,
    Labels,
    Layers,
    Limit,
    Mean,
    Measures,
    Memory,
    Model,
    Output,
    Precision,
    Run,
    SampleSpec,
    Seed,
    Size,
    Splits,
    Std,
    Weights,
)
from pyablate.shell import (
    INTERRUPTED,
    InputError,
    check_file,
    error_line,
    log_to_stderr,
    parse_bytes,
    parse_numbers,
)

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from pyablate.inputs import Data


class _Shell(TyperGroup):
    """Turns every foreseeable failure into one line on standard error and an exit code."""

    def main(self, *args: Any, **options: Any) -> Any:
        given = options.get("args") or (args[0] if args else None) or sys.argv[1:]
        options["standalone_mode"] = False
        line: str | None
        code: Any
        try:
            code = super().main(*args, **options)
            # Newer versions of typer turn Ctrl-C into this code themselves.
            line = "interrupted" if code == INTERRUPTED else ""
        except BaseException as error:
            line, code = error_line(error)
            if line is None or "--debug" in given:
                raise
        if line:
            typer.echo(f"pyablate: {line}", err=True)
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=_Shell,
    name="pyablate",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        typer.echo(f"pyablate {metadata.version('pyablate')}")
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


@app.command()
def demo(
    name: Annotated[
        str, typer.Argument(help="alexnet, alexnet_dropout, vgg_bn or resnet.")
    ] = "vgg_bn",
    limit: Annotated[int, typer.Option(min=1, help="How many of the 10,000 images.")] = 2000,
    output: Annotated[Path, typer.Option(help="Folder for run.zarr and units.csv.")] = Path("demo"),
    progress: Bar = None,
    debug: Debug = False,
) -> None:
    """Ablate every unit of a shipped network over the shipped test images.

    Takes minutes at most, then times the plain hook loop on a few units for comparison.

    Try `pyablate demo`, `pyablate demo resnet --limit 500 --output resnet_demo`
    """
    log_to_stderr(debug)
    import pyablate as pa
    from pyablate import table
    from pyablate.hook_loop import hook_loop_seconds
    from pyablate.store import check_writable

    model, images, labels = pa.demo.load(name, limit=limit)
    check_writable(output / "run.zarr")
    check_file(output / "units.csv")
    sites = pa.select(pa.sites(model, images[:1]), "*")
    result = pa.ablate(
        model,
        (images, labels),
        layers=["*"],
        class_names=pa.demo.CLASSES,
        progress=progress,
    )
    result.save(output / "run.zarr")
    result.to_dataframe().to_csv(output / "units.csv", index=False)
    out = table.console()
    table.print_summary(out, result)
    timing = hook_loop_seconds(model, (images, labels), sites, result=result)
    for line in table.hook_loop_lines(result, timing):
        out.print(line)
    out.print(f"Written: {output / 'run.zarr'} and {output / 'units.csv'}")


@app.command()
def run(
    model: Model,
    data: DataSpec,
    weights: Weights = None,
    labels: Labels = None,
    limit: Limit = None,
    layers: Layers = ["*"],  # noqa: B006  # typer copies it
    intervention: Intervention = "zero",
    precision: Precision = "auto",
    measures: Measures = None,
    seed: Seed = 0,
    device: Device = None,
    batch_size: BatchSize = None,
    memory: Memory = None,
    output: Output = Path("run.zarr"),
    csv: Csv = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    progress: Bar = None,
    debug: Debug = False,
) -> None:
    """Ablate every unit of the layers asked for and write the result.

    Try one of these:

    `pyablate run demo:vgg_bn --data demo --limit 2000 --output run.zarr`

    `pyablate run demo:resnet --data demo --layers 'stage3.*' --intervention mean --csv units.csv`

    `pyablate run torchvision:resnet18 --weights resnet18.pth --data val/ --size 224
    --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --device cuda`
    """
    log_to_stderr(debug)
    import pyablate as pa
    from pyablate import table
    from pyablate.store import check_writable

    budget = parse_bytes("--memory", memory)
    check_writable(output)
    if csv is not None:
        check_file(csv)
    network = _load_model(model, weights, device)
    batches = _load_data(data, labels, limit, size, mean, std, batch_size)
    result = pa.ablate(
        network,
        batches.batches,
        layers=layers,
        intervention=intervention,
        precision=precision,
        measures=measures or (),
        class_names=batches.class_names,
        device=device,
        batch_size=batch_size,
        memory=budget,
        seed=seed,
        progress=progress,
    )
    result.save(output)
    written = [str(output)]
    if csv is not None:
        result.to_dataframe().to_csv(csv, index=False)
        written.append(str(csv))
    out = table.console()
    table.print_summary(out, result)
    out.print(f"Written: {' and '.join(written)}")


@app.command()
def attributes(
    model: Model,
    data: DataSpec,
    weights: Weights = None,
    labels: Labels = None,
    limit: Limit = None,
    layers: Layers = ["*"],  # noqa: B006  # typer copies it
    which: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="Attributes or families of them; may be given again. `all` is all of them.",
        ),
    ] = ["all"],  # noqa: B006  # typer copies it
    device: Device = None,
    batch_size: BatchSize = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="A .csv file, one row per unit, or a .zarr folder."),
    ] = Path("attributes.csv"),
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    progress: Bar = None,
    debug: Debug = False,
) -> None:
    """Compute properties of every unit: norms, selectivity, information, gradients and others.

    The CSV file has one value per unit and attribute; the Zarr group has the values per class too.

    Try `pyablate attributes demo:vgg_bn --data demo --limit 2000 -o attributes.csv`
    """
    log_to_stderr(debug)
    if output.suffix not in (".csv", ".zarr"):
        raise InputError(f"--output: expected a name ending in .csv or .zarr, got {str(output)!r}")
    import pyablate as pa
    from pyablate import table
    from pyablate.store import check_writable
    from pyablate.unit_attributes.files import write_attributes

    check_file(output) if output.suffix == ".csv" else check_writable(output)

    network = _load_model(model, weights, device)
    batches = _load_data(data, labels, limit, size, mean, std, batch_size)
    found = pa.attributes(
        network,
        batches.batches,
        layers,
        which,
        class_names=batches.class_names,
        device=device,
        batch_size=batch_size,
        progress=progress,
    )
    write_attributes(found, output)
    table.console().print(
        f"Written: {output} ({found.sizes['unit']:,} units, {len(found.data_vars)} variables)"
    )


@app.command()
def layers(
    model: Model,
    weights: Weights = None,
    data: SampleSpec = None,
    input_shape: InputShape = None,
    debug: Debug = False,
) -> None:
    """List the layers that hold units: their names, how many units, and whether `*` has them.

    Try `pyablate layers demo:resnet`, `pyablate layers net:make --input-shape 3,224,224`
    """
    log_to_stderr(debug)
    import pyablate as pa
    from pyablate import table

    network = _load_model(model, weights, None)
    found = pa.sites(network, _sample(model, network, data, input_shape))
    try:
        selected = pa.select(found, "*")
    except ValueError:  # a network without activation modules: all its layers go by name
        selected = []
    table.console().print(table.sites_table(found, selected))


@app.command()
def plan(
    model: Model,
    weights: Weights = None,
    data: SampleSpec = None,
    input_shape: InputShape = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Number of images the run would have.")
    ] = None,
    layers: Layers = ["*"],  # noqa: B006  # typer copies it
    intervention: Intervention = "zero",
    memory: Memory = None,
    debug: Debug = False,
) -> None:
    """Say how a run would be done and what it would cost, without running it.

    Try `pyablate plan demo:vgg_bn --images 10000 --memory 2GB`
    """
    log_to_stderr(debug)
    import pyablate as pa

    budget = parse_bytes("--memory", memory)
    network = _load_model(model, weights, None)
    sample = _sample(model, network, data, input_shape)
    made = pa.plan(network, sample, layers, images=images, intervention=intervention, memory=budget)
    typer.echo(made.explain())


@app.command()
def significance(
    run: Run,
    fdr: Annotated[float, typer.Option(help="Share of wrong ones tolerated among those found.")] = (
        0.05
    ),
    splits: Splits = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the splits.")] = 0,
    csv: Csv = None,
    pairs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the pairs found, one per row, as CSV."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Tell which damage of a finished run is more than chance.

    Each class of each unit is tested (exact McNemar test, false discovery rate per layer). Beside
    the largest class drop of a unit stand the noise floor (what a harmless unit with the same
    changed images would show), the split half estimate (the class chosen on one half of the images,
    the drop measured on the other), and the chance p of a harmless unit to show as much, adjusted
    over the layer's units as q.

    Try `pyablate significance run.zarr`, `pyablate significance run.zarr --pairs pairs.csv`
    """
    log_to_stderr(debug)
    import numpy as np

    import pyablate as pa
    from pyablate import table
    from pyablate.statistics_table import significance_table

    for path in (csv, pairs):
        if path is not None:
            check_file(path)
    result = pa.load(run)
    tests = result.significance(fdr=fdr)
    units = result.max_class_test(splits=splits, seed=seed)
    if csv is not None:
        units.to_csv(csv, index=False)
    if pairs is not None:
        rows, classes = tests["significant"].to_numpy().nonzero()
        found = result.units.iloc[rows].assign(**{"class": np.array(result.class_names)[classes]})
        for name in ("lost", "gained", "drop", "p", "q"):
            found[name] = tests[name].to_numpy()[rows, classes]
        found.to_csv(pairs, index=False)
    out = table.console()
    out.print(
        f"Pairs of unit and class whose accuracy changes, at a false discovery rate of {fdr:g}:"
    )
    out.print(significance_table(result, tests, units))
    _say_written(out, csv, pairs)


@app.command()
def correlate(
    run: Run,
    attributes: Annotated[
        Path,
        typer.Argument(
            metavar="ATTRIBUTES",
            help="Table of attributes: a .csv file with unit labels in a column `unit` or `label`, "
            "or a .zarr group over the coordinate `unit`.",
            show_default=False,
        ),
    ],
    attribute: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this attribute; may be given again."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Only this target: accuracy_drop, split_half_drop, preferred_class_drop, gini, "
            "entropy, max_class_drop; may be given again.",
        ),
    ] = None,
    method: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="pearson, spearman or kendall; may be given again."),
    ] = ["spearman"],  # noqa: B006  # typer copies it
    layers: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only these layers; may be given again."),
    ] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Resamples of the bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all correlations as CSV.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Tell which attributes of units go with the damage that their ablation does, layer by layer.

    Try `pyablate correlate run.zarr attributes.csv`

    `pyablate correlate run.zarr attributes.csv --target split_half_drop --csv correlations.csv`
    """
    log_to_stderr(debug)
    import pyablate as pa
    from pyablate import table
    from pyablate.statistics_table import correlation_table
    from pyablate.unit_table import read_table

    if csv is not None:
        check_file(csv)
    found = pa.correlate(
        pa.load(run),
        read_table(attributes),
        attributes=attribute,
        targets=target,
        methods=method,
        layers=layers,
        resamples=resamples,
        seed=seed,
    )
    if csv is not None:
        found.to_csv(csv, index=False)
    out = table.console()
    out.print(correlation_table(found))
    _say_written(out, csv)


@app.command()
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


def _say_written(out: Console, *paths: Path | None) -> None:
    written = [str(path) for path in paths if path is not None]
    if written:
        out.print(f"Written: {' and '.join(written)}")


def _load_model(spec: str, weights: str | None, device: str | None) -> nn.Module:
    from pyablate.inputs import load_model

    return load_model(spec, weights=weights, device=device)


def _load_data(
    spec: str,
    labels: str | None = None,
    limit: int | None = None,
    size: int | None = None,
    mean: str | None = None,
    std: str | None = None,
    batch_size: int | None = None,
) -> Data:
    from pyablate.inputs import load_data

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


def _sample(spec: str, network: nn.Module, data: str | None, shape: str | None) -> Tensor:
    """One input for the network: from the data, of the shape given, or a shipped image."""
    import torch

    if shape is not None:
        sizes = [int(number) for number in parse_numbers("--input-shape", shape, whole=True) or ()]
        # Noise, not zeros: a constant input can hide which tensors are alive.
        sample = torch.rand(1, *sizes, generator=torch.Generator().manual_seed(0))
    elif data is not None or spec.startswith("demo:"):
        batches = _load_data(data or "demo", limit=2).batches
        sample = batches[0][:1] if isinstance(batches, tuple) else next(iter(batches))[0][:1]
    else:
        raise InputError("give --input-shape C,H,W or --data, so that the network can be run once")
    first = next(iter(network.parameters()), None)
    return sample if first is None else sample.to(first.device)


for _command in (prune, sensitivity, compare, cumulative, pairs, minimal_sets, rotation):
    app.command()(_command)


def main() -> None:
    """Entry point of the ``pyablate`` command."""
    app(prog_name="pyablate")
