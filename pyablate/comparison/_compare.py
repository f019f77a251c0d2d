"""Comparison of two networks: accuracies by class, and whether important units still are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import nn

from pyablate._validation import check_choice, check_count, check_level
from pyablate.analysis.statistics import adjusted, layer_rows, mcnemar
from pyablate.attribution.maps import METHODS
from pyablate.comparison.evaluation import Evaluation, evaluate, prepared_pair
from pyablate.comparison.preservation import Preservation, preserved_between
from pyablate.data.dataset import Data
from pyablate.network.forward import device_of
from pyablate.network.model_checks import class_names_of
from pyablate.result import AblationResult
from pyablate.results.arrays import Floats, Ints
from pyablate.results.notebook import page
from pyablate.results.record import word
from pyablate.runtime.determinism import undisturbed

logger = logging.getLogger("pyablate")

_FEWEST = 3  # two points always lie on a line


def compare(
    model: nn.Module,
    smaller: nn.Module,
    data: Any,
    *,
    class_names: Sequence[str] | None = None,
    fdr: float = 0.05,
    bins: int = 15,
    attributions: bool | str | Sequence[str] = False,
    masks: Any = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
) -> Comparison:
    """Compare a network with another one that has the same classes, made by whatever tool.

    Parameters
    ----------
    model, smaller : nn.Module
        The original and the other network: images ``[N, ...]`` to logits ``[N, classes]``. Both
        stay as they are.
    data : pair of arrays, DataLoader or iterable of (images, labels)
        As for :func:`pyablate.ablate`; the same images for both. Without labels the original's
        predictions stand in.
    class_names : sequence of str, optional
        One per class; by default as for :func:`pyablate.ablate`.
    fdr : float
        Level of the false discovery rate over the classes, between 0 and 1.
    bins : int
        Of the calibration error.
    attributions : bool, str or sequence of str
        Compare attribution maps as well: by all methods of
        :func:`pyablate.compression.attributions_preserved` or by those named. That function has
        more options.
    masks : array, optional
        ``[N, H, W]``, not 0 where the object is: how well the attributions point at it.
    seed : int
        Of the images drawn for the attributions.
    device : str or torch.device, optional
        Where to work; by default where the original is.
    batch_size : int, optional
        Images per forward pass; by default 64 on a CPU, 256 elsewhere.

    Returns
    -------
    Comparison
        Predictions are those of float64 forward passes, near ties apart.

    Raises
    ------
    ValueError, TypeError
        Bad arguments or data, or networks with different numbers of classes.

    Examples
    --------
    >>> rounded = pa.compression.int8_weights(model).model
    >>> comparison = pa.compare(model, rounded, data, class_names=pa.demo.CLASSES)
    >>> comparison.classes()["class"].tolist()[:2]
    ['T-shirt/top', 'Trouser']
    """
    check_level("fdr", fdr)
    check_count("bins", bins)
    methods = _methods(attributions, masks)
    with undisturbed(model, smaller, device):
        original, other, dtype = prepared_pair(model, smaller, device)
        images = Data(data, dtype=dtype, device=device_of(original), unlabelled=True)
        images.hold_if_read_once()
        if images.shuffled:
            logger.warning(
                "data: the loader shuffles: all images are held in memory, so that both networks "
                "see them in the same order; shuffle=False saves that"
            )
            images.hold()
        before = evaluate(original, images, batch_size)
        stand_in = None if images.labelled else before.prediction
        try:
            after = evaluate(other, images, batch_size, labels=stand_in)
        except (TypeError, ValueError) as error:
            if not str(error).startswith("model:"):
                raise  # of the data, or from the network's own code
            raise type(error)(str(error).replace("model:", "smaller:", 1)) from None
        if before.classes != after.classes:
            raise ValueError(
                f"smaller: expected {before.classes} classes as of the original, "
                f"got {after.classes}"
            )
        names = class_names_of(original, class_names, before.classes)
        kept = None
        if methods:
            images.hold()
            kept = preserved_between(
                original, other, images, before, after, methods=methods, masks=masks, seed=seed
            )
    return Comparison(before, after, names, fdr, bins, kept, images.labelled)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two networks on the same images.

    Attributes
    ----------
    before, after : Evaluation
        Predictions, confidences and losses of the original and of the other network.
    class_names : tuple of str
        One name per class.
    fdr : float
        Level of the false discovery rate.
    bins : int
        Of the calibration error.
    attributions : Preservation or None
        How alike their attributions are, if that was asked for.
    labelled : bool
        Whether the data had labels; if not, every accuracy is agreement with the original.

    Examples
    --------
    >>> same = pa.compare(model, model, data)
    >>> len(same.images())
    0
    """

    before: Evaluation
    after: Evaluation
    class_names: tuple[str, ...]
    fdr: float = 0.05
    bins: int = 15
    attributions: Preservation | None = None
    labelled: bool = True

    def __repr__(self) -> str:
        """Accuracies and differences in one line."""
        return (
            f"Comparison({self.word} {self.before.accuracy:.4f} -> {self.after.accuracy:.4f}, "
            f"{len(self.differing)} of {len(self.before.labels)} predictions differ)"
        )

    def _repr_html_(self) -> str:
        """Show the figures of both, and the classes that lose most."""
        figures = self.summary().rename_axis("figure").reset_index(name="value")
        classes = self.classes().sort_values("drop", ascending=False, kind="stable")
        return page(repr(self), figures, classes)

    @property
    def word(self) -> str:
        """What a share of right predictions is: accuracy, or without labels agreement."""
        return word(self.labelled)

    @cached_property
    def differing(self) -> Ints:
        """int64 [difference]: images of which the two predict different classes, ascending."""
        return np.flatnonzero(self.before.prediction != self.after.prediction)

    @cached_property
    def lost(self) -> Ints:
        """int64 [class]: images that only the original gets right."""
        return self._count(self.before.right & ~self.after.right)

    @cached_property
    def gained(self) -> Ints:
        """int64 [class]: images that only the other network gets right."""
        return self._count(~self.before.right & self.after.right)

    @cached_property
    def p(self) -> float:
        """Exact McNemar p value of the change of overall accuracy, two-sided."""
        return float(mcnemar(self.lost.sum(keepdims=True), self.gained.sum(keepdims=True))[0])

    @cached_property
    def class_accuracy_drop(self) -> Floats:
        """float64 [class]: accuracy before minus after; NaN for a class without images."""
        return self.before.class_accuracy - self.after.class_accuracy

    def summary(self) -> pd.Series:
        """Figures of both networks and of their difference, by name.

        Accuracy and its p value, worst and mean class accuracy, mean cross entropy, expected
        calibration error, and the share of images on which they differ.
        """
        rows: dict[str, float] = {}
        for name, one in (("before", self.before), ("after", self.after)):
            rows |= {
                f"accuracy_{name}": one.accuracy,
                f"worst_class_accuracy_{name}": float(np.nanmin(one.class_accuracy)),
                f"mean_class_accuracy_{name}": float(np.nanmean(one.class_accuracy)),
                f"loss_{name}": one.loss,
                f"calibration_error_{name}": one.calibration_error(self.bins),
            }
        drop = self.before.accuracy - self.after.accuracy
        differing = len(self.differing) / len(self.before.labels)
        return pd.Series({**rows, "accuracy_drop": drop, "p": self.p, "differing": differing})

    def classes(self) -> pd.DataFrame:
        """One row per class, tested.

        Returns
        -------
        pandas.DataFrame
            ``class``, ``images``, ``before``, ``after`` (accuracies), ``drop``, ``excess`` (the
            drop minus that of the overall accuracy), ``lost`` and ``gained`` (images), ``p`` (exact
            McNemar, two-sided), ``q`` (adjusted by Benjamini-Hochberg over the classes) and
            ``significant`` (``q <= fdr``). NaN for a class without images.

        Notes
        -----
        Hooker, Courville, Clark, Dauphin, Frome 2019, *What Do Compressed Deep Neural Networks
        Forget?*, look at the excess: compression widens the gaps between classes.
        """
        sizes = np.bincount(self.before.labels, minlength=self.before.classes)
        p = mcnemar(self.lost, self.gained)
        p[sizes == 0] = np.nan
        q = adjusted(p)
        return pd.DataFrame(
            {
                "class": self.class_names,
                "images": sizes,
                "before": self.before.class_accuracy,
                "after": self.after.class_accuracy,
                "drop": self.class_accuracy_drop,
                "excess": self.class_accuracy_drop - (self.before.accuracy - self.after.accuracy),
                "lost": self.lost,
                "gained": self.gained,
                "p": p,
                "q": q,
                "significant": q <= self.fdr,
            }
        )

    def images(self) -> pd.DataFrame:
        """One row per image on which the two differ: ``image``, ``label``, ``before``, ``after``.

        Classes are given by name, the image by its number in the data.
        """
        names = np.array(self.class_names, dtype=object)
        chosen = self.differing
        return pd.DataFrame(
            {
                "image": chosen,
                "label": names[self.before.labels[chosen]],
                "before": names[self.before.prediction[chosen]],
                "after": names[self.after.prediction[chosen]],
            }
        )

    def _count(self, of: Any) -> Ints:
        return np.bincount(self.before.labels[of], minlength=self.before.classes)


