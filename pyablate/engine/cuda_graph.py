"""The dense suffix as a CUDA graph: one launch for each slice of pairs.

Where maps are small or a network is deep, the host takes longer to launch the operations of a slice
than the device to do them. All full slices of a block do the same on other pairs; so one of them is
recorded, reading its pairs from memory that stays, and the others are one launch each;
docs/development/cuda.md says what that gains.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pyablate.engine.logit_change import Change, Changed
from pyablate.runtime.out_of_memory import is_shortage

logger = logging.getLogger("pyablate")

FIRST = 2
"""Slices of one size that run as they are. They convert weights and lay out filters, which later
ones find: made inside a recording, these would hold nothing before it is replayed. And recording
costs about two slices' launches, which fewer slices do not pay back."""

Run = Callable[[], Changed | None]


class Recorder(Protocol):
    """What a device offers; ``works`` until a recording has failed."""

    works: bool

    def record(self, run: Run, few: Run) -> tuple[Callable[[], None], Changed | None]:
        """Return what repeats all launches of ``run``, and where their result will stand.

        ``few`` does the same with a single pair.
        """


@dataclass(frozen=True, eq=False)
class Recorded:
    """A slice of pairs that can be repeated with others.

    Attributes
    ----------
    row, image : Tensor
        int64 ``[size]``, where it reads its pairs.
    replay : callable
        Launches all of it.
    change : Changed or None
        Where its logit changes stand until the next replay.
    """

    row: Tensor
    image: Tensor
    replay: Callable[[], None]
    change: Changed | None

    def of(self, row: Tensor, image: Tensor) -> Changed | None:
        """Logit changes of these pairs, as many as were recorded or fewer.

        Where there are fewer, pairs of an earlier slice stand behind them, and nobody reads what
        comes of those.
        """
        self.row[: len(row)].copy_(row)
        self.image[: len(row)].copy_(image)
        self.replay()
        return None if self.change is None else self.change.first(len(row))


@dataclass(eq=False)
class Repeated:
    """Logit changes of one block's pairs; a result stands until the next call.

    Attributes
    ----------
    change : callable
        Launches every operation by itself.
    recorder : Recorder
        Of the device.
    """

    change: Change
    recorder: Recorder
    _seen: dict[tuple[int, torch.dtype], int] = field(default_factory=dict)
    _recorded: dict[torch.dtype, Recorded] = field(default_factory=dict)

    def __call__(self, row: Tensor, image: Tensor, dtype: torch.dtype) -> Changed | None:
        """Logit changes; as of :data:`pyablate.engine.logit_change.Change`."""
        held = self._recorded.get(dtype)
        if held is not None and len(row) <= len(held.row):
            # Half of what was recorded, or less, is done sooner by itself.
            few = 2 * len(row) <= len(held.row)
            return self.change(row, image, dtype) if few else held.of(row, image)
        size = len(row), dtype
        self._seen[size] = self._seen.get(size, 0) + 1
        if self.recorder.works and self._seen[size] > FIRST:
            held = self._try(row, image, dtype)
            if held is not None:
                return held.of(row, image)
        return self.change(row, image, dtype)

    def _try(self, row: Tensor, image: Tensor, dtype: torch.dtype) -> Recorded | None:
        self._recorded.pop(dtype, None)  # of fewer pairs
        rows, images = row.clone(), image.clone()
        try:
            replay, change = self.recorder.record(
                lambda: self.change(rows, images, dtype),
                lambda: self.change(rows[:1], images[:1], dtype),
            )
        except RuntimeError as error:
            if is_shortage(error):  # fewer pairs may be recorded
                raise
            self.recorder.works = False
            reason = str(error).strip().splitlines()
            logger.warning(
                "the operations of a slice cannot be recorded as a CUDA graph (%s): each is "
                "launched by itself",
                reason[0] if reason else type(error).__name__,
            )
            return None
        self._recorded[dtype] = Recorded(rows, images, replay, change)
        return self._recorded[dtype]


def recorder(device: torch.device) -> Recorder | None:
    """Make what records on a device for one run; None where there are no CUDA graphs."""
    return CudaRecorder(torch.cuda.Stream(device)) if device.type == "cuda" else None


@dataclass(eq=False)
class CudaRecorder:
    """Records on a stream of its own, into memory that one recording after another uses.

    The memory is the last recording's, and goes with this object.
    """

    _stream: torch.cuda.Stream
    works: bool = True
    _last: torch.cuda.CUDAGraph | None = None

    def record(self, run: Run, few: Run) -> tuple[Callable[[], None], Changed | None]:
        """Record what ``run`` launches; nothing in it may wait for the device."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._stream.device)
        # The pool of the last graph, which has to be alive for that: a pool per graph would be
        # kept by the allocator when its graph is gone.
        pool = None if self._last is None else self._last.pool()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                # Libraries get their workspaces for a stream at its first use. What a whole slice
                # takes would stay with the stream, too.
                few()
                # Not torch.cuda.graph, which waits for the device and empties the cache.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    change = run()
                finally:
                    graph.capture_end()
        finally:
            current.wait_stream(self._stream)
        self._last = graph
        return graph.replay, change
