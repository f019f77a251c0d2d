"""The options that commands of the shell share, alone and in groups.

A command takes a group as one parameter. :func:`with_options` shows typer the options in it.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyablate.cli.common import (
    InputError,
    log_to_stderr,
    parse_integers,
    parse_numbers,
    parse_size,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pyablate.cli.data_specs import Data, Pixels

_MODEL_HELP = (
    "demo:NAME (a shipped network), module:factory, a .pt2 file from torch.export, "
    "torchvision:NAME or timm:NAME (where installed)."
)
_DATA_HELP = (
    "demo (the shipped images), a folder with one sub-folder per class, an .npz file with images "
    "and labels, an idx file (-idx3-ubyte, .gz or not), or a .tar file or folder of these with "
    "images and .cls files (WebDataset)."
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]
Weights = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Weights: .safetensors, or a checkpoint of tensors."),
]
Logits = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Which output of the model the logits are, where it returns several: a key or a "
        "place, counted from 0. `binary` makes two classes of a single logit.",
    ),
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
        help="In what pairs are computed first: auto, int8 (8-bit integers), bf16, fp16 (GPUs), "
        "fp32 or fp64; doubtful ones again more exactly, so the predictions are the same.",
    ),
]
Guarantee = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="exact: every prediction is computed. screened: predictions that gradients say cannot "
        "change are not computed, but for a random sample that bounds how many of them are wrong. "
        "estimated (run only): a random sample is computed, figures are estimates with intervals.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Of an estimated run: how much to compute, as a share of the pairs (2%), a number of "
        "them (500000) or a time (90s, 10min, 2h).",
    ),
]
Risk = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        help="Of a screened run: share of wrong predictions to aim at.",
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
Audit = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Random pairs to recompute by plain forward passes, as a check; by default as many as "
        "take about 5 % of the time, from 30 to 300.",
        show_default=False,
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
    str | None,
    typer.Option(
        metavar="N[,CROP]",
        help="Resize the shorter side to this, then crop the centre square of the same size, or of "
        "another, as in 256,224. Models of timm and torchvision bring size, interpolation, mean "
        "and std.",
    ),
]
Interpolation = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="How --size scales: bilinear (if left out), bicubic, ..."),
]
Mean = Annotated[
    str | None,
    typer.Option(
        metavar="M,M,M", help="Subtracted from each channel, after /255; one figure for all."
    ),
]
Std = Annotated[
    str | None,
    typer.Option(metavar="S,S,S", help="What each channel is divided by; one figure for all."),
]
Channels = Annotated[
    int | None,
    typer.Option(
        min=1, max=3, help="1 (grey) or 3 (RGB), where images of a folder are not what they seem."
    ),
]
OnBadImage = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What happens to image files that cannot be decoded: error (if left out), or skip, "
        "which lists them first.",
    ),
]
Classes = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="The network's classes (JSON or a name a line; imagenet where timm or torchvision is "
        "installed): folders are looked up among them by WordNet id, name or number.",
    ),
]
Unlabelled = Annotated[
    bool,
    typer.Option(
        "--unlabelled",
        help="Images without labels: the intact network's predictions stand in (run, compare), and "
        "all images below a folder are taken.",
    ),
]
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
Seeds = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Fdr = Annotated[float, typer.Option(help="Share of wrong ones tolerated among those found.")]
Only = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Only these layers; may be given again.")
]


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network that a command works on."""

    model: Model
    weights: Weights = None
    logits: Logits = None

    def load(self, device: str | None = None) -> nn.Module:
        """Load it (see `pyablate.cli.model_specs.load_model`) as a network that gives logits."""
        from pyablate.cli.model_specs import load_model
        from pyablate.network.classifier import classifier

        network = load_model(self.model, weights=self.weights, device=device)
        if self.logits is None:
            return network
        number = re.fullmatch(r"-?\d{1,9}", self.logits)
        return classifier(network, logits=int(self.logits) if number else self.logits)

    def pixels(self, model: nn.Module) -> Pixels | None:
        """Tell how the loaded network wants its images (see `own_pixels` there)."""
        from pyablate.cli.model_specs import own_pixels

        return own_pixels(self.model, model)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How images and their classes are read."""

    size: Size = None
    interpolation: Interpolation = None
    mean: Mean = None
    std: Std = None
    channels: Channels = None
    on_bad_image: OnBadImage = None
    classes: Classes = None
    unlabelled: Unlabelled = False


@dataclass(frozen=True, kw_only=True)
class Images:
    """The labelled images that a command works on."""

    data: DataSpec
    labels: Labels = None
    limit: Limit = None

    def load(
        self, pixels: Preprocessing, own: Pixels | None, batch_size: int | None = None
    ) -> Data:
        """Load them (see `pyablate.cli.data_specs.load_data`)."""
        from pyablate.cli.data_specs import load_data

        options: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
        return load_data(
            self.data,
            labels=self.labels,
            limit=self.limit,
            size=parse_size(pixels.size),
            interpolation=pixels.interpolation,
            mean=parse_numbers("--mean", pixels.mean),
            std=parse_numbers("--std", pixels.std),
            channels=pixels.channels,
            on_bad=pixels.on_bad_image,
            classes=pixels.classes,
            own=own,
            unlabelled=pixels.unlabelled,
            **options,
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Where a command gets the few inputs that it runs the network on."""

    data: SampleSpec = None
    labels: Labels = None
    pixels: Preprocessing
    input_shape: InputShape = None

    def load(self, network: Network, model: nn.Module) -> Tensor:
        """Take one input from the data, of the shape given, or from the shipped images."""
        sample = self.noise(1)
        if sample is None:
            sample = self.images(network, model, batch_size=2).first(1)  # one size
        parameter = next(iter(model.parameters()), None)
        return sample if parameter is None else sample.to(parameter.device)

    def noise(self, count: int) -> Tensor | None:
        """Draw inputs of the shape given, if one is: a constant could hide what is alive."""
        import torch

        if self.data is None:
            check_needed("--data", {"--labels": self.labels, **by_option(self.pixels)})
        if self.input_shape is None:
            return None
        sizes = parse_integers("--input-shape", self.input_shape, least=1)
        return torch.rand(count, *sizes, generator=torch.Generator().manual_seed(0))

    def images(self, network: Network, model: nn.Module, *, batch_size: int) -> Data:
        """Load the data, or the shipped images."""
        if self.data is None and not network.model.startswith("demo:"):
            raise InputError(
                "give --input-shape C,H,W or --data, so that the network can be run once"
            )
        images = Images(data=self.data or "demo", labels=self.labels)
        return images.load(self.pixels, network.pixels(model), batch_size)