def importance_preserved(
    before: AblationResult,
    after: AblationResult,
    *,
    measure: str = "accuracy_drop",
    matching: dict[str, str] | None = None,
) -> pd.DataFrame:
    """Say how well the importance of units before goes with that after a change of the network.

    Parameters
    ----------
    before, after : AblationResult
        Ablations of the two networks on the same images.
    measure : {"accuracy_drop", "max_class_drop"}
        What is ranked.
    matching : dict of str to str, optional
        Which unit (label before) is which afterwards; see :func:`surviving`. By default units with
        equal labels, where the layers have equally many units.

    Returns
    -------
    pandas.DataFrame
        One row per layer of ``before``: ``layer``; ``units``, those matched; ``spearman`` of
        their drops, NaN for fewer than three or constant drops; and ``profile``, the
        Spearman correlation over classes of the layers' mean class accuracy drops, which needs no
        matching of units but a layer of the same name.

    Raises
    ------
    ValueError
        Another measure, different classes or labels, or a match of unknown units.

    Examples
    --------
    >>> pa.compression.importance_preserved(result, result)["spearman"].tolist()
    [1.0]
    """
    check_choice("measure", measure, ("accuracy_drop", "max_class_drop"))
    if before.class_names != after.class_names:
        raise ValueError("after: expected the same classes as before, got other names")
    if not np.array_equal(before.labels, after.labels):
        raise ValueError("after: expected the same images as before, their labels differ")
    rows_after = layer_rows(after)
    pairs = _equal_labels(before, after) if matching is None else matching
    place_before, place_after = _places(before), _places(after)
    for old, new in pairs.items():
        if old not in place_before or new not in place_after:
            raise ValueError(f"matching: {old!r} and {new!r} are not units of the two results")
    lines = []
    for layer, rows in layer_rows(before).items():
        labels = before.units["label"].iloc[rows]
        matched = [(place_before[old], place_after[pairs[old]]) for old in labels if old in pairs]
        old_rows, new_rows = np.array(matched, dtype=np.int64).reshape(-1, 2).T
        profile = np.nan
        if layer in rows_after:
            profile = _spearman(
                before.class_accuracy_drop[rows].mean(axis=0),
                after.class_accuracy_drop[rows_after[layer]].mean(axis=0),
            )
        found = _spearman(getattr(before, measure)[old_rows], getattr(after, measure)[new_rows])
        lines.append({"layer": layer, "units": len(matched), "spearman": found, "profile": profile})
    return pd.DataFrame(lines)


