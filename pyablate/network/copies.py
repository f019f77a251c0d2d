"""Copies of a user's model, whatever it holds besides its weights."""

from __future__ import annotations

import copy
import functools
import logging
import operator
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyablate._validation import first_line
from pyablate.runtime.locks import export_lock

logger = logging.getLogger("pyablate")

_SHARED = (ModuleType, type(threading.Lock()), type(threading.RLock()))
"""What a copy may share with the model and nobody notices."""


def seen_through(model: nn.Module) -> nn.Module:
    """Return the network itself, whatever DataParallel and torch.compile have wrapped.

    A copy, where parts of it are wrapped: those have other names then.
    """
    model = _inside(model)
    return copied(model) if any(_inside(part) is not part for part in model.modules()) else model


def copied(model: nn.Module) -> nn.Module:
    """Copy a model, also one that holds what :func:`copy.deepcopy` refuses.

    Tensors with a history or of inference mode (old weight norm, activations that a pass left) are
    copied without it. Locks, files and the like are shared with the model, which is logged.
    Functions that were put on the model in place of its own, and hooks, refer to the copy. Of
    what is compiled or parallel, in whole or in part, the network as it was.

    Raises
    ------
    TypeError
        Something refuses even so; the message names it.
    """
    return copied_with(model, None)[0]


def copied_with(model: nn.Module, function: Any) -> tuple[nn.Module, Any]:
    """Copy a model as :func:`copied` does, and with it a function that may refer to it.

    The function refers to the copy where it referred to the model or a module of it.

    Raises
    ------
    TypeError
        The model refuses, or what the function refers to is reached in no way known here.
    """
    model = _inside(wrapped := model)
    # The lock: without hooks that another thread may have put on it.
    with export_lock(), torch.inference_mode(False):
        known = _plain_tensors(model) | _empty_tables(model)
        try:
            found, memo = _deepcopy(model, known)
        except Exception:  # whatever an object raises that does not like it
            known |= _awkward(model)
            try:
                found, memo = _deepcopy(model, known)
            except Exception as error:
                raise TypeError(
                    f"model: {type(model).__name__} cannot be copied: {first_line(error)}"
                ) from error
        memo[id(wrapped)] = found
        if function is not None:
            with suppress(Exception):  # one that refuses is shared
                function = copy.deepcopy(function, memo)
            function = _of_copy(function, memo)
            _check_belongs(function, found)
    return found, function


def _deepcopy(model: nn.Module, known: Mapping[int, Any]) -> tuple[nn.Module, dict[int, Any]]:
    """Return the copy of a model, and what stands in it for each object, by its id."""
    memo = dict(known)
    for module in reversed(list(model.modules())):  # the inner ones first
        if _inside(module) is not module:
            memo[id(module)] = copy.deepcopy(_inside(module), memo)
    found = copy.deepcopy(model, memo)
    if "forward" in vars(model):  # which a traced network (fx.GraphModule) leaves behind
        vars(found)["forward"] = copy.deepcopy(vars(model)["forward"], memo)
    for module in found.modules():
        if module._compiled_call_impl is not None:  # by `module.compile()`
            module._compiled_call_impl = None
        own = vars(module)
        owner = getattr(own.get("forward"), "__self__", None)  # which may hold functions
        inner = {} if owner is None or isinstance(owner, nn.Module) else vars(owner)
        for table in (own, inner, module._forward_hooks, module._forward_pre_hooks):
            for key, value in cast(dict[Any, Any], table).items():
                if isinstance(value, (FunctionType, tuple)):
                    table[key] = _of_copy(value, memo)
    return found, memo


def _inside(module: nn.Module) -> nn.Module:
    while True:
        if "_orig_mod" in module._modules:  # of torch.compile
            module = cast(nn.Module, module._modules["_orig_mod"])
        elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        else:
            return module


def _plain_tensors(model: nn.Module) -> dict[int, Tensor]:
    """Copy the tensors of modules that have a history or come from inference mode."""
    return {
        id(value): _plain(value)
        for module in model.modules()
        for table in (vars(module), module._parameters, module._buffers)
        for value in table.values()
        if isinstance(value, Tensor) and (not value.is_leaf or value.is_inference())
    }


def _plain(value: Tensor) -> Tensor:
    found = value.detach().clone()
    return nn.Parameter(found, value.requires_grad) if isinstance(value, nn.Parameter) else found


def _empty_tables(model: nn.Module) -> dict[int, Any]:
    """Make the dozen empty tables of hooks in each module anew, most of what copying costs."""
    return {
        id(value): OrderedDict()
        for module in model.modules()
        for value in vars(module).values()
        if type(value) is OrderedDict and not value
    }


def _of_copy(value: Any, memo: dict[int, Any]) -> Any:
    """Return what stands in the copy for a value that a function of the model refers to.

    ``memo`` tells it by the id of what is copied, and is added to.
    """
    if id(value) in memo or isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if isinstance(value, MethodType):
        owner = _of_copy(value.__self__, memo)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if isinstance(value, FunctionType):
        return _rebound(value, memo)
    inside = dict(enumerate(value)) if type(value) in (list, tuple) else _attributes(value)
    changed = {
        key: found
        for key, one in inside.items()
        if isinstance(one, (nn.Module, FunctionType, MethodType))
        and (found := _of_copy(one, memo)) is not one
    }
    if not changed:
        return value
    if type(value) in (list, tuple):
        return type(value)((inside | changed).values())
    memo[id(value)] = found = copy.copy(value)
    (found if type(value) is dict else vars(found)).update(changed)
    return found


