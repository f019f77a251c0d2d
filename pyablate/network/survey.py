"""Finding sites: one forward pass, watched module by module and operator by operator."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pyablate._validation import nearest
from pyablate.network.carried import Carried
from pyablate.network.exported import original_type
from pyablate.network.flow import Flow, Step
from pyablate.network.hooks import SPEAKING, Kind, Site, evaluation, function_name, inside
from pyablate.network.layout import Within
from pyablate.network.transformers import Attention, Part, attentions, streams

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
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
_NO_UNITS = (nn.Flatten, nn.Unflatten, nn.Softmax, nn.LogSoftmax, nn.Softmax2d)
_NOT_HEARD = (*_NO_UNITS, nn.Sequential)

_ROWS = 7
"""Images of the survey: a number that is unlikely to be some other axis's length."""


@dataclass(frozen=True)
class Survey:
    """What one forward pass of a network showed.

    Attributes
    ----------
    sites : list of Site
        Tensors that hold units, in the order in which the network computes them.
    weighted : list of (str, frozenset of str)
        Maps by weights on the way to the logits, but for the last: the module that holds the
        weights, and the sites that have its units, one by one.
    guessed : frozenset of str
        Sites whose axis does not follow from the weights.
    given : dict of str to int
        Axes that the caller gave, by site.
    """

    sites: list[Site]
    weighted: list[tuple[str, frozenset[str]]]
    guessed: frozenset[str]
    given: Mapping[str, int] = field(default_factory=dict)

    def left_out(self, chosen: Iterable[Site]) -> list[str]:
        """Name the modules that hold weights and have units in none of some sites."""
        names = {site.name for site in chosen}
        missing = [module for module, sites in self.weighted if names.isdisjoint(sites)]
        return list(dict.fromkeys(missing))

    def remarks(self, chosen: Sequence[Site], *, everything: bool) -> list[str]:
        """Say what should be known of a selection; ``everything`` if ``"*"`` was asked for."""
        missing = self.left_out(chosen) if everything else []
        guessed = [site for site in chosen if site.name in self.guessed]
        found = []
        if missing:
            found.append(
                f"the units of {len(missing)} modules with weights are in no chosen layer: "
                f"{_alike(missing)}; name such layers to ablate them, too"
            )
        if guessed:
            axes = ", ".join(f"{site.name} {list(site.shape)}: {site.axis}" for site in guessed)
            found.append(
                "the axis of the units could not be followed from the weights and is a guess "
                f"(batch counts as 0) for {axes}; axis= sets another"
            )
        return found

    def with_axes(self, given: Mapping[str, int]) -> Survey:
        """Set the axis of some sites, by name; 0 is the batch, negative ones count from the end.

        Raises
        ------
        ValueError, TypeError
            No such site or axis.
        """
        known = {site.name: site for site in self.sites}
        for name, axis in given.items():
            if name not in known:
                near = nearest(name, list(known))
                raise ValueError(f"axis: no layer that holds units is called {name!r}{near}")
            if known[name].width > 1:
                raise ValueError(f"axis: {name!r} holds heads; the network itself splits them")
            last = len(known[name].shape)
            if not isinstance(axis, int) or isinstance(axis, bool):
                raise TypeError(f"axis: expected an integer for {name!r}, got {axis!r}")
            if not 1 <= axis % (last + 1) <= last or not -last <= axis <= last:
                raise ValueError(f"axis: expected 1 to {last} for {name!r}, got {axis}")
            at = axis % (last + 1)
            site = known[name]
            known[name] = replace(site, axis=at, channels=site.shape[at - 1])
        axes = {name: known[name].axis for name in given}
        return replace(
            self, sites=list(known.values()), guessed=self.guessed.difference(given), given=axes
        )


def survey(model: nn.Module, sample: Tensor) -> Survey:
    """Run a network once and find out which of its tensors hold units; see :func:`sites`."""
    pass_ = _Pass(model)
    pass_.run(sample)
    return pass_.survey()


