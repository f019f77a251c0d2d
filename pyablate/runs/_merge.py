"""Joining the results of shards: runs of the same work on different images."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pyablate.result import AblationResult, load
from pyablate.results import store
from pyablate.runs.blocks import Block, BlockMetadata, Joining
from pyablate.runs.fingerprint import differences
from pyablate.runs.run_folder import StoreMismatch

logger = logging.getLogger("pyablate")


def merge(
    parts: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> AblationResult:
    """Join the results of all shards of a run into the result of the whole.

    Parameters
    ----------
    parts : sequence of path-like
        Finished results of ``pyablate run --shard i/n`` (``ablate(..., shard=(i, n))``), in any
        order.
    output : path-like, optional
        Where to write the result; the same bytes as of one run over all images.

    Returns
    -------
    AblationResult
        Of the whole.

    Raises
    ------
    StoreMismatch
        Parts that differ in model, data set or options; a ValueError.
    ValueError
        Images that are in no part or in two of them; the message names both.
    OSError
        A part cannot be read, or is not finished; the output cannot be written.

    Examples
    --------
    >>> parts = ["part1.zarr", "part2.zarr"]
    >>> for number, part in enumerate(parts, 1):
    ...     _ = pa.ablate(model, data, "features.16", shard=(number, 2), output=part)
    >>> len(pa.merge(parts).labels)
    60
    """
    if not parts:
        raise ValueError("parts: expected at least one, got none")
    if output is not None:
        store.check_writable(output)
    found = [(Path(path), load(path)) for path in parts]
    for path, part in found:
        if "hash" not in part.provenance.get("data", {}):
            raise ValueError(f"parts: {path} does not tell which images it has")
    found.sort(key=lambda item: (_images(item[1]).start, _images(item[1]).stop))
    _check_alike(found)
    _check_whole(found)
    joined = Joining()
    for _, part in found:
        joined.add(_block(part))
    whole = joined.block()
    _check_images(found, whole)
    _tell_raised([part for _, part in found])
    result = _whole(found[0][1], whole, _strategies([part for _, part in found]))
    if output is not None:
        result.save(output)
    return result


def _images(part: AblationResult) -> range:
    data = part.provenance["data"]
    return range(data["first"], data["first"] + data["count"])


def _check_alike(found: Sequence[tuple[Path, AblationResult]]) -> None:
    # Parts made from tensors and from a loader tell their data set differently: one of each kind.
    models: dict[frozenset[str], tuple[Path, AblationResult]] = {}
    for path, part in found:
        for other, model in models.values():
            differing = differences(_work(model), _work(part))
            if differing:
                raise StoreMismatch(
                    f"parts: {path} is of another run than {other}; what differs: "
                    f"{', '.join(differing)}"
                )
        models.setdefault(frozenset(_work(part)["data"]), (path, part))


def _work(part: AblationResult) -> dict[str, Any]:
    """Say what a part was made of, its own images apart."""
    data = part.provenance["data"]
    told = {name: data[name] for name in ("images", "labels", *_WHOLE) if name in data}
    return {**part.provenance, "data": told}


def _check_whole(found: Sequence[tuple[Path, AblationResult]]) -> None:
    problems = []
    last: Path | None = None
    stop = 0
    for path, part in found:
        images = _images(part)
        if len(part.labels) != len(images):
            problems.append(f"{path} does not hold the images that it names")
        if images.start > stop:
            problems.append(f"images {stop} to {images.start - 1} are missing, before {path}")
        if images.start < stop:
            problems.append(f"{path} and {last} both have image {images.start}")
        if images.stop > stop:
            stop, last = images.stop, path
    total = found[0][1].provenance["data"]["images"]
    if stop < total:
        problems.append(f"images {stop} to {total - 1} are missing, after {last}")
    if problems:
        raise ValueError(f"parts: {'; '.join(problems)}")


_WHOLE = ("others", "sample", "files")
"""What tells the data set from which a part comes, all images or some."""


def _check_images(found: Sequence[tuple[Path, AblationResult]], whole: Block) -> None:
    """Compare what all parts have with the data set that each has seen; say what cannot be."""
    joined = f"{whole.metadata.hash:064x}"
    for path, part in found:
        data = part.provenance["data"]
        if data.get("others") not in (None, joined):
            raise StoreMismatch(
                f"parts: {path} comes from a data set with other images or labels than those of "
                "the parts together"
            )
        if len(found) > 1 and not any(name in data for name in _WHOLE):
            logger.warning(
                "%s: made by an older version, does not tell from which data set; that the parts "
                "have the same was not checked",
                path,
            )


def _block(part: AblationResult) -> Block:
    metadata = BlockMetadata(
        hash=int(part.provenance["data"]["hash"], 16),
        audits={"": part.audit},
        strategy=part.strategy,
        measures=part.measures,
        screening=part.screening,
        estimate=part.estimate,
    )
    return Block(part.labels, part.baseline, part.flips, metadata)


def _strategies(parts: Sequence[AblationResult]) -> dict[str, str]:
    """Tell how each layer was computed: each way once, where an audit made some parts differ."""
    ways = {
        layer: list(dict.fromkeys(part.strategy.get(layer, "") for part in parts))
        for layer in parts[0].strategy
    }
    for layer in (layer for layer, each in ways.items() if len(each) > 1):
        logger.warning(
            "parts: the audit of some found layer %s to be wrong, and it was computed again there; "
            "the audits of the others found nothing",
            layer,
        )
    return {layer: "; ".join(each) for layer, each in ways.items()}


def _tell_raised(parts: Sequence[AblationResult]) -> None:
    """Tell where the sample of a screened part raised a threshold that others kept."""
    layers = [part.screening.layers if part.screening else {} for part in parts]
    for layer in layers[0]:
        if len({one[layer].raised for one in layers if layer in one}) > 1:
            logger.warning(
                "parts: the sample of some raised the threshold of layer %s, others kept it: each "
                "holds what it found with its own, and the certificate is of the whole",
                layer,
            )


def _whole(part: AblationResult, found: Block, strategy: dict[str, str]) -> AblationResult:
    told = part.provenance["data"]
    data = {
        "images": told["images"],
        "first": 0,
        "count": len(found.labels),
        **({"labels": told["labels"]} if "labels" in told else {}),
        "hash": f"{found.metadata.hash:064x}",
    }
    return replace(
        part,
        labels=found.labels.astype(np.int64),
        baseline=found.baseline.astype(np.int64),
        flips=found.flips,
        audit=found.metadata.audit,
        strategy=strategy,
        measures=found.metadata.measures,
        screening=found.metadata.screening,
        estimate=found.metadata.estimate,
        provenance={**part.provenance, "data": data},
    )
