"""The pictures of the document; every function takes what was measured and writes one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from paper import glyphs
from paper.analysis import TARGET_TITLES
from pyablate import AblationResult
from pyablate.analysis.statistics import layer_rows

mpl.use("agg")
BLUE, ORANGE, GREEN, PINK, GREY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#777777"
CURVES = {"measured drop": BLUE, "selectivity": ORANGE, "L1 norm": GREEN, "random": GREY}


def drops(families: Mapping[str, Sequence[AblationResult]], path: Path) -> None:
    """Largest class drop and overall drop of every unit, by layer, seeds of a family together."""
    figure, panels = _panels(len(families), width=6.0, height=3.1)
    for panel, (title, results) in zip(panels, families.items(), strict=True):
        layers = list(layer_rows(results[0]))
        floors = [result.noise_floor() for result in results]
        generator = np.random.default_rng(0)
        for column, layer in enumerate(layers):
            of_layer = [layer_rows(result)[layer] for result in results]
            for result, rows in zip(results, of_layer, strict=True):
                place = column + generator.uniform(-0.17, 0.17, len(rows))
                for shift, values, colour in (
                    (-0.2, result.max_class_drop, BLUE),
                    (0.2, result.accuracy_drop, ORANGE),
                ):
                    panel.plot(
                        place + shift, 100 * values[rows], ".", color=colour, ms=3, alpha=0.5, mew=0
                    )
            every = [values[rows] for values, rows in zip(floors, of_layer, strict=True)]
            level = 100 * np.median(np.concatenate(every))
            panel.plot([column - 0.4, column], [level, level], color="black", lw=1.2)
        panel.set_yscale("symlog", linthresh=1)
        panel.set_ylim(-3, 110)
        panel.set_yticks([-1, 0, 1, 10, 100], ["-1", "0", "1", "10", "100"])
        panel.axhline(0, color=GREY, lw=0.5)
        panel.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=7)
        panel.set_title(title, fontsize=10)
        panel.set_ylabel("accuracy drop (points)", fontsize=8)
    marks = [
        plt.Line2D([], [], color=BLUE, marker="o", ls="", ms=4),
        plt.Line2D([], [], color=ORANGE, marker="o", ls="", ms=4),
        plt.Line2D([], [], color="black", lw=1.2),
    ]
    names = ["largest class drop", "overall drop"]
    figure.legend(
        marks,
        [*names, "noise floor of the largest class drop, median"],
        ncols=3,
        fontsize=8,
        loc="upper center",
        frameon=False,
    )
    _write(figure, path, top=0.94)


def correlations(tables: Mapping[str, Sequence[pd.DataFrame]], path: Path) -> None:
    """Heat maps, attribute by layer, of Spearman correlations with each target, mean over seeds.

    One row of panels per family.
    """
    first = next(iter(tables.values()))[0]
    targets = [target for target in TARGET_TITLES if target in set(first["target"])]
    attributes = list(dict.fromkeys(first["attribute"]))
    figure, grid = plt.subplots(
        len(tables),
        len(targets),
        squeeze=False,
        figsize=(3.2 * len(targets) + 1.5, (0.17 * len(attributes) + 1.2) * len(tables)),
        layout="constrained",
    )
    image = None
    for line, (title, each) in zip(grid, tables.items(), strict=True):
        joined = pd.concat(each)
        for panel, target in zip(line, targets, strict=True):
            means = joined[joined["target"] == target].pivot_table(
                index="attribute",
                columns="layer",
                values="correlation",
                aggfunc="mean",
                sort=False,
                dropna=False,
            )
            means = means.reindex(index=attributes, columns=list(dict.fromkeys(each[0]["layer"])))
            panel.set_facecolor("#dddddd")
            image = panel.imshow(means, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
            panel.set_title(f"{title}: {TARGET_TITLES[target]}", fontsize=9)
            panel.set_xticks(
                range(means.shape[1]), means.columns, rotation=60, ha="right", fontsize=7
            )
            names = attributes if panel is line[0] else []
            panel.set_yticks(range(len(attributes)), names or [""] * len(attributes), fontsize=7)
            panel.tick_params(length=0)
    bar = figure.colorbar(image, ax=grid, shrink=0.5, aspect=40)
    bar.set_label("Spearman correlation over the units of a layer (grey: not defined)", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def differences(table: pd.DataFrame, path: Path) -> None:
    """Gini differences with intervals: as they are, and between units that lose as many images."""
    height = 0.24 * len(table) + 1.1
    figure, panel = plt.subplots(figsize=(8, height), layout="constrained")
    place = np.arange(len(table))[::-1]
    for shift, name, colour, title in (
        (0.14, "difference", BLUE, "as it is"),
        (-0.14, "equal_harm", ORANGE, "between units that lose as many images"),
    ):
        middle = table[name].to_numpy()
        panel.hlines(
            place + shift, table[f"{name}_low"], table[f"{name}_high"], color=colour, lw=1.5
        )
        panel.plot(middle, place + shift, "o", color=colour, ms=4, label=title)
    panel.axvline(0, color=GREY, lw=0.8)
    panel.set_yticks(place, table["what"], fontsize=8)
    panel.set_ylim(-0.7, len(table) - 0.3)
    panel.set_xlabel("mean Gini coefficient, first minus second, with 95 % intervals")
    panel.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def curves(families: Mapping[str, Sequence[pd.DataFrame]], path: Path) -> None:
    """Accuracy against the share of units removed, mean of seeds and repeats, with their range."""
    figure, panels = _panels(len(families), width=3.6, height=2.9)
    for panel, (title, tables) in zip(panels, families.items(), strict=True):
        for order, colour in CURVES.items():
            each = pd.concat(
                [
                    table[table["order"] == order].groupby("removed")["accuracy"].mean()
                    for table in tables
                ],
                axis=1,
            )
            share = 100 * each.index / each.index.max()
            panel.plot(share, 100 * each.mean(axis=1), color=colour, label=order, lw=1.6)
            panel.fill_between(
                share, 100 * each.min(axis=1), 100 * each.max(axis=1), color=colour, alpha=0.2, lw=0
            )
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("units removed (%)", fontsize=8)
        panel.set_ylabel("accuracy (%)", fontsize=8)
        panel.set_ylim(0, 100)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        ncols=4,
        fontsize=9,
        loc="upper center",
        frameon=False,
    )
    _write(figure, path, top=0.93)


def sample(path: Path) -> None:
    """One test image of every class of the rendered characters."""
    pixels, _ = glyphs.images(1)
    wide, enlarged = 20, 2
    sheet = pixels.reshape(-1, wide, glyphs.SIZE, glyphs.SIZE).permute(0, 2, 1, 3)
    sheet = sheet.reshape(-1, wide * glyphs.SIZE)
    sheet = sheet.repeat_interleave(enlarged, 0).repeat_interleave(enlarged, 1)
    plt.imsave(path, sheet.numpy(), cmap="gray", vmin=0, vmax=1)


def _panels(count: int, *, width: float, height: float) -> tuple[plt.Figure, list[Axes]]:
    columns = min(count, 2 if width > 5 else 3)
    lines = -(-count // columns)
    figure, grid = plt.subplots(
        lines, columns, squeeze=False, figsize=(width * columns, height * lines + 0.4)
    )
    panels = list(grid.ravel())
    for empty in panels[count:]:
        empty.set_visible(False)
    return figure, panels[:count]


def _write(figure: plt.Figure, path: Path, *, top: float) -> None:
    figure.tight_layout(rect=(0, 0, 1, top))
    figure.savefig(path, dpi=110)
    plt.close(figure)
