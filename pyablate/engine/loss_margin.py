"""Finer than predictions: how much each ablation changes the loss and the margin of an image.

A prediction either flips or does not; the loss and the margin move before that. Both follow from
the clean logits and a pair's change of them, whatever the precision in which that was carried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyablate._validation import check_choice
from pyablate.results.measures import MEASURES, Accuracy

Record = Callable[[Tensor, Tensor, Tensor], None]
"""``record(row, image, change)``: takes note of the logit changes [P, K] of some pairs."""


def check_measures(measures: Sequence[str]) -> tuple[str, ...]:
    """Check the names of measures and put them in order.

    Raises
    ------
    TypeError, ValueError
        Not a sequence of names, or no such measure.
    """
    if isinstance(measures, str) or not isinstance(measures, Sequence):
        raise TypeError(f"measures: expected a list of names, got {measures!r}")
    for name in measures:
        check_choice("measures", name, MEASURES)
    return tuple(name for name in MEASURES if name in measures)


def measure(name: str, logits: Tensor, label: Tensor) -> Tensor:
    """One number for each image.

    Parameters
    ----------
    name : str
        ``loss``: cross-entropy in nats, ``log sum_k exp z_k - z_y``; ``margin``: the largest logit
        minus the second largest.
    logits : Tensor
        ``[P, K]``.
    label : Tensor
        int64 ``[P]``.

    Returns
    -------
    Tensor
        ``[P]``.
    """
    if name == "loss":
        return logits.logsumexp(dim=1) - logits.gather(1, label.unsqueeze(1)).squeeze(1)
    top = logits.topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


@dataclass(frozen=True, eq=False)
class Measured:
    """Changes that the ablations of one job make to the images of one batch.

    Attributes
    ----------
    names : tuple of str
        Of the measures, M of them.
    logits : Tensor
        Float64 ``[N, K]``, of the clean run.
    label : Tensor
        int64 ``[N]``.
    before : Tensor
        Float64 ``[M, N]``, of the clean run.
    change : Tensor
        Float64 ``[M, rows, N]``; 0 where an ablation changes nothing.
    """

    names: tuple[str, ...]
    logits: Tensor
    label: Tensor
    before: Tensor
    change: Tensor

    @classmethod
    def of(cls, names: tuple[str, ...], logits: Tensor, label: Tensor, rows: int) -> Measured:
        """Begin with no change."""
        exact = logits.double()
        before = torch.stack([measure(name, exact, label) for name in names])
        change = exact.new_zeros(len(names), rows, len(logits))
        return cls(names, exact, label, before, change)

    def record(self, row: Tensor, image: Tensor, change: Tensor) -> None:
        """Take note of some pairs; a later, more precise change replaces an earlier one."""
        logits = self.logits[image] + change
        label = self.label[image]
        for number, name in enumerate(self.names):
            after = measure(name, logits, label)
            self.change[number, row, image] = after - self.before[number, image]

    def add_to(self, sums: Tensor) -> None:
        """Add up over the images of each class, into ``sums`` ``[M, rows, K]`` on the CPU."""
        sums.index_add_(2, self.label.cpu(), self.change.cpu())

    def audit(
        self, row: Tensor, image: Tensor, before: Tensor, after: Tensor
    ) -> tuple[Accuracy, ...]:
        """Compare pairs with their logits ``[P, K]`` in float64, of the intact network and ablated.

        All four on the CPU.

        Returns
        -------
        tuple of Accuracy
            One per measure.
        """
        label, change = self.label.cpu()[image], self.change.cpu()[:, row, image]
        found: list[Accuracy] = []
        for number, name in enumerate(self.names):
            exact = measure(name, after.double(), label) - measure(name, before.double(), label)
            found.append(Accuracy.of(exact.numpy(), (change[number] - exact).numpy()))
        return tuple(found)
