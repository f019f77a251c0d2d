"""The other ways to do the same job, each written as well as a careful user would.

A rival answers for a few units, spread evenly over the layer; all units cost it the same, so its
time is scaled to all of them. Whatever it prepares once (folding, compiling, choosing a batch size)
is not timed; running the layers before the unit is, once.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from subjects import Cut
from torch import Tensor, nn

from pyablate.network.near_tie import near_tie
from pyablate.network.sites import Site
from pyablate.reference.timing import hook_loop_seconds
from pyablate.result import AblationResult
from pyablate.runtime.determinism import float32_as

BATCH_SIZES = (32, 64, 128, 256, 512)
Decide = Callable[[Tensor], Tensor]
"""Logits ``[..., K]`` to classes ``[...]``."""


@dataclass(frozen=True)
class Agreement:
    """Pairs compared, pairs left out as near ties of the rival, and pairs that differ."""

    pairs: int
    near_ties: int
    mismatches: int


class Rival(Protocol):
    """What a measurement needs of a rival."""

    name: str
    note: str
    units_timed: int

    def seconds(self) -> float:
        """Do the job once; wall time, scaled to all units."""

    def check(self, result: AblationResult) -> Agreement:
        """Compare answers on the images of a result (the first ones of this rival)."""


def spread(units: int, count: int) -> list[int]:
    """Choose `count` of `units` at even distances."""
    count = min(count, units)
    return [(2 * i + 1) * units // (2 * count) for i in range(count)]


def plainly(logits: Tensor) -> Tensor:
    """Argmax: what is timed."""
    return logits.argmax(dim=-1)


def clearly(logits: Tensor) -> Tensor:
    """Argmax, or -1 where the top two are a near tie: what is compared."""
    return torch.where(near_tie(logits), -1, logits.argmax(dim=-1))


def agreement(found: Tensor, result: AblationResult, layer: str, units: Sequence[int]) -> Agreement:
    """Compare classes ``[units, N]``, -1 for near ties, with a result's."""
    ours = result.predictions([f"{layer}:{unit}" for unit in units])
    theirs = found.cpu().numpy()
    tie = theirs < 0
    return Agreement(int((~tie).sum()), int(tie.sum()), int(((theirs != ours) & ~tie).sum()))


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow TensorFloat-32 on GPUs for a while, or forbid it."""
    if not torch.cuda.is_available():
        yield  # it would change nothing, but torch.compile would compile anew
        return
    with float32_as("tf32" if allowed else "ieee"):
        yield


@dataclass(eq=False)
class Hooks:
    """`hooks`: a forward hook zeroes the unit, the whole network runs; the package's own loop."""

    model: nn.Module
    data: tuple[Tensor, Tensor]
    sites: Sequence[Site]
    share: float = 1.0  # of the units of these layers that the job is about
    units_timed: int = 6
    name: str = "hooks"
    note: str = ""

    def seconds(self) -> float:
        timing = hook_loop_seconds(self.model, self.data, self.sites, units=self.units_timed)
        layout = "channels last" if timing.channels_last else "contiguous"
        self.note = f"batch {timing.batch_size}, {layout}"
        return timing.seconds * self.share

    def check(self, result: AblationResult) -> Agreement:
        count = len(result.labels)
        data = self.data[0][:count], self.data[1][:count]
        with tf32(False):
            timing = hook_loop_seconds(
                self.model, data, self.sites, units=self.units_timed, result=result
            )
        return Agreement(timing.pairs_compared, timing.near_ties, timing.disagreements)


