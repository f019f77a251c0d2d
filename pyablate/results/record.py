"""The record of an ablation: flips, audit, and the accuracies and drops that follow.

One ablation changes few predictions, so the record is the list of *flips*: for each ablated unit
the images whose prediction changed, and to which class. Together with the baseline predictions
and the labels this is lossless; accuracies, confusion matrices and drops are computed from it.
Nothing here needs torch, a model or the extension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_array

from pyablate._validation import check_choice
from pyablate.results.arrays import Counts, Floats, Ints
from pyablate.results.audit import Audit
from pyablate.results.effort import Effort
from pyablate.results.estimate import Estimate
from pyablate.results.flips import Flips
from pyablate.results.measures import Measure
from pyablate.results.screening import Screening

if TYPE_CHECKING:
    import xarray as xr

_ESTIMATED = ("accuracy", "accuracy_drop", "class_accuracy_drop", "lost", "gained")
"""Figures that an estimated run has intervals of."""

Rows = Any
"""A label, a number, a slice, a mask, or a sequence of labels or numbers."""

MOST_DENSE = 10_000
"""Classes up to which a confusion matrix is a whole array unless asked for otherwise."""


def word(labelled: bool) -> str:
    """Say what a share of right predictions is called."""
    return "accuracy" if labelled else "agreement"


@dataclass(frozen=True, eq=False)
class Record:
    """Predictions of a network with each unit ablated, and what is counted from them.

    Statistics, plots, reports and stores know the record, and the record none of them. Users hold
    an :class:`AblationResult <pyablate.AblationResult>`, a record with all of these as methods,
    whose documentation tells what the fields are.
    """

    units: pd.DataFrame
    labels: Ints
    baseline: Ints
    flips: Flips
    class_names: tuple[str, ...]
    intervention: str = "zero"
    audit: Audit = field(default_factory=lambda: Audit(0, 0))
    strategy: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    effort: Effort = field(default_factory=lambda: Effort())
    measures: dict[str, Measure] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    labelled: bool = True
    screening: Screening | None = None
    estimate: Estimate | None = None

    def __repr__(self) -> str:
        """Size and summary in one line."""
        return (
            f"{type(self).__name__}({len(self.units)} units, {len(self.labels)} images, "
            f"{self.classes} classes, {self.intervention}, "
            f"{self._baseline}, {self.flip_count.sum():.0f} flips{self._guarantee})"
        )

    @property
    def guarantee(self) -> str:
        """What is promised: "exact"; "screened" and "estimated", see the attributes of the run."""
        if self.estimate is not None:
            return "estimated"
        return "exact" if self.screening is None else "screened"

    @property
    def _guarantee(self) -> str:
        if self.estimate is not None:
            return f", estimated from {int(self.estimate.drawn.sum())} computed pairs"
        if self.screening is None:
            return ""
        return f", screened: at most {self.screening.upper_bound:.2g} wrong at 95 %"

    @property
    def given_axes(self) -> dict[str, int]:
        """Axis of the units, by layer, where the run was given another than the network's own."""
        return dict(self.provenance.get("options", {}).get("axis", {}))

    @property
    def _baseline(self) -> str:
        if not self.labelled:
            return "no labels"
        return f"baseline accuracy {self.baseline_accuracy:.4f}"

    @property
    def word(self) -> str:
        """What a share of right predictions is: accuracy, or without labels agreement."""
        return word(self.labelled)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @cached_property
    def class_sizes(self) -> Ints:
        """int64 [class]: images of each class."""
        return np.bincount(self.labels, minlength=self.classes)

    @cached_property
    def baseline_accuracy(self) -> float:
        """Share of images that the intact network gets right."""
        return float((self.baseline == self.labels).mean())

    @cached_property
    def baseline_class_accuracy(self) -> Floats:
        """float64 [class]: the same within each class; NaN for a class without images."""
        return self._shares(self._hits_by_class(self.baseline))

    @cached_property
    def lost(self) -> Counts:
        """int64 [unit, class]: images of a class that went from right to wrong.

        In an estimated run this and the two below are float64, estimates of these numbers.
        """
        return self._count(self._was_right)

    @cached_property
    def gained(self) -> Counts:
        """int64 [unit, class]: images of a class that went from wrong to right."""
        return self._count(self._is_right)

    @cached_property
    def undefined(self) -> Counts:
        """int64 [unit, class]: images of a class without a prediction, as logits are not finite.

        Their prediction is -1, "none"; they count as wrong.
        """
        return self._count(self.flips.prediction < 0)

    @cached_property
    def accuracy(self) -> Floats:
        """float64 [unit]: accuracy with the unit ablated."""
        return self.baseline_accuracy - self.accuracy_drop

    @cached_property
    def accuracy_drop(self) -> Floats:
        """float64 [unit]: accuracy before minus after; positive means harm."""
        net: Counts = (self.lost - self.gained).sum(axis=1)
        return np.asarray(net / len(self.labels), np.float64)

    @cached_property
    def class_accuracy_drop(self) -> Floats:
        """float64 [unit, class]: drop within each class; NaN for a class without images."""
        return self._shares(self.lost - self.gained)

    @cached_property
    def max_class_drop(self) -> Floats:
        """float64 [unit]: largest drop over the classes.

        An extreme statistic: a harmless unit with some random flips has a positive one too, and of
        estimated drops the largest is too large on average. See
        :func:`pyablate.analysis.statistics.max_class_test` for what chance makes of it,
        :func:`pyablate.analysis.statistics.split_half_drop` for an estimate without that bias.
        """
        largest: Floats = np.nanmax(self.class_accuracy_drop, axis=1, initial=-np.inf)
        return largest

    @cached_property
    def max_class(self) -> Ints:
        """int64 [unit]: the class with the largest drop, the first on equality."""
        where: Ints = np.nanargmax(self.class_accuracy_drop, axis=1)
        return where

    @cached_property
    def loss_change(self) -> Floats:
        """float64 [unit]: change of the mean cross-entropy in nats; positive means harm.

        Raises
        ------
        ValueError
            The run did not record it (``measures=["loss"]``); so for the three below.
        """
        return self._mean_change("loss")

    @cached_property
    def class_loss_change(self) -> Floats:
        """float64 [unit, class]: the same within each class; NaN for a class without images."""
        return self._class_change("loss")

    @cached_property
    def margin_change(self) -> Floats:
        """float64 [unit]: change of the mean lead of the largest logit over the second largest."""
        return self._mean_change("margin")

    @cached_property
    def class_margin_change(self) -> Floats:
        """float64 [unit, class]: the same within each class; NaN for a class without images."""
        return self._class_change("margin")

    @cached_property
    def flip_count(self) -> Counts:
        """int64 [unit]: changed predictions; float64, an estimate, in an estimated run."""
        if self.flips.weight is None:
            return np.diff(self.flips.start)
        return np.bincount(self.flips.row, self.flips.weight, minlength=len(self.units))

    def half_width(self, of: str = "accuracy_drop") -> Floats:
        """Half of the 95 % interval of a figure that an estimated run estimates.

        It tells how far the figure of all pairs of these images may be from the estimate; which
        images there are is another matter, see :meth:`pyablate.AblationResult.significance`.

        Parameters
        ----------
        of : str
            ``"accuracy"``, ``"accuracy_drop"``, ``"class_accuracy_drop"``, ``"lost"`` or
            ``"gained"``.

        Returns
        -------
        ndarray
            float64 ``[unit]`` or ``[unit, class]`` like the figure, in its unit; zeros where all
            pairs were decided. See :class:`pyablate.results.estimate.Estimate`.

        Raises
        ------
        ValueError
            No such figure.
        """
        check_choice("of", of, _ESTIMATED)
        flips, label = self.flips, self.labels[self.flips.image]
        counts = {"lost": self._was_right, "gained": self._is_right}.get(
            of, self._was_right | self._is_right
        )
        overall = of.startswith("accuracy")
        if self.estimate is None or flips.weight is None:
            return np.zeros(len(self.units) if overall else (len(self.units), self.classes))
        layer = pd.factorize(self.units["layer"])[0].astype(np.int64)
        image = flips.image.astype(np.int64)[counts]
        entries = layer, flips.row[counts], image, flips.weight[counts]
        if overall:
            return self.estimate.half_width(*entries) / len(self.labels)
        found = self.estimate.half_width_by_class(*entries, label[counts])
        return self._shares(found) if of == "class_accuracy_drop" else found

    def check_complete(self, what: str) -> None:
        """Refuse what needs the prediction of every pair.

        Raises
        ------
        ValueError
            The run was an estimated one, which computed a sample of them.
        """
        if self.estimate is not None:
            raise ValueError(
                f"{what}: needs the prediction of every (unit, image) pair, and this run computed "
                'a sample of them; ablate with guarantee="exact" or "screened"'
            )

    def rows(self, rows: Rows) -> Ints:
        """Row numbers from a label, a number, a slice, a mask or a sequence of these.

        Raises
        ------
        ValueError
            No such unit.
        """
        if isinstance(rows, str) or (np.ndim(rows) and np.asarray(rows).dtype.kind in "UO"):
            return np.array([self._row_of(label) for label in np.atleast_1d(rows)], dtype=np.int64)
        try:
            return np.atleast_1d(np.arange(len(self.units))[rows])
        except IndexError as error:
            raise ValueError(f"rows: {error}; the result has {len(self.units)} units") from None

    def predictions(self, rows: Rows = slice(None)) -> Ints:
        """Predicted class of every image with the units of ``rows`` ablated, one at a time.

        Returns
        -------
        ndarray
            int64 ``[len(rows), image]``; -1 where there is none, see :attr:`undefined`.

        Raises
        ------
        ValueError
            No such unit; the run is an estimated one, which has not got them.
        """
        self.check_complete("predictions")
        chosen = self.rows(rows)
        predicted = np.tile(self.baseline, (len(chosen), 1))
        for out, row in zip(predicted, chosen, strict=True):
            run = slice(self.flips.start[row], self.flips.start[row + 1])
            out[self.flips.image[run]] = self.flips.prediction[run]
        return predicted

    def confusion(self, rows: Rows = slice(None), *, sparse: bool | None = None) -> Any:
        """Confusion matrices with the units of ``rows`` ablated.

        Parameters
        ----------
        rows : label, number, slice, mask or sequence
            Units, by default all.
        sparse : bool, optional
            Whether only cells with images are kept. By default from more than 10,000 classes on,
            where one whole matrix takes 0.8 GB.

        Returns
        -------
        ndarray, or scipy.sparse.csr_array or list of these
            int64 ``[len(rows), class, predicted]``; a single label or number gives
            ``[class, predicted]``. If sparse, one ``csr_array`` ``[class, predicted]`` a unit; a
            single label or number gives it alone. Images without a prediction are in none, see
            :attr:`undefined`.

        Raises
        ------
        ValueError
            As of :meth:`predictions`.

        Examples
        --------
        >>> worst = int(result.max_class_drop.argmax())
        >>> few = result.confusion(worst, sparse=True)  # one row per class
        >>> bool((few.toarray() == result.confusion(worst)).all())
        True
        """
        self.check_complete("confusion")
        chosen, k = self.rows(rows), self.classes
        found: Any
        if k > MOST_DENSE if sparse is None else sparse:
            found = [self._sparse_confusion(row) for row in chosen]
        else:
            found = np.empty((len(chosen), k, k), dtype=np.int64)
            for out, predicted in zip(found, map(self.predictions, chosen), strict=True):
                cell = (self.labels * k + predicted[0])[predicted[0] >= 0]
                out[:] = np.bincount(cell, minlength=k * k).reshape(k, k)
        return found[0] if np.ndim(rows) == 0 and not isinstance(rows, slice) else found

    def _sparse_confusion(self, row: Any) -> csr_array:
        after = self.predictions(row)[0]
        known = after >= 0
        cell = self.labels[known], after[known]
        shape = self.classes, self.classes
        return csr_array((np.ones(len(cell[0]), dtype=np.int64), cell), shape=shape)

    @cached_property
    def data(self) -> xr.Dataset:
        """Everything as labelled arrays over ``unit``, ``class`` and ``image``."""
        import xarray as xr  # slow to import: half a second

        unit, per_class = ("unit",), ("unit", "class")
        measured: dict[str, Any] = {}
        for name, measure in self.measures.items():
            accuracy = {"accuracy": str(measure.accuracy)}
            measured[f"{name}_change"] = (unit, self._mean_change(name), accuracy)
            measured[f"class_{name}_change"] = (per_class, self._class_change(name), accuracy)
        return xr.Dataset(
            {
                "label": ("image", self.labels),
                "baseline": ("image", self.baseline),
                "class_size": ("class", self.class_sizes),
                "baseline_class_accuracy": ("class", self.baseline_class_accuracy),
                "accuracy": (unit, self.accuracy),
                "accuracy_drop": (unit, self.accuracy_drop),
                "max_class_drop": (unit, self.max_class_drop),
                "max_class": (unit, self.max_class),
                "class_accuracy_drop": (per_class, self.class_accuracy_drop),
                "lost": (per_class, self.lost),
                "gained": (per_class, self.gained),
                "undefined": (per_class, self.undefined),
                **measured,
                **{name: (unit, values) for name, values in self._interval.items()},
            },
            coords=coordinates(self),
            attrs={
                "intervention": self.intervention,
                "baseline_accuracy": self.baseline_accuracy,
                "audit": str(self.audit),
            },
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per unit: drops, the class hurt most, and the drop of every class.

        ``flips`` counts changed predictions; where some of them are none, ``undefined`` counts
        those. Where recorded, also the changes of loss and margin, overall and of every class. In
        an estimated run ``accuracy_drop_low`` and ``accuracy_drop_high`` are the ends of the 95 %
        interval of ``accuracy_drop``, ``low: ...`` and ``high: ...`` those of every class's drop.
        """
        summary = pd.DataFrame(
            {
                "accuracy": self.accuracy,
                "accuracy_drop": self.accuracy_drop,
                "max_class_drop": self.max_class_drop,
                "max_class": np.array(self.class_names, dtype=object)[self.max_class],
                "flips": self.flip_count,
                **self._interval,
            }
        )
        if self.undefined.any():
            summary["undefined"] = self.undefined.sum(axis=1)
        per_class = [self._columns("drop", self.class_accuracy_drop)]
        if self.estimate is not None:
            width = self.half_width("class_accuracy_drop")
            per_class += [
                self._columns("low", self.class_accuracy_drop - width),
                self._columns("high", self.class_accuracy_drop + width),
            ]
        for name in self.measures:
            summary[f"{name}_change"] = self._mean_change(name)
            per_class.append(self._columns(f"{name} change", self._class_change(name)))
        return pd.concat([self.units.reset_index(drop=True), summary, *per_class], axis=1)

    @property
    def _interval(self) -> dict[str, Floats]:
        """Ends of the interval of each unit's accuracy drop, in an estimated run."""
        if self.estimate is None:
            return {}
        drop, width = self.accuracy_drop, self.half_width("accuracy_drop")
        return {"accuracy_drop_low": drop - width, "accuracy_drop_high": drop + width}

    @property
    def _was_right(self) -> NDArray[np.bool_]:
        """Bool [flip]: the intact network was right."""
        right: NDArray[np.bool_] = self.baseline[self.flips.image] == self.labels[self.flips.image]
        return right

    @property
    def _is_right(self) -> NDArray[np.bool_]:
        """Bool [flip]: the ablated one is."""
        right: NDArray[np.bool_] = self.flips.prediction == self.labels[self.flips.image]
        return right

    def _columns(self, what: str, values: Floats) -> pd.DataFrame:
        return pd.DataFrame(values, columns=[f"{what}: {name}" for name in self.class_names])

    def _hits_by_class(self, predicted: Ints) -> Ints:
        return np.bincount(self.labels[predicted == self.labels], minlength=self.classes)

    def _count(self, of: NDArray[np.bool_]) -> Counts:
        """Flips that satisfy ``of``, by row and true class."""
        cell = self.flips.row * self.classes + self.labels[self.flips.image]
        shape = len(self.units), self.classes
        weight = None if self.flips.weight is None else self.flips.weight[of]
        return np.bincount(cell[of], weight, minlength=shape[0] * shape[1]).reshape(shape)

    def _shares(self, counts: Counts) -> Floats:
        """Divide counts or sums [..., class] by the class sizes."""
        sizes = np.where(self.class_sizes > 0, self.class_sizes, np.nan)
        return np.asarray(counts / sizes, np.float64)

    def _mean_change(self, name: str) -> Floats:
        mean: Floats = self._measure(name).change.sum(axis=1) / len(self.labels)
        return mean

    def _class_change(self, name: str) -> Floats:
        return self._shares(self._measure(name).change)

    def _measure(self, name: str) -> Measure:
        if name not in self.measures:
            raise ValueError(
                f"measures: this run recorded {', '.join(self.measures) or 'none'}, not {name!r}; "
                f'ablate with measures=["{name}"]'
            )
        return self.measures[name]

    def _row_of(self, label: str) -> int:
        found = np.flatnonzero((self.units["label"] == label).to_numpy())
        if not len(found):
            raise ValueError(f"rows: no unit {str(label)!r} in this result")
        return int(found[0])


def coordinates(result: Record) -> dict[str, Any]:
    """Labels of the dimensions ``unit`` and ``class``, for an ``xarray.Dataset``."""
    return {
        "unit": result.units["label"].to_numpy(dtype=str),
        "layer": ("unit", result.units["layer"].to_numpy(dtype=str)),
        "index": ("unit", result.units["unit"].to_numpy()),
        "class": np.array(result.class_names, dtype=str),
    }
