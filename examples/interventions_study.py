"""How much of the measured importance of units is due to what replaces them.

    python examples/interventions_study.py [--images 2000]

A layer of two shipped networks, ablated unit by unit by zero, mean, resample and the optimal
constant (pyablate.optimal_constants), which is chosen on one half of the images; all are judged on
the other. Writes docs/results/interventions.md; some two minutes of one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from compression_page import _markdown
from numpy.typing import NDArray
from scipy import stats

import pyablate as pa
from pyablate.analysis.bootstrap import resample
from pyablate.experiments.split import split

LAYERS = {"alexnet": "features.11", "convnext": "stage2.2"}
WHAT = {
    "alexnet": "48 maps behind ReLU, in front of pooling and the linear layers",
    "convnext": "64 channels of the last residual sum, of either sign",
}
HOW = ("zero", "mean", "resample", "optimal")
RESAMPLES = 2000
Floats = NDArray[np.float64]


def measured(network: str, images: int) -> tuple[dict[str, pa.AblationResult], pa.OptimalConstants]:
    """Ablations of a layer on the half of the images on which no constant was chosen."""
    model, *data = pa.demo.load(network, limit=images)
    found = pa.optimal_constants(
        model, tuple(data), LAYERS[network], rounds=3, progress=False, audit=0
    )
    other = pa.ablate(
        model,
        split(tuple(data), seed=0).measuring,
        LAYERS[network],
        intervention="resample",
        measures=["loss"],
        progress=False,
        audit=0,
    )
    return {**found.results, "resample": other}, found


def own_share(replaced: Floats, optimal: Floats) -> tuple[float, float, float]:
    """Share of the loss that the optimal constant does away with, and its interval over units."""
    drawn = resample(len(replaced), RESAMPLES, np.random.default_rng(0)).astype(float)
    shares = 1 - (drawn @ optimal) / (drawn @ replaced)
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(1 - optimal.sum() / replaced.sum()), float(low), float(high)


def word(low: float, high: float) -> str:
    """Tell whether the replacement's own share is large."""
    if low > 0.5:
        return "most of it"
    if low > 0:
        return "part of it"
    return "none, the constants did worse on other images" if high < 0 else "none seen"


def alike(correlation: float) -> str:
    """Tell whether two replacements order the units alike."""
    return "the same" if correlation >= 0.9 else "a similar" if correlation >= 0.5 else "another"


def section(network: str, images: int) -> tuple[list[str], str]:
    """Return the verdicts on a network, and its part of the page."""
    results, found = measured(network, images)
    loss = {how: results[how].loss_change for how in HOW}
    lines, verdicts = [], []
    for how in HOW:
        result = results[how]
        order = stats.spearmanr(loss[how], loss["optimal"]).statistic
        row = [
            how,
            f"{1000 * loss[how].mean():.2f}",
            f"{100 * result.accuracy_drop.mean():.2f}",
            f"{100 * result.accuracy_drop.max():.1f}",
            f"{100 * result.split_half_drop().max():.1f}",
        ]
        if how == "optimal":
            lines.append([*row, "", ""])
            continue
        share, low, high = own_share(loss[how], loss["optimal"])
        lines.append(
            [*row, f"{100 * share:.0f} [{100 * low:.0f}, {100 * high:.0f}]", f"{order:.2f}"]
        )
        verdicts.append(
            f"- {network}, {how}: {word(low, high)} ({100 * share:.0f} % of the loss, "
            f"{100 * low:.0f} to {100 * high:.0f}); {alike(order)} order of the units "
            f"({order:.2f})."
        )
    table, half = found.table, len(results["zero"].labels)
    chosen = [1000 * table[f"{how}_chosen"].mean() for how in ("zero", "mean", "optimal")]
    away = (table["constant"] - table["mean_activation"]).abs()
    spread = table["mean_activation"].abs().mean()
    heads = ["replaced by", "loss", "accuracy", "most", "class, most", "own share", "order"]
    text = f"""## {network}: `{LAYERS[network]}`

{WHAT[network]}; {half:,} images to choose constants on, {half:,} others to
judge all four on. Before, {100 * results["zero"].baseline_accuracy:.1f} % of these are right.

{_markdown(heads, lines)}
On the half on which the constants were chosen the mean loss rose by {chosen[0]:.2f} (zero),
{chosen[1]:.2f} (mean) and {chosen[2]:.2f} (optimal): what the optimal one loses on the other half
beyond that is fitted to single images. It lies {away.median() / spread:.1f} times the layer's usual
mean activation from the unit's mean (median over units).
"""
    return verdicts, text


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000, help="half to choose, half to judge")
    parser.add_argument("--page", type=Path, default=Path("docs/results/interventions.md"))
    options = parser.parse_args()
    verdicts, sections = zip(*(section(each, options.images) for each in LAYERS), strict=True)
    told = "\n".join(line for some in verdicts for line in some)
    options.page.write_text(
        f"""# Interventions: zero, mean, resample, optimal

Written by `python examples/interventions_study.py`; do not edit. A unit's ablation costs what the
unit said and what is unusual about the replacement. The optimal constant (Li and Janson 2024,
`pa.optimal_constants`: [the least harmful constant][constant]) costs least of all constants, so
what another replacement costs beyond it is that replacement's own doing.

[constant]: ../guides/interventions.md#the-least-harmful-constant

How much of the loss is the replacement's own:

{told}

*Most* or *part of it*: the 95 % interval (bootstrap over units) of the own share lies above 50 %
or above 0; *none seen*: it holds 0. The own share is 1 minus the loss by the optimal constant over
the loss by this replacement, all units together. The order of the units by loss is *the same* as
that by the optimal constant from a rank correlation of 0.9, *similar* from 0.5.

The best constant of all images is not known: on the half on which the constants were chosen their
loss is too low, on the other too high. So what a constant could spare lies, but for chance, between
the two: the verdicts use the other half, and what was found on the first stands below each table.

In the tables: *loss*, the rise of the mean loss in thousandths of a nat, mean over units;
*accuracy*, its mean drop in points, and *most*, the largest of a unit; *class, most*, the largest
drop of a class that was chosen on other images; *order*, the rank correlation over units with the
loss by the optimal constant.

"""
        + "\n".join(sections)
    )


if __name__ == "__main__":
    main()
