"""Pictures of one result: ``result.plot``."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy.cluster import hierarchy
from scipy.spatial import distance

from pyablate._validation import check_choice, check_count, check_level
from pyablate.analysis.correlation import chosen_layers, correlate
from pyablate.analysis.statistics import (
    adjusted,
    layer_rows,
    max_class_test,
    mcnemar,
    sampling_variance,
    significance,
)
from pyablate.analysis.targets import unit_targets
from pyablate.analysis.unit_table import aligned, attribute_columns, formula_of, preferred_classes
from pyablate.plots.drawing import (
    ABOVE,
    CHANCE,
    CLASS_DROP,
    COLOURS,
    MARKERS,
    entry,
    label_of,
    legend,
    linear_part,
    new_axes,
    plain,
    squeezed,
    stretch,
    stretch_bar,
    tick,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import xarray as xr
    from matplotlib.axes import Axes

    from pyablate.results.arrays import Floats, Ints
    from pyablate.results.record import Record, Rows


@dataclass(frozen=True)
class ResultPlots:
    """Pictures of one result: ``result.plot``.

    Attributes
    ----------
    result : AblationResult
        What is drawn.

    Examples
    --------
    >>> axes = result.plot.drops()
    >>> axes.get_ylabel()
    'largest class accuracy drop (percentage points)'
    """

    result: Record

    def _said(self, label: str) -> str:
        """Say agreement instead of accuracy where there are no labels."""
        return label.replace("accuracy", self.result.word)

    def drops(
        self,
        drop: Literal["max_class_drop", "accuracy_drop"] = "max_class_drop",
        *,
        layers: str | Sequence[str] | None = None,
        fdr: float = 0.05,
        names: int = 1,
        log: bool | None = None,
        limit: float | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """Draw every unit as a dot, layer by layer, and what chance would show.

        Units whose drop is more than chance are blue, all others grey: by the test of
        :func:`pyablate.analysis.statistics.max_class_test`, or for the overall accuracy by the
        exact McNemar test over all images, both adjusted over the units of a layer. The grey band
        is the noise floor, the largest class drop to expect of harmless units (:func:`noise_floor
        <pyablate.analysis.statistics.noise_floor>`): 5 % to 95 % of the layer's units, with the
        median. The overall drop of a harmless unit is 0 on average. Of an estimated run only that
        can be drawn, with the 95 % interval of each unit.

        Parameters
        ----------
        drop : str
            ``"max_class_drop"`` or ``"accuracy_drop"``.
        layers : str or sequence of str, optional
            Names or globs; by default all.
        fdr : float
            False discovery rate of what is called more than chance.
        names : int
            How many units of each layer to name, the largest drops first.
        log : bool, optional
            Whether the axis is logarithmic beyond drops near 0; by default where a single unit
            would take half of it.
        limit : float, optional
            Percentage points at which the axis ends; units beyond are drawn as triangles there.
        ax : matplotlib.axes.Axes, optional
            Where to draw; by default a new figure.

        Raises
        ------
        ImportError
            matplotlib is not installed.
        ValueError
            Another drop, no such layer, ``limit`` not above 0, ``fdr`` not between 0 and 1.
        """
        check_level("fdr", fdr)
        _check_limit(limit)
        q, floor = _chance(self.result, drop)
        found = q <= fdr
        chosen = chosen_layers(self.result, layers)
        axes = new_axes(ax, width=max(5.0, 1.5 + 1.1 * len(chosen)), height=4.4)
        if floor is None:
            axes.axhline(0, color=CHANCE, linewidth=1, zorder=0)
        else:
            _floors(axes, [100 * floor[rows] for rows in chosen.values()])
        drops = 100 * getattr(self.result, drop)
        place = np.random.default_rng(0).uniform(-0.3, 0.3, len(drops))
        for number, rows in enumerate(chosen.values()):
            place[rows] += number
        shown = np.concatenate(list(chosen.values()))
        for rows, colour, meaning in (
            (shown[~found[shown]], CHANCE, "unit within chance"),
            (shown[found[shown]], COLOURS[0], f"unit beyond chance (q ≤ {fdr:g})"),
        ):
            if len(rows):
                style: dict[str, Any] = {"color": colour, "alpha": 0.8, "linewidths": 0}
                _dots(axes, place[rows], drops[rows], limit, s=12, label=meaning, **style)
        if self.result.estimate is not None:
            _interval(axes, place[shown], drops[shown], 100 * self.result.half_width(drop)[shown])
        for rows in chosen.values():
            for row in rows[np.argsort(-drops[rows], kind="stable")][:names]:
                text = _name(self.result, row, with_class=drop == "max_class_drop")
                at = drops[row] if limit is None else np.clip(drops[row], -limit, limit)
                axes.annotate(text, (place[row], at), **ABOVE)
        tick(axes.xaxis, list(chosen), turned=len(chosen) > 5)
        ylabel = self._said(label_of(drop)[0])
        axes.set(xlim=(-0.5, len(chosen) - 0.5), xlabel="layer", ylabel=ylabel)
        axes.margins(y=0.12)
        axes.use_sticky_edges = False  # the bands, else dots at 0 were cut in half
        stretch(axes.yaxis, drops[shown], log if limit is None else bool(log))
        legend(axes)
        return axes

    def heat_map(
        self,
        units: int | Rows = 20,
        *,
        order: Literal["drop", "layer", "cluster"] = "drop",
        fdr: float = 0.05,
        limit: float | None = None,
        log: bool | None = None,
        classes: int = 50,
        ax: Axes | None = None,
    ) -> Axes:
        """Draw the accuracy drop of every class for some units; dots mark what is significant.

        Classes without images are left out, which the axis says.

        Parameters
        ----------
        units : int, or labels, numbers, a mask or a slice
            How many units, those with the largest class drop; or which.
        order : str
            Of the rows: ``"drop"``, the largest class drop first; ``"layer"``, as in the result;
            ``"cluster"``, units with alike drops side by side (average linkage of the Euclidean
            distances).
        fdr : float
            False discovery rate, see :func:`pyablate.analysis.statistics.significance`.
        limit : float, optional
            Percentage points at which the colours end; by default the largest drop or gain.
        log : bool, optional
            Whether the colours are logarithmic beyond drops near 0; by default where one drop in
            fifty would take half of them, and no ``limit`` is given.
        classes : int
            Draw at most so many, those of which one of these units changes most images; they keep
            their order.
        ax : matplotlib.axes.Axes, optional
            Where to draw; by default a new figure.

        Raises
        ------
        ImportError
            matplotlib is not installed.
        ValueError
            No such unit or order, less than one unit or class, ``limit`` not above 0, ``fdr`` not
            between 0 and 1.
        """
        result = self.result
        _check_limit(limit)
        check_count("classes", classes)
        rows = _ordered(result, _chosen(result, units), order)
        shown = _most_changed(result, rows, classes)
        drops = 100 * result.class_accuracy_drop[rows][:, shown]
        significant = significance(result, fdr=fdr)["significant"].to_numpy()[rows][:, shown]
        width, height = 2.6 + 0.42 * len(shown), 1.6 + 0.22 * len(rows)
        axes = new_axes(ax, width=min(width, 18), height=min(height, 12))
        axes.spines[:].set_visible(False)
        end = limit or float(np.nanmax(np.abs(drops))) or 1.0
        stretched = log if log is not None else limit is None and squeezed(drops)
        linear = linear_part(drops)
        colours = _colours(end, linear if stretched else None)
        # Each cell its own colour: matplotlib would blend many small ones.
        style: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest"}
        image = axes.imshow(drops, cmap="RdBu_r", norm=colours, **style)
        down, across = np.nonzero(significant)
        axes.scatter(across, down, s=12, color="black", edgecolors="white", linewidths=0.6)
        tick(axes.yaxis, result.units["label"].iloc[rows].tolist())
        tick(axes.xaxis, [result.class_names[k] for k in shown], turned=True)
        xlabel = _classes_said(result, len(shown))
        axes.set(xlabel=xlabel, ylabel=f"unit switched off (dot: q ≤ {fdr:g})")
        beyond = "neither" if limit is None else "both"
        label = self._said(CLASS_DROP)
        bar = axes.figure.colorbar(image, ax=axes, label=label, extend=beyond, shrink=0.8)
        if stretched:
            stretch_bar(bar, linear, end)
        return axes

    def profile(
        self,
        unit: str | int,
        *,
        classes: int = 20,
        fdr: float = 0.05,
        ax: Axes | None = None,
    ) -> Axes:
        """Draw what one unit does to each class: images lost, images gained, and the drop.

        Parameters
        ----------
        unit : str or int
            Label ``"layer:unit"`` or row number.
        classes : int
            Draw at most so many, those with the largest changes; they keep their order.
        fdr : float
            Drops with ``q`` up to this are filled, see
            :func:`pyablate.analysis.statistics.significance`.
        ax : matplotlib.axes.Axes, optional
            Where to draw; by default a new figure.

        Raises
        ------
        ImportError
            matplotlib is not installed.
        ValueError
            No such unit, less than one class, ``fdr`` not between 0 and 1.
        """
        result = self.result
        row = int(result.rows(unit)[0])
        check_count("classes", classes)
        significant = significance(result, fdr=fdr)["significant"].to_numpy()[row]
        sizes = np.maximum(result.class_sizes, 1)
        # Estimates of a few may be negative; none is drawn as the other.
        lost, gained = (
            100 * np.maximum(counts[row], 0) / sizes for counts in (result.lost, result.gained)
        )
        present = np.flatnonzero(result.class_sizes)
        most = present[np.argsort(-(lost + gained)[present], kind="stable")][:classes]
        shown = np.sort(most)
        place = np.arange(len(shown))
        axes = new_axes(ax, width=6.4, height=1.6 + 0.27 * len(shown))
        axes.barh(place, lost[shown], height=0.6, color=COLOURS[1], label="right → wrong")
        axes.barh(place, -gained[shown], height=0.6, color=COLOURS[5], label="wrong → right")
        for which, face, meaning in (
            (~significant[shown], "white", "drop"),
            (significant[shown], "black", f"drop, q ≤ {fdr:g}"),
        ):
            if which.any():
                net = (lost - gained)[shown][which]
                style: dict[str, Any] = {"s": 26, "color": face, "edgecolors": "black", "zorder": 3}
                axes.scatter(net, place[which], label=meaning, **style)
        if result.estimate is not None:
            width = 100 * result.half_width("class_accuracy_drop")[row][shown]
            _interval(
                axes, (lost - gained)[shown], np.asarray(place, np.float64), width, upright=False
            )
        axes.axvline(0, color="black", linewidth=0.8)
        tick(axes.yaxis, [result.class_names[k] for k in shown])
        axes.invert_yaxis()
        axes.set_xlabel("share of the class's images (%); drop (percentage points)")
        title = f"{result.units['label'].iloc[row]}, replaced by: {result.intervention}"
        axes.set_title(plain(title), fontsize="medium")
        legend(axes)
        return axes

    def scatter(
        self,
        table: xr.Dataset | pd.DataFrame,
        attribute: str,
        target: str = "split_half_drop",
        *,
        layers: str | Sequence[str] | None = None,
        method: str = "spearman",
        preferred: str = "class_selectivity_class",
        seed: int = 0,
        log: bool | None = None,
        limit: float | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """Draw an attribute of the units against what their ablation does.

        Each layer has its own colour, marker and correlation: attributes are compared within one
        layer only.

        Parameters
        ----------
        table : xarray.Dataset or pandas.DataFrame
            Attributes over the unit labels, see :func:`pyablate.correlate`.
        attribute : str
            Which.
        target : str
            What to predict, see :func:`pyablate.analysis.targets.unit_targets`.
        layers : str or sequence of str, optional
            Names or globs; by default all.
        method : str
            ``spearman``, ``pearson`` or ``kendall``, with its 95 % bootstrap interval.
        preferred : str
            Variable of the table with each unit's preferred class.
        seed : int
            Of everything random.
        log : bool, optional
            Whether both axes are logarithmic beyond numbers near 0; by default each where a single
            unit would take half of it.
        limit : float, optional
            Where the upward axis ends, in its units; units beyond are drawn as triangles there.
        ax : matplotlib.axes.Axes, optional
            Where to draw; by default a new figure.

        Raises
        ------
        ImportError
            matplotlib is not installed.
        ValueError, TypeError
            ``limit`` not above 0, and whatever :func:`pyablate.correlate` raises.
        """
        _check_limit(limit)
        result, frame = self.result, aligned(table, self.result)
        numbers = attribute_columns(frame, attribute)[attribute]
        classes = preferred_classes(frame, preferred, result.class_names)
        values = unit_targets(result, target, preferred=classes, seed=seed)[target]
        chosen = chosen_layers(result, layers)
        found = correlate(
            result,
            frame,
            attributes=attribute,
            targets={target: values},
            methods=method,
            layers=list(chosen),
            seed=seed,
        )
        axes = new_axes(ax, width=6.4, height=4.8)
        label, scale = label_of(target)
        lines = zip(found.itertuples(), cycle(COLOURS), cycle(MARKERS), strict=False)
        for line, colour, marker in lines:
            rows = chosen[str(line.layer)]
            meaning = f"{line.layer}: {line.correlation:+.2f} [{line.low:+.2f}, {line.high:+.2f}]"
            style: dict[str, Any] = {"s": 20, "color": colour, "alpha": 0.75, "linewidths": 0}
            across, up = numbers[rows], scale * values[rows]
            _dots(axes, across, up, limit, label=entry(meaning), marker=marker, **style)
        axes.set(xlabel=_attribute_label(table, attribute), ylabel=plain(self._said(label)))
        shown = np.concatenate(list(chosen.values()))
        stretch(axes.xaxis, numbers[shown], log)
        stretch(axes.yaxis, scale * values[shown], log if limit is None else bool(log))
        legend(axes, title=f"{method}, 95 % interval")
        return axes


def _chance(result: Record, drop: str) -> tuple[Floats, Floats | None]:
    """Return the adjusted p of each unit, float64 [unit], and the noise floor if there is one."""
    check_choice("drop", drop, ("max_class_drop", "accuracy_drop"))
    if drop == "max_class_drop":
        tests = max_class_test(result, splits=1)
        return tests["q"].to_numpy(), tests["noise_floor"].to_numpy()
    counts = result.lost.sum(axis=1), result.gained.sum(axis=1)
    p = mcnemar(*counts, sampling_variance(result, "accuracy_drop"))
    for rows in layer_rows(result).values():
        p[rows] = adjusted(p[rows])
    return p, None


def _check_limit(limit: float | None) -> None:
    if limit is not None and not limit > 0:
        raise ValueError(f"limit: expected a number above 0, got {limit!r}")


def _dots(axes: Axes, x: Floats, y: Floats, limit: float | None, **style: Any) -> None:
    """Draw dots; those beyond the limit as triangles where the axis ends, named by no legend."""
    if limit is None:
        axes.scatter(x, y, **style)
        return
    axes.set_ylim(-limit if (y < 0).any() or axes.get_ylim()[0] < 0 else 0, limit)
    inside = np.abs(y) <= limit
    axes.scatter(x[inside], y[inside], **style)
    edge = style | {"s": 3 * style["s"], "label": "_beyond", "clip_on": False}
    for marker, beyond in (("^", y > limit), ("v", y < -limit)):
        if beyond.any():
            ends = np.full(int(beyond.sum()), limit if marker == "^" else -limit)
            axes.scatter(x[beyond], ends, **edge | {"marker": marker})


def _attribute_label(table: Any, attribute: str) -> str:
    """Name of an attribute, with its formula where the table says it."""
    name, formula = attribute.replace("_", " "), formula_of(table, attribute)
    return "\n".join(wrap(plain(f"{name}: {formula}" if formula else name), 80))


def _most_changed(result: Record, rows: Ints, most: int) -> Ints:
    """Classes with images, at most so many: those of which one of these units changes most."""
    present = np.flatnonzero(result.class_sizes)
    # In images: a class of one image easily loses all of its accuracy.
    changed = np.abs(result.lost[rows] - result.gained[rows]).max(axis=0)[present]
    return np.sort(present[np.argsort(-changed, kind="stable")][:most])


def _classes_said(result: Record, shown: int) -> str:
    present = int((result.class_sizes > 0).sum())
    if shown < present:
        return f"class ({shown} of {present:,} with images, those of which most change)"
    if present < result.classes:
        return f"class (the {present:,} of {result.classes:,} with images)"
    return "class"


def _colours(end: float, linear: float | None) -> Any:
    """Colours from ``-end`` to ``end``, logarithmic beyond ``linear`` if there is one."""
    from matplotlib import colors  # an extra; the axes are there, so it is, too

    if linear is None:
        return colors.Normalize(-end, end)
    return colors.SymLogNorm(min(linear, end), vmin=-end, vmax=end)


def _interval(axes: Axes, x: Floats, y: Floats, width: Floats, *, upright: bool = True) -> None:
    """Draw 95 % intervals of what an estimated run estimates."""
    ends: dict[str, Any] = {"yerr" if upright else "xerr": width}
    style: dict[str, Any] = {"fmt": "none", "ecolor": CHANCE, "elinewidth": 0.8, "zorder": 1}
    axes.errorbar(x, y, **ends, label="95 % interval", **style)


def _floors(axes: Axes, floors: Sequence[Floats]) -> None:
    low, middle, high = np.transpose([np.quantile(floor, [0.05, 0.5, 0.95]) for floor in floors])
    place = np.arange(len(floors))
    style: dict[str, Any] = {"width": 0.9, "color": CHANCE, "alpha": 0.35, "zorder": 0}
    meaning = "noise floor (median, 5 % to 95 % of units)"
    axes.bar(place, high - low, bottom=low, label=meaning, **style)
    axes.hlines(middle, place - 0.45, place + 0.45, color=CHANCE, linewidth=1.5, zorder=0)


def _name(result: Record, row: int, *, with_class: bool) -> str:
    unit = result.units["unit"].iloc[row]
    name = f"unit {unit}" if unit >= 0 else plain(result.units["label"].iloc[row])
    return f"{name}:\n{plain(result.class_names[result.max_class[row]])}" if with_class else name


def _chosen(result: Record, units: int | Rows) -> Ints:
    if isinstance(units, int | np.integer) and not isinstance(units, bool):
        check_count("units", units)
        return _by_drop(result, np.arange(len(result.units)))[:units]
    rows = result.rows(units)
    if not len(rows):
        raise ValueError("units: expected at least 1, got none")
    return rows


def _by_drop(result: Record, rows: Ints) -> Ints:
    """Order rows by the largest class drop; where small classes tie, by the drop of all images."""
    order: Ints = np.lexsort((-result.accuracy_drop[rows], -result.max_class_drop[rows]))
    return rows[order]


def _ordered(result: Record, rows: Ints, order: str) -> Ints:
    check_choice("order", order, ("drop", "layer", "cluster"))
    if order == "drop":
        return _by_drop(result, rows)
    if order == "layer":
        return np.sort(rows)
    if len(rows) < 2:
        return rows
    apart = distance.pdist(np.nan_to_num(result.class_accuracy_drop[rows]))
    tree = hierarchy.linkage(apart, "average", optimal_ordering=True)
    return rows[hierarchy.leaves_list(tree)]
