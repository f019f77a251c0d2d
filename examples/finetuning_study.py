"""What the learning rate of fine-tuning regains after pruning, and what 8-bit gradients cost it.

    python examples/finetuning_study.py [--folder compression_study_finetuning]

Half of a shipped network is removed; it is fine-tuned on some of the first 5,000 shipped images and
measured on 1,000 of the others. Each training is a file in the folder: a killed run goes on where
it stopped. At the end the page docs/results/fine-tuning.md is written.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from compression_page import _interval, _markdown
from compression_study import Settings, Study
from torch import Tensor, nn

import pyablate as pa
from pyablate import compression

NETWORK = "vgg_bn"
RATES = (0.001, 0.02)
EPOCHS = (2, 8)
SETTINGS = Settings(networks=(NETWORK,), training=2560, maps=200, seeds=3)
CLIPS = (1.0, 0.8, 0.6, 0.4, 0.2)
FIGURES = ("accuracy", "grad_cam pearson", "lrp pearson", "collapsed weighted")


@dataclass(frozen=True)
class Rounded:
    """A forward hook that rounds the gradient of a layer's outputs to 8 bits.

    Attributes
    ----------
    by_channel : bool
        A scale for each channel instead of one for the tensor.
    clips : tuple of float
        Shares of the largest size at which the range may end; that with the smallest squared error,
        each weighted by the size of the gradient, is taken.
    """

    by_channel: bool = False
    clips: tuple[float, ...] = (1.0,)

    def __call__(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        """Round what comes back through the output."""
        if output.requires_grad:
            output.register_hook(self.rounded)

    def rounded(self, gradient: Tensor) -> Tensor:
        """Return the gradient ``[N, C, ...]`` as whole steps from -127 to 127 times a scale."""
        dims = [dim for dim in range(gradient.ndim) if dim != 1 or not self.by_channel]
        top = gradient.abs().amax(dims, keepdim=True).clamp(min=1e-30)
        best = least = None
        for clip in self.clips:
            scale = clip * top / 127
            found = (gradient / scale).round_().clamp_(-127, 127).mul_(scale)
            if len(self.clips) == 1:
                return found
            error = ((found - gradient).square_() * gradient.abs()).sum(dims, keepdim=True)
            if best is None or least is None:
                best, least = found, error
            else:
                best, least = torch.where(error < least, found, best), error.minimum(least)
        return best


ROUNDED = {
    "8 bits, one scale": Rounded(),
    "8 bits by channel, clipped": Rounded(by_channel=True, clips=CLIPS),
}


def half(study: Study) -> nn.Module:
    """Return the network without the half of each layer that has the smallest norms."""
    model = pa.demo.network(NETWORK)
    return compression.prune_filters(model, study.choosing[0][:2], 0.5).model


def trained(study: Study, seed: int, rate: float, epochs: int, rounded: str = "") -> pd.DataFrame:
    """Fine-tune the halved network, and tell in one row what came back."""
    model = half(study)
    for module in model.modules():
        if rounded and isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(ROUNDED[rounded])
    data = study.drawn(study.settings.training, seed)
    tuned = pa.finetune(
        model, data, epochs=epochs, learning_rate=rate, seed=seed, progress=False
    ).model
    for module in tuned.modules():
        module._forward_hooks.clear()
    row = {} if rounded else maps_kept(study, tuned)
    row |= {"accuracy": accuracy(study, tuned), "rate": rate, "epochs": epochs}
    return pd.DataFrame([row | {"gradients": rounded or "float32"}])


def accuracy(study: Study, model: nn.Module) -> float:
    """Share of the images to measure on that a network has right."""
    return pa.compare(model, model, study.measuring).after.accuracy


def maps_kept(study: Study, smaller: nn.Module) -> dict[str, float]:
    """Tell how near the attribution maps of a smaller network are to the original's."""
    model, data = pa.demo.network(NETWORK), study.measuring
    kept = compression.attributions_preserved(
        model, smaller, data, methods=["grad_cam", "lrp"], images=study.settings.maps
    ).summary(resamples=1)
    return {
        f"{method} {figure}": mean
        for method, figure, mean in kept[["method", "figure", "mean"]].itertuples(index=False)
    }


def untrained(study: Study) -> pd.DataFrame:
    """Tell the accuracy before pruning, and behind it."""
    models = {"before": pa.demo.network(NETWORK), "pruned": half(study)}
    rows = [{"gradients": name, "accuracy": accuracy(study, one)} for name, one in models.items()]
    return pd.DataFrame(rows)


