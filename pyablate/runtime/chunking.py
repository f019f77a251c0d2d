"""How much one call may do: Python hears an interrupt between two calls, not within one.

What follows the clean run works on slices that stay in a processor's caches. The clean run itself,
the float64 pass and replay take many images at a time, each with the whole map; in a network of the
size of VGG-16 one convolution would take seconds. They are cut by counts, not by the clock, so that
the last bits of a run do not depend on how busy the machine was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

LONGEST = 16_000_000_000
"""Multiplications and additions of one call in float32: some 0.2 s on one core with AVX-512."""

LARGEST = 512 << 20
"""Bytes of the widest clean tensor of a batch: an activation takes half a second on one core."""

_COUNTED = (aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)


def portions(operations: int, tensor: Tensor) -> int:
    """Into how many calls to cut one of so many multiplications and additions on a tensor."""
    if tensor.device.type != "cpu":  # calls return before they are carried out
        return 1
    return max(1, -(-operations * tensor.element_size() // (4 * LONGEST)))


def images_at_a_time(model: nn.Module, images: Tensor) -> int:
    """As many images as keep the costliest call of a network short, and at least two.

    Parameters
    ----------
    model : nn.Module
        Run once on a CPU; some networks squeeze a single image away, so it takes two at least.
    images : Tensor
        ``[N, ...]``: a few, in the precision of the network.
    """
    if images.device.type != "cpu":
        return torch.iinfo(torch.int32).max
    count = _Count()
    with torch.no_grad(), count:
        model(images.clone())  # it may work in place
    longest = 4 * LONGEST // images.element_size()
    return int(max(2, longest * len(images) // max(count.most, 1)))


class _Count(TorchDispatchMode):
    """Multiplications and additions of the costliest operator that runs meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in _COUNTED:
            formula = cast(Callable[..., int], flop_registry[function.overloadpacket])
            self.most = max(self.most, formula(*args, **(kwargs or {}), out_val=result))
        return result