@dataclass(eq=False)
class Cached:
    """`cached`: the activations of the layer are kept, only what follows runs for each unit.

    The units lie on an axis of the layer's output; the job may be about some of them only.
    """

    cut: Cut
    images: Tensor
    layer: str
    axis: int = 1
    asked: Sequence[int] | None = None
    compiling: bool = True
    units_timed: int = 4
    name: str = "cached"
    note: str = ""
    batch: int = 0
    clock: Callable[[], float] = time.perf_counter
    units: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cut.suffix.to(self.images.device, memory_format=torch.channels_last)
        with torch.inference_mode():
            kept = self._keep(self.images[: max(BATCH_SIZES)])
            asked = range(kept[0].shape[self.axis]) if self.asked is None else self.asked
            self.total = len(asked)
            self.units = [asked[i] for i in spread(self.total, self.units_timed)]
            self.units_timed = len(self.units)
            self.run: Callable[..., Tensor] = self.cut.suffix
            self.batch, eager = self._best_batch(kept)
            self.note = f"eager, batch {self.batch}"
            if self.compiling:
                self._compile(kept, eager)

    def seconds(self) -> float:
        with torch.inference_mode(), tf32(True):
            begin = self.clock()
            kept = self._keep(self.images)
            _wait(self.images)
            middle = self.clock()
            self._predict(kept, plainly)
            end = self.clock()
        return middle - begin + (end - middle) * self.total / len(self.units)

    def check(self, result: AblationResult) -> Agreement:
        with torch.inference_mode(), tf32(False):
            found = self._predict(self._keep(self.images[: len(result.labels)]), clearly)
        return agreement(found, result, self.layer, self.units)

    def _keep(self, images: Tensor) -> list[Tensor]:
        parts = [self.cut.prefix(part) for part in images.split(256)]
        kept = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        return [_channels_last(tensor) for tensor in kept]

    def _predict(self, kept: Sequence[Tensor], decide: Decide) -> Tensor:
        """Classes ``[units, N]``; each batch stays in the cache while its units are swept."""
        rows = []
        for parts in zip(*(tensor.split(self.batch) for tensor in kept), strict=True):
            whole = len(parts[0]) == self.batch
            run = self.run if whole else self.cut.suffix  # an odd rest would be compiled again
            column = []
            for unit in self.units:
                its = parts[0].select(self.axis, unit)
                before = its.clone()
                its.zero_()
                column.append(decide(run(*parts)))
                its.copy_(before)
            rows.append(torch.stack(column))
        return torch.cat(rows, dim=1).cpu()

    def _best_batch(self, kept: list[Tensor]) -> tuple[int, float]:
        rates: dict[int, float] = {}
        for batch in BATCH_SIZES:
            if batch <= len(kept[0]) or not rates:
                parts = [tensor[:batch] for tensor in kept]
                rates[batch] = self._time(self.cut.suffix, parts) / len(parts[0])
        best = min(rates, key=lambda batch: rates[batch])
        return min(best, len(kept[0])), rates[best]

    def _compile(self, kept: list[Tensor], eager: float) -> None:
        """Take the compiled suffix if it is faster."""
        if shutil.which("c++") is None and shutil.which("g++") is None:
            self.note += " (torch.compile skipped: no C++ compiler)"
            return
        torch._dynamo.reset()  # each suffix counts as one more version of nn.Sequential's code
        # Freezing prepacks the weights and fuses activations into convolutions on the CPU.
        options = {"freezing": True} if self.images.device.type == "cpu" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(self.cut.suffix, options=options)
            parts = [tensor[: self.batch] for tensor in kept]
            faster = self._time(compiled, parts) / len(parts[0])
        if faster < eager:
            self.run = compiled
            self.note = f"compiled, batch {self.batch}"

    def _time(self, run: Callable[..., Tensor], parts: list[Tensor]) -> float:
        best = float("inf")
        with tf32(True):
            run(*parts)
            for _ in range(3):
                begin = time.perf_counter()
                run(*parts).cpu()
                best = min(best, time.perf_counter() - begin)
        return best


