"""Sites, the tensors of a network that hold units: found, named and selected; forward hooks.

A *site* is the output of a module (or of one call of it) that has the batch first and an axis
whose entries are units: the channels of a map, the features of a fully connected layer, the
hidden features of a transformer's MLP.  Sites are found by running the network once on a small
sample with forward hooks, so this works for every network, whether or not it can be exported.
"""

from __future__ import annotations

import copy
import fnmatch
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pyablate._validation import nearest
from pyablate.network.exported import original_type
from pyablate.runtime.locks import export_lock

Kind = Literal["activation", "block", "layer"]

_ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    getattr(nn, name)
    for name in (
        "CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish "
        "PReLU ReLU ReLU6 RReLU SELU Sigmoid SiLU Softplus Softshrink Softsign Tanh Tanhshrink "
        "Threshold"
    ).split()
)
_FUNCTIONAL_ACTIVATIONS: frozenset[Any] = frozenset(
    getattr(owner, name)
    for owner in (functional, torch, Tensor)
    for name in (
        "celu elu gelu hardsigmoid hardswish hardtanh leaky_relu mish prelu relu relu6 relu_ "
        "selu sigmoid silu softplus tanh"
    ).split()
    if hasattr(owner, name)
)
_UNITS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
)
_UNITS_LAST = (nn.Linear, nn.LayerNorm)
_NO_UNITS = (nn.Flatten, nn.Unflatten, nn.Softmax, nn.LogSoftmax, nn.Softmax2d)


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
    kind : {"activation", "block", "layer"}
        ``"*"`` selects activations and blocks; layers are asked for by name.

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

    def label(self, unit: int) -> str:
        """Name of one unit, ``"layer:unit"``."""
        return f"{self.name}:{unit}"


def sites(model: nn.Module, sample: Tensor) -> list[Site]:
    """List every site of a network, in the order in which the network computes them.

    Parameters
    ----------
    model : nn.Module
        The network. It is run once in evaluation mode without gradients and left as it was.
    sample : Tensor
        A batch of inputs, ``[N, ...]``; one image is enough.

    Returns
    -------
    list of Site
        Modules whose output is one floating-point tensor ``[N, ..., units, ...]``. The
        network's own output (its logits) is not a site: it holds classes.

    Raises
    ------
    TypeError
        ``model`` is no module, or (in part) TorchScript, where hooks do not reach.

    Examples
    --------
    >>> [site.name for site in pa.sites(model, images[:1]) if site.kind == "activation"]
    ['features.2', 'features.6', 'features.9', 'features.13', 'features.16']
    """
    check_model(model)
    with export_lock(), torch.inference_mode(False):  # whose tensors do not count their changes
        return _Survey(model, sample.clone()).sites()


