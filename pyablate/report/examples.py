"""Images in a report: which ones a unit's card shows, and small pictures of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pyablate.analysis.statistics import row_blocks
from pyablate.report.numbers import certain, joined, leading
from pyablate.report.packed import packed
from pyablate.results.arrays import Ints
from pyablate.results.record import Record

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor

FLIPPED = 12
"""Images per unit that change their prediction."""

ACTIVATING = 8
"""Images per unit that activate it most."""

BUDGET = 4_000_000
"""Bytes of text that the pictures of one report may take."""

HEAT = 2_000_000
"""Bytes of text that the maps of relevance may take."""

_MOST_PICTURES = 4000  # held in memory while they are drawn
_SIDE = 80  # pixels of the longer side
_BATCH = 256


def examples(
    result: Record, activating: Ints | None, data: Any, relevant: Ints | None = None
) -> dict[str, Any]:
    """Choose images for the cards of the units, and draw them where data are at hand.

    ``activating`` are the images that activate each unit most, and ``relevant`` those for which it
    is most relevant, int64 [unit, image], -1 for none; the data are those of the run, in their
    order. Returns ``start``, ``image`` and ``after`` (which images flip, to which class; as in
    :class:`pyablate.Flips`); ``activating``, ``relevant``; ``shown``, ``label`` and ``before``
    (number, class and intact prediction of every image mentioned); and
    ``pictures`` (by image number, as data URIs).
    """
    result = certain(result)
    parts = [_chosen(result, rows) for rows in row_blocks(result)]
    flips, lengths = (joined([each[i] for each in parts]) for i in range(2))
    ends = np.cumsum(lengths)
    entries = np.split(flips, ends[:-1])
    image = result.flips.image[flips].astype(np.int64)
    given = [rows for rows in (activating, relevant) if rows is not None]
    shown = np.unique(np.concatenate([image, *(rows[rows >= 0] for rows in given)]))
    return {
        "start": packed(np.concatenate([[0], ends])),
        "image": packed(image),
        "after": packed(result.flips.prediction[flips]),
        "activating": None if activating is None else packed(activating),
        "relevant": None if relevant is None else packed(relevant),
        "shown": packed(shown),
        "label": packed(result.labels[shown]),
        "before": packed(result.baseline[shown]),
        "pictures": {}
        if data is None
        else _pictures(data, result, _wanted(result, entries, given)),
    }


def _chosen(result: Record, rows: slice) -> tuple[Ints, Ints]:
    """Flips of each unit to show, and how many: images made wrong, of its most hurt class first."""
    first, stop = result.flips.start[[rows.start, rows.stop]]
    run, row = slice(first, stop), result.flips.row[first:stop]
    image = result.flips.image[run]
    label, before = result.labels[image], result.baseline[image]
    lost = before == label
    gained = result.flips.prediction[run] == label
    of_worst = label == result.max_class[row]
    rank = np.select([lost & of_worst, lost, gained], [0, 1, 2], 3)
    lengths = np.diff(result.flips.start[rows.start : rows.stop + 1])
    chosen = np.lexsort((rank, row))[leading(lengths, FLIPPED)]
    return first + chosen, np.minimum(lengths, FLIPPED)


def _wanted(result: Record, entries: list[Ints], given: list[Ints]) -> Ints:
    """Images to draw, each once; those of the units that matter most first."""
    parts = []
    for row in np.argsort(-result.max_class_drop, kind="stable"):
        parts.append(result.flips.image[entries[row]].astype(np.int64))
        parts += [rows[row][rows[row] >= 0] for rows in given]
    every = np.concatenate([np.empty(0, dtype=np.int64), *parts])
    _, first = np.unique(every, return_index=True)
    return every[np.sort(first)][:_MOST_PICTURES]


def _pictures(data: Any, result: Record, wanted: Ints) -> dict[str, str]:
    """Pictures by image number, as many as the budget allows."""
    pixels = dict(_pixels(data, result, set(wanted.tolist())))
    if not pixels:
        return {}
    # Normalisation is undone well enough: the extremes of each channel become black and white.
    low = np.min([each.min(axis=(1, 2)) for each in pixels.values()], axis=0)
    high = np.max([each.max(axis=(1, 2)) for each in pixels.values()], axis=0)
    drawn: dict[str, str] = {}
    room = BUDGET
    for number in wanted.tolist():
        uri = _uri(pixels[number], low, high)
        room -= len(uri)
        if room < 0:
            break
        drawn[str(number)] = uri
    return drawn


def heat_maps(result: Record, found: xr.Dataset) -> dict[str, str]:
    """Draw where the most relevant images are relevant: data URIs by ``"unit label/rank"``.

    White where nothing is, red for the class, blue against it, each map to its largest value; those
    of the units that matter most, as many as the budget allows.
    """
    import torch

    if "relevant_map" not in found.variables:
        return {}
    maps, known = found["relevant_map"].to_numpy(), found["unit"].to_numpy().tolist()
    place = {label: row for row, label in enumerate(known)}
    drawn: dict[str, str] = {}
    room = HEAT
    labels = result.units["label"].to_numpy()
    for label in labels[np.argsort(-result.max_class_drop, kind="stable")].tolist():
        for rank, heat in enumerate(maps[place[label]][:ACTIVATING] if label in place else ()):
            level = heat / max(float(np.abs(heat).max()), np.finfo(np.float32).tiny)
            colours = np.stack([1 - (-level).clip(0), 1 - np.abs(level), 1 - level.clip(0)])
            uri = _uri(_drawable(torch.from_numpy(colours)), np.zeros(3), np.ones(3))
            room -= len(uri)
            if room < 0:
                return drawn
            drawn[f"{label}/{rank}"] = uri
    return drawn


def _pixels(
    data: Any, result: Record, wanted: set[int]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Images [C, H, W] that are wanted, with their numbers; checks all labels on the way."""
    import torch

    from pyablate.data.dataset import Data

    source = Data(data, dtype=torch.float32, device=torch.device("cpu"), unlabelled=True)
    done = 0
    for batch in source.batches(_BATCH):
        if batch.images.ndim != 4:
            raise ValueError(
                f"data: expected images [N, C, H, W] to draw, got shape "
                f"{list(batch.images.shape)}; without data and model the report has no pictures"
            )
        expected = result.labels[done : done + len(batch)]
        told = result.labelled and source.labelled
        if len(expected) != len(batch) or (
            told and not np.array_equal(batch.labels.numpy(), expected)
        ):
            raise ValueError(
                f"data: not the images of this result: labels differ from image {done} on"
                if len(expected) == len(batch)
                else f"data: the result has {len(result.labels):,} images, these are more"
            )
        for offset, image in enumerate(batch.images):
            if done + offset in wanted:
                yield done + offset, _drawable(image)
        done += len(batch)
    if done != len(result.labels):
        raise ValueError(f"data: the result has {len(result.labels):,} images, these are {done:,}")


def _drawable(image: Tensor) -> NDArray[np.float32]:
    """Make an image of any number of channels one of one (grey) or three; small if it was large."""
    from torch.nn.functional import interpolate

    if len(image) not in (1, 3):
        image = image.mean(dim=0, keepdim=True)
    shrink = max(1.0, max(image.shape[1:]) / _SIDE)
    size = [max(1, round(length / shrink)) for length in image.shape[1:]]
    small: NDArray[np.float32] = interpolate(image[None], size=size, mode="area")[0].numpy()
    return small


def _uri(image: NDArray[np.float32], low: NDArray[Any], high: NDArray[Any]) -> str:
    scaled = (image - low[:, None, None]) / np.maximum(high - low, 1e-12)[:, None, None]
    levels = np.round(255 * scaled.clip(0, 1)).astype(np.uint8)
    picture = Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0))
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=80, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode("ascii")
