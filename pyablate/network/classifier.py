"""A user's model as the rest of the package sees it: one tensor of images to logits ``[N, K]``.

What a model returns besides its logits, and that it takes several inputs, is dealt with here only:
the forward of a working copy is wrapped, so that its modules keep their names.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from pyablate._validation import nearest
from pyablate.data.inputs import Inputs
from pyablate.network.copies import copied_with
from pyablate.network.forward import contents
from pyablate.runtime.determinism import callers_device

logger = logging.getLogger("pyablate")

Choice = str | int | Callable[[Any], Tensor] | None
"""Which of a model's outputs the logits are; see :func:`classifier`."""

BINARY = "binary"


def classifier(model: nn.Module, *, logits: Choice = None) -> nn.Module:
    """Copy a model as one that returns its logits and nothing else.

    All functions that take a model take what this returns, and most do the same by themselves as
    long as ``logits`` is not needed.

    Parameters
    ----------
    model : nn.Module
        Any classifier.
    logits : str, int or callable, optional
        What the logits are, where the model returns more than one tensor. By default ``logits`` of
        a mapping or an object that has them, as Hugging Face's ``ModelOutput``, or the first item
        of a tuple or list. A string is another key or attribute, a number another place, a callable
        gets what the model returned and gives the logits ``[N, classes]``; modules of the model to
        which it refers are those of the copy. ``"binary"`` makes two
        classes of one logit ``[N]`` or ``[N, 1]``: 0 for the first and the logit for the second,
        which is predicted where the logit is positive.

    Returns
    -------
    nn.Module
        A copy: one tensor of images to logits. Its modules have the names they had.

    Raises
    ------
    TypeError
        ``model`` is no module, ``logits`` of another type, or a callable that reaches modules with
        weights which are not the model's.

    Examples
    --------
    >>> class TwoHeads(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.body, self.coarse = model, torch.nn.Linear(10, 2)
    ...     def forward(self, x):
    ...         fine = self.body(x)
    ...         return {"fine": fine, "coarse": self.coarse(fine)}
    >>> coarse = pa.classifier(TwoHeads().eval(), logits="coarse")
    >>> list(coarse(images[:3]).shape)
    [3, 2]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    check_choice_of_logits(logits)
    work, logits = copied_with(model, logits)
    _Forward.for_(work, logits).put_on(work)
    return work


def check_choice_of_logits(logits: Any) -> None:
    """Refuse what says nothing about where the logits are."""
    known = logits is None or isinstance(logits, (str, int)) or callable(logits)
    if not known or isinstance(logits, bool):
        raise TypeError(f"logits: expected a string, a number or a callable, got {logits!r}")


@contextmanager
def giving_logits(
    model: nn.Module, logits: Choice = None, inputs: Inputs | None = None
) -> Iterator[None]:
    """Let a model take one tensor and return its logits for a while, without a copy."""
    before = dict(vars(model))
    _Forward.for_(model, logits, inputs).put_on(model)
    try:
        yield
    finally:
        del vars(model)["forward"]
        if "forward" in before:
            vars(model)["forward"] = before["forward"]


def inputs_of(model: nn.Module) -> Inputs | None:
    """Tell how a working copy takes several inputs; None if it takes images."""
    own = _Forward.of(model)
    return None if own is None else own.inputs


def take_inputs(model: nn.Module, inputs: Inputs | None) -> None:
    """Let a working copy, in place, take several inputs packed to one tensor."""
    own = _Forward.of(model)
    if own is not None:
        own.inputs = inputs


def choice_of(model: nn.Module) -> str:
    """Tell in one line what a working copy does to inputs and outputs; empty if nothing."""
    own = _Forward.of(model)
    return "" if own is None else repr(own)


def logits_of(model: nn.Module, returned: Any) -> Any:
    """Take the logits out of what the own forward of a working copy returned."""
    own = _Forward.of(model)
    for choice in () if own is None else own.choices:
        returned, _ = _taken(returned, choice)
    return returned


def varied(
    model: nn.Module, images: Tensor, change: Callable[[Tensor], Tensor], others: Tensor
) -> Tensor:
    """Other images that a model takes: changed, but for integers, which come from ``others``."""
    inputs = inputs_of(model)
    if inputs is None:
        return change(images)
    return torch.where(inputs.integers(images), others, change(images))


class _Forward:
    """Forward of a working copy, in place of that of its class."""

    def __init__(
        self, inner: Callable[..., Any], choices: tuple[Choice, ...], inputs: Inputs | None
    ) -> None:
        self.inner, self.choices, self.inputs = inner, choices, inputs
        self.device = callers_device()  # where it makes tensors without naming one
        self.said = False

    @classmethod
    def for_(cls, model: nn.Module, logits: Choice, inputs: Inputs | None = None) -> _Forward:
        """Make one for a model, whose outputs may be chosen from already."""
        own = cls.of(model)
        if own is None:
            return cls(model.forward, (logits,), inputs)
        more = () if logits is None else (logits,)
        found = cls(own.inner, (*own.choices, *more), inputs or own.inputs)
        found.said = own.said
        return found

    @classmethod
    def of(cls, model: nn.Module) -> _Forward | None:
        """Find the one that was put on a model; None if there is none."""
        owner = getattr(vars(model).get("forward"), "__self__", None)
        return owner if isinstance(owner, cls) else None

    def put_on(self, model: nn.Module) -> None:
        """Replace a model's own forward."""
        vars(model)["forward"] = self.forward  # a method: torch.export looks at its code

    def forward(self, images: Tensor) -> Any:
        """Return the logits; what is no tensor even then is handed on, to be refused."""
        if self.device is None:
            return self._logits(images)
        with self.device:
            return self._logits(images)

    def _logits(self, images: Tensor) -> Any:
        inputs = self.inputs
        found = self.inner(images) if inputs is None else inputs.call(self.inner, images)
        for choice in self.choices:
            taken, name = _taken(found, choice)
            if name and not self.said:
                logger.info(
                    "model: it returns %s; %s is taken as the logits (logits= picks another)",
                    contents(found),
                    name,
                )
                self.said = True
            found = taken
        return found

    def __repr__(self) -> str:
        """Choices only; functions by name and by what they do."""
        given = [_told(one) for one in self.choices if one is not None]
        parts = [f"logits={one}" for one in given]
        return "; ".join(parts if self.inputs is None else [*parts, str(self.inputs)])


