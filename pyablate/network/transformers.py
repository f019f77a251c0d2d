"""Transformers in a forward pass: heads, queries, keys and values, and the residual stream."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from pyablate.network.flow import Factor, Step, consecutive, latest_of


@dataclass(frozen=True)
class Part:
    """Features of a map by weights: the queries, keys or values.

    Attributes
    ----------
    maker : Step
        What the map returned.
    start, length : int
        First of them there, and how many.
    alone : list of Step
        Tensors that consist of them, the latest first.
    """

    maker: Step
    start: int
    length: int
    alone: list[Step]


@dataclass(frozen=True)
class Attention:
    """One weighting of values by products of queries and keys.

    Attributes
    ----------
    module : str
        The module that was running.
    heads : int
        Into which the features are split.
    joined : list of Step
        Tensors behind it in which each head is a run of features, in order.
    parts : dict of str to Part
        ``q``, ``k``, ``v`` where each is a run of what one map by weights returned.
    """

    module: str
    heads: int
    joined: list[Step]
    parts: dict[str, Part]


def attentions(steps: Sequence[Step], live: AbstractSet[Step]) -> Iterator[Attention]:
    """Find products of tensors that vary, whose batches are split into heads by the weights."""
    for step in steps:
        if step not in live or not (step.attends or step.multiplies_matrices):
            continue
        split = _heads(step)
        heads = math.prod(factor.size for factor in split)
        shared = heads > 1 and len(split) < len(step.features())
        joined = list(_joined(step, split, live)) if shared else []
        if joined:
            yield Attention(step.within, heads, joined, _parts(step, steps))


def streams(steps: Sequence[Step], live: AbstractSet[Step]) -> Iterator[Step]:
    """Find sums on a residual stream: one branch reads them, and so does the next sum."""
    for step in steps:
        if step in live and _sums(step):
            readers = [reader for reader in step.readers if reader in live]
            if len(readers) > 1 and any(_sums(reader) for reader in readers):
                yield step


def _sums(step: Step) -> bool:
    return step.op == "add" and len({one for one in step.inputs if one.shape == step.shape}) > 1


def _heads(step: Step) -> list[Factor]:
    """Factors of the heads: those that share the batch of the product with the images."""
    features = step.features()
    alone = [one for axis in step.axes[-2:] for one in axis]
    return [factor for factor in features if factor not in alone]


def _joined(step: Step, heads: list[Factor], live: AbstractSet[Step]) -> Iterator[Step]:
    """Follow the result inside its module up to the next map, while nothing else reads it."""
    features, within = step.features(), step.within
    while True:
        readers = [reader for reader in step.readers if reader in live]
        if len(readers) != 1:
            return
        step = readers[0]
        inside = step.within == within or step.within.startswith(f"{within}." if within else "")
        if step.mixes or step.reduces or not inside:
            return
        axis = step.feature_axis()
        factors = list(step.axes[axis]) if axis is not None else []
        if factors[: len(heads)] == heads and sorted(factors) == sorted(features):
            yield step


def _parts(step: Step, steps: Sequence[Step]) -> dict[str, Part]:
    """Say which features of which maps are the queries, keys and values."""
    if step.attends:
        named = dict(zip("qkv", step.inputs, strict=False))
    else:
        named = {"v": step.inputs[-1]}
        product: Step | None = step.inputs[-2]
        while product is not None and not product.multiplies_matrices:
            product = product.inputs[0] if product.inputs else None
        if product is not None:
            named = {"q": product.inputs[-2], "k": product.inputs[-1], **named}
    found = {}
    for name, part in named.items():
        factors = sorted(part.features(), key=lambda factor: -factor.stride)
        if part.offset is None or not factors or factors[-1].stride != 1:
            continue
        length, maker = math.prod(one.size for one in factors), steps[latest_of(part) - 1]
        if consecutive(factors):
            found[name] = Part(maker, part.offset, length, list(_way_back(part, length)))
    return found


def _way_back(step: Step, length: int) -> Iterator[Step]:
    """Go back towards the map while there are just these features."""
    while step.source is None and math.prod(one.size for one in step.features()) == length:
        yield step
        step = step.inputs[0]
    if step.source is not None and step.units == length:
        yield step
