"""Several inputs of a model as one tensor, and back: the engine knows images ``[N, ...]`` only."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

_log = logging.getLogger("pyablate")

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)

LABELS = ("labels", "label")
"""Keys of the labels in a batch that is a mapping, as Hugging Face's data sets have them."""


@dataclass(frozen=True)
class Inputs:
    """How the inputs of a model lie in one tensor.

    One input keeps its shape; several lie flat, side by side, in ``[N, width]``.

    Attributes
    ----------
    names : tuple of str or None
        Keywords of the model's forward; None where they go by position.
    shapes : tuple of tuple of int
        Of each input for one image.
    dtypes : tuple of torch.dtype or None
        To what each is turned back: integers and booleans, which the model needs as indices or
        masks. None stays in the dtype that the model computes in.
    """

    names: tuple[str, ...] | None
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype | None, ...]

    @classmethod
    def of(cls, given: Any) -> Inputs:
        """Describe a batch: a mapping by keyword, a tuple or list by position, or one tensor."""
        names = tuple(map(str, given)) if isinstance(given, Mapping) else None
        parts = _tensors(given)
        return cls(
            names,
            tuple(tuple(part.shape[1:]) for part in parts),
            tuple(part.dtype if is_integer(part) else None for part in parts),
        )

    def pack(self, given: Any, dtype: torch.dtype) -> Tensor:
        """Join the inputs of a batch to one tensor, in which integers keep their values.

        Raises
        ------
        ValueError
            An integer that ``dtype`` cannot hold, or inputs that are not of one length.
        """
        parts = _tensors(given)
        for name, part in zip(self.called, parts, strict=True):
            if is_integer(part) and not torch.equal(part.to(dtype).to(part.dtype), part):
                raise ValueError(
                    f"{name} holds integers that {dtype} cannot hold (the largest is "
                    f"{int(part.max())}); a model in float64 takes them up to 2**53"
                )
        if len(parts) == 1:
            return parts[0]
        if len({len(part) for part in parts}) > 1:
            counts = dict(zip(self.called, map(len, parts), strict=True))
            raise ValueError(f"expected inputs of as many images each, got {counts}")
        flat = [part.reshape(len(part), -1) for part in parts]
        return torch.cat(
            [scaled(one, dtype) if one.dtype == torch.uint8 else one.to(dtype) for one in flat],
            dim=1,
        )

    def takes(self, other: Inputs) -> bool:
        """Whether a batch is like the first one, but for the width of its integers."""
        return (self.names, self.shapes, [dtype is None for dtype in self.dtypes]) == (
            other.names,
            other.shapes,
            [dtype is None for dtype in other.dtypes],
        )

    def unpack(self, images: Tensor) -> list[Tensor]:
        """Return the inputs in the model's shapes and dtypes."""
        if len(self.shapes) == 1:
            parts: Sequence[Tensor] = [images]
        else:
            parts = images.split([prod(shape) for shape in self.shapes], dim=1)
            parts = [
                part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)
            ]
        return [
            part if dtype is None else part.to(dtype)
            for part, dtype in zip(parts, self.dtypes, strict=True)
        ]

    def call(self, forward: Callable[..., Any], images: Tensor) -> Any:
        """Call a model's forward with the inputs that lie in one tensor."""
        parts = self.unpack(images)
        if self.names is None:
            return forward(*parts)
        return forward(**dict(zip(self.names, parts, strict=True)))

    def as_given(self, images: Tensor) -> Any:
        """Return the inputs as they came: a dict, or a tuple."""
        parts = self.unpack(images)
        return tuple(parts) if self.names is None else dict(zip(self.names, parts, strict=True))

    def integers(self, images: Tensor) -> Tensor:
        """Which entries of one image are integers, a bool that broadcasts against ``images``."""
        if len(self.shapes) == 1:
            return torch.tensor(self.dtypes[0] is not None, device=images.device)
        widths = torch.tensor([prod(shape) for shape in self.shapes])
        whole = torch.tensor([dtype is not None for dtype in self.dtypes])
        return whole.repeat_interleave(widths).to(images.device)

    @property
    def called(self) -> list[str]:
        """What a message calls each input."""
        if self.names is not None:
            return list(self.names)
        return [f"input {number}" for number in range(len(self.shapes))]

    def __str__(self) -> str:
        """Names and shapes, as a message gives them."""
        return ", ".join(
            f"{name} {list(shape)}" for name, shape in zip(self.called, self.shapes, strict=True)
        )


