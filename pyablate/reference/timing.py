"""Timing of the plain hook loop: what the same job costs when it is written the usual way.

A careful user writes it like this: evaluation mode, ``inference_mode``, the memory layout and the
batch size that are fastest here, one forward hook that zeroes one unit in place, and a full
forward pass over all images for every unit. All units cost the same, so a few of them, spread
over the layers, give the time of all by scaling.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pyablate._validation import check_count
from pyablate.data.dataset import Data
from pyablate.network.classifier import classifier
from pyablate.network.forward import check_logits, device_of, forward, own_dtype
from pyablate.network.model_checks import fit_inputs
from pyablate.network.near_tie import near_tie
from pyablate.network.sites import Site, evaluation, hooked
from pyablate.reference.loop import predictions

if TYPE_CHECKING:
    from pyablate.result import AblationResult

_BATCH_SIZES = (64, 128, 256, 512)
_TRIAL_IMAGES = 512


@dataclass(frozen=True)
class HookLoopTiming:
    """What the plain hook loop costs, and how that was found.

    Attributes
    ----------
    seconds : float
        Estimate for all units and images: the time measured, scaled.
    measured_seconds : float
        Wall time of the units that were timed.
    units_timed, units : int
        Units timed, and units in all.
    images_timed, images : int
        Images timed, and images in all.
    batch_size : int
        The fastest of the batch sizes tried.
    channels_last : bool
        Whether the channels-last layout was the faster one.
    pairs_compared : int
        (unit, image) pairs whose prediction was compared with the result's; 0 without a result.
    near_ties : int
        Pairs left out of the comparison: top-2 margin under 1e-5 of the logit scale.
    disagreements : int
        Compared pairs in which the predictions differ.
    """

    seconds: float
    measured_seconds: float
    units_timed: int
    units: int
    images_timed: int
    images: int
    batch_size: int
    channels_last: bool
    pairs_compared: int = 0
    near_ties: int = 0
    disagreements: int = 0


def hook_loop_seconds(
    model: nn.Module,
    data: Any,
    sites: Sequence[Site],
    *,
    units: int = 8,
    images: int | None = None,
    result: AblationResult | None = None,
) -> HookLoopTiming:
    """Time the plain hook loop on a few units and scale it to all of them.

    Parameters
    ----------
    model : nn.Module
        The network, on the device to be timed. A copy of it is run; it stays as it was.
    data : pair of arrays, DataLoader or iterable of (x, y)
        As for :func:`pyablate.ablate`, in the order in which it had them.
    sites : sequence of Site
        The layers whose units the estimate is for.
    units : int
        How many units to time, spread evenly over all units of all sites.
    images : int, optional
        How many of the images to run for each of them. None is all.
    result : AblationResult, optional
        A run over the same data with ``intervention="zero"``. The predictions of the loop are
        compared with its own.

    Raises
    ------
    ValueError
        No sites, no images, or a count below 1.
    """
    if not sites:
        raise ValueError("sites: expected at least one layer, got none")
    check_count("units", units)
    if images is not None:
        check_count("images", images)
    plain = classifier(model)
    source = Data(data, dtype=own_dtype(model), device=device_of(model), unlabelled=True)
    x, total = _gather(source, images)
    chosen = _spread(sites, units)
    with evaluation(plain), torch.inference_mode():
        check_logits(fit_inputs(plain, source, x), 2)
        x, batch, channels_last = _fastest(plain, x)
        start = time.perf_counter()
        logits = [_predict(plain, x, batch, site, unit) for site, unit in chosen]
        seconds = time.perf_counter() - start
    everything = sum(site.channels for site in sites)
    scale = everything / len(chosen) * total / len(x)
    compared, ties, wrong = _compare(result, chosen, logits) if result is not None else (0, 0, 0)
    return HookLoopTiming(
        seconds=seconds * scale,
        measured_seconds=seconds,
        units_timed=len(chosen),
        units=everything,
        images_timed=len(x),
        images=total,
        batch_size=batch,
        channels_last=channels_last,
        pairs_compared=compared,
        near_ties=ties,
        disagreements=wrong,
    )


class _Silence:
    """Forward hook that zeroes one unit of one site."""

    def __init__(self, site: Site, unit: int) -> None:
        self.site, self.unit, self.calls = site, unit, 0

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        self.calls += 1
        if self.site.call not in (None, self.calls):
            return output
        # In place is cheapest, but an output that shares memory with an input (Identity, Flatten,
        # an in-place activation) would change what others read as well.
        shared = any(
            isinstance(x, Tensor)
            and x.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
            for x in inputs
        )
        silenced = output.clone() if shared else output
        silenced.select(self.site.axis, self.unit).zero_()
        return silenced


def _silenced(unit: int) -> Callable[[Site, int, Tensor], Tensor]:
    """Give a change that zeroes one unit of a tensor that is not simply a module's output."""

    def change(site: Site, _call: int, output: Tensor) -> Tensor:
        entries = torch.tensor(site.entries(unit), device=output.device)
        return output.index_fill(site.axis, entries, 0)

    return change


