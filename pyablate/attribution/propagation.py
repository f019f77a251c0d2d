"""Relevance by the z+ rule, with z^B at the images: masked at units, or contrasted between classes.

A layer's output is written ``z = p (z / p)`` with the second factor held fixed, p being what the
layer's rule counts as contributions. Activation times gradient is then relevance, at every layer,
and a backward pass carries it: where tensors join or are read twice, it adds up by itself. Nothing
of Captum's is needed, whose rules have neither masks nor a box of inputs.

The z+ and z^B rules: Montavon, Lapuschkin, Binder, Samek, Mueller 2017, doi:10.1016/
j.patcog.2016.11.008.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from pyablate.attribution.lrp_modules import traceable
from pyablate.network.forward import forward
from pyablate.network.sites import Site

SMALLEST = 1e-9
"""Added to contributions, none of which is negative, before relevance is divided by them."""

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


class _Layer(nn.Module):
    """A layer whose backward pass divides relevance by its rule; the forward pass stays."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.sign = 1  # -1: as if all weights were negated, of relevance only

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.layer(x)
        if not torch.is_grad_enabled():
            return z
        p = self.contributions(x)
        carried = p * (z / (p + SMALLEST)).detach()
        return carried + (z - carried).detach()

    def contributions(self, x: Tensor) -> Tensor:
        """Sum what is positive: inputs and weights of equal sign."""
        return self.linear(x.clamp(min=0), 1) + self.linear(x.clamp(max=0), -1)

    def linear(self, x: Tensor, part: int) -> Tensor:
        """Apply the positive (1), negative (-1) or all (0) weights, without the bias."""
        weight = self.sign * self.layer.get_parameter("weight")
        if part:
            weight = weight.clamp(min=0) if part > 0 else weight.clamp(max=0)
        given = {"weight": weight}
        if self.layer.bias is not None:
            given["bias"] = torch.zeros_like(self.layer.get_parameter("bias"))
        found: Tensor = functional_call(self.layer, given, (x,))
        return found