def run(study: Study) -> pd.DataFrame:
    """Make all trainings that are not there yet, and return a row for each."""
    parts = [study.piece("untrained", lambda: untrained(study))]
    seeds = range(study.settings.seeds)
    for seed, rate, epochs in itertools.product(seeds, RATES, EPOCHS):
        make: Callable[[], pd.DataFrame] = partial(trained, study, seed, rate, epochs)
        parts.append(study.piece(f"{rate:g}-{epochs}-{seed}", make))
    for seed, name in itertools.product(seeds, ROUNDED):
        make = partial(trained, study, seed, RATES[1], EPOCHS[0], name)
        parts.append(study.piece(f"{name}-{seed}", make))
    return pd.concat(parts, ignore_index=True)


def page(table: pd.DataFrame, settings: Settings) -> str:
    """Write the page about the trainings."""
    known = table.set_index("gradients")["accuracy"]
    rates = table[table["gradients"] == "float32"]
    groups = rates.groupby(["epochs", "rate"], sort=True)
    lines = [[f"{epochs:.0f}", f"{rate:g}", *_told(rows)] for (epochs, rate), rows in groups]
    differences = [
        [f"{epochs:.0f}", *_told(_difference(rows, "rate", RATES[1], RATES[0]))]
        for epochs, rows in rates.groupby("epochs")
    ]
    short = table[(table["rate"] == RATES[1]) & (table["epochs"] == EPOCHS[0])]
    rounded = []
    for name in ("float32", *ROUNDED):
        cost = _told(_difference(short, "gradients", name, "float32"))[0]
        rounded.append([name, _told(short[short["gradients"] == name])[0], cost])
    figures = ["accuracy", "Grad-CAM Pearson", "LRP Pearson", "1000 x distance"]
    before, after = (f"{100 * known[name]:.1f} %" for name in ("before", "pruned"))
    return f"""# Fine-tuning: two learning rates, and 8-bit gradients

Written by `python examples/finetuning_study.py`; do not edit. Half of each layer of `{NETWORK}`
is removed by `l1`, and what is left is fine-tuned, on {settings.training:,} of the first 5,000
shipped images, others for every seed, in batches of 128 with a momentum of 0.9, the rate falling
along a cosine to 0. Everything is measured on {settings.measuring:,} of the other
5,000 images, maps on {settings.maps}: accuracy in per cent, and how near attribution maps are to
those before pruning, where both networks predict the same class
([compression](../guides/compression.md)); of the distance of collapsed maps less is better. ± is
half the width of the 95 % interval (Student's t) of a mean over {settings.seeds} seeds; that other
images to measure on would give other figures is not in it. Before pruning {before} of the images
are right, behind it and before training {after}.

## Two learning rates

Wang, Qin, Bai, Fu 2021, *Dynamical Isometry: The Missing Ingredient for Neural Network Pruning*,
arXiv:2105.05916, ask why a larger learning rate regains more. Their answer: signals pass badly
through what pruning leaves, and a larger rate mends that sooner.

{_markdown(["epochs", "rate", *figures], lines)}
The larger rate minus the smaller one, seed by seed:

{_markdown(["epochs", *figures], differences)}
## 8-bit gradients

Zhao, Huang, Pan, Li, Zhang, Gu, Xu 2021, *Distribution Adaptive INT8 Quantization for Training
CNNs*, arXiv:2102.04782, round the gradients of a layer's outputs with a scale for each channel, in
a range that is clipped with large gradients in mind. Here, {EPOCHS[0]} epochs at {RATES[1]:g}, the
range ends at that of {len(CLIPS)} shares of the channel's largest gradient with the smallest sum of
squared errors, each times the size of its gradient.

{_markdown(["gradients", "accuracy", "minus float32, seed by seed"], rounded)}"""


def _told(rows: pd.DataFrame) -> list[str]:
    scales = zip(FIGURES, (100, 1, 1, 1000), (2, 3, 3, 2), strict=True)
    return [_interval(rows[name], factor, digits) for name, factor, digits in scales]


def _difference(rows: pd.DataFrame, column: str, one: Any, other: Any) -> pd.DataFrame:
    """Figures of one group minus those of another; rows are in the order of the seeds in both."""
    first, second = (rows.loc[rows[column] == value, list(FIGURES)] for value in (one, other))
    return first.reset_index(drop=True) - second.reset_index(drop=True)


def main() -> None:
    """Run the study and write its page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("compression_study_finetuning"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/fine-tuning.md"))
    options = parser.parse_args()
    start = time.monotonic()
    table = run(Study(options.folder, SETTINGS))
    options.page.write_text(page(table, SETTINGS).rstrip() + "\n")
    print(f"wrote {options.page} after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