def _told(choice: Any) -> Any:
    """Tell a choice in the same words in every process, and another function in others."""
    if not callable(choice):
        return choice
    code = getattr(choice, "__code__", None) or getattr(type(choice).__call__, "__code__", None)
    name = getattr(choice, "__qualname__", type(choice).__qualname__)
    return f"{name} {hashlib.sha256(_does(code).encode()).hexdigest()[:16]}"


def _does(code: CodeType | None) -> str:
    if code is None:
        return ""
    inside = [_does(one) if isinstance(one, CodeType) else one for one in code.co_consts]
    return repr((code.co_code.hex(), code.co_names, inside))


def _taken(found: Any, logits: Choice) -> tuple[Any, str]:
    """Take the logits out of what a model returned; if unasked, say which they are."""
    if callable(logits):
        return logits(found), ""
    if logits == BINARY:
        taken, name = _taken(found, None)
        return _two_classes(taken), name
    if isinstance(logits, str):
        return _named(found, logits), ""
    if isinstance(logits, int):
        return _numbered(found, logits), ""
    if isinstance(found, Tensor):
        return found, ""
    if isinstance(found, Mapping):
        return (found["logits"], "'logits'") if "logits" in found else (found, "")
    if hasattr(found, "logits"):
        return found.logits, "'logits'"
    if isinstance(found, (tuple, list)) and found:
        return found[0], "the first"
    return found, ""


def _two_classes(logit: Any) -> Tensor:
    single = isinstance(logit, Tensor) and (logit.ndim == 1 or logit.shape[1:] == (1,))
    if not single:
        raise ValueError(f'logits: "binary" needs one logit an image, got {contents(logit)}')
    column = logit.reshape(-1, 1)
    return torch.cat([torch.zeros_like(column), column], dim=1)


def _named(found: Any, name: str) -> Any:
    if isinstance(found, Mapping):
        if name in found:
            return found[name]
        near = nearest(name, [str(key) for key in found])
    elif hasattr(found, name):
        return getattr(found, name)
    else:
        near = ""
    raise ValueError(f"logits: the model returns {contents(found)}, got {name!r}{near}")


def _numbered(found: Any, number: int) -> Any:
    items: Sequence[Any] = list(found.values()) if isinstance(found, Mapping) else found
    if isinstance(items, (tuple, list)) and -len(items) <= number < len(items):
        return items[number]
    raise ValueError(f"logits: the model returns {contents(found)}, got {number}")
