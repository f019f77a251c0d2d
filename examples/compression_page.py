"""The page and the pictures about the study of compression, made from its tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from scipy import stats

matplotlib.use("Agg")
from matplotlib import pyplot

from pyablate.analysis import bootstrap

# Hues in a fixed order (validated for colour vision deficiency); chance is grey.
HUES = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#e87ba4", "#008300", "#4a3aa7", "#e34948")
CHANCE = "#8a8a86"
POINTS = 0.005  # of accuracy: what counts as equal after fine-tuning


def write(found: Mapping[str, pd.DataFrame], page: Path, settings: Mapping[str, Any]) -> None:
    """Write the page and, into ``images`` beside it, its pictures."""
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    draw_curves(found["curves"], images / "compression-curves.png")
    draw_redundancy(found["redundancy"], images / "compression-redundancy.png")
    draw_tuned(found["tuned"], images / "compression-finetuning.png")
    parts = [
        _introduction(settings),
        _curves(found["curves"]),
        _redundancy(found["redundancy"]),
        _transforms(found["transforms"]),
        _tuned(found["tuned"]),
        _confirmed(found["confirmed"]),
        _latency(found["latency"]),
    ]
    page.write_text("\n".join(parts).rstrip() + "\n")


def _introduction(settings: Mapping[str, Any]) -> str:
    few = settings["measuring"] < 1000
    quick = (
        "**A quick run: one network and too few images to conclude anything from.**\n\n"
        if few
        else ""
    )
    return f"""# Compression: results

Written by `make compression` (`examples/compression_study.py`); do not edit. What the functions do
is told in [compression](../guides/compression.md).

