"""The part of the network behind a job's sites: what can change, and which tensors that reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from pyablate.engine import constant_delta, rules
from pyablate.engine.job import Job
from pyablate.engine.logit_change import carried
from pyablate.network.graph import LINEAR_MAPS, MARKER, Graph


@dataclass(frozen=True, eq=False)
class Suffix:
    """What lies between a job's sites and the logits.

    Attributes
    ----------
    graph : Graph
        The network.
    job : Job
        The ablations.
    nodes : list of fx.Node
        Nodes that the ablations can change, in order.
    """

    graph: Graph
    job: Job
    nodes: list[fx.Node]

    @classmethod
    def of(cls, graph: Graph, job: Job) -> Suffix:
        """Cut the network behind a job's sites."""
        names = {site.name for site in job.sites}
        return cls(graph, job, graph.after([m for m in graph.markers if m.args[1] in names]))

    @cached_property
    def reads(self) -> set[fx.Node]:
        """Tensors of the clean run that the rules read."""
        changed = set(self.nodes)
        needed: set[fx.Node] = set()
        for node in self.nodes:
            still = [s for s in node.all_input_nodes if s not in changed]
            needed.update(s for s in still if s not in self.graph.constants)
            if node.target is MARKER:
                needed.add(node)
            elif rules.reads_base(self.graph, node):
                needed.update([node, *node.all_input_nodes])
        needed |= constant_delta.reaches(self.job, self.nodes)
        return {
            node
            for node in needed
            if node not in self.graph.constants and self.graph.size(node, 1) is None
        }

    def pairs_in(self, slice_bytes: int, device: torch.device) -> Callable[[torch.dtype], int]:
        """As many pairs as let the widest tensor fit, by precision."""
        return lambda dtype: usual(
            max(1, slice_bytes // (self.widest * carried(dtype).itemsize)), device
        )

    def columns(self, weight: Tensor, channel: Tensor) -> Tensor:
        """Columns ``[K, U]`` of the last layer that the units reach, laid out by unit once."""

        def lay_out() -> Tensor:
            return weight.t().index_select(0, channel).contiguous()

        return self.graph.prepared((self.job, weight.dtype), lay_out).t()

    @cached_property
    def work(self) -> float:
        """Operations for one pair, about: its multiplications and elements, dead or alive."""
        graph = self.graph
        return sum(multiply_adds(graph, node) + graph.elements(node) for node in self.nodes)

    @cached_property
    def mixed_work(self) -> float:
        """Operations behind the first maps that mix a unit with others, which are cheap."""
        mixed: set[fx.Node] = set()
        total = 0.0
        for node in self.nodes:
            follows = not mixed.isdisjoint(node.all_input_nodes)
            if follows or node.target in LINEAR_MAPS:
                mixed.add(node)
            if follows:
                total += multiply_adds(self.graph, node)
        return total

    @cached_property
    def widest(self) -> int:
        """Largest number of elements that one pair needs in one tensor of the suffix."""
        return max((self.graph.elements(node) for node in self.nodes), default=1)


def multiply_adds(graph: Graph, node: fx.Node) -> float:
    """Multiplications and additions of a convolution or a linear map for one image."""
    filters = graph.constant(node, 1) if node.target in LINEAR_MAPS else None
    return 0.0 if filters is None else 2.0 * graph.elements(node) * filters[0].numel()


def usual(pairs: int, device: torch.device, *, up: bool = False) -> int:
    """Round a number of pairs to one of few: three leading bits, the others 0; on a GPU one bit.

    oneDNN and cuDNN prepare each convolution anew for every number of pairs that they have not met,
    oneDNN for half a millisecond or more. What is left over of a batch is filled up with a pair's
    copies.
    """
    step = 1 << max(0, pairs.bit_length() - (1 if device.type == "cuda" else 3))
    return -(-pairs // step) * step if up else pairs // step * step


def needed(suffixes: Iterable[Suffix]) -> set[fx.Node]:
    """Clean tensors that any of the suffixes reads."""
    return set().union(*(suffix.reads for suffix in suffixes))