def _attributes(value: Any) -> dict[Any, Any]:
    """Return what an object holds, or a dict."""
    if type(value) is dict:
        return value
    return {} if isinstance(value, (type, ModuleType)) else getattr(value, "__dict__", {})


def _rebound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """Give a function that refers to modules of the model those of the copy instead.

    It may do so by its closure, by a default or, as in notebooks, by a name of its file, and by
    functions that it refers to in one of these ways.
    """
    memo[id(function)] = function  # it may refer to itself

    def of_copy(value: Any) -> Any:
        return _of_copy(value, memo)

    try:
        before = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # a variable that has no value yet
        return function
    after = [of_copy(value) for value in before]
    names = _globals_of(function)
    moved = {name: of_copy(value) for name, value in names.items()}
    moved = {name: value for name, value in moved.items() if value is not names[name]}
    defaults = tuple(map(of_copy, function.__defaults__ or ()))
    keywords = {name: of_copy(value) for name, value in (function.__kwdefaults__ or {}).items()}
    old = [*before, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if not moved and all(map(operator.is_, old, [*after, *defaults, *keywords.values()])):
        return function
    cells = tuple(map(CellType, after))
    found = FunctionType(
        function.__code__,
        {**function.__globals__, **moved} if moved else function.__globals__,
        function.__name__,
        defaults or None,
        cells,
    )
    for cell, value in zip(cells, before, strict=True):
        if value is function:
            cell.cell_contents = found
    if moved:
        found.__globals__.update({name: found for name in names if names[name] is function})
    found.__kwdefaults__, found.__qualname__ = keywords or None, function.__qualname__
    found.__dict__.update(function.__dict__)
    memo[id(function)] = found
    return found


def _globals_of(function: FunctionType) -> dict[str, Any]:
    """Find what a function reaches by names of its file, and that may belong to the model."""
    known = function.__globals__
    named = {name: known[name] for name in function.__code__.co_names if name in known}
    return {
        name: value
        for name, value in named.items()
        if not isinstance(value, FunctionType) or value.__module__ == function.__module__
    }


def _check_belongs(function: Any, model: nn.Module) -> None:
    """Refuse a function that reaches weights which are not the model's."""
    own = set(model.modules())
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", function)]
    for name, value in waiting:
        if isinstance(value, nn.Module):
            if value not in own and any(True for _ in (*value.parameters(), *value.buffers())):
                by = f" by {name!r}" if name else ""
                raise TypeError(
                    f"logits: the function reaches {type(value).__name__}{by}, which is no module "
                    "of the model; give a model that has all that is needed, and let the function "
                    "refer to its modules, as in lambda out: model.head(out)"
                )
        elif id(value) not in seen:
            seen.add(id(value))
            waiting += _reached(value)


def _reached(value: Any) -> Iterator[tuple[str, Any]]:
    """Go through what a function, or a container, refers to, by name."""
    if isinstance(value, FunctionType):
        with suppress(ValueError):  # a variable that has no value yet
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            names = dict(zip(value.__code__.co_freevars, cells, strict=True)) | _globals_of(value)
            yield from names.items()
            for name, one in names.items():
                held = _attributes(one)
                for key in held.keys() & set(value.__code__.co_names):
                    yield f"{name}.{key}", held[key]
        yield from (("a default", one) for one in value.__defaults__ or ())
        yield from (value.__kwdefaults__ or {}).items()
    elif isinstance(value, MethodType):
        yield from (("self", value.__self__), ("", value.__func__))
    elif isinstance(value, functools.partial):
        yield from (("", value.func), ("", value.args), ("", value.keywords))
    elif isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple, set)):
        yield from (("", one) for one in value)


def _awkward(model: nn.Module) -> dict[int, Any]:
    """Say what stands in the copy for the objects that cannot be copied, by their id."""
    weights = (*model.parameters(), *model.buffers())
    passed: dict[int, Any] = {id(one): one for one in (*model.modules(), *weights)}
    found: dict[int, Any] = {}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            for path, one in _refusing(value, f"{prefix}.{name}".lstrip("."), passed):
                found[id(one)] = _plain(one) if isinstance(one, Tensor) else one
                if not isinstance(one, (Tensor, *_SHARED)):
                    _say_shared(path, type(one).__name__)
    return found


@functools.cache  # a run makes several copies
def _say_shared(path: str, kind: str) -> None:
    logger.warning(
        "model: %s (%s) cannot be copied, and the working copy uses the model's own; set it to "
        "None meanwhile if a run should leave it alone",
        path,
        kind,
    )


def _refusing(value: Any, path: str, passed: dict[int, Any]) -> Iterator[tuple[str, Any]]:
    """Find what refuses to be copied, in dicts and lists too; ``passed`` need not be looked at."""
    if id(value) in passed:
        return
    try:
        copy.deepcopy(value, dict(passed))
        return
    except Exception:  # as above
        passed[id(value)] = value
    if isinstance(value, (Mapping, list, tuple, set)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, one in items:
            yield from _refusing(one, f"{path}.{key}", passed)
    else:
        yield path, value