def surviving(before: Sequence[str], removed: Sequence[str]) -> dict[str, str]:
    """Match units before a removal to their new numbers behind it.

    Parameters
    ----------
    before : sequence of str
        Labels ``"layer:unit"`` of all units of the layers concerned.
    removed : sequence of str
        Labels of those that went, such as ``Removal.units``.

    Returns
    -------
    dict of str to str
        Label before to label afterwards, for the units that stayed.

    Examples
    --------
    >>> labels_before = ["features.16:0", "features.16:1", "features.16:2"]
    >>> pa.compression.surviving(labels_before, ["features.16:1"])
    {'features.16:0': 'features.16:0', 'features.16:2': 'features.16:1'}
    """
    gone = set(removed)
    number: dict[str, int] = {}
    matched = {}
    for label in sorted(before, key=lambda name: int(name.rpartition(":")[2])):
        layer = label.rpartition(":")[0]
        if label not in gone:
            matched[label] = f"{layer}:{number.get(layer, 0)}"
            number[layer] = number.get(layer, 0) + 1
    return matched


def _methods(attributions: bool | str | Sequence[str], masks: Any) -> Sequence[str]:
    if not attributions:
        if masks is not None:
            raise ValueError("masks: they need attributions=True or the names of methods")
        return ()
    if attributions is True:
        return METHODS
    return [attributions] if isinstance(attributions, str) else list(attributions)


def _equal_labels(before: AblationResult, after: AblationResult) -> dict[str, str]:
    sizes = {layer: len(rows) for layer, rows in layer_rows(after).items()}
    there = set(after.units["label"])
    return {
        str(label): str(label)
        for layer, rows in layer_rows(before).items()
        if sizes.get(layer) == len(rows)
        for label in before.units["label"].iloc[rows]
        if label in there
    }


def _places(result: AblationResult) -> dict[str, int]:
    return {str(label): row for row, label in enumerate(result.units["label"])}


def _spearman(x: Floats, y: Floats) -> float:
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if len(x) < _FEWEST or x.min() == x.max() or y.min() == y.max():
        return float("nan")
    return float(stats.spearmanr(x, y).statistic)