def as_tensor(given: Any) -> Tensor:
    """Make a tensor of real numbers: of arrays in any layout, byte order and unsigned type, too.

    Raises
    ------
    TypeError
        Text, objects or complex numbers.
    ValueError
        A tensor without values, on the meta device.
    """
    if isinstance(given, np.ndarray):
        if given.dtype.kind not in "biufc":
            raise TypeError(f"expected numbers, got an array of {given.dtype}")
        given = np.asarray(given, given.dtype.newbyteorder("="), order="C")
    found = torch.as_tensor(given)
    if found.is_complex():
        raise TypeError(
            f"expected real numbers, got {found.dtype}; real and imaginary parts may be channels"
        )
    if found.is_meta:
        raise ValueError("expected values, got a tensor on the meta device, which has none")
    # Torch computes with bytes, and else with signed integers only.
    return found.long() if found.dtype in _UNSIGNED else found


def is_integer(part: Tensor) -> bool:
    """Whether numbers stand for themselves: integers and booleans, but for bytes of images."""
    return not part.is_floating_point() and not part.is_complex() and part.dtype != torch.uint8


def scaled(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring bytes of images to ``[0, 1]``, which the log tells once."""
    _say_scaled()
    # In float32 whatever the dtype: all precisions are to have the same images.
    return (images.to(torch.float32) / 255).to(dtype)


@functools.cache
def _say_scaled() -> None:
    _log.warning("data: images of uint8 are scaled from 0..255 to 0..1; give floats to avoid that")


def packed(sample: Any, dtype: torch.dtype) -> tuple[Tensor, Inputs | None]:
    """Join a batch of several inputs to one tensor; one tensor stays, and its inputs are None."""
    if isinstance(sample, Tensor):
        return sample, None
    inputs = Inputs.of(sample)
    return inputs.pack(sample, dtype), inputs


def arguments(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a batch as the arguments of a model's forward, by position and by keyword."""
    if isinstance(sample, Mapping):
        return (), dict(sample)
    return (tuple(sample) if is_structured(sample) else (sample,)), {}


def is_structured(given: Any) -> bool:
    """Whether images came as a mapping, or as a tuple or list of arrays."""
    if isinstance(given, (tuple, list)):
        return bool(given) and all(isinstance(part, (Tensor, np.ndarray)) for part in given)
    return isinstance(given, Mapping)


def labels_apart(batch: Mapping[str, Any], where: str) -> tuple[dict[str, Any], Any]:
    """Split a batch that is a mapping into its inputs and its labels, None if it has none.

    Raises
    ------
    TypeError
        There are no inputs, or two kinds of labels.
    """
    inputs = {key: value for key, value in batch.items() if key not in LABELS}
    found = [batch[key] for key in LABELS if key in batch]
    if not inputs or len(found) > 1:
        raise TypeError(
            f"{where}: expected a mapping of inputs and {' or '.join(map(repr, LABELS))}, got "
            f"one of {', '.join(map(repr, batch)) or 'nothing'}"
        )
    return inputs, found[0] if found else None


def chosen(images: Any, which: Tensor) -> Any:
    """Choose some images (bool or int64 ``[N]``) of a tensor, or of each input of several."""
    if isinstance(images, Mapping):
        return {name: chosen(part, which) for name, part in images.items()}
    if isinstance(images, (tuple, list)):
        return tuple(chosen(part, which) for part in images)
    return images[which.to(images.device)]


def _tensors(given: Any) -> list[Tensor]:
    parts = given if is_structured(given) else [given]
    named = list(parts.items()) if isinstance(parts, Mapping) else list(enumerate(parts))
    found = []
    for name, part in named:
        try:
            found.append(as_tensor(part))
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"input {name!r} is no tensor but {type(part).__name__}; leave out what the model "
                "does not take"
            ) from None
        if not found[-1].ndim:
            raise TypeError(f"input {name!r} is one number; expected one row per image")
    return found