@dataclass(eq=False)
class ClosedForm:
    """`closed_form`: ``logits - g[:, u] * W[:, u]`` for many units at once, then argmax."""

    maps: Tensor  # [N, U, ...], the activated maps before global pooling
    linear: nn.Linear
    layer: str
    chunk_elements: int = 1 << 20
    name: str = "closed_form"
    note: str = ""

    def __post_init__(self) -> None:
        self.units_timed = self.maps.shape[1]
        seconds = {}
        some = self.maps[:8]
        for elements in (1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24):
            self.chunk_elements = elements
            seconds[elements] = min(self._time(some) for _ in range(2))
        self.chunk_elements = min(seconds, key=lambda elements: seconds[elements])
        self.note = f"chunks of {self.chunk_elements:,} logits"

    def seconds(self) -> float:
        return self._time(self.maps)

    def check(self, result: AblationResult) -> Agreement:
        with tf32(False):
            found = self._predict(self.maps[: len(result.labels)], clearly)
        return agreement(found, result, self.layer, range(self.units_timed))

    def _time(self, maps: Tensor) -> float:
        with tf32(True):
            begin = time.perf_counter()
            self._predict(maps, plainly)
            return time.perf_counter() - begin

    @torch.inference_mode()
    def _predict(self, maps: Tensor, decide: Decide) -> Tensor:
        pooled = maps.flatten(2).mean(dim=2)
        logits = self.linear(pooled)
        columns = self.linear.weight.t().contiguous()  # [U, K]
        units, classes = columns.shape
        # A few images at a time, so that the logits of one chunk stay in the cache.
        images = max(1, self.chunk_elements // (units * classes))
        step = max(1, min(units, self.chunk_elements // classes))
        out = torch.empty(len(pooled), units, dtype=torch.int64, device=pooled.device)
        scratch = torch.empty(images * step * classes, device=pooled.device)
        for first in range(0, len(pooled), images):
            n = slice(first, first + images)
            for start in range(0, units, step):
                u = slice(start, start + step)
                g, w = pooled[n, u].unsqueeze(2), columns[u].unsqueeze(0)
                shape = (g.shape[0], g.shape[1], classes)
                changed = scratch[: g.shape[0] * g.shape[1] * classes].view(shape)
                torch.addcmul(logits[n].unsqueeze(1), g, w, value=-1, out=changed)
                out[n, u] = decide(changed)
        return out.t().cpu()


@dataclass(eq=False)
class Captum:
    """`captum`: `LayerFeatureAblation`, one group of features per channel.

    Captum goes through all groups of a mask; the channels that are not timed form one more group.
    It returns attributions; the predictions are noted on the way.
    """

    model: nn.Module
    images: Tensor
    layer: str
    units_timed: int = 4
    batch: int = 256
    name: str = "captum"
    note: str = ""
    noted: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        from captum.attr import LayerFeatureAblation

        with torch.inference_mode():
            shape = self._output(self.images[:1]).shape
        self.total = shape[1]
        self.units = spread(self.total, self.units_timed)
        self.units_timed = len(self.units)
        group = torch.zeros(self.total, dtype=torch.long)
        group[self.units] = torch.arange(1, len(self.units) + 1)
        mask = group.reshape(1, -1, *[1] * (len(shape) - 2)).expand(1, *shape[1:])
        self.mask = mask.to(self.images.device)
        self.decide: Decide = plainly
        self.ablation = LayerFeatureAblation(self._note, self.model.get_submodule(self.layer))
        self.note = f"batch {self.batch}"

    def seconds(self) -> float:
        begin = time.perf_counter()
        self._predict(self.images, plainly)
        # One forward pass for each unit, one for the rest of the channels, two to begin with.
        return (time.perf_counter() - begin) * (self.total + 2) / (len(self.units) + 3)

    def check(self, result: AblationResult) -> Agreement:
        found = self._predict(self.images[: len(result.labels)], clearly)
        return agreement(found, result, self.layer, self.units)

    @torch.inference_mode()
    def _predict(self, images: Tensor, decide: Decide) -> Tensor:
        self.decide = decide
        rows = []
        for part in images.split(self.batch):
            self.noted.clear()
            self.ablation.attribute(part, target=0, layer_mask=self.mask)
            rows.append(torch.stack(self.noted[-len(self.units) :]))
        return torch.cat(rows, dim=1).cpu()

    def _note(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        self.noted.append(self.decide(logits))
        return logits

    def _output(self, images: Tensor) -> Tensor:
        kept: list[Tensor] = []
        module = self.model.get_submodule(self.layer)
        handle = module.register_forward_hook(lambda *args: kept.append(args[2]))
        self.model(images)
        handle.remove()
        return kept[0]


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()


def _wait(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
