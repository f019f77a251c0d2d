"""Coupled units, which can only be removed together, from Torch-Pruning's dependency graph.

Removing a channel of a residual sum removes it from everything that is added there; a depthwise
convolution ties its input to its output; flattening ties a channel to a block of features. The
graph is Torch-Pruning's; here its entries are given the names of units.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from pyablate._validation import first_line, optional
from pyablate.data.inputs import Inputs, is_structured, packed
from pyablate.network.classifier import giving_logits
from pyablate.network.hooks import SPEAKING
from pyablate.network.sites import (
    Site,
    check_model,
    copied,
    evaluation,
    hooked,
    parse_label,
    select,
    sites,
)

_MISSING = (
    "this needs Torch-Pruning, which knows the channels that hang together; "
    "install it with: pip install 'pyablate[compression]'"
)


@dataclass(frozen=True)
class Coupled:
    """Units that can only be removed together.

    Attributes
    ----------
    units : tuple of str
        Labels ``"layer:unit"`` in the order of the network. Ablating all of them by zero is
        what removing the channel does.
    obstacle : str
        Why they cannot be removed; empty if they can.

    Examples
    --------
    >>> pa.couplings(pa.demo.network("resnet"), images[:2], "stem.2")[0].units
    ('stem.2:0', 'stage1.0.relu2:0', 'stage1.1.relu2:0')
    """

    units: tuple[str, ...]
    obstacle: str = ""

    @property
    def label(self) -> str:
        """Labels joined by ``+``, as :func:`pyablate.ablate` names a group."""
        return "+".join(self.units)

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers of the units, each once."""
        return tuple(dict.fromkeys(unit.rpartition(":")[0] for unit in self.units))


@dataclass(frozen=True, eq=False)
class Entry:
    """What removing units of one site does to one module.

    Attributes
    ----------
    dependency : torch_pruning.dependency.Dependency
        Calling it with channel numbers removes them.
    channels, units : tuple of int
        Each channel of the module and the unit of the site that takes it along.
    """

    dependency: Any
    channels: tuple[int, ...]
    units: tuple[int, ...]


