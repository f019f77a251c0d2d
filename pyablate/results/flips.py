"""Flips: the predictions that ablations changed, row by row. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyablate.results.arrays import Floats, Ints


@dataclass(frozen=True)
class Flips:
    """Changed predictions, one run of entries per ablated unit.

    Attributes
    ----------
    start : int64 [unit + 1]
        Entries of row ``u`` are ``start[u]:start[u + 1]``.
    image : int32 [flip]
        Image index, ascending within a row.
    prediction : int32 [flip]
        The new class; -1 where there is none, since the logits became NaN or infinite.
    weight : float64 [flip] or None
        Of an estimated run: what each adds to counts of flips. Those that were predicted have 1; of
        a pair that was computed and found to be another there are entries that correct this, with
        weights above 1 or below 0. None where all flips are known.

    Examples
    --------
    >>> flips = result.flips
    >>> flips.start.shape, int(flips.start[-1]) == len(flips.image) == len(flips.prediction)
    ((129,), True)
    """

    start: NDArray[np.int64]
    image: NDArray[np.int32]
    prediction: NDArray[np.int32]
    weight: Floats | None = None

    @classmethod
    def gather(
        cls, units: int, pieces: Sequence[tuple[ArrayLike, ...]], *, weighted: bool = False
    ) -> Flips:
        """Sort pieces (row, image, new class) in any order into one record.

        With ``weighted`` each has the weights besides.
        """
        pieces = pieces or [([],) * (3 + weighted)]
        row, image, new = (
            np.concatenate([np.asarray(piece[i], dtype=np.int64) for piece in pieces])
            for i in range(3)
        )
        order = np.lexsort((image, row))
        start = np.zeros(units + 1, dtype=np.int64)
        np.cumsum(np.bincount(row, minlength=units), out=start[1:])
        weight = None
        if weighted:
            weight = np.concatenate([np.asarray(piece[3], np.float64) for piece in pieces])[order]
        return cls(start, image[order].astype(np.int32), new[order].astype(np.int32), weight)

    @classmethod
    def joined(cls, parts: Sequence[Flips], images: Sequence[int]) -> Flips:
        """Put records of consecutive images together.

        Parameters
        ----------
        parts : sequence of Flips
            All of the same rows; images numbered within each part.
        images : sequence of int
            Number of images of each part.
        """
        counts = [np.diff(part.start) for part in parts]
        start = np.concatenate([[0], np.cumsum(np.sum(counts, axis=0), dtype=np.int64)])
        image = np.empty(start[-1], np.int32)
        prediction = np.empty(start[-1], np.int32)
        weighted = any(part.weight is not None for part in parts)
        weight = np.empty(start[-1]) if weighted else None
        cursor, first = start[:-1].copy(), 0
        for part, count, length in zip(parts, counts, images, strict=True):
            where = np.repeat(cursor - part.start[:-1], count) + np.arange(len(part.image))
            image[where] = part.image + first
            prediction[where] = part.prediction
            if weight is not None:
                assert part.weight is not None
                weight[where] = part.weight
            cursor += count
            first += length
        return cls(start, image, prediction, weight)

    def updated(self, again: Flips, rows: NDArray[np.bool_]) -> Flips:
        """Take the entries of some rows, bool ``[unit]``, from another record of these images."""
        count = np.where(rows, np.diff(again.start), np.diff(self.start))
        new, kept, taken = np.repeat(rows, count), ~rows[self.row], rows[again.row]

        def merged(mine: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
            found = np.empty(len(new), mine.dtype)
            found[~new], found[new] = mine[kept], other[taken]
            return found

        weight = None
        if self.weight is not None and again.weight is not None:
            weight = merged(self.weight, again.weight)
        return Flips(
            np.concatenate([[0], np.cumsum(count, dtype=np.int64)]),
            merged(self.image, again.image),
            merged(self.prediction, again.prediction),
            weight,
        )

    @cached_property
    def row(self) -> Ints:
        """int64 [flip]: the row of each entry."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))
