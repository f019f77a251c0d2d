"""What was measured, as a page: tables, pictures, and sentences that follow from the figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from paper import analysis, glyphs, plots
from paper.analysis import ATTRIBUTES, CELL_FIGURES, OF_CELLS, TARGET_TITLES, TARGETS
from paper.findings import Groups, correlation_of, in_short, spread_of
from paper.groups import Group, concentration
from paper.markdown import interval, listed, number, points, spread, table
from paper.measure import CURVE_ORDERS, Measured
from paper.networks import FAMILIES

CELL_TITLES = ("within a unit", "within a class", "top cells")


def write(studied: Sequence[Measured], path: Path, pictures: Path) -> None:
    """Write the page and its pictures.

    Parameters
    ----------
    studied : sequence of Measured
        All networks, those of a family together.
    path : pathlib.Path
        The Markdown file.
    pictures : pathlib.Path
        Folder of the pictures.
    """
    groups = {
        name: Group(family, members)
        for name, family in FAMILIES.items()
        if (members := [each for each in studied if each.network.family == family])
    }
    pictures.mkdir(parents=True, exist_ok=True)
    shown = Path(os.path.relpath(pictures, path.parent)).as_posix()
    compared = concentration(groups)
    draw(groups, compared, pictures)
    blocks = [
        *introduction(groups, studied),
        *in_short(groups, compared),
        *drops_section(groups, shown),
        *prediction_section(groups, shown),
        *cells_section(groups),
        *concentration_section(compared, shown),
        *curves_section(groups, shown),
        *glyphs_section(groups, shown),
        *cannot_tell(groups),
        *all_layers(groups),
    ]
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def draw(groups: Groups, compared: pd.DataFrame, folder: Path) -> None:
    """Write all pictures."""
    titled = {group.family.title: group for group in groups.values()}
    plots.drops(
        {title: group.results for title, group in titled.items()}, folder / "paper-drops.png"
    )
    shown = {
        group.family.title: [member.correlations for member in group.members]
        for name, group in groups.items()
        if name in ("alexnet", "glyphs") or len(groups) < 3
    }
    plots.correlations(shown, folder / "paper-correlations.png")
    plots.differences(compared, folder / "paper-concentration.png")
    plots.curves(
        {title: [member.curves for member in group.members] for title, group in titled.items()},
        folder / "paper-curves.png",
    )
    if "glyphs" in groups:
        plots.sample(folder / "paper-glyphs.png")


def introduction(groups: Groups, studied: Sequence[Measured]) -> list[str]:
    """Say what the page is and which networks it is about."""
    lines = []
    for group in groups.values():
        accuracy = [each.baseline_accuracy for each in group.results]
        epochs = [str(member.network.training()["epochs"]) for member in group.members]
        lines.append(
            (
                f"`{group.family.name}`",
                group.family.title,
                len(group.members),
                ", ".join(epochs),
                ", ".join(points(value, 2) for value in accuracy),
                f"{len(group.results[0].units):,}",
                f"{len(group.results[0].labels):,}",
                group.results[0].classes,
            )
        )
    audited = sum(each.result.audit.pairs for each in studied)
    mismatches = sum(each.result.audit.mismatches for each in studied)
    pairs = sum(len(each.result.units) * len(each.result.labels) for each in studied)
    return [
        "# The paper again",
        "<!-- Written by `make paper`; changes belong into paper/document.py. -->",
        "Zhou, Sun, Bau and Torralba asked in 2018 what single units of trained networks are good "
        "for ([arXiv:1806.02891](https://arxiv.org/abs/1806.02891)): switched off one at a time, "
        "no unit seemed to matter for the accuracy over all classes, while single classes suffered "
        "badly. This page asks the same questions of the small networks that ship with this "
        "project. `make paper` measures everything anew and writes the page; no figure in it, and "
        "no sentence that rests on one, is typed by hand. Drops are in points (hundredths), "
        "positive for harm. What follows a figure in round brackets is the least and the most of "
        "single networks of a family, in square brackets a 95 % bootstrap interval.",
        table(
            [
                "weights",
                "here called",
                "seeds",
                "epochs",
                "accuracy (%)",
                "units",
                "images",
                "classes",
            ],
            lines,
        ),
        f"The first three differ in one thing each, with three fully connected layers on five "
        f"convolutions. Units are the channels behind each activation and each residual block, "
        f"replaced by zero, nothing is retrained: {pairs:,} (unit, image) pairs. Of these "
        f"{audited:,} were recomputed by the runs' own audits, {mismatches} differed. "
        "Images of the first data set are Fashion-MNIST's test images"
        + ("; [the other](#the-second-data-set) is made here." if "glyphs" in groups else ".")
        + " Seeds other than 0 were partly trained for fewer epochs, as the table says.",
    ]


def drops_section(groups: Groups, shown: str) -> list[str]:
    """Question 1: how large are the drops."""
    lines = []
    for group in groups.values():
        lines.append(
            (
                group.family.title,
                *(
                    spread_of(name, group, 1)
                    for name in (
                        "harmless",
                        "harmless_upper",
                        "overall_largest_upper",
                        "damaged",
                        "damaged_5_upper",
                        "split_half_largest_upper",
                    )
                ),
            )
        )
    return [
        "## 1. How much do single units matter?",
        table(
            [
                "network",
                "units below one point overall (%)",
                "the same, upper half of the layers (%)",
                "largest overall drop there",
                "units that damage a class (%)",
                "by five points and more, upper half (%)",
                "largest class drop there",
            ],
            lines,
        ),
        "A unit damages a class if its largest class drop is more than chance: p against the null "
        "model of [statistics](../guides/statistics.md), Benjamini-Hochberg at 5 % within the "
        "layer. The largest of many drops is positive by chance alone: so the table has the drop "
        "of a class that was chosen on one half of the images and measured on the other, and the "
        "picture the noise floor, what a harmless unit with as many changed predictions shows. "
        "Tables of all layers stand [below](#all-layers).",
        f"![For every layer of every family, the largest class drop and the overall drop of each "
        f"unit, with the noise floor.]({shown}/paper-drops.png)",
        _drops_sentence(groups),
    ]


def _drops_sentence(groups: Groups) -> str:
    first = {
        group.family.title: np.mean([each["overall_largest"].iloc[0] for each in group.drops])
        for group in groups.values()
    }
    above = [title for title, value in first.items() if value >= analysis.POINT]
    return (
        "The units of the first layer are an exception that the paper did not look at: its largest "
        "overall drop is "
        + "; ".join(f"{points(value)} ({title})" for title, value in first.items())
        + f". It reaches a point in {len(above)} of {len(first)} families."
    )


def prediction_section(groups: Groups, shown: str) -> list[str]:
    """Question 2: what predicts them."""
    lines = []
    for group in groups.values():
        for name in ATTRIBUTES:
            row = group.predicted.loc[name]
            lines.append(
                (
                    group.family.title,
                    f"`{name}`",
                    *(correlation_of(group, name, target) for target in TARGETS),
                    interval(row["difference"], row["difference_low"], row["difference_high"]),
                )
            )
    agreement = [
        (
            group.family.title,
            *(
                f"{number(group.reliability[target].min())} to "
                f"{number(group.reliability[target].max())}, mean "
                f"{number(group.reliability[target].mean())}"
                for target in TARGETS[:2]
            ),
        )
        for group in groups.values()
    ]
    return [
        "## 2. What predicts it?",
        "Spearman correlation over the units of a layer, mean over the layers. The largest class "
        "drop is the split-half one. The difference is class drop minus overall drop, units "
        "resampled. [attributes](../guides/attributes.md) has the formulas.",
        table(
            [
                "network",
                "attribute",
                *(TARGET_TITLES[name] for name in TARGETS),
                "class minus overall",
            ],
            lines,
        ),
        f"![Heat maps of the rank correlation of every attribute with every target, layer by "
        f"layer.]({shown}/paper-correlations.png)",
        "No attribute can agree much better with a target than the target with itself. Measured on "
        "two halves of the images, the targets of the units of a layer agree like this (Spearman, "
        "range and mean over layers):",
        table(["network", *(TARGET_TITLES[name] for name in TARGETS[:2])], agreement),
        _prediction_sentence(groups),
        _loss_sentence(groups),
    ]


def _loss_sentence(groups: Groups) -> str:
    """Say whether overall harm is predicted better when it is measured finely."""
    overall, loss = (
        np.concatenate([group.predicted.loc[list(ATTRIBUTES), target] for group in groups.values()])
        for target in ("accuracy_drop", "loss_change")
    )
    better, every = int((loss > overall).sum()), len(loss)
    reading = (
        "Part of what looks unpredictable in the overall drop is its coarseness: few images flip."
        if better > every / 2
        else "So it is not the coarseness of the accuracy that hides a relation."
    )
    return (
        "The loss change is overall harm too, but on a scale that moves before a prediction flips. "
        f"Over the {len(ATTRIBUTES)} attributes of the table and all families its mean correlation "
        f"is {number(loss.mean())}, that of the overall drop {number(overall.mean())}; it is the "
        f"larger in {better} of {every} pairs of attribute and family. {reading}"
    )


def _prediction_sentence(groups: Groups) -> str:
    best = {
        target: [group.predicted[target].idxmax() for group in groups.values()]
        for target in TARGETS[:2]
    }
    parts = []
    for target, names in best.items():
        counted = pd.Series(names).value_counts()
        parts.append(
            f"for the {TARGET_TITLES[target]} "
            + listed([f"`{name}` ({count})" for name, count in counted.items()])
        )
    spreads = [
        row[f"{target}_most"] - row[f"{target}_least"]
        for group in groups.values()
        if len(group.members) > 1
        for _, row in group.predicted.iterrows()
        for target in TARGETS[:2]
    ]
    between = (
        f" Seeds of one family differ in these means by {number(float(np.median(spreads)))} in the "
        f"median and {number(max(spreads))} at most."
        if spreads
        else ""
    )
    return (
        f"The best single attribute of those in the table, with the number of families: "
        f"{'; '.join(parts)}.{between}"
    )


def cells_section(groups: Groups) -> list[str]:
    """Question 3: cells of unit and class."""
    lines = []
    for group in groups.values():
        for name in OF_CELLS:
            rows = [group.cells.loc[(name, figure)] for figure in CELL_FIGURES]
            lines.append(
                (
                    group.family.title,
                    f"`{name}`",
                    *(
                        cell
                        for row in rows[:2]
                        for cell in (
                            spread(row["value"], row["value_least"], row["value_most"]),
                            number(row["ceiling"]),
                            f"{row['told']:.0f} of {row['layers']:.0f}",
                        )
                    ),
                    points(rows[2]["value"], 0),
                    points(rows[2]["halves"], 0),
                )
            )
    top = [line for group in groups.values() for line in _top_cells(group)]
    return [
        "## 3. Which class suffers?",
        "The largest class drop says how much a unit matters to some class. Here every cell of "
        "unit and class is asked: does what an attribute says of class k foretell the drop of it? "
        "*Within a unit* is Spearman's correlation over the classes, mean over units (which class "
        "suffers), *within a class* that over the units, mean over classes (which unit matters), "
        f"*top cells* the share of the {points(analysis.TOP_CELLS, 0)} % of the cells with the "
        "largest attribute that are among as many with the largest drops "
        f"({points(analysis.TOP_CELLS, 0)} % by chance), beside that share between the drops of "
        "two halves of the images. Means over layers. Attributes come from one half of the images "
        "and drops from the other, so no image is in both; the ceiling is what a perfect attribute "
        "would reach on so few images. *Beyond shuffles* counts the layers of all seeds in which "
        "neither the attribute shuffled among units, which keeps what makes classes fragile "
        "whoever is ablated, nor shuffled among classes reaches the figure (q at most "
        f"{points(analysis.LEVEL, 0)} %): [statistics](../guides/statistics.md) has the formulas.",
        table(
            [
                "network",
                "attribute",
                "within a unit",
                "ceiling",
                "beyond shuffles",
                "within a class",
                "ceiling",
                "beyond shuffles",
                "top cells",
                "of halves",
            ],
            lines,
        ),
        "In the last map of the first seed, units and classes drawn again:",
        table(["network", "attribute", "units", *CELL_TITLES], top),
        _cells_sentence(groups),
    ]


def _top_cells(group: Group) -> list[tuple[str, ...]]:
    """Figures of the last map with their intervals, attribute by attribute."""
    table = group.members[0].cells
    of_top = table[table["layer"] == group.family.top].set_index(["attribute", "figure"])
    lines = []
    for name in OF_CELLS:
        rows = [of_top.loc[(name, figure)] for figure in CELL_FIGURES]
        shown = (interval(row["value"], row["low"], row["high"]) for row in rows)
        lines.append((group.family.title, f"`{name}`", str(rows[0]["units"]), *shown))
    return lines


def _cells_sentence(groups: Groups) -> str:
    """Say which attribute tells most, and how much of what can be told."""
    parts = []
    for figure, words in zip(CELL_FIGURES[:2], CELL_TITLES[:2], strict=True):
        tables = (group.cells.xs(figure, level="figure") for group in groups.values())
        known = [of_figure.dropna(subset="value") for of_figure in tables]
        best = [rows.sort_values("value").iloc[-1] for rows in known if len(rows)]
        counted = pd.Series([row.name for row in best], dtype=object).value_counts()
        reached = [row["value"] / row["ceiling"] for row in best if row["ceiling"] > 0]
        named = listed([f"`{name}` ({count})" for name, count in counted.items()])
        share = (
            f", at {points(min(reached), 0)} to {points(max(reached), 0)} % of the ceiling"
            if reached
            else ""
        )
        parts.append(f"{words} {named}{share}")
    return f"The best attribute, with the number of families: {'; '.join(parts)}."


def concentration_section(compared: pd.DataFrame, shown: str) -> list[str]:
    """Question 4: rotation, dropout, batch norm."""
    lines = [
        (
            row["what"],
            number(row["first"]),
            number(row["second"]),
            interval(row["difference"], row["difference_low"], row["difference_high"]),
            interval(row["equal_harm"], row["equal_harm_low"], row["equal_harm_high"]),
            points(row["overall_first"], 2),
            points(row["overall_second"], 2),
            row["pairs"],
        )
        for _, row in compared.iterrows()
    ]
    return [
        "## 4. Rotation, dropout and batch norm",
        "How concentrated on few classes is the damage? The Gini coefficient is 0 if all classes "
        "suffer alike and nears 1 if one suffers alone; it is taken over units (or directions) "
        "that lose at least ten images. Directions are random orthogonal axes in the last map. "
        "Who loses few images loses them in few classes, so the difference is given twice: as it "
        "is, and between units that lose as many images (the coefficient of a side beside the "
        "logarithm of the number of lost images). Intervals of the twins resample networks and "
        "units in the first, units in the second.",
        table(
            [
                "first minus second",
                "Gini, first",
                "Gini, second",
                "difference",
                "at equal numbers of lost images",
                "overall drop, first",
                "overall drop, second",
                "pairs of seeds of this sign",
            ],
            lines,
        ),
        f"![Differences of the mean Gini coefficient with their intervals.]"
        f"({shown}/paper-concentration.png)",
    ]


def curves_section(groups: Groups, shown: str) -> list[str]:
    """Question 5: cumulative ablation."""
    lines, least = [], []
    for group in groups.values():
        of_group = group.areas
        least.append(of_group.mean(axis=1).idxmin())
        lines.append(
            (
                group.family.title,
                *(
                    spread(
                        of_group.loc[order].mean(),
                        of_group.loc[order].min(),
                        of_group.loc[order].max(),
                        digits=3,
                    )
                    for order in CURVE_ORDERS
                ),
            )
        )
    named = [order for order in CURVE_ORDERS if order != "random"]
    beats = {
        order: [
            group.family.title
            for group in groups.values()
            if (group.areas.loc[order] < group.areas.loc["random"]).all()
        ]
        for order in named
    }
    return [
        "## 5. Many units",
        "The units of the last map are removed one after another, the first of an order first. "
        "The area under the curve is over the share of units removed: a ranking that puts "
        "important units first has a small one. Measured drops come from one half of the images, "
        "all curves from the other.",
        table(["network", *CURVE_ORDERS], lines),
        f"![Accuracy against the share of units removed, by order.]({shown}/paper-curves.png)",
        " ".join(
            f"Removing by {order} hurts more than a random order in all seeds of "
            f"{len(titles)} of {len(groups)} families ({listed(titles)})."
            for order, titles in beats.items()
        )
        + " The smallest area is that of "
        + listed([f"{order} ({count})" for order, count in pd.Series(least).value_counts().items()])
        + ", with the number of families.",
    ]


def glyphs_section(groups: Groups, shown: str) -> list[str]:
    """Question 6: many classes."""
    if "glyphs" not in groups:
        return []
    group = groups["glyphs"]
    result = group.results[0]
    floor = np.mean([each["floor_median"].mean() for each in group.drops])
    ten = [other for name, other in groups.items() if name != "glyphs"]
    fewer = np.mean([each["floor_median"].mean() for other in ten for each in other.drops])
    return [
        "## The second data set",
        f"Ten classes are few for damage to single classes: who ruins one of them costs ten "
        f"points overall. So the questions above are asked of {result.classes} classes as well: "
        f"characters (digits, Latin, Greek and Cyrillic letters, signs) in {len(glyphs.FACES)} "
        "faces of the open fonts DejaVu and STIX, turned, sheared, scaled, moved, unevenly lit and "
        "noisy, drawn by `paper/glyphs.py` from a seed; the networks never saw the test images, "
        "but the same faces. In the tables it is "
        f"*{group.family.title}*, with {len(result.labels) // result.classes} images of a class.",
        f"![One test image of each of the {result.classes} classes.]({shown}/paper-glyphs.png)",
        f"With so few images of so many classes chance alone does more: the noise floor of the "
        f"largest class drop, median over units and mean over layers, is {points(floor, 2)} points"
        + (f", {points(fewer, 2)} in the networks of ten classes" if ten else "")
        + ". Ruining one class altogether costs "
        f"{points(1 / result.classes, 2)} points overall here: that no unit matters overall is, to "
        "that extent, arithmetic.",
    ]


def cannot_tell(groups: Groups) -> list[str]:
    """Name the limits of all this."""
    agreement = {
        target: np.mean([group.reliability[target].mean() for group in groups.values()])
        for target in TARGETS[:2]
    }
    lower = min(agreement, key=lambda target: agreement[target])
    single = [group.family.title for group in groups.values() if len(group.members) == 1]
    return [
        "## What these data cannot tell",
        "\n".join(
            [
                "- The networks are small and so are the images; the paper's were AlexNet, VGG and "
                "ResNet on photographs with hundreds of classes. Directions can be compared, "
                "figures cannot.",
                "- Concept alignment, the paper's fourth attribute, needs masks of concepts, and "
                "neither data set has any.",
                f"- The {TARGET_TITLES[lower]} is the noisier of the two targets (agreement of "
                f"halves {number(agreement[lower])} against "
                f"{number(max(agreement.values()))}, mean over networks): part of the difference "
                "in how well they are predicted is the noise of the targets.",
                "- Intervals over units take the network as given. What a family does is known "
                "only as far as its seeds agree"
                + (f"; of {listed(single)} there is one network each" if single else "")
                + ".",
                "- Single ablations do not see units that stand in for each other: both look "
                "harmless.",
                "- A correlation describes; it does not say that the attribute is why a unit "
                "matters.",
            ]
        ),
    ]


def all_layers(groups: Groups) -> list[str]:
    """Tabulate question 1 layer by layer."""
    blocks = [
        "## All layers",
        "Mean over the seeds of a family. Drops in points, shares in per cent.",
    ]
    for group in groups.values():
        mean, _, _ = analysis.over_seeds(group.drops)
        lines = [
            (
                f"`{layer}`",
                number(row["units"], 0),
                points(row["overall_median"], 2),
                points(row["overall_largest"], 2),
                points(row["class_median"], 2),
                points(row["floor_median"], 2),
                points(row["split_half_median"], 2),
                points(row["class_largest"], 2),
                points(row["damaged"]),
                *(number(group.reliability.loc[layer, target]) for target in TARGETS[:2]),
            )
            for layer, row in mean.iterrows()
        ]
        blocks += [
            f"### {group.family.title[0].upper()}{group.family.title[1:]}",
            table(
                [
                    "layer",
                    "units",
                    "overall, median",
                    "largest",
                    "largest class drop, median",
                    "its noise floor",
                    "its split-half estimate",
                    "largest",
                    "units that damage",
                    "halves agree: overall",
                    "class",
                ],
                lines,
            ),
        ]
    return blocks
