"""Evaluation of one network: predictions, losses, calibration error; close calls in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pyablate._validation import check_count, first_line
from pyablate.data.dataset import Batch, Data
from pyablate.engine.clean_run import close_calls
from pyablate.engine.rounding import Rounding, outlying
from pyablate.network import near_tie
from pyablate.network.classifier import giving_logits
from pyablate.network.forward import check_logits, device_of, forward, own_dtype
from pyablate.network.model_checks import fit_inputs
from pyablate.network.sites import check_model, copied
from pyablate.results.arrays import Floats, Ints
from pyablate.runtime.allocator import keep_freed_blocks
from pyablate.runtime.out_of_memory import is_shortage

_FIRST, _LATER = 8, 2
"""Images of the first batch, and of each later one, on which the logits' rounding is measured."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a network says of every image.

    Attributes
    ----------
    labels, prediction : int64 [image]
        True and predicted class; of equal logits the first class. Without labels the original
        network's predictions stand in.
    confidence : float64 [image]
        Probability of the predicted class.
    losses : float64 [image]
        Cross entropy.
    classes : int
        Number of classes.

    Examples
    --------
    >>> same = pa.compare(model, model, data)
    >>> same.before.accuracy == same.after.accuracy
    True
    """

    labels: Ints
    prediction: Ints
    confidence: Floats
    losses: Floats
    classes: int

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """Bool [image]: whether the prediction is right."""
        found: NDArray[np.bool_] = self.prediction == self.labels
        return found

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return float(self.right.mean())

    @property
    def loss(self) -> float:
        """Mean cross entropy."""
        return float(self.losses.mean())

    @cached_property
    def class_accuracy(self) -> Floats:
        """float64 [class]; NaN for a class without images."""
        sizes = np.bincount(self.labels, minlength=self.classes)
        hits = np.bincount(self.labels[self.right], minlength=self.classes)
        return hits / np.where(sizes > 0, sizes, np.nan)

    def calibration_error(self, bins: int = 15) -> float:
        """Return the expected calibration error over bins of equal width.

        ``sum_b n_b / N |accuracy_b - confidence_b|`` (Guo, Pleiss, Sun, Weinberger 2017, *On
        Calibration of Modern Neural Networks*).

        Raises
        ------
        ValueError
            Fewer than one bin.
        """
        check_count("bins", bins)
        # Confidence 1 belongs to the last bin; a bin has its upper end.
        place = np.clip(np.ceil(self.confidence * bins).astype(np.int64) - 1, 0, bins - 1)
        gap = np.bincount(place, self.right - self.confidence, minlength=bins)
        return float(np.abs(gap).sum() / len(self.labels))


def evaluate(
    model: nn.Module,
    data: Data,
    batch_size: int | None = None,
    *,
    exact: nn.Module | None = None,
    labels: Ints | None = None,
) -> Evaluation:
    """Run a network over the data.

    The model is in evaluation mode, in the dtype and on the device of the data; ``exact`` is the
    same network in float64, by default a copy; ``labels`` stand in for those of data that have
    none, by default the network's own predictions. By default 64 images at a time on a CPU, whose
    caches hold no more, or 256. Predictions are those in float64, near ties apart.
    """
    keep_freed_blocks()
    exact = exact or copied(model).double()
    size = batch_size or (64 if data.device.type == "cpu" else 256)
    rounding = Rounding()
    parts: list[tuple[NDArray[Any], ...]] = []
    classes = 0
    with torch.no_grad(), giving_logits(model), giving_logits(exact):
        for batch in data.batches(size):
            if not parts and (data.inputs or data.integers):
                fit_inputs(model, data, batch.images)
                fit_inputs(exact, data, batch.images.double())
            logits = check_logits(_returned(model, batch, first=not parts), len(batch))
            _check_values(logits, batch)
            chosen = outlying(batch.images, _FIRST if not parts else _LATER)
            few = batch.images[chosen].double()
            rounding |= Rounding.measured(logits[chosen], forward(exact, few))
            classes = logits.shape[1]
            logits = logits.double()
            close = close_calls(logits, rounding.tolerance(logits)).nonzero().squeeze(1)
            if len(close):
                logits[close] = forward(exact, batch.images[close].double())
            top = logits.softmax(dim=1).max(dim=1).values
            prediction = truth = logits.argmax(dim=1)
            if data.labelled:
                truth = batch.labels
            elif labels is not None:
                truth = torch.from_numpy(labels[batch.index.numpy()]).to(logits.device)
            losses = functional.cross_entropy(logits, truth, reduction="none")
            found = (truth, prediction, top, losses)
            parts.append(tuple(each.cpu().numpy() for each in found))
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Evaluation(joined[0], joined[1], joined[2], joined[3], classes)


def _returned(model: nn.Module, batch: Batch, *, first: bool) -> Any:
    """Run the model on a batch; what it cannot take is told of the first."""
    try:
        return forward(model, _laid_out(batch.images))
    except (RuntimeError, IndexError, TypeError) as error:
        if not first or is_shortage(error):
            raise
        shape = list(batch.images.shape[1:])
        raise ValueError(
            f"model: it fails on images of shape {shape}: {first_line(error)}"
        ) from error


def prepared(model: nn.Module, device: str | torch.device | None) -> tuple[nn.Module, torch.dtype]:
    """Copy a network for evaluation, in float32 (float64 if it is), and tell the dtype."""
    check_model(model)
    dtype = own_dtype(model)
    work = copied(model).to(device_of(model) if device is None else device)
    work = (work.double() if dtype == torch.float64 else work.float()).eval()
    # Convolutions of few channels are up to twice as fast with the channels last.
    work.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return work, dtype


def prepared_pair(
    model: nn.Module, smaller: nn.Module, device: str | torch.device | None
) -> tuple[nn.Module, nn.Module, torch.dtype]:
    """Copy two networks for evaluation, both in the dtype and on the device of the first."""
    original, dtype = prepared(model, device)
    try:
        other, _ = prepared(smaller, device_of(original))
    except TypeError as error:
        raise TypeError(str(error).replace("model:", "smaller:")) from None
    return original, other.to(dtype), dtype


def _laid_out(images: Tensor) -> Tensor:
    """Lay a batch of maps out with the channels last."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def _check_values(logits: Tensor, batch: Batch) -> None:
    near_tie.check(near_tie.usable(logits).cpu(), batch.index)
    if int(batch.labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"data: label {int(batch.labels.max())} is outside the model's {logits.shape[1]} "
            f"classes (0 to {logits.shape[1] - 1})"
        )
