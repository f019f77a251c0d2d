"""The shell's ``prune`` and ``finetune``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyablate.cli.common import InputError, check_files, check_suffix
from pyablate.cli.compression import By, Column, Fraction, Scope, check_column, ranking_of
from pyablate.cli.options import (
    Bar,
    Device,
    Images,
    Network,
    Preprocessing,
    Seed,
    check_needed,
)
from pyablate.cli.tables import columns, count, figure, frame_table, points, show
from pyablate.io.atomic import write_csv

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from pyablate.compression import Removal

Save = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write the smaller network: .pt2 (a program with its weights), or .safetensors, with "
        "the code that makes it beside it (.py).",
    ),
]
_TIMED = 32  # images of a pass whose latency is measured
_STEP_NAMES = {"flops": "FLOPs left=flops", "latency": "time left=latency", "accuracy": "accuracy"}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a smaller network has to be like."""

    flops: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE", help="Remove down to so many FLOPs: -50% or 0.5 leave half of them."
        ),
    ] = None
    latency: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Likewise the time of a pass, measured here."),
    ] = None
    accuracy: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Remove no more than this accuracy on the images allows: 90% or 0.9; by itself, "
            "as much as it allows.",
        ),
    ] = None

    def shares(self) -> dict[str, float]:
        """Read those that are given."""
        given = {"flops": self.flops, "latency": self.latency, "accuracy": self.accuracy}
        return {name: _share(f"--{name}", text) for name, text in given.items() if text is not None}


def _share(option: str, text: str) -> float:
    """Read 0.5, 50% or, of what is taken away, -50%."""
    found = re.fullmatch(r"(-?)(\d+(?:\.\d*)?|\.\d+) *(%?)", text.strip())
    taken = bool(found and found[1])
    share = float(found[2]) / (100 if found[3] else 1) if found else -1.0
    if not 0 <= share <= 1 or (taken and option == "--accuracy"):
        raise InputError(f"{option}: expected a share such as 50% or 0.5, got {text!r}")
    return 1 - share if taken else share


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


_HISTORY_COLUMNS = (
    *columns(count, "Epoch=epoch"),
    *columns("{:.3g}".format, "learning rate=learning_rate"),
    *columns(figure, "loss", "cross entropy=cross_entropy", "penalty"),
)
_CURVE_COLUMNS = (
    *columns(str, "Ranking=ranking"),
    *columns(lambda share: f"{100 * share:.0f} %", "gone=fraction"),
    *columns(points, "accuracy", "worst class=worst_class_accuracy"),
    *columns(points, "mean class=mean_class_accuracy"),
    *columns("{:.3f}".format, "loss"),
    *columns("{:,.0f}".format, "parameters", "FLOPs=flops"),
)


def prune(
    *,
    network: Network,
    images: Images,
    by: By = ["l1"],  # noqa: B006  # typer copies it
    column: Column = None,
    scope: Scope = "layer",
    fraction: Fraction = None,
    seeds: Annotated[int, typer.Option(min=0, help="Random orders to compare with.")] = 3,
    seed: Seed = 0,
    device: Device = None,
    pixels: Preprocessing,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the curves as CSV.")
    ] = None,
    save: Save = None,
    target: Wanted,
    progress: Bar = None,
) -> None:
    """Remove units by one or several rankings: curves of what is lost, or one smaller network.

    Curves are drawn up unless a smaller network is asked for (`--save`, `--flops`, `--latency`,
    `--accuracy`), which needs one `--by`, and either one `--fraction` or a target. Nothing else is
    computed then, but with `--csv` the curve of that fraction, or what was tried for the target.

    Try `pyablate prune demo:vgg_bn --data demo --limit 1000 --by l1 --by bn_scale`

    `pyablate prune demo:vgg_bn --data demo --by run.zarr --column max_class_drop --csv curve.csv`

    `pyablate prune demo:vgg_bn --data demo --by l1 --fraction 0.3 --save smaller.pt2`

    `pyablate prune demo:vgg_bn --data demo --by l1 --flops -50% --accuracy 85% --save
    small.safetensors`
    """
    from pyablate.compression import remove
    from pyablate.compression._prune_curve import FRACTIONS, prune_curve

    wanted = target.shares()
    check_files(csv=csv, save=save)
    _check_saving(save, network)
    one = len(by) == 1 and bool(wanted) != (len(fraction or []) == 1) and not (wanted and fraction)
    if (save is not None or wanted) and not one:
        raise ValueError(
            f"{'--save' if save else 'targets'}: expected one --by, and one --fraction or a target "
            "(--flops, --latency, --accuracy), which say what to remove"
        )
    check_column(column, by)
    model = network.load(device)
    loaded = images.load(pixels, network.pixels(model))
    rankings = {what: ranking_of(what, model, loaded, column, scope, seed) for what in by}
    if save is not None or wanted:
        sample = loaded.first(_TIMED if "latency" in wanted else 2)
        data = loaded.batches if "accuracy" in wanted else None
        given: dict[str, Any] = dict(wanted) if wanted else {"fraction": (fraction or [0.0])[0]}
        removal = remove(model, rankings[by[0]], sample, data=data, **given)
        if save is not None:
            _save(removal, model, network.model, sample, save)
        if removal.steps is not None and csv is not None:
            write_csv(removal.steps, csv)
        if wanted or csv is None:
            show(*_removal_tables(removal), written=[csv, save, *_code_of(save)])
            return
    curves = prune_curve(
        model,
        loaded.batches,
        rankings,
        fractions=fraction or FRACTIONS,
        seeds=seeds,
        class_names=loaded.class_names,
        device=device,
        progress=progress,
    )
    if csv is not None:
        write_csv(curves, csv)
    # Random orders by their mean.
    means = curves.groupby(["ranking", "fraction"], sort=False).mean(numeric_only=True)
    written = [csv, save, *_code_of(save)]
    show(frame_table(means.reset_index(), _CURVE_COLUMNS, grouped=1), written=written)


