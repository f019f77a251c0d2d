"""Statistics of the units and calibration of the tiers, as a run stores them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyablate.engine import int8_conv
from pyablate.engine.care import Care
from pyablate.engine.precision_cascade import PrecisionCascade
from pyablate.engine.replacements import Key, Statistics

TIERS = (torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""All precisions of the dense part, cheapest first."""


def in_words(tier: str) -> str:
    """Say a precision in the words of a user."""
    return "8-bit integers" if tier == "int8" else tier


def pack_statistics(
    statistics: Mapping[Key, Statistics], thresholds: Mapping[str, Any] | None = None
) -> dict[str, NDArray[Any]]:
    """Turn statistics, and what a screened run measured, into named arrays."""
    keys = [[name, call, list(known.shape)] for (name, call), known in statistics.items()]
    arrays = {"keys": _text(keys), **({"thresholds": _text(thresholds)} if thresholds else {})}
    for number, known in enumerate(statistics.values()):
        for name in ("mean", "std", "class_mean"):
            arrays[f"{name}.{number}"] = getattr(known, name).cpu().numpy()
    return arrays


def _text(value: Any) -> NDArray[Any]:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def unpack_thresholds(arrays: Mapping[str, NDArray[Any]]) -> Any:
    """Return the thresholds that :func:`pack_statistics` was given; None if it was given none."""
    return json.loads(arrays["thresholds"].tobytes()) if "thresholds" in arrays else None


def unpack_statistics(
    arrays: Mapping[str, NDArray[Any]], device: torch.device
) -> dict[Key, Statistics]:
    """Undo :func:`pack_statistics`."""
    found = {}
    for number, (site, call, shape) in enumerate(json.loads(arrays["keys"].tobytes())):
        moments = {
            name: torch.from_numpy(arrays[f"{name}.{number}"]).to(device)
            for name in ("mean", "std", "class_mean")
        }
        found[site, call] = Statistics(**moments, shape=tuple(shape))
    return found


def pack_cascade(cascade: PrecisionCascade, raised: int = 0) -> dict[str, Any]:
    """Turn a calibration, the care taken, and how often a threshold was raised, into JSON."""
    return {
        "tiers": [str(tier).removeprefix("torch.") for tier in cascade.tiers],
        "doubts": {
            str(tier).removeprefix("torch."): bound for tier, bound in cascade.error_bounds.items()
        },
        "typical": cascade.typical,
        "gain": cascade.gain,
        "measured": cascade.measured,
        "care": int(cascade.care),
        **({"raised": raised} if raised else {}),
    }


def care_of(state: Sequence[Mapping[str, Any]]) -> list[Care]:
    """Return the care with which each job was done on a block."""
    return [Care(known.get("care", Care.USUAL)) for known in state]


def raised_of(state: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return how often each job's threshold had been raised when a block was done."""
    return [int(known.get("raised", 0)) for known in state]


def restore_care(cascades: Sequence[PrecisionCascade], state: Sequence[Mapping[str, Any]]) -> None:
    """Take no less care than was taken on a block."""
    for cascade, care in zip(cascades, care_of(state), strict=False):
        cascade.care = max(cascade.care, care)


def restore_cascades(
    cascades: Sequence[PrecisionCascade], state: Sequence[Mapping[str, Any]], *, any_tier: bool
) -> None:
    """Go on with calibrations that an earlier process made, and with no less care than it.

    Parameters
    ----------
    cascades : sequence of PrecisionCascade
        Of the jobs; they are changed.
    state : sequence of mapping
        Of as many of the jobs, from the first on, as have been calibrated.
    any_tier : bool
        Whether tiers may be taken up that the cascades lack: which ones pay is measured anew by
        each process, and not always with the same outcome.
    """
    restore_care(cascades, state)
    for cascade, known in zip(cascades, state, strict=False):
        tiers = [_dtype(name) for name in known["tiers"]]
        possible = _possible if any_tier else cascade.tiers.__contains__
        if tiers[-1] != cascade.full or not all(map(possible, tiers)):
            continue
        cascade.tiers = tiers
        cascade.error_bounds = {
            _dtype(name): float(bound) for name, bound in known["doubts"].items()
        }
        cascade.typical = [float(step) for step in known["typical"]]
        cascade.gain = float(known["gain"])
        cascade.measured = int(known["measured"])


def _dtype(name: str) -> torch.dtype:
    return {str(t).removeprefix("torch."): t for t in TIERS}[name]


def _possible(tier: torch.dtype) -> bool:
    if tier == torch.float16:
        return torch.cuda.is_available()
    return tier != torch.int8 or int8_conv.available()
