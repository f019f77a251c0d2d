"""Why a ranking by accuracy drops on few images prunes badly: an experiment with a page about it.

    python examples/ranking_study.py [--networks alexnet vgg_bn] [--sizes 200 500 3000 9000]

Every unit is ablated alone on blocks of 100 shipped images; the same counts are then read in
different ways (ties, signs, shrinkage, changed predictions, loss) and from a few blocks or many.
Each reading ranks the units, and the network is pruned by it, on other images. Each block is a file
in the folder: a killed run goes on where it stopped. Writes docs/results/ranking.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from compression_page import _markdown
from numpy.typing import NDArray
from scipy import stats

import pyablate as pa
from pyablate.analysis.shrinkage import beta_prior
from pyablate.analysis.statistics import mcnemar
from pyablate.compression._remove import silencing

BLOCK, MEASURING = 100, 1000
SIZES = (200, 500, 3000, 9000)
USUAL = 500  # images, as on the page about compression
PARTS = 12  # disjoint ones of a size, at most
FRACTIONS = (0.1, 0.3, 0.5, 0.7)
RANDOM = 6  # orders
UNRESOLVED = 0.05
Floats = NDArray[np.float64]


def measured(network: str, block: int, folder: Path) -> pd.DataFrame:
    """Images lost and gained and the loss gained without each unit, on one block of images."""
    path = folder / f"{network}-{BLOCK}x{block}.csv"
    if not path.exists():
        images, labels = pa.demo.images()
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        result = pa.ablate(
            pa.demo.network(network),
            (images[part], labels[part]),
            measures=["loss"],
            audit=0,
            progress=False,
        )
        table = result.units[["label", "layer"]].assign(
            lost=result.lost.sum(axis=1),
            gained=result.gained.sum(axis=1),
            loss=BLOCK * result.loss_change,
        )
        table.to_csv(path.with_suffix(".part"), index=False)
        path.with_suffix(".part").replace(path)
    return pd.read_csv(path)


def shrunken(counts: pd.DataFrame, _noise: Floats) -> Floats:
    """Return the accuracy drop of each unit, shrunken towards what is usual in its layer."""
    drop = np.zeros(len(counts))
    changed = (counts["lost"] + counts["gained"]).to_numpy()
    for rows in counts.groupby("layer", sort=False).indices.values():
        lost, of_layer = counts["lost"].to_numpy()[rows], changed[rows]
        a, b = beta_prior(lost, of_layer)
        drop[rows] = of_layer * (2 * (lost + a) / (of_layer + a + b) - 1)
    return drop


READINGS: dict[str, Callable[[pd.DataFrame, Floats], Floats]] = {
    "accuracy drop": lambda c, _: c["lost"] - c["gained"],
    "ties at random": lambda c, noise: c["lost"] - c["gained"] + noise,
    "helpful as harmless": lambda c, noise: (c["lost"] - c["gained"]).clip(lower=0) + noise,
    "shrunken": shrunken,
    "changed": lambda c, noise: c["lost"] + c["gained"] + noise,
    "loss": lambda c, _: c["loss"],
}
WHAT = {
    "accuracy drop": "lost minus gained; equal ones in the order of the network",
    "ties at random": "the same, equal ones at random",
    "helpful as harmless": "units that gain more than they lose count 0, at random among the ties",
    "shrunken": "`shrunken_drop`: the drop expected of a unit that changes as many images",
    "changed": "lost plus gained: the sign is given up, equal ones at random",
    "loss": "`loss_change`, of all images, also those whose prediction stays",
}


class Pruning:
    """Accuracy of a network on images apart, by the order in which its units go."""

    def __init__(self, network: str) -> None:
        images, labels = pa.demo.images()
        self.images, self.labels = images[-MEASURING:], labels[-MEASURING:]
        self.model = pa.demo.network(network).eval()
        self.sites = pa.sites(self.model, self.images[:2])

    def area(self, units: pd.DataFrame, scores: Floats) -> float:
        """Mean accuracy over the shares of every layer that are removed, lowest scores first."""
        found = []
        for share in FRACTIONS:
            gone: list[str] = []
            for rows in units.groupby("layer", sort=False).indices.values():
                order = rows[np.argsort(scores[rows], kind="stable")]
                gone += units["label"].iloc[order[: round(share * len(rows))]].tolist()
            with silencing(self.model, self.sites, gone), torch.no_grad():
                right = self.model(self.images).argmax(1) == self.labels
            found.append(right.double().mean().item())
        return float(np.mean(found))


def pooled(some: list[pd.DataFrame]) -> pd.DataFrame:
    """Add the counts of some blocks up."""
    columns = ["lost", "gained", "loss"]
    joined = some[0].copy()
    joined[columns] = sum(table[columns] for table in some)
    return joined


def parts_of(tables: list[pd.DataFrame], images: int) -> list[pd.DataFrame]:
    """Return the counts on disjoint parts of so many images."""
    together = images // BLOCK
    starts = range(0, len(tables) - together + 1, together)
    return [pooled(tables[start : start + together]) for start in starts][:PARTS]


def areas(
    network: str, sizes: Sequence[int], folder: Path
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Areas of all readings by the number of images; and how coarse the counts are on 500."""
    tables = [measured(network, block, folder) for block in range(max(sizes) // BLOCK)]
    kept = folder / f"{network}-areas-{'-'.join(map(str, sizes))}.csv"
    if not kept.exists():
        pruning = Pruning(network)
        lines = []
        for seed in range(RANDOM):
            chance = np.random.default_rng(seed).random(len(tables[0]))
            head = {"reading": "random", "images": 0, "part": seed}
            lines.append(head | {"area": pruning.area(tables[0], chance)})
        for images in sizes:
            for part, counts in enumerate(parts_of(tables, images)):
                noise = np.random.default_rng(part).uniform(0, 0.5, len(counts))
                for reading, score in READINGS.items():
                    scores = np.asarray(score(counts, noise), dtype=np.float64)
                    head = {"reading": reading, "images": images, "part": part}
                    lines.append(head | {"area": pruning.area(counts, scores)})
        pd.DataFrame(lines).to_csv(kept, index=False)
    return pd.read_csv(kept), coarseness(parts_of(tables, USUAL), pooled(tables))


def coarseness(tables: list[pd.DataFrame], every: pd.DataFrame) -> dict[str, float]:
    """Tell what 500 images can resolve of the units, mean over parts of so many."""
    p = [mcnemar(table["lost"].to_numpy(), table["gained"].to_numpy()) for table in tables]
    net = [(table["lost"] - table["gained"]) for table in tables]
    pairs = [(i, j) for i in range(len(net)) for j in range(i)]
    total = every["lost"] - every["gained"]
    helpful = [drop < 0 for drop in net]
    return {
        "units": len(every),
        "values": float(np.mean([drop.nunique() for drop in net])),
        "unresolved": float(np.mean([(one > UNRESOLVED).mean() for one in p])),
        "helpful": float(np.mean([one.mean() for one in helpful])),
        # Of the units that look helpful on one part, those that are on all others together.
        "confirmed": float(
            np.mean([((total - net[i])[one] < 0).mean() for i, one in enumerate(helpful)])
        ),
        **{
            f"again_{name}": float(
                np.mean([stats.spearmanr(some[i], some[j]).statistic for i, j in pairs])
            )
            for name, some in {
                "drop": net,
                "changed": [table["lost"] + table["gained"] for table in tables],
                "loss": [table["loss"] for table in tables],
            }.items()
        },
    }


def difference(found: pd.DataFrame, reading: str, other: str, images: int) -> tuple[float, float]:
    """Mean difference of two readings of the same blocks, and half of its 95 % interval."""
    of = found[found["images"] == images].pivot(index="part", columns="reading", values="area")
    values = (of[reading] - of[other]).to_numpy()
    wide = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else np.nan
    return float(values.mean()), float(wide)


def told(mean: float, half: float) -> str:
    """Tell whether a difference is more than the spread between blocks."""
    if not abs(mean) > half:
        return "not told from 0"
    return "better" if mean > 0 else "worse"


def section(network: str, wanted: Sequence[int], folder: Path) -> tuple[list[str], str]:
    """Return the verdicts on a network, and its part of the page."""
    found, coarse = areas(network, wanted, folder)
    sizes = sorted(set(found["images"]) - {0})
    chance = found.loc[found["reading"] == "random", "area"]
    cells = found.groupby(["reading", "images"])["area"].agg(["mean", "std", "count"])
    lines = []
    for reading in READINGS:
        row = [f"`{reading}`"]
        for images in sizes:
            mean, std, count = cells.loc[(reading, images)]
            row.append(f"{100 * mean:.1f}" + (f" ({100 * std:.1f})" if count > 2 else ""))
        mean, half = difference(found, reading, "accuracy drop", USUAL)
        row.append("" if reading == "accuracy drop" else f"{100 * mean:+.1f} ± {100 * half:.1f}")
        lines.append(row)
    by_chance = f"{100 * chance.mean():.1f} ({100 * chance.std():.1f})"
    lines.append(["random", *[by_chance] * len(sizes), ""])
    heads = ["ranked by", *(f"{images:,} images" for images in sizes), f"minus drop, {USUAL}"]
    verdicts = []
    for reading, question in (
        ("ties at random", "Ties: breaking them at random is"),
        ("helpful as harmless", "Helpful by chance: not sending those units first is"),
        ("shrunken", "Shrinkage is"),
        ("changed", "Cancellation: counting lost and gained alike is"),
        ("loss", "Resolution: the loss of the same images is"),
    ):
        mean, half = difference(found, reading, "accuracy drop", USUAL)
        verdicts.append(
            f"- {network}: {question} **{told(mean, half)}** "
            f"({100 * mean:+.1f} ± {100 * half:.1f} points)."
        )
    ends = sizes[0], sizes[-1]
    by_size = [100 * cells.loc[("accuracy drop", images), "mean"] for images in ends]
    best = max(READINGS, key=lambda reading: cells.loc[(reading, sizes[-1]), "mean"])
    above = by_size[1] > 100 * (chance.mean() + 2 * chance.std())
    verdicts.append(
        f"- {network}: More images: from {ends[0]:,} to {ends[1]:,} the accuracy drop goes from "
        f"{by_size[0]:.1f} to {by_size[1]:.1f}, **{'above' if above else 'not above'}** chance "
        f"({100 * chance.mean():.1f}, two standard deviations {200 * chance.std():.1f}); best "
        f"there: `{best}`."
    )
    text = f"""## {network}

{coarse["units"]} units. On {USUAL} images their accuracy drops take {coarse["values"]:.0f}
different values (mean over disjoint parts); {100 * coarse["unresolved"]:.0f} % cannot be told from
0 (McNemar, p > {UNRESOLVED:g}). {100 * coarse["helpful"]:.0f} % look helpful, of which
{100 * coarse["confirmed"]:.0f} % do so on all other images together as well. Rank correlation over
units between two parts: accuracy drop {coarse["again_drop"]:.2f}, changed predictions
{coarse["again_changed"]:.2f}, loss {coarse["again_loss"]:.2f}.

{_markdown(heads, lines)}"""
    return verdicts, text


def main() -> None:
    """Measure what is missing, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["alexnet", "vgg_bn"])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help=f"{USUAL} among them")
    parser.add_argument("--folder", type=Path, default=Path("ranking_study"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/ranking.md"))
    options = parser.parse_args()
    most = len(pa.demo.images()[1]) - MEASURING
    if USUAL not in options.sizes or any(n % BLOCK or not 0 < n <= most for n in options.sizes):
        parser.error(f"--sizes: expected multiples of {BLOCK} up to {most}, {USUAL} among them")
    options.folder.mkdir(parents=True, exist_ok=True)
    parts = [section(network, tuple(options.sizes), options.folder) for network in options.networks]
    verdicts = "\n".join(line for lines, _ in parts for line in lines)
    readings = "\n".join(f"- `{reading}`: {what}" for reading, what in WHAT.items())
    options.page.write_text(
        f"""# Ranking by few images

Written by `python examples/ranking_study.py`; do not edit. On [compression](compression.md) a
ranking by the accuracy drop of single units on {USUAL} images prunes no better than chance. Why?
The same ablations are read in different ways, each of which mends one possible cause and leaves the
others:

{readings}

Every unit is ablated alone, on up to {max(options.sizes):,} images; each number of images is tried
on {PARTS} disjoint parts of the images, or as many as there are. The figures are mean accuracies in
per cent over the shares {FRACTIONS[0]:.0%} to {FRACTIONS[-1]:.0%} of every layer removed, lowest
first, on {MEASURING:,} other images; in brackets the standard deviation over parts, or over
{RANDOM} random orders; ± is half the 95 % interval (Student's t) over parts, of the difference from
the accuracy drop of the same part.

## In short

{verdicts}

*Better* and *worse*: the interval leaves 0 out. Where most accuracy drops cannot be told from 0,
`pa.rank` says so and ranks by `shrunken_drop`; whether that helps is what the lines above tell
([an order](../guides/compression.md#an-order-parank)).

"""
        + "\n".join(text for _, text in parts)
    )


if __name__ == "__main__":
    main()
