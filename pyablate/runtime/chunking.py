"""Chunk sizes: how much one call works on, bounded by caches, memory and the wait for Ctrl-C.

Python hears an interrupt between two calls, not within one. What follows the clean run works on
slices that stay in a processor's caches. The clean run itself, the float64 pass and replay take
many images at a time, each with the whole map; in a network of the size of VGG-16 one convolution
would take seconds. They are cut by counts, not by the clock, so that the last bits of a run do not
depend on how busy the machine was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 16_000_000_000
"""Multiplications and additions of one call in float32: some 0.2 s on one core with AVX-512."""

LARGEST = 512 << 20
"""Bytes of the widest clean tensor of a batch: an activation takes half a second on one core."""

SLICE = 24 << 20
"""Bytes of the widest delta that are worked on at a time: what stays in a processor's third cache.
Less would do for networks of 28 x 28 pixels, but of 224 x 224 too few pairs share a reading of the
weights (docs/development/notebook.md)."""

DEVICE_SLICE = 512 << 20
"""The same on a GPU: one pass over it takes 0.2 ms at 2.6 TB/s, measured on an H200, as long as
launching tens of operations."""

DOUBLE_SLICE = 16 << 20
"""That of float64, where fewer pairs come and more are done to each."""

CLEAN_SLICE = 4 << 20
"""Bytes of the widest tensor up to which the clean run takes images together."""

GRADIENTS = 8 << 20
"""Bytes of an image's gradients at narrow places of a network, whatever the memory: what a screened
run settles depends on what places there are."""

REPLAYED = 64
"""Pairs that are replayed together, fewer where one image alone takes long."""

NUMBERS = 1 << 22
"""Numbers that statistics and attributes work on at a time: some tens of megabytes an array."""

CACHED_NUMBERS = 1 << 16
"""Numbers in float64 that stay in the caches between one step and the next."""

DISTANCE_ROWS = 256
"""Rows of a matrix of distances that are computed together."""

READ = 1 << 20
"""Bytes that are read from a file at a time."""


def portions(operations: int, tensor: Tensor) -> int:
    """Into how many calls to cut one of so many multiplications and additions on a tensor."""
    if tensor.device.type != "cpu":  # calls return before they are carried out
        return 1
    return max(1, -(-operations * tensor.element_size() // (4 * LONGEST)))