def finetune(
    *,
    network: Network,
    images: Images,
    save: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Where the trained network goes: .safetensors (weights for the same MODEL), or "
            ".pt2 (weights and program).",
        ),
    ],
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")] = 3,
    learning_rate: Annotated[
        float, typer.Option(min=0, help="Of the first step; it falls along a cosine to 0.")
    ] = 0.01,
    momentum: Annotated[float, typer.Option(min=0, help="Of stochastic gradient descent.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(min=0, help="Likewise.")] = 5e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 128,
    original: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The network before compression: train so that attributions stay as its are.",
        ),
    ] = None,
    original_weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="Weights of the original network.")
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    pixels: Preprocessing,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one row per epoch as CSV.")
    ] = None,
    progress: Bar = None,
) -> None:
    """Train a smaller network for a few epochs, to regain what it has lost.

    Give it images to train on, others than those by which it is judged (`pyablate compare`).

    Try `pyablate finetune small:make_model --weights small.safetensors --data train/ --save
    tuned.safetensors`, where `pyablate prune --save small.safetensors` wrote `small.py` too.
    """
    import pyablate as pa
    from pyablate.compression import save_network
    from pyablate.io.weights import write_state

    check_files(save=save, csv=csv)
    check_suffix(save, (".safetensors", ".pt2"), "--save")
    if original is None:
        check_needed("--original", {"--original-weights": original_weights})
    model = network.load(device)
    teacher = None
    if original is not None:
        other = Network(model=original, weights=original_weights, logits=network.logits)
        teacher = other.load(device)
    loaded = images.load(pixels, network.pixels(model))
    tuned = pa.finetune(
        model,
        loaded.batches,
        original=teacher,
        preserve_attributions=teacher is not None,
        epochs=epochs,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        batch_size=batch_size,
        seed=seed,
        device=device,
        progress=progress,
    )
    if csv is not None:
        write_csv(tuned.history, csv)
    if save.suffix == ".pt2":
        save_network(tuned.model, loaded.first(2), save)
    else:
        write_state(tuned.model, save, "--save")
    show(frame_table(tuned.history, _HISTORY_COLUMNS), written=[csv, save])


def _removal_tables(removal: Removal) -> list[Table | str]:
    """Tabulate sizes before and after, and what was tried for a target."""
    import pandas as pd

    sizes = pd.DataFrame(
        [
            (name, getattr(removal.before, name), getattr(removal.after, name))
            for name in ("parameters", "flops")
        ],
        columns=["figure", "before", "after"],
    )
    sizes["figure"] = sizes["figure"].replace({"flops": "FLOPs of one image"})
    sizes["left"] = sizes["after"] / sizes["before"]
    shown = (
        *columns(str, "Size=figure"),
        *columns(count, "before", "after"),
        *columns(_percent, "left"),
    )
    tables: list[Table | str] = [
        frame_table(sizes, shown),
        f"{len(removal.units):,} units are gone",
    ]
    if removal.steps is not None:
        steps = removal.steps.assign(chosen=removal.steps["chosen"].map({True: "yes", False: ""}))
        measured = [heading for name, heading in _STEP_NAMES.items() if name in steps]
        tried = (
            *columns(count, "Places tried=places"),
            *columns(_percent, *measured),
            *columns(str, "chosen"),
        )
        tables.append(frame_table(steps, tried))
    return tables


def _check_saving(save: Path | None, network: Network) -> None:
    """Refuse a file that no smaller network can be written to, before the work."""
    if save is None:
        return
    check_suffix(save, (".pt2", ".safetensors"), "--save")
    if save.suffix == ".safetensors" and network.model.endswith(".pt2"):
        raise InputError(
            "--save: expected a .pt2 file for a network that is one, since code that makes it is "
            f"not known, got {str(save)!r}"
        )


def _save(removal: Removal, model: nn.Module, maker: str, sample: Any, path: Path) -> None:
    """Write a smaller network: a program, or weights and the code that makes it."""
    from pyablate.compression import save_network, save_weights

    if path.suffix == ".pt2":
        save_network(removal.model, sample, path)
    else:
        save_weights(removal.model, model, maker, path)


def _code_of(save: Path | None) -> list[Path]:
    """Name the file of code beside one of weights."""
    return [save.with_suffix(".py")] if save is not None and save.suffix == ".safetensors" else []