@dataclass(eq=False)
class _Call:
    """One call of one module."""

    name: str
    number: int
    module: nn.Module
    shape: tuple[int, ...]
    axis: int
    guessed: bool
    step: Step | None
    steps: int
    """Operators that had run when the module returned."""
    functions: int
    """Functions of torch that had been called when the module returned."""
    within: Within
    feeds_activation: bool = False
    holds_classes: bool = False


@dataclass
class _Pass:
    """One forward pass, watched: which module made which tensor, with units along which axis."""

    model: nn.Module
    calls: list[_Call] = field(default_factory=list)
    inside: list[tuple[str, nn.Module]] = field(default_factory=list)
    functions: list[str] = field(default_factory=list)
    first_items: dict[str, int | None] = field(default_factory=dict)
    """Place of the first tensor with units in what a module returns."""
    last_axis: int = 1
    logits: Step | None = None

    def __post_init__(self) -> None:
        self.flow = Flow(self.inside)

    def run(self, sample: Tensor) -> None:
        """Run the network in evaluation mode and leave it as it was."""
        sample = sample[torch.arange(_ROWS) % len(sample)]
        handles = []
        try:
            for name, module in self.model.named_modules():
                handles.append(module.register_forward_pre_hook(self._enter(name)))
                leave = self._leave(name) if name else self._finish
                handles.append(module.register_forward_hook(leave))
            with evaluation(self.model), torch.no_grad(), _Functions(self), self.flow:
                self.flow.begin(sample)
                self.model(sample)
        finally:
            for handle in handles:
                handle.remove()

    def survey(self) -> Survey:
        """Say what was seen: sites by modules, and those that nonlinearities make besides."""
        carried = Carried(self.flow.steps, self.logits)
        for call in self.calls:
            call.holds_classes = call.step is not None and carried.holds_classes(call.step)
        chosen = [place for place in self._module_places() if place.site.kind in SPEAKING]
        reached = carried.names({place.site.name: place.steps for place in chosen})
        unheard = [source for source in self._sources(carried) if not reached[source]]
        inner = [*self._speaking(carried, unheard), *self._transformer_places(carried)]
        places = sorted([*self._module_places(), *inner], key=lambda place: place.order)
        reached = carried.names({place.site.name: place.steps for place in places})
        return Survey(
            [place.site for place in places],
            [(str(step.source), frozenset(reached[step])) for step in self._sources(carried)],
            frozenset(place.site.name for place in places if place.guessed),
        )

    def _sources(self, carried: Carried) -> list[Step]:
        """List maps by weights that are on the way to the logits, but for those that make them."""
        modules = dict(self.model.named_modules())
        return [
            step
            for step in self.flow.steps
            if step.source is not None
            and _holds_weights(modules[step.source])
            and step in carried.live
            and not carried.ends_in_logits(step)
        ]

    def _speaking(self, carried: Carried, unheard: list[Step]) -> Iterator[_Place]:
        """Find the nonlinearity behind each map: mark the module that speaks, or give a place."""
        inner: dict[Step, tuple[_Call, Step]] = {}
        for source in unheard:
            way = carried.to_nonlinearity(source)
            if way is None:
                continue
            here = self._call_of([way.end])
            feeding = self._call_of(way.exits[:-1])
            if here is not None:
                here.feeds_activation = True
            elif feeding is not None and way.plain_after(cast(Step, feeding.step)):
                feeding.feeds_activation = True
            elif feeding is not None and way.end.function is not None:
                inner.setdefault(way.end, (feeding, way.end))
        for call, end in inner.values():
            place = self._inner_place(call, end)
            if place is not None:
                yield place

    def _call_of(self, steps: list[Step]) -> _Call | None:
        """Find the call of a module that holds units and returned the latest of some steps."""
        for step in reversed(steps):
            for call in self.calls:
                if call.step is step and not issubclass(original_type(call.module), _NOT_HEARD):
                    return call
        return None

    def _several(self, call: _Call) -> bool:
        """Whether a module is called more than once."""
        alike = (o for o in self.calls if (o.name, o.within.item) == (call.name, call.within.item))
        return sum(1 for _ in alike) > 1

    def _inner_place(self, call: _Call, end: Step) -> _Place | None:
        """Give a place to what a function returned some time after a module did."""
        axis = end.feature_axis()
        if axis is None or end.function is None or end.shape[0] != _ROWS:
            return None
        function = self.functions[end.function]
        count = self.functions[call.functions : end.function + 1].count(function)
        several = self._several(call)
        name = f"{call.name}.{function}"
        if name in dict(self.model.named_modules()):  # which may be a site by itself
            name += "()"
        name += f"@{call.number}" if several else ""
        site = Site(
            name=name,
            module=call.name,
            call=call.number if several else None,
            channels=end.shape[axis],
            axis=axis,
            shape=end.shape[1:],
            kind="activation",
            function=(function, count),
        )
        return _Place(site, [end], end.number, guessed=False)

    def _transformer_places(self, carried: Carried) -> Iterator[_Place]:
        """Give places to heads, queries, keys, values, and sums on the stream within a block."""
        found: dict[str, list[_Place]] = {}

        def add(module: str, what: str, place: _Place | None) -> None:
            if place is not None:
                name = f"{module}.{what}" if module else what
                found.setdefault(name, []).append(place)

        for one in attentions(self.flow.steps, carried.live):
            add(one.module, "heads", self._heads(one))
            for what, place in self._parts(one):
                add(one.module, what, place)
        for step in streams(self.flow.steps, carried.live):
            if all(call.step is not step for call in self.calls):
                add(step.within, "stream", self._place_of(step))
        taken = dict(self.model.named_modules())
        for name, places in found.items():
            name += "()" if name in taken else ""
            for number, place in enumerate(places, 1):
                full = f"{name}@{number}" if len(places) > 1 else name
                kind: Kind = "heads" if place.site.width > 1 else "part"
                yield replace(place, site=replace(place.site, name=full, kind=kind))

    def _heads(self, attention: Attention) -> _Place | None:
        """Find the last tensor that can be replaced, in which each head is a slice."""
        for step in reversed(attention.joined):
            place = self._place_of(step)
            if place is not None:
                count = attention.heads
                width = place.site.channels // count
                site = replace(place.site, channels=count, width=width)
                return replace(place, site=site)
        return None

    def _parts(self, attention: Attention) -> Iterator[tuple[str, _Place | None]]:
        """Find queries, keys and values that are not all that a module returns."""
        for name, part in attention.parts.items():
            made = [c for c in self.calls if c.name == part.maker.source and c.step is not None]
            call = next((c for c in made if c.steps >= part.maker.number), None)
            if call is None or call.step is None or call.shape[call.axis] != part.maker.units:
                alone = map(self._place_of, reversed(part.alone))
                yield name, next((place for place in alone if place is not None), None)
            elif part.length < part.maker.units:
                yield name, self._cut(self._place_of(call.step), part)

    def _cut(self, place: _Place | None, part: Part) -> _Place | None:
        """Give a place to a part of the features."""
        if place is None:
            return None
        site = place.site
        within = replace(site.within, part=(site.axis, part.start, part.length))
        shape = list(site.shape)
        shape[site.axis - 1] = part.length
        site = replace(site, channels=part.length, within=within, shape=tuple(shape))
        return replace(place, site=site)

    def _place_of(self, step: Step) -> _Place | None:
        """Give a place to a tensor, if a module or a function returned it."""
        axis, layout = step.feature_axis(), step.images()
        if axis is None or layout is None or axis == layout.axis:
            return None
        call = next((call for call in reversed(self.calls) if call.step is step), None)
        function = None
        if call is None and step.function is not None:
            call = next((c for c in reversed(self.calls) if c.functions <= step.function), None)
            name = self.functions[step.function]
            between = self.functions[call.functions if call else 0 : step.function + 1]
            function = (name, between.count(name))
        if call is None:
            return None
        several = self._several(call)
        at = layout.axis_there(axis)
        site = Site(
            name="",
            module=call.name,
            call=call.number if several else None,
            channels=step.shape[axis],
            axis=at,
            shape=layout.shape_first(step.shape)[1:],
            kind="layer",
            function=function,
            within=Within(None if function else call.within.item, layout),
        )
        order = step.number if function else call.steps
        return _Place(site, [step], order, guessed=False)

    def _module_places(self) -> list[_Place]:
        places: list[_Place] = []
        by_name: dict[str, list[_Call]] = {}
        for call in self.calls:
            by_name.setdefault(self._name(call), []).append(call)
        seen: set[Step] = set()
        for call in self.calls:
            is_logits = call.step is not None and call.step is self.logits
            if not is_logits and not issubclass(original_type(call.module), _NO_UNITS):
                alike = by_name[self._name(call)]
                places += self._places_of(call, alike, known=call.step in seen)
            if call.step is not None:
                seen.add(call.step)
        return places

    def _name(self, call: _Call) -> str:
        """Name of what a module returned: of several tensors all but the first are numbered."""
        item = call.within.item
        is_first = item == self.first_items[call.name]
        return call.name if is_first else f"{call.name}({(item or 0) + 1})"

    def _places_of(self, call: _Call, calls: list[_Call], *, known: bool) -> list[_Place]:
        kind = self._kind(call, known)
        site = Site(
            name=self._name(call),
            module=call.name,
            call=None,
            channels=call.shape[call.axis],
            axis=call.axis,
            shape=call.shape[1:],
            kind=kind,
            within=call.within,
        )
        steps = [other.step for other in calls if other.step is not None]
        plain = _Place(site, steps, call.steps, call.guessed)
        if len(calls) == 1:
            return [plain]
        # A module without weights that is called twice is two layers that share an object; one
        # with weights is one set of units that speaks twice.
        separate = not any(True for _ in call.module.parameters())
        one_call = replace(
            site,
            name=f"{site.name}@{call.number}",
            call=call.number,
            kind=kind if separate else "layer",
        )
        single = replace(plain, site=one_call, steps=[call.step] if call.step else [])
        if call.number > 1 or any(_layout(other) != _layout(call) for other in calls):
            return [single]
        return [replace(plain, site=replace(site, kind="layer")) if separate else plain, single]

    def _kind(self, call: _Call, known: bool) -> Kind:
        if call.holds_classes:
            return "layer"
        kind = original_type(call.module)
        holds_others = issubclass(kind, nn.Sequential)  # and is heard through its last module
        if call.feeds_activation and not holds_others:
            return "activation"
        if issubclass(kind, _ACTIVATIONS):
            return "activation"
        no_axis = call.guessed and call.step is not None and call.step.split
        if _is_block(call.module) and not known and not holds_others and not no_axis:
            return "block"
        return "layer"

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _inputs: Any) -> None:
            self.inside.append((name, module))

        return hook

    def _finish(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self.logits = self.flow.step(output)

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            self.inside.pop()
            if not isinstance(output, (tuple, list)):
                self._note(name, module, output, None)
            # What the library's attention returns is told by the module around it.
            elif not isinstance(module, nn.MultiheadAttention):
                for number, one in enumerate(output):
                    self._note(name, module, one, number)

        return hook

    def _within(self, output: Any, item: int | None) -> Within | None:
        """Say where the images lie in what a module returned; None if that holds no units."""
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim < 2:
            return None
        step = self.flow.step(output)
        axis, layout = (step.feature_axis(), step.images()) if step else (None, None)
        if layout is None or layout.plain:
            # Of several tensors it is the one whose units are known.
            holds = output.shape[0] == _ROWS and (item is None or axis is not None)
            return Within(item) if holds else None
        return Within(item, layout) if axis not in (None, layout.axis) else None

    def _note(self, name: str, module: nn.Module, output: Any, item: int | None) -> None:
        within = self._within(output, item)
        if within is None:
            return
        step = self.flow.step(output)
        axis = None if step is None else step.feature_axis()
        known = axis is not None
        shape = within.images.shape_first(output.shape)
        if axis is None:
            axis = self._guess(module, output)
        else:
            axis = within.images.axis_there(axis)
            self.last_axis = axis if len(shape) < 3 or axis < len(shape) - 1 else -1
        number = 1 + sum((call.name, call.within.item) == (name, item) for call in self.calls)
        self.first_items.setdefault(name, item)
        self.calls.append(
            _Call(
                name=name,
                number=number,
                module=module,
                shape=shape,
                axis=axis,
                guessed=not known and output.ndim > 2,
                step=step,
                steps=len(self.flow.steps),
                functions=len(self.functions),
                within=within,
            )
        )

    def _guess(self, module: nn.Module, output: Tensor) -> int:
        """Guess the axis where it does not follow from weights: no weights yet, or units split."""
        kind = original_type(module)
        if issubclass(kind, _NORMS):
            return 1
        if issubclass(kind, nn.LayerNorm):
            return output.ndim - 1
        return self.last_axis % output.ndim if output.ndim == 3 else 1


class _Functions(TorchFunctionMode):
    """Notes calls of functions, and which functional activations the modules feed."""

    def __init__(self, watched: _Pass) -> None:
        super().__init__()
        self.watched = watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Mark the module whose output is activated, unless an activation module does it."""
        watched, running = self.watched, self.watched.inside
        # An exported program calls the ATen overload where the model called a function.
        named = func
        if isinstance(func, torch._ops.OpOverload):
            named = getattr(torch, func._schema.name.removeprefix("aten::"), None)
        if named in _FUNCTIONAL_ACTIVATIONS and args and isinstance(args[0], Tensor):
            module = running[-1][1] if running else watched.model
            step = watched.flow.step(args[0])
            functional_call = not issubclass(original_type(module), _ACTIVATIONS)
            for call in watched.calls if functional_call and step is not None else ():
                if call.step is step:
                    call.feeds_activation = True
                    break
        opened = inside(func)
        if opened is not None:
            with self:
                return opened(*args, **(kwargs or {}))
        before = len(watched.flow.steps)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            watched.functions.append(function_name(func))
            step = watched.flow.step(result)
            if step is not None and step.number > before:
                step.function = len(watched.functions) - 1
        return result


@dataclass(frozen=True)
class _Place:
    """A site, and the steps of the forward pass that are its tensors."""

    site: Site
    steps: list[Step]
    order: int
    guessed: bool


def _is_block(module: nn.Module) -> bool:
    """Whether more than one module inside holds weights; those that make weights do not count."""
    inside = (m for name, m in module.named_modules() if "parametrizations" not in name.split("."))
    return sum(map(_holds_weights, inside)) > 1


def _holds_weights(module: nn.Module) -> bool:
    own = any(True for _ in module.parameters(recurse=False))
    return own or "parametrizations" in module._modules


def _alike(names: Sequence[str]) -> str:
    """List names, those that differ in a number between dots only as one with their count."""
    by_form: dict[str, list[str]] = {}
    for name in names:
        by_form.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    return ", ".join(
        f"{form} ({len(alike)})" if len(alike) > 1 else alike[0] or "the network itself"
        for form, alike in by_form.items()
    )


def _layout(call: _Call) -> tuple[int, int, Within]:
    return call.shape[call.axis], call.axis, call.within