{quick}Units are ranked on {settings["ranking"]:,} of the first 5,000 shipped images, other ones for
every seed; everything is measured on {settings["measuring"]:,} of the other 5,000. Nothing is
trained unless it says so. Figures are in per cent where they are shares. ± is half the width of the
95 % interval (Student's t) of a mean over {settings["seeds"]} seeds; of two seeds the range stands
in brackets. Seeds draw the images to rank on, the random orders and the order of training; what
depends on none of these has no interval. That other images to measure on would give other figures
is not in it: from that alone the 95 % interval of an accuracy near 50 % is
± {_binomial(settings):.1f} points; that of a difference on the same images is narrower.
"""


def _binomial(settings: Mapping[str, Any]) -> float:
    """Half width, in points, of the 95 % interval of an accuracy of one half."""
    return float(100 * stats.norm.ppf(0.975) * np.sqrt(0.25 / settings["measuring"]))


def _curves(table: pd.DataFrame) -> str:
    gone = table[table["fraction"] > 0]
    most = f"{gone['fraction'].max():.0%}"
    each = gone.groupby(["network", "ranking", "seed"], sort=False)
    areas = each[["accuracy", "worst_class_accuracy"]].mean().reset_index()
    lines = []
    for network, mine in areas.groupby("network", sort=False):
        for ranking, rows in mine.groupby("ranking", sort=False):
            lines.append(
                [
                    network,
                    ranking,
                    _interval(rows["accuracy"]),
                    _interval(rows["worst_class_accuracy"]),
                ]
            )
    heads = ["network", "ranking", "accuracy", "worst class"]
    return f"""## Which ranking keeps accuracy longest

Mean accuracy over the points of the curve (shares from {gone["fraction"].min():.0%} to {most} of
each layer removed, the same share of every layer), so larger is better.

{_best(areas, "accuracy", "Overall accuracy is kept longest by")}
{_best(areas, "worst_class_accuracy", "The worst class is kept longest by")}

![Accuracy of all images and of the worst class against the share of units removed, for each
network and ranking; bands are the range over seeds.](images/compression-curves.png)

{_markdown(heads, lines)}
`accuracy_drop` and `max_class_drop` are measured by ablating every unit (and what hangs together
with it) alone; `hrank` ranks layers with maps only, so its shares are shares of fewer units.
Why accuracy drops on few images rank badly: [ranking by few images](ranking.md).
"""


def _best(areas: pd.DataFrame, figure: str, sentence: str) -> str:
    told = []
    for network, mine in areas.groupby("network", sort=False):
        values = {name: rows[figure] for name, rows in mine.groupby("ranking", sort=False)}
        chance = values.pop("random")
        first, second = sorted(values, key=lambda name: -values[name].mean())[:2]
        told.append(
            f"- {network}: `{first}` with {_interval(values[first])}, behind it `{second}` with "
            f"{_interval(values[second])}; chance {_interval(chance)}"
        )
    return sentence + ":\n\n" + "\n".join(told) + "\n"


def _redundancy(table: pd.DataFrame) -> str:
    lines = []
    for (network, share), rows in table.groupby(["network", "share"], sort=False):
        inside = [_spearman(mine["summed"], mine["together"]) for _, mine in rows.groupby("layer")]
        within = [value for value in inside if np.isfinite(value)]
        lines.append(
            [
                network,
                f"{share:.0%}",
                f"{100 * rows['summed'].mean():.1f}",
                f"{100 * rows['together'].mean():.1f}",
                _correlation(rows["summed"], rows["together"]),
                _interval(within, 1, 2),
            ]
        )
    heads = ["network", "share of a layer", "sum of single drops", "drop together"]
    heads += ["rank correlation", "within layers"]
    more = (table["together"] > table["summed"]).mean()
    return f"""## How well single units predict a group

Groups drawn at random within a layer, ablated together, against the sum of the drops of their
units alone. {more:.0%} of the groups lose more than that sum: units back each other up, so each
alone looks harmless. The rank correlation over all groups (with the 95 % percentile interval of a
bootstrap over groups) says mostly which layers matter; within layers (its mean over them, with the
t interval over layers) it says which group of equal size.

![Accuracy drop of groups together against the sum of the drops of their
units.](images/compression-redundancy.png)

{_markdown(heads, lines)}"""


def _transforms(table: pd.DataFrame) -> str:
    text = """## What each transform does

Without training, soft filter pruning excepted. `level` is the share of units, singular values or
weights that goes (of the pruned and decomposed network half by either); codebooks have 256, 64 and
16 kernels, block masks 2, 3 and 4 blocks. `bits`: what the weights still take. `drop`: accuracy
lost. `excess`: the class that lost most beyond that, in the first seed, and by how much. `classes`:
how many changed significantly. `profile`: rank correlation, over classes, of the mean damage that
units of the last layer with maps do before and after; `units`: rank correlation of their accuracy
drops, unit by unit. `Grad-CAM` and `LRP`: Pearson correlation of the maps of both networks, over
images on which they agree.
"""
    for network, mine in table.groupby("network", sort=False):
        lines = []
        for (transform, level), rows in mine.groupby(["transform", "level"], sort=False):
            first = rows.iloc[0]
            lines.append(
                [
                    transform,
                    f"{100 * level:.0f}",
                    f"{100 * rows['kept_bits'].mean():.1f}",
                    _interval(rows["accuracy_drop"]),
                    f"{first['worst_class']} {100 * first['worst_excess']:+.0f}",
                    f"{rows['significant'].mean():.0f}",
                    *(_interval(rows[name], 1, 2) for name in ("profile", "units")),
                    *(_interval(rows[name], 1, 2) for name in ("grad_cam", "lrp")),
                ]
            )
        heads = ["transform", "level", "bits", "drop", "excess", "classes"]
        heads += ["profile", "units", "Grad-CAM", "LRP"]
        text += f"\n### {network}\n\n{_markdown(heads, lines)}"
    return text


def _tuned(table: pd.DataFrame) -> str:
    lines, verdicts = [], []
    for network, mine in table.groupby("network", sort=False):
        for variant, rows in mine.groupby("variant", sort=False):
            figures = ("grad_cam cosine", "grad_cam pearson", "lrp pearson", "collapsed weighted")
            shown = [
                _interval(rows[name], 1 if i < 3 else 1000, 3 if i < 3 else 2)
                for i, name in enumerate(figures)
            ]
            lines.append([network, variant, _interval(rows["accuracy"], 100, 2), *shown])
        verdicts.append(_verdict(network, mine))
    first = table.iloc[0]
    heads = ["network", "penalty", "accuracy", "Grad-CAM cosine", "Grad-CAM Pearson", "LRP Pearson"]
    heads.append("1000 x distance")
    return f"""## Does fine-tuning bring the maps back

Half of each layer removed by `l1`, then {first["epochs"]:.0f} epoch(s) at a learning
rate of {first["learning_rate"]:g} falling along a cosine, without a penalty (`plain`) and with each
variant of the attribution penalty at weight {first["weight"]:g}. Distance: weighted collapsed
attributions, smaller is better.
{chr(10).join(verdicts)}

![Accuracy and similarity of Grad-CAM maps after fine-tuning with and without the
penalty.](images/compression-finetuning.png)

{_markdown(heads, lines)}"""


def _confirmed(table: pd.DataFrame) -> str:
    verdicts = [_verdict(network, rows) for network, rows in table.groupby("network", sort=False)]
    return f"""### On images by which the weight was not chosen

Weight {table["weight"].iloc[0]:g} was chosen on `resnet` with the seeds and images above, so they
cannot tell what it costs. The same with other seeds, measured on all shipped images that nothing
else here has seen, and for networks that had no part in the choice:

{chr(10).join(verdicts)}
"""


def _verdict(network: str, table: pd.DataFrame) -> str:
    by = {
        variant: rows.set_index("seed").sort_index() for variant, rows in table.groupby("variant")
    }
    plain, kept = by["plain"], by["weighted"]
    change = kept["accuracy"] - plain["accuracy"]
    better = kept["grad_cam pearson"] - plain["grad_cam pearson"]
    nearer = kept["lrp pearson"] - plain["lrp pearson"]
    equal = "within" if (change.abs() <= POINTS).all() else "not within"
    held = "in every seed" if (better > 0).all() else f"in {(better > 0).sum()} of {len(better)}"
    return (
        f"- {network}: the weighted penalty changes accuracy by {_interval(change, 100, 2)} "
        f"points, {equal} 0.5 points in every seed, and the Pearson correlation of the Grad-CAM "
        f"maps by {_interval(better, 1, 3)}, better {held}; that of LRP maps, which it does not "
        f"look at, by {_interval(nearer, 1, 3)}."
    )


def _latency(table: pd.DataFrame) -> str:
    lines = [
        [
            row["network"],
            row["network_removed"],
            f"{row['milliseconds']:.1f}",
            f"{row['low']:.1f} to {row['high']:.1f}",
            f"{row['speedup']:.2f}",
        ]
        for row in table.to_dict("records")
    ]
    return f"""## Latency of really smaller networks

64 images, the four networks timed in turn; median and quartiles of a pass in milliseconds, on
whatever machine wrote this page; the ratio says more than the times.

{_markdown(["network", "removed", "ms", "quartiles", "speed-up"], lines)}"""


def draw_curves(table: pd.DataFrame, path: Path) -> None:
    """Accuracy of all and of the worst class: a column for each network."""
    networks = list(table["network"].unique())
    figures = ("accuracy", "worst_class_accuracy")
    size = (3.1 * len(networks) + 1.6, 5.6)
    canvas, axes = pyplot.subplots(2, len(networks), figsize=size, sharey=True, squeeze=False)
    names = [name for name in table["ranking"].unique() if name != "random"]
    hue = {**dict(zip(names, HUES, strict=False)), "random": CHANCE}
    for column, network in enumerate(networks):
        mine = table[table["network"] == network]
        for row, figure in enumerate(figures):
            panel = axes[row][column]
            for ranking, rows in mine.groupby("ranking", sort=False):
                points = rows.groupby("fraction")[figure]
                mean = 100 * points.mean()
                dashed = "--" if ranking == "random" else "-"
                panel.plot(mean.index, mean, dashed, color=hue[ranking], lw=1.5, label=ranking)
                if rows["seed"].nunique() > 1:
                    low, high = 100 * points.min(), 100 * points.max()
                    panel.fill_between(mean.index, low, high, color=hue[ranking], alpha=0.12, lw=0)
            _plain(panel)
            panel.set_title(network if row == 0 else "", fontsize=10)
    axes[0][0].set_ylabel("accuracy, %")
    axes[1][0].set_ylabel("worst class accuracy, %")
    for panel in axes[1]:
        panel.set_xlabel("share of each layer removed")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    for panel in axes[0]:
        more = panel.get_legend_handles_labels()
        handles += [h for h, name in zip(*more, strict=True) if name not in labels]
        labels += [name for name in more[1] if name not in labels]
    canvas.legend(handles, labels, loc="center right", frameon=False, fontsize=9)
    canvas.tight_layout(rect=(0, 0, 1 - 1.5 / size[0], 1))
    _save(canvas, path)


def draw_redundancy(table: pd.DataFrame, path: Path) -> None:
    """Drop together against the sum of single drops: a panel for each network."""
    networks = list(table["network"].unique())
    canvas, axes = pyplot.subplots(
        1, len(networks), figsize=(3 * len(networks), 3.2), sharey=True, squeeze=False
    )
    shares = sorted(table["share"].unique())
    for panel, network in zip(axes[0], networks, strict=True):
        mine = table[table["network"] == network]
        for share, hue in zip(shares, ("#86b6ef", "#2a78d6", "#104281"), strict=True):
            rows = mine[mine["share"] == share]
            panel.scatter(
                100 * rows["summed"],
                100 * rows["together"],
                s=12,
                color=hue,
                alpha=0.8,
                label=f"{share:.0%} of a layer",
                linewidths=0,
            )
        low, high = 100 * mine["summed"].min(), 100 * max(mine["summed"].max(), 0.01)
        panel.plot([low, min(high, 100)], [low, min(high, 100)], color=CHANCE, lw=1)
        panel.set_title(network, fontsize=10)
        panel.set_xlabel("sum of single drops, points")
        _plain(panel)
    axes[0][0].set_ylabel("drop together, points")
    axes[0][0].legend(frameon=False, fontsize=8, loc="upper left")
    canvas.tight_layout()
    _save(canvas, path)


def draw_tuned(table: pd.DataFrame, path: Path) -> None:
    """Accuracy against similarity of maps: one mark for each seed and variant."""
    networks = list(table["network"].unique())
    canvas, axes = pyplot.subplots(
        1, len(networks), figsize=(3.4 * len(networks), 3.2), squeeze=False
    )
    for panel, network in zip(axes[0], networks, strict=True):
        mine = table[table["network"] == network]
        for variant, hue in zip(("plain", "weighted", "equal", "stochastic"), HUES, strict=False):
            rows = mine[mine["variant"] == variant]
            colour = CHANCE if variant == "plain" else hue
            panel.scatter(
                100 * rows["accuracy"], rows["grad_cam pearson"], s=36, color=colour, label=variant
            )
        panel.set_title(network, fontsize=10)
        panel.set_xlabel("accuracy, %")
        _plain(panel)
    axes[0][0].set_ylabel("Pearson r of Grad-CAM maps")
    axes[0][0].legend(frameon=False, fontsize=8)
    canvas.tight_layout()
    _save(canvas, path)


def _plain(panel: Any) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#e4e3df", lw=0.6)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8)


def _save(canvas: Any, path: Path) -> None:
    canvas.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(canvas)


def _interval(values: Iterable[float], factor: float = 100, digits: int = 1) -> str:
    """Mean, with the half width of its 95 % t interval where there are three values or more.

    Two values have their range in brackets: a t interval of two is too wide to say anything.
    """
    known = np.array([value for value in values if np.isfinite(value)]) * factor
    if len(known) == 0:
        return "-"
    mean = f"{known.mean():.{digits}f}"
    if len(known) == 1:
        return mean
    if len(known) == 2:
        return f"{mean} ({known.min():.{digits}f} to {known.max():.{digits}f})"
    half = stats.t.ppf(0.975, len(known) - 1) * stats.sem(known)
    return f"{mean} ± {half:.{digits}f}"


def _correlation(x: pd.Series, y: pd.Series) -> str:
    """Spearman's coefficient with the 95 % percentile interval of a bootstrap over the rows."""
    rho = _spearman(x, y)
    if not np.isfinite(rho):
        return "-"
    weights = bootstrap.resample(len(x), 2000, np.random.default_rng(0))
    variables = [bootstrap.Variable(each.to_numpy(np.float64), weights) for each in (x, y)]
    drawn = bootstrap.coefficients(variables[0], variables[1], "spearman")
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return f"{rho:.2f} ({low:.2f} to {high:.2f})"


def _spearman(x: pd.Series, y: pd.Series) -> float:
    if len(x) < 3 or x.nunique() == 1 or y.nunique() == 1:
        return float("nan")
    return float(stats.spearmanr(x, y).statistic)


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows) + "\n"
