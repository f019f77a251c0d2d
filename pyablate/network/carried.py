"""Which tensors carry the units of which weights, and where those units pass a nonlinearity."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pyablate.network.flow import Step


@dataclass(frozen=True)
class Way:
    """From a map by weights to the nonlinearity behind it.

    Attributes
    ----------
    exits : list of Step
        Tensors that all of the way passes, the map's own first, the nonlinearity's result last.
    regions : list of set of Step
        What lies between each of them and the next, that next one included.
    """

    exits: list[Step]
    regions: list[set[Step]]

    @property
    def end(self) -> Step:
        """What the nonlinearity returns."""
        return self.exits[-1]

    def plain_after(self, step: Step) -> bool:
        """Whether a unit that is 0 at an exit gives the nonlinearity nothing but that 0.

        Norms would turn it into another constant, other tensors would speak for it, and where the
        number of units changes, one is made of several.
        """
        at = self.exits.index(step)
        behind = set().union(*self.regions[at:])
        return step.units == self.end.units and not any(
            one.normalises
            or one.reduces
            or any(source not in behind and source is not step for source in one.inputs)
            for one in behind
        )


class Carried:
    """Units on their way through a forward pass."""

    def __init__(self, steps: Sequence[Step], logits: Step | None) -> None:
        self.steps = steps
        self.logits = logits
        self.live = _before(steps, logits)
        self._to_logits = self.names({"": [logits]} if logits is not None else {})
        self._classes = {logits} if logits is not None else set()
        for step in reversed(steps):
            readers = [reader for reader in step.readers if reader in self.live]
            only = all(one in self._classes and one.keeps_units_of(step) for one in readers)
            if readers and only and len(step.shape) <= 2:
                self._classes.add(step)

    def ends_in_logits(self, step: Step) -> bool:
        """Whether the units of a step are classes."""
        return bool(self._to_logits[step])

    def holds_classes(self, step: Step) -> bool:
        """Whether a tensor has the logits' units and nothing else: neither positions nor uses."""
        return step in self._classes

    def names(self, sites: Mapping[str, Sequence[Step]]) -> dict[Step, set[str]]:
        """Say of each step in which sites its units are, each by itself.

        A unit that is multiplied by that of a site is silent when that one is, and counts too.
        """
        at: dict[Step, set[str]] = {step: set() for step in self.steps}
        for name, steps in sites.items():
            for step in steps:
                at.setdefault(step, set()).add(name)
        arrived: dict[Step, set[str]] = {}
        for step in self.steps:
            arrived[step] = set(at[step])
            for source in step.inputs:
                if source in arrived and step.keeps_units_of(source):
                    arrived[step] |= arrived[source]
        found: dict[Step, set[str]] = {}
        for step in reversed(self.steps):
            found[step] = at[step]
            for reader in step.readers:
                if reader in found and reader.keeps_units_of(step):
                    found[step] |= found[reader]
                    if reader.multiplies:
                        others = (s for s in reader.inputs if s is not step and s in arrived)
                        found[step].update(*(arrived[other] for other in others))
        return found

    def to_nonlinearity(self, start: Step) -> Way | None:
        """Go on behind a map by weights up to the first nonlinearity; None if there is none.

        Each stretch of the way ends in the first tensor that all that follows goes through.
        """
        exits, regions = [start], list[set[Step]]()
        while True:
            region = self._region(exits[-1])
            if region is None:
                return self._direct(exits, regions)
            exits.append(max(region, key=lambda step: step.number))
            regions.append(region)
            if not any(step.reduces for step in region) and any(step.bends for step in region):
                return Way(exits, regions)

    def _direct(self, exits: list[Step], regions: list[set[Step]]) -> Way | None:
        """Take a nonlinearity that reads the last tensor alone, whatever else reads it."""
        for reader in exits[-1].readers:
            if reader.bends and reader in self.live and set(reader.inputs) == {exits[-1]}:
                return Way([*exits, reader], [*regions, {reader}])
        return None

    def _region(self, start: Step) -> set[Step] | None:
        """Collect what reads a tensor until all of it has come together in one again."""
        region: set[Step] = set()
        waiting: list[tuple[int, Step]] = []

        def push(readers: Iterable[Step]) -> None:
            for reader in readers:
                if reader in self.live and reader not in region:
                    region.add(reader)
                    heapq.heappush(waiting, (reader.number, reader))

        push(start.readers)
        while waiting:
            step = heapq.heappop(waiting)[1]
            if step.mixes or step is self.logits:
                return None
            if not waiting:
                return region
            push(step.readers)
        return None


def _before(steps: Sequence[Step], logits: Step | None) -> set[Step]:
    """Collect the steps that the logits follow from."""
    found = {logits} if logits is not None else set()
    for step in reversed(steps):
        if step in found:
            found.update(step.inputs)
    return found