def check_model(model: object) -> None:
    """Check that a model is a network whose layers can be seen at work."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"{name} is" if name else "this is"
            raise TypeError(
                f"model: {what} TorchScript, whose layers cannot be reached; "
                "give the network from which it was scripted or traced"
            )


def select(found: Sequence[Site], layers: str | Sequence[str] | None = None) -> list[Site]:
    """Choose sites by name or glob, in the order of ``found``.

    Parameters
    ----------
    found : sequence of Site
        What :func:`sites` returned.
    layers : str or sequence of str, optional
        Dotted module names, taken as they are, and globs. ``"*"`` (the default) is every
        activation and block output. Any other glob selects the activations and blocks that it
        matches, or, if it matches none of these, all the layers that it matches.

    Raises
    ------
    ValueError
        A pattern selects nothing; the message offers the nearest names.

    Examples
    --------
    >>> [site.name for site in pa.select(pa.sites(model, images[:1]), "features.1*")]
    ['features.13', 'features.16']
    """
    wanted: set[str] = set()
    for pattern in _as_list(layers):
        wanted.update(site.name for site in _matches(found, pattern))
    return [site for site in found if site.name in wanted]


def parse_label(
    found: Sequence[Site], label: str, count: Callable[[Site], int] = lambda site: site.channels
) -> tuple[Site, int]:
    """Turn ``"layer:unit"`` into its site and unit."""
    if not isinstance(label, str):
        raise TypeError(f'unit label: expected "layer:unit", got {type(label).__name__}')
    name, colon, unit = label.rpartition(":")
    if not colon or not unit.isdecimal():
        raise ValueError(f'unit label: expected "layer:unit" such as "features.3:7", got {label!r}')
    site = _named(found, name)
    units = count(site)
    if int(unit) >= units:
        raise ValueError(
            f"unit {unit} of layer {name!r} is out of range: the layer has {units} units "
            f"(0 to {units - 1})"
        )
    return site, int(unit)


def copied(model: nn.Module) -> nn.Module:
    """Copy a model, also one that holds tensors with a history, as old weight norm leaves them.

    Of a compiled one the network as it was.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    with export_lock():  # without hooks that another thread may have put on it
        history = {
            id(value): value.detach().clone()
            for module in model.modules()
            for value in vars(module).values()
            if isinstance(value, Tensor) and not value.is_leaf
        }
        # A dozen empty tables of hooks in each module are most of what copying costs.
        empty: dict[int, Any] = {
            id(value): OrderedDict()
            for module in model.modules()
            for value in vars(module).values()
            if type(value) is OrderedDict and not value
        }
        return copy.deepcopy(model, history | empty)


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
    """Let ``change(site, call, output)`` replace the output at each call of the sites' modules.

    A call (counted from 1 within one forward pass of ``model``) that no target names is left
    alone. The hooks are gone afterwards, whatever happened.
    """
    by_module: dict[str, list[Site]] = {}
    for site in targets:
        by_module.setdefault(site.module, []).append(site)
    calls: dict[str, int] = {}
    handles = [model.register_forward_pre_hook(lambda *_: calls.clear())]

    def watch(name: str) -> Callable[..., Tensor | None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
            calls[name] = calls.get(name, 0) + 1
            changed = output
            for site in by_module[name]:
                if site.call in (None, calls[name]):
                    changed = change(site, calls[name], changed)
            return changed

        return hook

    try:
        for name in by_module:
            handles.append(model.get_submodule(name).register_forward_hook(watch(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_list(layers: str | Sequence[str] | None) -> list[str]:
    if layers is None:
        return ["*"]
    patterns = [layers] if isinstance(layers, str) else list(layers)
    if not patterns:
        raise ValueError('layers: expected names or globs such as "*", got an empty list')
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"layers: expected strings, got {type(pattern).__name__}")
    return patterns


def _matches(found: Sequence[Site], pattern: str) -> list[Site]:
    exact = [site for site in found if site.name == pattern]
    if exact:
        return exact
    if not any(mark in pattern for mark in "*?["):
        return [_named(found, pattern)]
    matched = [site for site in found if fnmatch.fnmatchcase(site.name, pattern)]
    active = [site for site in matched if site.kind != "layer"]
    if pattern == "*" and not active:
        raise ValueError(
            'layers: "*" means activation and block outputs, and this network has none; name the '
            f"layers instead, for example {[site.name for site in found[:4]]}"
        )
    if not matched:
        raise ValueError(f"layers: no layer matches {pattern!r}{_nearest(found, pattern)}")
    return active or matched


def _named(found: Sequence[Site], name: str) -> Site:
    for site in found:
        if site.name == name:
            return site
    raise ValueError(f"layers: no layer that holds units is called {name!r}{_nearest(found, name)}")


def _nearest(found: Sequence[Site], name: str) -> str:
    return nearest(name, [site.name for site in found])


_ROWS = 7
"""Images of the survey: a number that is unlikely to be some other axis's length."""


@dataclass
class _Call:
    """One call of one module in the survey."""

    name: str
    module: nn.Module
    output: Tensor
    key: tuple[int, int]
    axis: int
    feeds_activation: bool = False


@dataclass
class _Survey:
    """One forward pass, watched: which module made which tensor, with units along which axis."""

    model: nn.Module
    sample: Tensor
    calls: list[_Call] = field(default_factory=list)
    inside: list[nn.Module] = field(default_factory=list)
    natural: tuple[int, int] = (0, 1)  # channels and axis (1 or -1) of the last weighted layer
    logits: tuple[int, int] = (0, 0)

    def sites(self) -> list[Site]:
        self._run()
        found: list[Site] = []
        calls: dict[str, list[_Call]] = {}
        for call in self.calls:
            calls.setdefault(call.name, []).append(call)
        seen: set[tuple[int, int]] = set()
        for call in self.calls:
            number = next(i for i, other in enumerate(calls[call.name], 1) if other is call)
            found += self._sites_of(call, number, calls[call.name], call.key in seen)
            seen.add(call.key)
        return found

    def _sites_of(
        self, call: _Call, number: int, calls: list[_Call], known: bool
    ) -> Iterator[Site] | list[Site]:
        if call.key == self.logits or issubclass(original_type(call.module), _NO_UNITS):
            return []
        kind = self._kind(call, known)
        site = Site(
            name=call.name,
            module=call.name,
            call=None,
            channels=call.output.shape[call.axis],
            axis=call.axis,
            shape=tuple(call.output.shape[1:]),
            kind=kind,
        )
        if len(calls) == 1:
            return [site]
        # A module without weights that is called twice is two layers that share an object; one
        # with weights is one set of units that is used twice.
        separate = not any(True for _ in call.module.parameters())
        one_call = replace(
            site,
            name=f"{call.name}@{number}",
            call=number,
            kind=kind if separate else "layer",
        )
        if number > 1 or any(_layout(other) != _layout(call) for other in calls):
            return [one_call]
        return [replace(site, kind="layer") if separate else site, one_call]

    def _kind(self, call: _Call, known: bool) -> Kind:
        kind = original_type(call.module)
        holds_others = issubclass(kind, nn.Sequential)  # whose output is that of its last module
        if call.feeds_activation and not holds_others:
            return "activation"
        if issubclass(kind, _ACTIVATIONS):
            return "activation"
        if _has_parts(call.module) and not known and not holds_others:
            return "block"
        return "layer"

    def _run(self) -> None:
        sample = self.sample[torch.arange(_ROWS) % len(self.sample)]
        handles = []
        try:
            for name, module in self.model.named_modules():
                handles.append(module.register_forward_pre_hook(self._enter))
                if name:
                    handles.append(module.register_forward_hook(self._leave(name)))
                else:
                    handles.append(module.register_forward_hook(self._finish))
            with evaluation(self.model), torch.no_grad(), _Activations(self):
                self.model(sample)
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, _inputs: Any) -> None:
        self.inside.append(module)

    def _finish(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self.logits = _key(output)

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.inside.pop()
            holds = (
                isinstance(output, Tensor)
                and output.is_floating_point()
                and output.ndim >= 2
                and output.shape[0] == _ROWS
            )
            if holds:
                axis = self._axis(module, inputs, output)
                self.calls.append(_Call(name, module, output, _key(output), axis))

        return hook

    def _axis(self, module: nn.Module, inputs: Any, output: Tensor) -> int:
        if issubclass(original_type(module), _UNITS_FIRST):
            self.natural = (output.shape[1], 1)
            return 1
        if original_type(module) in _UNITS_LAST:
            self.natural = (output.shape[-1], -1)
            return output.ndim - 1
        source = inputs[0] if inputs and not _has_parts(module) else output
        if isinstance(source, Tensor) and source.ndim == output.ndim:
            for call in reversed(self.calls):
                if call.key[0] == id(source):
                    return call.axis
        channels, axis = self.natural
        if output.ndim == 3:  # tokens [N, L, C] or a signal [N, C, L]: as the last layer had it
            return axis % 3
        last = output.ndim - 1
        if output.shape[1] != channels and output.shape[last] == channels:
            return last
        return 1


class _Activations(TorchFunctionMode):
    """Notices functional activations: the site is the module that feeds them."""

    def __init__(self, survey: _Survey) -> None:
        super().__init__()
        self.survey = survey

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Mark the module whose output is activated, unless an activation module does it."""
        inside = self.survey.inside
        # An exported program calls the ATen overload where the model called a function.
        named = func
        if isinstance(func, torch._ops.OpOverload):
            named = getattr(torch, func._schema.name.removeprefix("aten::"), None)
        if named in _FUNCTIONAL_ACTIVATIONS and args and isinstance(args[0], Tensor):
            functional_call = not (inside and issubclass(original_type(inside[-1]), _ACTIVATIONS))
            key = _key(args[0])
            for call in self.survey.calls if functional_call else ():
                if call.key == key:
                    call.feeds_activation = True
                    break
        return func(*args, **(kwargs or {}))


def _has_parts(module: nn.Module) -> bool:
    """Whether a module is made of others; those that compute its weights do not count."""
    return any(name != "parametrizations" for name, _ in module.named_children())


def _key(tensor: Tensor) -> tuple[int, int]:
    """Identify a tensor and its state: an in-place operation makes a new one of it."""
    return id(tensor), tensor._version


def _layout(call: _Call) -> tuple[int, int]:
    return call.output.shape[call.axis], call.axis
