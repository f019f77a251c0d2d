"""Sites, and how their tensors are seen and replaced while a network runs."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from pyablate.network.layout import WHOLE, Within
from pyablate.runtime.determinism import tensors_on_cpu

Kind = Literal["activation", "block", "layer", "heads", "part"]
SPEAKING: tuple[Kind, ...] = ("activation", "block")


@dataclass(frozen=True)
class Site:
    """A tensor that holds units.

    Attributes
    ----------
    name : str
        Dotted module name; with ``@k`` behind it, the k-th call only (counted from 1).
    module : str
        Dotted module name.
    call : int or None
        Which call of the module; None means every call.
    channels : int
        Number of units.
    axis : int
        Axis of the units in the output, batch included (never 0).
    shape : tuple of int
        Shape of the output for one image, batch left out.
    kind : {"activation", "block", "layer", "heads", "part"}
        ``"*"`` selects activations and blocks; layers, attention heads and parts of layers
        (queries, keys, values) are asked for by name.
    function : (str, int) or None
        Where the tensor is not what the module returns, but what a function of torch returns that
        the network calls afterwards: name of the function, and which of the calls by that name
        since the module returned, from 1.
    width : int
        Consecutive entries along the axis that make one unit: more than one for attention heads.
    within : Within
        Which tensor this is, where it is not simply all that is returned, images first.

    Examples
    --------
    >>> site = pa.sites(model, images[:1])[-1]
    >>> site.name, site.channels, site.kind
    ('pool', 128, 'layer')
    """

    name: str
    module: str
    call: int | None
    channels: int
    axis: int
    shape: tuple[int, ...]
    kind: Kind
    function: tuple[str, int] | None = None
    width: int = 1
    within: Within = WHOLE

    @property
    def features(self) -> int:
        """Entries along the axis of the units."""
        return self.channels * self.width

    @property
    def plain(self) -> bool:
        """Whether this is all that a module returns, and each entry is a unit."""
        return self.function is None and self.within == WHOLE and self.width == 1

    def entries(self, unit: int) -> range:
        """Entries along the axis that are one unit."""
        return range(unit * self.width, (unit + 1) * self.width)

    def label(self, unit: int) -> str:
        """Name of one unit, ``"layer:unit"``."""
        return f"{self.name}:{unit}"


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Run a network in evaluation mode and give every module its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def hooked(
    model: nn.Module, targets: Iterable[Site], change: Callable[[Site, int, Tensor], Tensor]
) -> Iterator[None]:
    """Let ``change(site, call, tensor)`` replace the sites' tensors at each call of their modules.

    A call (counted from 1 within one forward pass of ``model``) that no target names is left
    alone. The hooks are gone afterwards, whatever happened.
    """
    by_module: dict[str, list[Site]] = {}
    for site in targets:
        by_module.setdefault(site.module, []).append(site)
    calls: dict[str, int] = {}
    handles = [model.register_forward_pre_hook(lambda *_: calls.clear())]
    results = FunctionResults()
    if any(site.function for sites in by_module.values() for site in sites):
        handles += results.watching(model)

    def replaced(site: Site, call: int, output: Any) -> Any:
        tensor = site.within.of(output)
        with tensors_on_cpu():  # which the network's own may not be
            changed = change(site, call, tensor)
        return output if changed is tensor else site.within.put(output, changed)

    def watch(name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            call = calls[name] = calls.get(name, 0) + 1
            changed = output
            for site in by_module[name]:
                if site.call not in (None, call):
                    continue
                if site.function is None:
                    with results.paused():
                        changed = replaced(site, call, changed)
                else:
                    results.expect(site.function, functools.partial(replaced, site, call))
            return changed

        return hook

    try:
        for name in by_module:
            handles.append(model.get_submodule(name).register_forward_hook(watch(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_recorders(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Take a caller's hooks away that return nothing: they record, and are no part of the network.

    They are told from those that do change something by one forward pass of ``images``, in which
    none of them is left out.
    """
    tables = [
        table
        for module in model.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
        if table
    ]
    saved = [dict(table) for table in tables]
    changing: set[int] = set()

    def noting(key: int, hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def noted(*arguments: Any, **named: Any) -> Any:
            result = hook(*arguments, **named)
            if result is not None:
                changing.add(key)
            return result

        return noted

    try:
        if tables:
            for table in tables:
                table.update({key: noting(key, hook) for key, hook in table.items()})
            with evaluation(model), torch.no_grad():
                model(images.clone())
            for table, hooks in zip(tables, saved, strict=True):
                table.clear()
                table.update({key: hook for key, hook in hooks.items() if key in changing})
        yield
    finally:
        for table, hooks in zip(tables, saved, strict=True):
            table.clear()
            table.update(hooks)


class FunctionResults(TorchFunctionMode):
    """Replaces what functions of torch return to the network that calls them.

    A residual sum, a functional batch norm or a gate is no module's output. Such a tensor is told
    by the module whose call came before and by the functions that the network called since, which
    are the same however and wherever the network is run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._expected: list[_Expected] = []
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count no call of a function meanwhile: it is not the network's."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def watching(self, model: nn.Module) -> list[RemovableHandle]:
        """Watch the forward passes of a network until the handles are removed."""

        def enter(*_: Any) -> None:
            self._expected.clear()
            self.__enter__()  # type: ignore[no-untyped-call]

        def leave(*_: Any) -> None:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        return [
            model.register_forward_pre_hook(enter),
            model.register_forward_hook(leave, always_call=True),
        ]

    def expect(self, function: tuple[str, int], change: Callable[[Tensor], Tensor | None]) -> None:
        """Let ``change`` see, and perhaps replace, the result of a function called from now on."""
        name, number = function
        self._expected.append(_Expected(name, number, change))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and change its result if it is expected."""
        opened = inside(func)
        if opened is not None:
            with self:
                return opened(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if self._paused or not isinstance(result, Tensor):
            return result
        name, given = function_name(func), result
        for one in list(self._expected):
            one.left -= one.name == name
            if one.left == 0:
                self._expected.remove(one)
                changed = one.change(result)
                result = result if changed is None else changed
        if result is not given and any(given is argument for argument in args):
            result = given.copy_(result)  # in place: the network may look at its argument
        return result


@dataclass(eq=False)
class _Expected:
    name: str
    left: int
    change: Callable[[Tensor], Tensor | None]


def inside(function: Any) -> Callable[..., Any] | None:
    """Give the function that does the same with the functions that it calls in sight, if any.

    All that ``nn.MultiheadAttention`` does is one function of torch, which hides what it calls
    from a mode that was told of itself.
    """
    return _ATTENTION if function is functional.multi_head_attention_forward else None


_ATTENTION = types.FunctionType(
    functional.multi_head_attention_forward.__code__,
    {**vars(functional), "has_torch_function": lambda _tensors: False},
    argdefs=functional.multi_head_attention_forward.__defaults__,
)


def function_name(function: Any) -> str:
    """Name of a function of torch, the same for its forms: ``Tensor.relu_`` is a ``relu``."""
    name = str(getattr(function, "__name__", type(function).__name__))
    return name.partition(".")[0].strip("_")