def _predict(model: nn.Module, x: Tensor, batch: int, site: Site, unit: int) -> Tensor:
    """Logits ``[N, K]`` on the CPU with one unit silenced."""
    parts = []
    for part in x.split(batch):
        if not site.plain:
            with hooked(model, [site], _silenced(unit)):
                parts.append(forward(model, part))
            continue
        handle = model.get_submodule(site.module).register_forward_hook(_Silence(site, unit))
        try:
            parts.append(forward(model, part))
        finally:
            handle.remove()
    return torch.cat(parts).cpu()  # the copy also waits for a GPU to finish


def _fastest(model: nn.Module, x: Tensor) -> tuple[Tensor, int, bool]:
    """Try memory layouts and batch sizes on some images; leave model and images in the best."""
    layouts = [torch.contiguous_format] + [torch.channels_last] * (x.ndim == 4)
    seconds: dict[tuple[torch.memory_format, int], float] = {}
    for layout in layouts:
        _lay_out(model, layout)
        trial = x[:_TRIAL_IMAGES].contiguous(memory_format=layout)
        for batch in _BATCH_SIZES:
            if batch == _BATCH_SIZES[0] or batch <= len(trial):
                # The first of the two passes is the warm-up.
                seconds[layout, batch] = min(_time_forward(model, trial, batch) for _ in range(2))
    layout, batch = min(seconds, key=lambda key: seconds[key])
    _lay_out(model, layout)
    return x.contiguous(memory_format=layout), batch, layout is torch.channels_last


def _lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)


def _time_forward(model: nn.Module, x: Tensor, batch: int) -> float:
    start = time.perf_counter()
    for part in x.split(batch):
        last = forward(model, part)
    last.cpu()
    return time.perf_counter() - start


def _gather(data: Data, images: int | None) -> tuple[Tensor, int]:
    """Return the first images as one tensor, and how many there are in all."""
    data.hold_if_read_once()
    total = len(data)
    part = range(total if images is None else min(images, total))
    parts = [batch.images for batch in data.batches(_TRIAL_IMAGES, part)]
    if not parts:
        raise ValueError("data: no images")
    return torch.cat(parts), total


def _spread(sites: Sequence[Site], units: int) -> list[tuple[Site, int]]:
    """Pick units at even distances in the list of all units, in order."""
    everything = [(site, unit) for site in sites for unit in range(site.channels)]
    count = min(units, len(everything))
    return [everything[(2 * i + 1) * len(everything) // (2 * count)] for i in range(count)]


def _compare(
    result: AblationResult, chosen: Sequence[tuple[Site, int]], logits: Sequence[Tensor]
) -> tuple[int, int, int]:
    """Count the pairs compared, the near ties left out, and the disagreements."""
    row_of = {label: row for row, label in enumerate(result.units["label"])}
    known = [i for i, (site, unit) in enumerate(chosen) if site.label(unit) in row_of]
    if not known:
        return 0, 0, 0
    rows = [row_of[chosen[i][0].label(chosen[i][1])] for i in known]
    ours = np.asarray(result.predictions(rows))
    theirs = torch.stack([logits[i] for i in known]).double()
    tie = near_tie(theirs).numpy()
    found = np.stack([predictions(values) for values in theirs])
    differs = found != ours[:, : theirs.shape[1]]
    return int((~tie).sum()), int(tie.sum()), int((differs & ~tie).sum())