def by_option(group: Any) -> dict[str, object]:
    """Name the values of a group of options as the command line does."""
    return {f"--{name.replace('_', '-')}": value for name, value in vars(group).items()}


def check_needed(option: str, others: Mapping[str, object]) -> None:
    """Refuse options that say something about another one, which was not given."""
    for other, value in others.items():
        if value is not None and value is not False:
            raise InputError(f"{other} needs {option}, got none")


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function: its groups become the options in them, ``--debug`` is added."""
    parameters = inspect.signature(function, eval_str=True).parameters
    debugging = Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=Debug)

    @functools.wraps(function)
    def command(*, debug: bool, **values: Any) -> None:
        log_to_stderr(debug)
        function(**_grouped(parameters, values))

    single = [*_ungrouped(parameters.values()), debugging]
    single.sort(key=lambda parameter: parameter.default is not Parameter.empty)  # required first
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in single]
    )
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in single}
    return command


def _is_group(annotation: Any) -> bool:
    return is_dataclass(annotation)


def _fields(group: Any) -> Mapping[str, Parameter]:
    return inspect.signature(group, eval_str=True).parameters


def _ungrouped(parameters: Iterable[Parameter]) -> Iterator[Parameter]:
    for parameter in parameters:
        if _is_group(parameter.annotation):
            yield from _ungrouped(_fields(parameter.annotation).values())
        else:
            yield parameter


def _grouped(parameters: Mapping[str, Parameter], values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: parameter.annotation(**_grouped(_fields(parameter.annotation), values))
        if _is_group(parameter.annotation)
        else values[name]
        for name, parameter in parameters.items()
    }
