"""Operations that decide and count: flips of the last layer, classes, confusions."""

from __future__ import annotations

import torch
from torch import Tensor

from pyablate.ops import reference as reference
from pyablate.ops._checks import check_classes, check_pairs, check_range, check_shape, check_tensor
from pyablate.ops._layout import wider
from pyablate.ops.dispatch import (
    FLOATS,
    backend,
    context,
)


def head_flips(
    logits: Tensor, delta: Tensor, weight: Tensor, baseline: Tensor, tolerance: Tensor
) -> Tensor:
    """Predict for every (image, unit) where the ablation reaches the classes by one linear map.

    Most pairs are settled without looking at the classes: the lead of the baseline class cannot
    shrink by more than ``delta`` times the spread of the unit's weights.

    Parameters
    ----------
    logits : Tensor
        [N, K], of the clean run, float32 or float64; bfloat16 and float16 are raised to
        float32.
    delta : Tensor
        [N, U], change of each unit's pooled activation.
    weight : Tensor
        [K, U], weight of the linear map.
    baseline : Tensor
        int32 [N], the class predicted by the clean run.
    tolerance : Tensor
        [N], smallest top-2 margin that is trusted, in units of the logits.

    Returns
    -------
    Tensor
        int32 [N, U]: argmax over k of ``logits[n, k] + delta[n, u] * weight[k, u]``, the lowest
        index on equality; -1 (undecided) unless the top-2 margin is above ``tolerance[n]``. Logits
        of minus infinity are classes that cannot win; what else is not finite leaves its pair
        undecided.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.

    Examples
    --------
    >>> logits, weight = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> delta, baseline = torch.tensor([[-3.0, 0.5]]), torch.tensor([0], dtype=torch.int32)
    >>> pa.ops.head_flips(logits, delta, weight, baseline, torch.tensor([1e-3])).tolist()
    [[1, 0]]
    """
    dtype = check_tensor("logits", logits, dims=2, dtypes=FLOATS)
    images, classes = logits.shape
    check_tensor("delta", delta, dims=2, dtypes=FLOATS, like=logits)
    units = delta.shape[1]
    check_shape("delta", delta, (images, units))
    check_tensor("weight", weight, dtypes=FLOATS, like=logits)
    check_shape("weight", weight, (classes, units))
    check_classes(classes)
    check_pairs(logits, baseline=(baseline, 0, classes))
    check_shape("baseline", baseline, (images,))
    check_tensor("tolerance", tolerance, dtypes=FLOATS, like=logits)
    check_shape("tolerance", tolerance, (images,))
    dtype = wider(logits, delta, weight)
    logits, delta, tolerance = (t.detach().to(dtype) for t in (logits, delta, tolerance))
    weight = weight.detach().to(dtype)
    core = backend(logits)
    if core is None:
        return reference.head_flips(logits, delta, weight, baseline, tolerance)
    # The scan of one unit's classes wants [U, K]; no copy where weight is a view of such a tensor
    columns = weight.t().contiguous()
    if units == 0:
        return torch.empty(images, 0, dtype=torch.int32, device=logits.device)
    bounds = torch.stack([columns.amin(1), columns.amax(1), columns.abs().amax(1)])  # [3, U]
    out = torch.empty(images, units, dtype=torch.int32, device=logits.device)
    core.head_flips(
        logits.contiguous(),
        delta.contiguous(),
        columns,
        bounds,
        baseline.contiguous(),
        tolerance.contiguous(),
        out,
        **context(logits),
    )
    return out


def classify(
    logits: Tensor,
    delta: Tensor,
    image: Tensor,
    tolerance: Tensor,
    *,
    relative: float = 0.0,
) -> Tensor:
    """Predict each pair's class from the clean logits and their change.

    Parameters
    ----------
    logits : Tensor
        [N, K], of the clean run, float32 or float64; bfloat16 and float16 are raised to
        float32.
    delta : Tensor
        [P, K], change of the logits.
    image : Tensor
        int32 [P], row of ``logits`` for each pair.
    tolerance : Tensor
        [N], smallest top-2 margin that is trusted, in units of the logits.
    relative : float
        Added to the tolerance, times the spread (max - min over classes) of the pair's ``delta``:
        the rounding error of a low-precision delta grows with the delta.

    Returns
    -------
    Tensor
        int32 [P]: argmax of ``logits[image] + delta``, the lowest index on equality; -1 (undecided)
        unless the top-2 margin is above the tolerance. Logits of minus infinity are classes that
        cannot win; what else is not finite leaves its pair undecided.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.

    Examples
    --------
    >>> logits, delta = torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0, 3.0], [0.0, 0.5]])
    >>> image = torch.zeros(2, dtype=torch.int32)
    >>> pa.ops.classify(logits, delta, image, torch.tensor([1e-3])).tolist()
    [1, 0]
    """
    check_tensor("logits", logits, dims=2, dtypes=FLOATS)
    images, classes = logits.shape
    check_classes(classes)
    check_tensor("delta", delta, dims=2, dtypes=FLOATS, like=logits)
    pairs = check_pairs(logits, image=(image, 0, images))
    check_shape("delta", delta, (pairs, classes))
    check_tensor("tolerance", tolerance, dtypes=FLOATS, like=logits)
    check_shape("tolerance", tolerance, (images,))
    dtype = wider(logits, delta)
    logits, delta, tolerance = (t.detach().to(dtype) for t in (logits, delta, tolerance))
    core = backend(logits)
    if core is None:
        return reference.classify(logits, delta, image, tolerance, relative=relative)
    out = torch.empty(pairs, dtype=torch.int32, device=logits.device)
    core.classify(
        logits.contiguous(),
        delta.contiguous(),
        image.contiguous(),
        tolerance.contiguous(),
        out,
        relative,
        **context(logits),
    )
    return out


def confusion_counts(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """Count predictions by unit, label and predicted class.

    Parameters
    ----------
    prediction : Tensor
        int32 [U, N], in [0, classes).
    label : Tensor
        int32 [N], in [0, classes).
    classes : int
        Number of classes K.

    Returns
    -------
    Tensor
        int32 [U, K, K], counts by [unit, label, predicted]. On CUDA an entry out of range is not
        counted.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.

    Examples
    --------
    >>> prediction = torch.tensor([[0, 1, 1]], dtype=torch.int32)
    >>> label = torch.tensor([0, 0, 1], dtype=torch.int32)
    >>> pa.ops.confusion_counts(prediction, label, 2).tolist()
    [[[1, 1], [0, 1]]]
    """
    check_classes(classes)
    check_tensor("prediction", prediction, dims=2, dtypes=(torch.int32,))
    check_pairs(prediction, label=(label, 0, classes))
    units, images = prediction.shape
    check_shape("label", label, (images,))
    check_range("prediction", prediction, 0, classes)
    core = backend(prediction)
    if core is None:
        return reference.confusion_counts(prediction, label, classes)
    out = torch.empty(units, classes, classes, dtype=torch.int32, device=prediction.device)
    core.confusion_counts(prediction.contiguous(), label.contiguous(), out, **context(prediction))
    return out
