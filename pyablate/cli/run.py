"""Shell commands of a run: ``run`` and ``merge``."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyablate._validation import check_bytes
from pyablate.cli.common import (
    EXIT_CODES,
    InputError,
    check_files,
    parse_axes,
    parse_shard,
    words,
)
from pyablate.cli.options import (
    AsJson,
    Audit,
    Axes,
    Bar,
    BatchSize,
    Budget,
    Csv,
    Device,
    Fresh,
    Guarantee,
    Images,
    Intervention,
    Layers,
    Measures,
    Memory,
    Network,
    OnMismatch,
    Output,
    Precision,
    Preprocessing,
    Risk,
    Seed,
    Shard,
)
from pyablate.cli.summary import summary
from pyablate.cli.tables import show
from pyablate.io.atomic import write_csv

if TYPE_CHECKING:
    from pyablate.result import AblationResult


def run(
    *,
    network: Network,
    images: Images,
    layers: Layers = ["*"],  # noqa: B006  # typer copies it
    intervention: Intervention = "zero",
    axis: Axes = None,
    precision: Precision = "auto",
    measures: Measures = None,
    guarantee: Guarantee = "exact",
    risk: Risk = 1e-5,
    budget: Budget = None,
    audit: Audit = None,
    on_mismatch: OnMismatch = "error",
    seed: Seed = 0,
    device: Device = None,
    batch_size: BatchSize = None,
    memory: Memory = None,
    output: Output = Path("run.zarr"),
    fresh: Fresh = False,
    shard: Shard = None,
    csv: Csv = None,
    pixels: Preprocessing,
    progress: Bar = None,
    as_json: AsJson = False,
) -> None:
    """Ablate every unit of the layers asked for and write the result.

    Killed or interrupted, the same command goes on where it stopped and ends with the same bytes.
    It refuses an output that holds a run with another model, data or options.

    Try one of these:

    `pyablate run demo:vgg_bn --data demo --limit 2000 --output run.zarr`

    `pyablate run demo:resnet --data demo --layers 'stage3.*' --intervention mean --csv units.csv`

    `pyablate run torchvision:resnet18 --weights resnet18.pth --data val/ --size 224
    --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --device cuda`

    Several processes, on one machine or many that share a disk:

    `torchrun --nproc-per-node=4 -m pyablate run demo:resnet --data demo -o run.zarr`

    Machines that share nothing:

    `pyablate run demo:resnet --data demo --shard 1/2 -o part1.zarr`

    `pyablate merge part1.zarr part2.zarr -o run.zarr`
    """
    import pyablate as pa
    from pyablate.runs import run_folder
    from pyablate.runtime.distributed import is_first, own_device, started_by_torchrun
    from pyablate.runtime.progress import JsonLines

    room, part = check_bytes("--memory", memory), parse_shard(shard)
    run_folder.check_place(output, fresh=fresh)
    check_files(csv=csv)
    distributed = started_by_torchrun()
    place = own_device(distributed, device)
    device = None if place is None else str(place)
    model = network.load(device)
    data = images.load(pixels, network.pixels(model), batch_size)
    lines = JsonLines()
    with run_folder.begun_by(words.get()):
        result = pa.ablate(
            model,
            data.batches,
            layers=layers,
            intervention=intervention,
            axis=parse_axes(axis),
            precision=precision,
            measures=measures or (),
            guarantee=guarantee,
            risk=risk,
            budget=budget,
            class_names=data.class_names,
            device=device,
            batch_size=batch_size,
            memory=room,
            audit=audit,
            on_mismatch=on_mismatch,
            seed=seed,
            progress=lines if as_json and progress is not False else progress,
            output=output,
            fresh=fresh,
            shard=part,
            distributed=distributed,
        )
    if not is_first():
        return
    if csv is not None:
        _write_units(result, csv, output)
    written = [output, csv]
    if as_json:
        paths = [str(path) for path in written if path is not None]
        lines.event("result", **_record(result), written=paths)
    else:
        show(*summary(result), written=written)


run.__doc__ = f"{inspect.cleandoc(run.__doc__ or '')}\n\n{EXIT_CODES}"


def merge(
    *,
    parts: Annotated[
        list[Path],
        typer.Argument(
            metavar="PART...",
            help="Results of `pyablate run --shard`, all of them, in any order.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="Where the result goes (Zarr).")
    ] = Path("run.zarr"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Replace the result that is at the output already.")
    ] = False,
    csv: Csv = None,
) -> None:
    """Join the results of all shards into that of one run.

    Refuses shards that are missing, that overlap, or that differ in model, data or options; and
    an output that exists, unless --fresh is given and it is none of the parts.

    Try `pyablate merge part1.zarr part2.zarr -o run.zarr`
    """
    import pyablate as pa
    from pyablate.results.store import check_writable

    if any(os.path.realpath(part) == os.path.realpath(output) for part in parts):
        raise InputError(f"--output: expected none of the parts, got {str(output)!r}")
    if output.exists() and not fresh:
        raise InputError(f"--output: {output} exists; --fresh replaces a result")
    check_writable(output)
    check_files(csv=csv)
    result = pa.merge(parts, output)
    if csv is not None:
        _write_units(result, csv, output)
    show(*summary(result), written=[output, csv])


def _write_units(result: AblationResult, csv: Path, output: Path) -> None:
    """Write one row per unit; what took hours is safe if that fails, and the message says where."""
    try:
        write_csv(result.to_dataframe(), csv)
    except OSError as error:
        reason = f"{error.strerror or error}; the result is in {output}"
        raise OSError(error.errno, reason) from error


def _record(result: AblationResult) -> dict[str, object]:
    return {
        "units": len(result.units),
        "images": len(result.labels),
        "classes": result.classes,
        "flips": float(result.flip_count.sum()) if result.estimate else len(result.flips.image),
        "baseline_accuracy": result.baseline_accuracy,
        "labelled": result.labelled,
        "audit": {
            "pairs": result.audit.pairs,
            "mismatches": result.audit.mismatches,
            "mended": result.audit.mended,
            "upper_bound": result.audit.upper_bound,
        },
        "guarantee": result.guarantee,
        **_screened(result),
        **_estimated(result),
        "strategy": result.strategy,
        "seconds": round(result.seconds, 3),
    }


def _screened(result: AblationResult) -> dict[str, object]:
    found = result.screening
    if found is None:
        return {}
    names = ("pairs", "settled", "computed", "sampled", "wrong", "missed_bound", "upper_bound")
    return {"screening": {name: getattr(found, name) for name in names}}


def _estimated(result: AblationResult) -> dict[str, object]:
    found = result.estimate
    if found is None:
        return {}
    counts = {"pairs": int(found.live.sum()), "drawn": int(found.drawn.sum())}
    return {"estimate": {"budget": found.budget, "expected": found.expected, **counts}}