class Coupling:
    """The dependency graph of a copy of a network, by units.

    Parameters
    ----------
    model : nn.Module
        The network; it is copied.
    sample : Tensor, dict or tuple of Tensor
        A batch of inputs, ``[N, ...]``; one image is enough.

    Attributes
    ----------
    model : nn.Module
        The copy.
    sites : list of Site
        All sites, in the order of the network, but for attention heads, queries, keys and values.
    sample : Tensor
        The first two of the sample in the dtype and on the device of the model.
    inputs : Inputs or None
        How several inputs lie in the sample.
    classes : list of Coupled
        All coupled units, those of one layer together.
    """

    def __init__(self, model: nn.Module, sample: Any) -> None:
        check_model(model)
        self.inputs: Inputs | None = None
        first = next(model.parameters(), torch.zeros(0))
        if is_structured(sample):
            sample, self.inputs = packed(sample, first.dtype)
        if not isinstance(sample, Tensor) or sample.ndim < 2 or len(sample) == 0:
            got = list(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
            raise TypeError(f"sample: expected a tensor of images [N, ...], got {got}")
        self._flags = {name: each.requires_grad for name, each in model.named_parameters()}
        self.model = copied(model)
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.sample = sample[:2].detach().to(first.device, first.dtype)
        with giving_logits(self.model, inputs=self.inputs):
            every = sites(self.model, self.sample)
            self.sites = [site for site in every if site.kind not in ("heads", "part")]
            self._graph, self._nodes = _trace(self.model, self.sample, self.sites)
        self._entries = {site.name: self._follow(site) for site in self.sites}
        self._group_of, self.classes = self._couple()

    def find(self, label: str) -> Coupled:
        """Return the coupled units that a unit ``"layer:unit"`` belongs to."""
        site, unit = parse_label(self.sites, label)
        return self._group_of[site.name, unit]

    def selected(self, layers: str | Sequence[str] | None) -> list[Coupled]:
        """Coupled units with one at least in the layers, or all, in the order of the network."""
        if layers is None:
            return self.classes
        wanted = {
            id(self._group_of[site.name, unit])
            for site in select(self.sites, layers)
            for unit in range(site.channels)
        }
        return [one for one in self.classes if id(one) in wanted]

    def channels(self, units: Iterable[str]) -> Iterator[tuple[Any, list[int]]]:
        """Every module's dependency with the channels that go when these units do."""
        gone: dict[tuple[int, Any], tuple[Any, set[int]]] = {}
        chosen: dict[str, set[int]] = {}
        for label in units:
            site, unit = parse_label(self.sites, label)
            chosen.setdefault(site.name, set()).add(unit)
        for name, mine in chosen.items():
            for entry in self._entries[name]:
                dependency = entry.dependency
                key = id(dependency.target), dependency.handler
                into = gone.setdefault(key, (dependency, set()))[1]
                pairs = zip(entry.channels, entry.units, strict=True)
                into.update(channel for channel, unit in pairs if unit in mine)
        for dependency, taken in gone.values():
            if taken:
                yield dependency, sorted(taken)

    def name_of(self, module: nn.Module) -> str:
        """Dotted name of a module of the copy."""
        name: str = self._graph._module2name[module]
        return name

    def layer_size(self, layer: str) -> int:
        """Units of a layer."""
        return next(site.channels for site in self.sites if site.name == layer)

    def without(self, units: Iterable[str]) -> nn.Module:
        """Return a new copy of the network without these units and all that hang together."""
        smaller = copied(self.model)
        names = self._graph._module2name
        for dependency, taken in self.channels(units):
            module = dependency.target.module
            bare = isinstance(module, nn.Parameter)
            name = self._graph._param_to_name.get(module) if bare else names.get(module)
            if name is None:
                continue  # an operation without parameters
            count = self._channel_count(dependency)
            if count is not None and len(taken) >= count:
                raise ValueError(
                    f"units: all {count} channels of {name} would go; at least one has to stay"
                )
            dependency.handler.__self__.pruning_dim = dependency.target.pruning_dim
            if bare:
                owner, _, leaf = name.rpartition(".")
                whole = smaller.get_parameter(name)
                cut = dependency.handler(whole, taken)
                setattr(smaller.get_submodule(owner), leaf, cut)
            else:
                dependency.handler(smaller.get_submodule(name), taken)
        for name, parameter in smaller.named_parameters():
            parameter.requires_grad_(self._flags.get(name, parameter.requires_grad))
        return smaller

    def _channel_count(self, dependency: Any) -> int | None:
        """Count the channels, on the side of the module that the dependency cuts."""
        module = dependency.target.module
        if isinstance(module, nn.Parameter):
            return int(module.shape[dependency.target.pruning_dim])
        side = "get_out_channels" if "out" in dependency.handler.__name__ else "get_in_channels"
        count = getattr(self._graph.get_pruner_of_module(module), side)(module)
        return None if count is None else int(count)

    def _follow(self, site: Site) -> list[Entry]:
        """Ask the graph what goes when units of a site go, for all its units at once."""
        entries: list[Entry] = []
        for node in self._nodes[site.name]:
            pruner = self._graph.get_pruner_of_module(node.module)
            whole = list(range(site.channels))
            group = self._graph.get_pruning_group(node.module, pruner.prune_out_channels, whole)
            for item in group.items:
                roots = [-1 if root is None else int(root) for root in item.root_idxs]
                entries.append(Entry(item.dep, tuple(item.idxs), tuple(roots)))
        return entries

    def _couple(self) -> tuple[dict[tuple[str, int], Coupled], list[Coupled]]:
        """Join the units of all sites to classes; the first result tells the class of each."""
        every = [(site, unit) for site in self.sites for unit in range(site.channels)]
        start = {site.name: number for number, (site, unit) in enumerate(every) if unit == 0}
        links, obstacles, made = self._links(start)
        left, right = zip(*links, strict=True) if links else ((), ())
        graph = coo_array(([1] * len(left), (left, right)), shape=(len(every), len(every)))
        members: dict[int, list[int]] = {}
        for number, together in enumerate(connected_components(graph, directed=False)[1]):
            members.setdefault(int(together), []).append(number)
        read = self._read_sites()
        by_unit: dict[tuple[str, int], Coupled] = {}
        classes = []
        for numbers in members.values():
            reasons = [obstacles[one] for one in numbers if one in obstacles]
            if made.isdisjoint(numbers):
                reasons.append("no weights make it")
            pairs = [every[one] for one in numbers]
            # Of a class that nothing need silence, every unit is named.
            named = [pair for pair in pairs if pair[0].name in read]
            labels = tuple(site.label(unit) for site, unit in named or pairs)
            coupled = Coupled(labels, next(iter(reasons), ""))
            by_unit.update({(site.name, unit): coupled for site, unit in pairs})
            if named:
                classes.append(coupled)
        return by_unit, classes

    def _links(
        self, start: dict[str, int]
    ) -> tuple[list[tuple[int, int]], dict[int, str], set[int]]:
        """Pairs of units that hang together, units that cannot go and why, units with weights."""
        by_node = {
            id(node): site for site in reversed(self.sites) for node in self._nodes[site.name]
        }
        links: list[tuple[int, int]] = []
        obstacles: dict[int, str] = {}
        made: set[int] = set()
        for site in self.sites:
            base = start[site.name]
            made.update(base + unit for unit in _made(self._entries[site.name]))
            for entry in self._entries[site.name]:
                other = by_node.get(id(entry.dependency.target)) if _is_output(entry) else None
                reason = _obstacle(entry)
                for channel, unit in zip(entry.channels, entry.units, strict=True):
                    if reason:
                        obstacles[base + unit] = reason
                    elif other is not None and channel >= other.channels:
                        obstacles[base + unit] = "Torch-Pruning loses track of the channel"
                    elif other is not None:
                        links.append((base + unit, start[other.name] + channel))
        return links, obstacles, made

    def _read_sites(self) -> set[str]:
        """Sites to silence so that whatever reads a removed channel reads zeros.

        Activations and blocks; and where a layer is read without one of these in between (the
        linear bottleneck of an inverted residual), that layer.
        """
        active = {site.name for site in self.sites if site.kind in SPEAKING}
        silent = {id(node) for name in active for node in self._nodes[name]}
        plain = {
            id(node): site.name
            for site in reversed(self.sites)
            if site.kind == "layer"
            for node in self._nodes[site.name]
        }
        found = set(active)
        for node in self._graph.module2node.values():
            if isinstance(node.module, (nn.modules.conv._ConvNd, nn.Linear)):
                found |= _unmasked(node.inputs, silent, plain)
        return found


def couplings(
    model: nn.Module, sample: Any, layers: str | Sequence[str] | None = None
) -> list[Coupled]:
    """List the units of a network that can only be removed together.

    Parameters
    ----------
    model : nn.Module
        The network; it stays as it is.
    sample : Tensor, dict or tuple of Tensor
        A batch of inputs, ``[N, ...]``; one image is enough.
    layers : str or sequence of str, optional
        Names or globs; by default all activations and blocks.

    Returns
    -------
    list of Coupled
        In the order of the network. Each can be handed to :func:`pyablate.ablate` as a group.

    Raises
    ------
    ImportError
        Torch-Pruning is not installed.
    TypeError, ValueError
        Model, sample or layers are bad; the message says how.

    Examples
    --------
    >>> coupled = pa.couplings(model, images[:2], "features.16")
    >>> len(coupled), coupled[0].units
    (128, ('features.16:0',))
    """
    return Coupling(model, sample).selected(layers)


def torch_pruning() -> Any:
    """Import Torch-Pruning or say how to get it."""
    return optional("torch_pruning", _MISSING)


def _trace(
    model: nn.Module, sample: Tensor, found: Sequence[Site]
) -> tuple[Any, dict[str, list[Any]]]:
    """Build the graph and find the nodes that hold the output of each site."""
    pruning = torch_pruning()
    made_by: dict[str, list[Any]] = {site.name: [] for site in found}

    def note(site: Site, _call: int, output: Tensor) -> Tensor:
        made_by[site.name].append(output.grad_fn)
        return output

    def forward(network: nn.Module, images: Tensor) -> Tensor:
        with hooked(network, found, note):
            logits: Tensor = network(images)
        return logits

    graph = pruning.DependencyGraph()
    with torch.enable_grad(), evaluation(model):
        try:
            graph.build_dependency(model, sample, forward_fn=forward, verbose=False)
        except (RuntimeError, AssertionError, AttributeError) as error:
            raise ValueError(
                f"model: Torch-Pruning cannot follow this network: {first_line(error)}"
            ) from error
    by_function = {node.grad_fn: node for node in graph.module2node.values()}
    nodes = {
        name: [by_function[made] for made in functions if made in by_function]
        for name, functions in made_by.items()
    }
    return graph, nodes


def _obstacle(entry: Entry) -> str:
    """Say why Torch-Pruning cannot remove this, or nothing."""
    module, kind = entry.dependency.target.module, entry.dependency.target.type.name
    if kind == "OUTPUT":
        return "its channels are the classes"
    if isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups < module.out_channels:
        return "a convolution in groups makes or reads it"
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        return "" if module.in_channels == module.out_channels else "a depthwise multiplier"
    if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
        return "it is normalised together with other channels"
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return "it is normalised together with other channels"
    if -1 in entry.units:
        return "Torch-Pruning loses track of the channel"
    return ""


def _made(entries: Sequence[Entry]) -> set[int]:
    """Units with which an output of some weights goes."""
    weighted = (nn.modules.conv._ConvNd, nn.Linear)
    return {
        unit
        for entry in entries
        if isinstance(entry.dependency.target.module, weighted) and _is_output(entry)
        for unit in entry.units
    }


def _is_output(entry: Entry) -> bool:
    """Whether the module loses outputs; what keeps channels apart loses both sides at once."""
    return "out" in entry.dependency.handler.__name__


def _unmasked(nodes: Sequence[Any], silent: set[int], plain: dict[int, str]) -> set[str]:
    """Layers that are read at these nodes and that no silent node stands for."""
    found: set[str] = set()
    seen: set[int] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if id(node) in silent or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node.module, nn.Module) and any(True for _ in node.module.parameters()):
            if id(node) in plain:
                found.add(plain[id(node)])
        else:  # no weights of its own: it is zero where its inputs are
            waiting.extend(node.inputs)
    return found
