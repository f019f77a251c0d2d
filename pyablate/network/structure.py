"""What ``torch.export`` sees of a network, as one value to compare: all but its weights' values.

Parameters and buffers have no values while a network is traced. Everything else may steer the
trace: modules and their settings, hooks, the functions that are called, with what these refer to.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Hashable, Mapping
from contextlib import suppress
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyablate.network.copies import globals_of

_PLAIN = (bool, int, str, bytes, type(None), type(Ellipsis), type(NotImplemented), CodeType, Enum)
_BY_IDENTITY = (
    type,
    ModuleType,
    logging.Logger,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
)


class _Untold(Exception):
    """Something holds what cannot be compared, such as a lock or a generator."""


def structure(model: nn.Module) -> Hashable | None:
    """Tell a network but for the values of its parameters and buffers.

    Returns
    -------
    hashable or None
        Equal for networks that ``torch.export`` traces alike. It refers to classes, modules of
        Python and code, to no network. None where something in it cannot be told.
    """
    try:
        told = _Walk().of(model)
        hash(told)
    except Exception:  # whatever an object raises that does not like it
        return None
    return told


class _Walk:
    """Goes through what a network holds; what is met again is told by its number."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, Any]] = {}  # with the value, whose id is its as it lives

    def of(self, value: Any) -> Hashable:
        """Tell a value."""
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, (float, complex)):
            return type(value), repr(value)  # NaN is itself
        if isinstance(value, _BY_IDENTITY):
            return value
        return self._again(value) or (type(value), self._inside(value))

    def _again(self, value: Any) -> Hashable:
        """Tell a value that was met before; None, and remember it, where it was not."""
        if id(value) in self.seen:
            return "again", self.seen[id(value)][0]
        self.seen[id(value)] = len(self.seen), value
        return None

    def _inside(self, value: Any) -> Hashable:
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Tensor):
            return _form(value), _digest(value)
        if isinstance(value, (np.ndarray, np.generic)):
            return self._array(np.asarray(value))
        if isinstance(value, Mapping):
            items = tuple((self.of(key), self.of(one)) for key, one in value.items())
            return items, self._attributes(value)
        if isinstance(value, (list, tuple)):
            return tuple(map(self.of, value)), self._attributes(value)
        if isinstance(value, (set, frozenset)):
            return frozenset(map(self.of, value))
        return self._function(value)

    def _module(self, module: nn.Module) -> Hashable:
        tables = {"_parameters", "_buffers"}
        weights = tuple(
            (table, name, self._weight(one))
            for table in sorted(tables)
            for name, one in vars(module)[table].items()
        )
        others = {name: one for name, one in vars(module).items() if name not in tables}
        # A class of one's own may have been given other methods meanwhile.
        own = [kind for kind in type(module).__mro__ if not _is_torch(kind)]
        methods = [(name, one) for kind in own for name, one in vars(kind).items()]
        functions = tuple((name, self.of(_bare(one))) for name, one in methods if _bare(one))
        return weights, self.of(others), functions

    def _weight(self, value: Tensor | None) -> Hashable:
        return None if value is None else self._again(value) or (type(value), _form(value))

    def _array(self, value: np.ndarray) -> Hashable:
        if value.dtype.hasobject:
            raise _Untold
        return value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).digest()

    def _function(self, value: Any) -> Hashable:
        if isinstance(value, MethodType):
            return self.of(value.__func__), self.of(value.__self__)
        if isinstance(value, functools.partial):
            return self.of(value.func), self.of(value.args), self.of(value.keywords)
        if isinstance(value, BuiltinFunctionType):
            if value.__self__ is None or isinstance(value.__self__, ModuleType):
                return value
            raise _Untold
        if isinstance(value, FunctionType):
            return value if _is_torch(value) else self._code(value)
        wrapped = getattr(value, "__wrapped__", None)
        if wrapped is not None and type(value).__module__ == "functools":
            return self.of(wrapped)
        if not hasattr(value, "__dict__") or _has_slots(type(value)):
            raise _Untold
        return self._attributes(value)

    def _code(self, function: FunctionType) -> Hashable:
        cells: tuple[Hashable, ...] = ()
        with suppress(ValueError):  # a variable that has no value yet
            cells = tuple(self.of(cell.cell_contents) for cell in function.__closure__ or ())
        named = tuple((name, self.of(one)) for name, one in globals_of(function).items())
        defaults = self.of(function.__defaults__), self.of(function.__kwdefaults__)
        return function.__code__, cells, named, defaults, self.of(vars(function))

    def _attributes(self, value: Any) -> Hashable:
        held = getattr(value, "__dict__", None)
        return tuple((name, self.of(one)) for name, one in held.items()) if held else ()


def _form(value: Tensor) -> Hashable:
    strides = value.stride() if value.layout == torch.strided else None
    return tuple(value.shape), strides, value.dtype, value.device, value.layout


def _digest(value: Tensor) -> bytes:
    """Hash the values of a tensor that is no weight: they may be in the trace as numbers."""
    if value.layout != torch.strided or value.is_meta:
        raise _Untold
    flat = value.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).digest()


def _is_torch(value: Any) -> bool:
    return value is object or str(value.__module__).partition(".")[0] == "torch"


def _bare(value: Any) -> FunctionType | None:
    """Return the function behind an entry of a class; None if there is none."""
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    return value if isinstance(value, FunctionType) else None


def _has_slots(kind: type) -> bool:
    """Whether instances hold more than their ``__dict__`` shows."""
    return any("__slots__" in vars(one) and vars(one)["__slots__"] for one in kind.__mro__) or (
        kind.__basicsize__ > object.__basicsize__ + 16
    )
