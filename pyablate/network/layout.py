"""Where images lie in a tensor, and which part of what a module returns a site is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchLayout:
    """Where a tensor keeps the images: ``shape[axis] == outer * images * inner``."""

    axis: int
    inner: int = 1
    outer: int = 1

    @property
    def plain(self) -> bool:
        """Whether the tensor has exactly one row per image, first."""
        return self == BatchLayout(0)

    def pick(self, x: Tensor, image: Tensor) -> Tensor:
        """Gather images: the batch becomes ``len(image)`` long."""
        if self.inner == self.outer == 1:
            return x.index_select(self.axis, image)
        split: Tensor = x.unflatten(self.axis, (self.outer, -1, self.inner))
        return split.index_select(self.axis + 1, image).flatten(self.axis, self.axis + 2)

    def images_first(self, x: Tensor) -> Tensor:
        """View a tensor with the images first; what else their axis held becomes axes."""
        if self.plain:
            return x
        split: Tensor = x.unflatten(self.axis, (self.outer, -1, self.inner))
        moved = split.movedim(self.axis + 1, 0)
        for at, size in ((self.axis + 2, self.inner), (self.axis + 1, self.outer)):
            moved = moved.squeeze(at) if size == 1 else moved
        return moved

    def images_back(self, x: Tensor) -> Tensor:
        """Undo :meth:`images_first`."""
        if self.plain:
            return x
        for at, size in ((self.axis + 1, self.outer), (self.axis + 2, self.inner)):
            x = x.unsqueeze(at) if size == 1 else x
        return x.movedim(0, self.axis + 1).flatten(self.axis, self.axis + 2).contiguous()

    def shape_first(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape that :meth:`images_first` gives."""
        images = shape[self.axis] // (self.outer * self.inner)
        split = (size for size in (self.outer, self.inner) if size > 1)
        return (images, *shape[: self.axis], *split, *shape[self.axis + 1 :])

    def axis_there(self, axis: int) -> int:
        """Say where another axis lies once the images are first."""
        added = (self.outer > 1) + (self.inner > 1)
        return axis + 1 if axis < self.axis else axis + added


FIRST = BatchLayout(0)


@dataclass(frozen=True)
class Within:
    """Which tensor a site is, within what a module or function returns.

    Attributes
    ----------
    item : int or None
        Of a tuple or list, which one.
    images : BatchLayout
        Where the images lie; in the site's tensor they are first.
    part : (int, int, int) or None
        Axis of the site's tensor, first entry there and number of entries, where it is a part.
    """

    item: int | None = None
    images: BatchLayout = FIRST
    part: tuple[int, int, int] | None = None

    def of(self, output: Any) -> Tensor:
        """Give the site's tensor, a view."""
        whole = self.images.images_first(output if self.item is None else output[self.item])
        return whole if self.part is None else whole.narrow(*self.part)

    def put(self, output: Any, changed: Tensor) -> Any:
        """Give what was returned with another tensor at the site."""
        if self.part is not None:
            axis, start, length = self.part
            whole = Within(self.item, self.images).of(output)
            rest = whole.shape[axis] - start - length
            before, _, after = whole.split([start, length, rest], dim=axis)
            changed = torch.cat([before, changed, after], dim=axis)
        changed = self.images.images_back(changed)
        if self.item is None:
            return changed
        items = [*output[: self.item], changed, *output[self.item + 1 :]]
        return output._make(items) if hasattr(output, "_make") else type(output)(items)


WHOLE = Within()
"""All of a tensor, images first."""
