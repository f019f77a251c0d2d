"""Reading of weights, without arbitrary pickles."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

# Where trainers put the weights inside a checkpoint, in the order tried.
_NESTED = ("state_dict", "model_state_dict", "model")
# Wrappers (DataParallel, torch.compile) that leave their name in front of every key.
_WRAPPERS = ("module.", "_orig_mod.")
_NAMED = 3
MAX_BYTES = 64 << 30
"""Limit of an unpacked checkpoint, against decompression bombs."""


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the weights in a safetensors file or a checkpoint of ``torch.save``.

    A checkpoint holds a state dict, or a dict with one under "state_dict", "model_state_dict" or
    "model"; the prefixes "module." and "_orig_mod." are dropped where every key has them.

    Raises
    ------
    OSError
        The file is missing or unreadable.
    ValueError
        The file is damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights: expected a file, found none at {str(path)!r}")
    if path.suffix == ".safetensors":
        try:
            return _without_wrappers(safetensors.torch.load_file(path))
        except safetensors.SafetensorError as error:
            raise ValueError(f"weights: {str(path)!r} is no safetensors file ({error})") from None
    return _without_wrappers(_state_in(_unpickle_tensors(path), path))


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `model`; missing, unexpected and misshapen entries are all named.

    The batch counter of batch norm may be missing: old checkpoints lack it, evaluation does not
    read it.

    Raises
    ------
    ValueError
        `state` does not fit; the model is unchanged then.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    misshapen = [
        f"{k}: expected {list(own[k].shape)}, found {list(state[k].shape)}"
        for k in own
        if k in state and own[k].shape != state[k].shape
    ]
    faults = [
        f"{len(names)} {kind} ({_first(names)})"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if faults:
        raise ValueError(f"weights: {source!r} does not fit the model: {'; '.join(faults)}")
    model.load_state_dict(state, strict=False)


def _unpickle_tensors(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile:  # one of the older format, which is not compressed
        size = 0
    if size > MAX_BYTES:
        raise ValueError(
            f"weights: {str(path)!r} unpacks to {size} bytes, the limit is {MAX_BYTES}"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:
        # The restricted unpickler stumbles over foreign bytes in many ways.
        raise ValueError(
            f"weights: {str(path)!r} is damaged or holds objects other than tensors; "
            "expected a state dict"
        ) from None


def _state_in(content: Any, path: Path) -> dict[str, Tensor]:
    found = content
    if isinstance(content, dict):
        for key in _NESTED:
            if isinstance(content.get(key), dict):
                found = content[key]
                break
    if not isinstance(found, dict) or not found:
        raise ValueError(
            f"weights: expected a state dict in {str(path)!r}, found {type(found).__name__}"
            + (" without entries" if isinstance(found, dict) else "")
        )
    strange = [str(k) for k, v in found.items() if not isinstance(v, Tensor)]
    if strange:
        raise ValueError(
            f"weights: expected tensors only in {str(path)!r}, "
            f"found {len(strange)} other entries ({_first(strange)})"
        )
    return found


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS:
        if all(key.startswith(prefix) for key in state):
            return _without_wrappers({k.removeprefix(prefix): v for k, v in state.items()})
    return state


def _first(names: list[str]) -> str:
    more = [f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join(names[:_NAMED] + more)
