"""Recall and balanced accuracy of a result's rows, absolute rather than as drops."""

from __future__ import annotations

import numpy as np

from pyablate.result import AblationResult
from pyablate.results.arrays import Floats, Ints


def class_accuracy(result: AblationResult) -> Floats:
    """float64 [row, class]: share of the images of a class that are still right (recall)."""
    return result.baseline_class_accuracy - result.class_accuracy_drop


def balanced_accuracy(result: AblationResult) -> Floats:
    """Balanced accuracy of each class against the rest, with each row ablated.

    ``(recall + true negative rate) / 2`` of the question "is it this class?", answered by argmax:
    0.5 is chance, whatever the number of classes (Bau et al. 2020, "Understanding the role of
    individual units in a deep neural network").

    Returns
    -------
    ndarray
        float64 ``[row, class]``; NaN for a class without images, or if there are no others.

    Examples
    --------
    >>> from pyablate.experiments import balanced_accuracy
    >>> balanced_accuracy(result).shape
    (128, 10)
    """
    false = baseline_false(result) + _false_change(result)
    return (class_accuracy(result) + true_negative_rate(result, false)) / 2


def baseline_balanced_accuracy(result: AblationResult) -> Floats:
    """float64 [class]: the same for the intact network."""
    rate = true_negative_rate(result, baseline_false(result))
    return (result.baseline_class_accuracy + rate) / 2


def true_negative_rate(result: AblationResult, false: Ints) -> Floats:
    """Share of the other classes' images that are not taken for a class, from counts of those."""
    others = len(result.labels) - result.class_sizes
    rate: Floats = 1 - false / np.where(others > 0, others, np.nan)
    return rate


def baseline_false(result: AblationResult) -> Ints:
    """int64 [class]: images of other classes that the intact network takes for a class."""
    wrong = result.baseline[result.baseline != result.labels]
    return np.bincount(wrong, minlength=result.classes)


def _false_change(result: AblationResult) -> Ints:
    """int64 [row, class]: by how many these become more."""
    result.check_complete("balanced_accuracy")
    image, row = result.flips.image, result.flips.row
    shape = len(result.units), result.classes
    change = np.zeros(shape[0] * shape[1], dtype=np.int64)
    for sign, predicted in ((1, result.flips.prediction), (-1, result.baseline[image])):
        false = (predicted != result.labels[image]) & (predicted >= 0)
        cell = row[false] * result.classes + predicted[false]
        change += sign * np.bincount(cell, minlength=len(change))
    return change.reshape(shape)
