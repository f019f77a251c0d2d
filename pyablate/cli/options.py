"""The options that commands of the shell share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MODEL_HELP = (
    "demo:NAME (a shipped network), module:factory, a .pt2 file from torch.export, "
    "torchvision:NAME or timm:NAME (where installed)."
)
_DATA_HELP = (
    "demo (the shipped images), a folder with one sub-folder per class, an .npz file with images "
    "and labels, or an idx file (-idx3-ubyte, .gz or not)."
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]
Weights = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Weights: .safetensors, or a checkpoint of tensors."),
]
DataSpec = Annotated[str, typer.Option("--data", metavar="DATA", help=_DATA_HELP)]
SampleSpec = Annotated[str | None, typer.Option("--data", metavar="DATA", help=_DATA_HELP)]
InputShape = Annotated[
    str | None,
    typer.Option(metavar="C,H,W", help="Shape of one input, where there are no data at hand."),
]
Labels = Annotated[
    str | None, typer.Option(metavar="FILE", help="Labels, where they lie apart from the images.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only this many images.")]
Layers = Annotated[
    list[str],
    typer.Option(
        metavar="GLOB",
        help="Dotted module names or globs; may be given again. `*` is every activation output "
        "and block output; `pyablate layers` lists them all.",
    ),
]
Axes = Annotated[
    list[str] | None,
    typer.Option(
        "--axis",
        metavar="LAYER=N",
        help="Axis of a layer's units, 0 being the batch, where it was found wrongly; may be given "
        "again.",
    ),
]
Intervention = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What stands in for a unit: zero, mean, class-mean, constant:V, resample, noise, "
        "direction (random orthogonal directions).",
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Arithmetic of the dense part: auto, int8, bf16, fp32 or fp64; the predictions are "
        "the same.",
    ),
]
Measures = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Also record how much each ablation changes the loss (cross-entropy) or the margin "
        "(largest logit minus the second), per class; may be given again.",
    ),
]
OnMismatch = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What happens if audited predictions differ whatever is tried: error, or warn and "
        "write the result all the same.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the audit and of random interventions.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the model's own if left out.")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Images per batch; changes time and memory only.")
]
Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory to stay under, for example 4GB.")
]
Size = Annotated[
    int | None,
    typer.Option(min=1, help="Resize the shorter side to this, then crop the centre square."),
]
Mean = Annotated[
    str | None, typer.Option(metavar="M,M,M", help="Subtracted from each channel, after /255.")
]
Std = Annotated[str | None, typer.Option(metavar="S,S,S", help="What each channel is divided by.")]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="PATH",
        help="Where the result goes (Zarr). Finished blocks of images are kept there: after a kill "
        "the same command goes on.",
    ),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over, whatever run is in the output already.")
]
Shard = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Only the I-th of N parts of the images, I from 1; `pyablate merge` joins the parts.",
    ),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="For machines: progress and result as JSON lines on standard out."),
]
Csv = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write one row per unit as CSV.")
]
Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="A result of `pyablate run`.", show_default=False)
]
Splits = Annotated[
    int, typer.Option(min=1, help="Random splits to average the split half estimate over.")
]
Bar = Annotated[
    bool | None,
    typer.Option(
        "--progress/--no-progress",
        help="Progress bar; by default only on a terminal, log lines elsewhere.",
        show_default=False,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")]