class _Box(_Layer):
    """A first layer, whose inputs may have both signs: z^B, ``sum x w - low w+ - high w-``.

    Relevance ends here, at what the layer reads: the images, or these normalised.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.leaves: tuple[Tensor, Tensor, Tensor] | None = None

    def look(self, x: Tensor) -> None:
        """Widen the box, by channel, so that it holds these inputs."""
        rows = x.detach().movedim(1, 0).flatten(1)
        shape = [1, -1, *[1] * (x.ndim - 2)]
        low, high = rows.amin(1).reshape(shape), rows.amax(1).reshape(shape)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def contributions(self, x: Tensor) -> Tensor:
        assert self.low is not None
        assert self.high is not None
        # The bounds take part in the product of input and gradient, each as an input of its own.
        leaves = [part.expand_as(x).detach().clone() for part in (x, self.low, self.high)]
        own, low, high = (leaf.requires_grad_() for leaf in leaves)
        self.leaves = own, low, high
        return self.linear(own, 0) - self.linear(low, 1) - self.linear(high, -1)


class _Passed(nn.Module):
    """Batch norm by itself, tanh: each number passes relevance on to the one it is made of."""

    def __init__(self, each: nn.Module) -> None:
        super().__init__()
        self.each = each

    def forward(self, x: Tensor) -> Tensor:
        z = self.each(x)
        carried = x * (z / torch.where(x == 0, 1, x)).detach()
        kept: Tensor = carried + (z - carried).detach()
        return kept


@dataclass(frozen=True, eq=False)
class Relevance:
    """What came of one forward pass.

    Attributes
    ----------
    logits : Tensor
        ``[N, classes]``.
    activations : dict of str to Tensor
        By site, part of the graph of the logits.
    boxes : list
        First layers, with their inputs.
    masks : dict of str to Tensor
        Relevance is multiplied by these at their sites; filled and emptied between backward passes.
    shape : tuple of int
        Of one image.
    """

    logits: Tensor
    activations: dict[str, Tensor]
    boxes: Sequence[_Box]
    masks: dict[str, Tensor]
    shape: tuple[int, ...]

    def at_image(self, start: Tensor) -> Tensor:
        """Carry relevance of the logits ``[N, classes]`` to the images, ``[N, C, ...]``.

        Raises
        ------
        ValueError
            Layers with weights read something else than the images' own numbers.
        """
        leaves = [leaf for box in self.boxes for leaf in box.leaves or ()]
        gradients = self._gradients(start, leaves)
        parts = [leaf.detach() * grad for leaf, grad in zip(leaves, gradients, strict=True)]
        return torch.stack([self._as_images(part) for part in parts]).sum(0)

    def _as_images(self, part: Tensor) -> Tensor:
        part = part[: len(self.logits)]
        same = tuple(part.shape[1:]) == self.shape
        flat = part.ndim == 2 and part.shape[1] == math.prod(self.shape)
        if not (same or flat):
            raise ValueError(
                "model: relevance reaches the images where the first layer with weights reads "
                f"these, of shape {list(self.shape)}; one reads {list(part.shape[1:])}"
            )
        return part.reshape(len(part), *self.shape)

    def coefficients(self, start: Tensor) -> dict[str, Tensor]:
        """Relevance of each number of the sites over the number itself, by site: ``R = a c``."""
        gradients = self._gradients(start, list(self.activations.values()))
        rows = len(self.logits)  # of a single image there are two
        return {n: g[:rows] for n, g in zip(self.activations, gradients, strict=True)}

    def at_sites(self, start: Tensor) -> dict[str, Tensor]:
        """Relevance of each number of the sites, of their shapes."""
        found = self.coefficients(start)
        return {n: self.activations[n].detach()[: len(c)] * c for n, c in found.items()}

    def _gradients(self, start: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        z = self.logits.detach()
        seed = start / torch.where(z.abs() < SMALLEST, SMALLEST, z)
        found = torch.autograd.grad(self.logits, leaves, seed, retain_graph=True, allow_unused=True)
        return [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves, found, strict=True)
        ]


class Propagation:
    """A traced copy of a network whose backward pass carries relevance.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    parts : iterable of Tensor
        All images, some at a time: the box of z^B holds them.
    sample : Tensor
        A few images.
    sites : sequence of Site
        At which relevance is wanted, or masked; ``found`` has those that can be seen.

    Raises
    ------
    Unsupported
        There is no rule for something in the network.
    """

    def __init__(
        self, model: nn.Module, sample: Tensor, parts: Iterable[Tensor], sites: Sequence[Site] = ()
    ) -> None:
        self.traced, taps = traceable(model, sample, sites)
        self.sites = list(sites)
        self.boxes: list[_Box] = []
        self.last: _Layer | None = None
        self._masks: dict[str, Tensor] = {}
        self._seen: dict[str, Tensor] = {}
        behind = self._place_rules()
        taps = {name: path for name, path in taps.items() if path in behind}
        self.found = [site for site in sites if site.name in taps]
        for name, path in taps.items():
            self.traced.get_submodule(path).register_forward_hook(self._tap(name))
        self._fit(parts)

    def run(self, images: Tensor, *, negated: bool = False) -> Relevance:
        """Pass some images through; with ``negated``, relevance sees the last weights negated."""
        self._seen.clear()
        self._masks = {}
        if self.last is not None:
            self.last.sign = -1 if negated else 1
        with torch.enable_grad():
            logits: Tensor = forward(self.traced, images)
        shape = tuple(images.shape[1:])
        return Relevance(logits, dict(self._seen), self.boxes, self._masks, shape)

    def _place_rules(self) -> set[Any]:
        """Put rules in place of layers; return what is called behind some layer with weights."""
        behind: set[fx.Node] = set()  # some layer with weights
        for node in self.traced.graph.nodes:
            before = any(argument in behind for argument in node.all_input_nodes)
            layer = self.traced.get_submodule(node.target) if node.op == "call_module" else None
            if isinstance(layer, _WEIGHTED):
                rule = _Layer(layer) if before else _Box(layer)
                if isinstance(rule, _Box):
                    self.boxes.append(rule)
                self.traced.add_module(node.target, rule)
                if all(user.op == "output" for user in node.users):
                    self.last = rule
                before = True
            elif isinstance(layer, (nn.modules.batchnorm._BatchNorm, nn.Tanh)):
                self.traced.add_module(node.target, _Passed(layer))
            if before:
                behind.add(node)
        return {node.target for node in behind}

    def _fit(self, parts: Iterable[Tensor]) -> None:
        handles = [
            box.register_forward_pre_hook(lambda box, inputs: box.look(*inputs))
            for box in self.boxes
        ]
        with torch.no_grad():
            for part in parts:
                forward(self.traced, part)
        for handle in handles:
            handle.remove()

    def _tap(self, name: str) -> Callable[..., None]:
        def see(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                masks = self._masks
                output.register_hook(lambda g: g * masks[name] if name in masks else None)
                self._seen[name] = output

        return see


def one_hot(target: Tensor, logits: Tensor) -> Tensor:
    """Relevance 1 at one class of each image, ``[N, classes]``."""
    return torch.zeros_like(logits).scatter_(1, target[:, None], 1.0)


def others(target: Tensor, logits: Tensor) -> Tensor:
    """Relevance 1, in equal parts, at all other classes."""
    return (1 - one_hot(target, logits)) / (logits.shape[1] - 1)


def contrast(of_target: Tensor, of_others: Tensor) -> Tensor:
    """Positive part of the difference of two maps ``[N, ...]``, each divided by its sum."""
    return (_to_one(of_target) - _to_one(of_others)).clamp(min=0)


def _to_one(values: Tensor) -> Tensor:
    total = values.flatten(1).sum(1).reshape(-1, *[1] * (values.ndim - 1))
    return torch.where(total == 0, 0, values / torch.where(total == 0, 1, total))


def contrasted(
    network: Propagation,
    images: Tensor,
    target: Tensor,
    kind: str,
    look: Callable[[Relevance, Tensor], Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Contrastive relevance of whatever ``look`` takes from relevance that starts somewhere.

    ``kind`` is ``"others"``, against all other classes, or ``"negated"``, against the same class
    with the last layer's weights negated.
    """
    if network.sites and not network.found:
        return {}
    first = network.run(images)
    start = one_hot(target, first.logits)
    of_target = look(first, start)
    if kind == "others":
        against = look(first, others(target, first.logits))
    else:
        against = look(network.run(images, negated=True), start)
    return {name: contrast(of_target[name], against[name]) for name in of_target}
