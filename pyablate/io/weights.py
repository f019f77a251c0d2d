"""Reading of weights, without arbitrary pickles, and writing."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pyablate.io.atomic import whole
from pyablate.io.sanitize import visible

_log = logging.getLogger("pyablate")

# Where trainers put the weights inside a checkpoint; the first of these that is there is taken.
_NESTED = ("state_dict", "model_state_dict", "model")
# Wrappers (torch.compile, DataParallel) that leave their name in keys.
_WRAPPERS = ("_orig_mod", "module")
# What profilers (thop) leave in a state dict.
_COUNTERS = ("total_ops", "total_params")
_NAMED = 3
_DEPTH = 3  # modules in front of a key that a trainer may have added: Lightning's "model.net."
MAX_BYTES = 64 << 30
"""Limit of an unpacked checkpoint, against decompression bombs."""


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the weights in a safetensors file or a checkpoint of ``torch.save``.

    A checkpoint holds a state dict, or a dict with one under "state_dict", "model_state_dict" or
    "model", or under any one other key ("net", "ema", ...). What torch.compile and DataParallel add
    to names ("_orig_mod.", "module.") and the counters of profilers are dropped.

    Raises
    ------
    OSError
        The file is missing or unreadable.
    ValueError
        The file is damaged, holds anything but tensors, or several state dicts under unusual keys.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights: expected a file, found none at {str(path)!r}")
    if path.suffix == ".safetensors":
        try:
            return _cleaned(safetensors.torch.load_file(path))
        except safetensors.SafetensorError as error:
            raise ValueError(f"weights: {str(path)!r} is no safetensors file ({error})") from None
    return _cleaned(_state_in(_unpickle_tensors(path), path))


def write_state(model: nn.Module, path: Path, what: str = "path") -> None:
    """Write the weights of a network as a safetensors file, whole or not at all."""
    # Copies: tensors that share memory are not taken.
    state = model.state_dict()
    state = {name: each.detach().clone().contiguous() for name, each in state.items()}
    with whole(path, what) as fresh:
        safetensors.torch.save_file(state, fresh)


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `model`; missing, unexpected and misshapen entries are all named.

    Names that a trainer has put in front of all or some keys ("model.", "backbone."), or that the
    model has and the checkpoint lacks, are taken off or added where exactly one such reading fits;
    a log line says which. The batch counter of batch norm may be missing: old checkpoints lack it,
    evaluation does not read it.

    Raises
    ------
    ValueError
        `state` does not fit, or in several ways; the model is unchanged then.
    """
    own = model.state_dict()
    faults = _faults(own, state)
    if faults:
        fitting = [one for one in _readings(own, state) if not _faults(own, one.state)]
        if len(fitting) > 1:
            ways = " or ".join(one.said for one in fitting)
            raise ValueError(f"weights: {source!r} fits the model in several ways: {ways}")
        if not fitting:
            raise ValueError(f"weights: {source!r} does not fit the model: {'; '.join(faults)}")
        _log.info("weights: %r fits the model %s", source, fitting[0].said)
        state = fitting[0].state
    model.load_state_dict(state, strict=False)


@dataclass(frozen=True)
class _Reading:
    """A state dict under other names, and what was done to them."""

    state: dict[str, Tensor]
    said: str


def _faults(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    misshapen = [
        f"{k}: expected {list(own[k].shape)}, found {list(state[k].shape)}"
        for k in own
        if k in state and own[k].shape != state[k].shape
    ]
    return [
        f"{len(names)} {kind} ({_first(names)})"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]


def _readings(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[_Reading]:
    """State dicts whose keys lack a prefix that they have, or have one that the model has."""
    for prefix in _prefixes(state):
        inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        outside = {k: v for k, v in state.items() if not k.startswith(prefix)}
        if not outside.keys() & inside.keys():
            yield _Reading(outside | inside, f"without {prefix!r} in front of names")
        if outside:
            left = f"the other {len(outside)} entries left out ({_first(sorted(outside))})"
            yield _Reading(inside, f"by what is below {prefix!r}, {left}")
    for prefix in _prefixes(own):
        yield _Reading({prefix + k: v for k, v in state.items()}, f"below its {prefix!r}")


def _prefixes(names: Iterable[str]) -> list[str]:
    """First few modules of each name, as ``"model."`` and ``"model.net."``."""
    parts = [name.split(".")[:-1][:_DEPTH] for name in names]
    return sorted({".".join(one[:n]) + "." for one in parts for n in range(1, len(one) + 1)})


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
        raise ValueError(f"weights: {str(path)!r} {_why_refused(path)}") from None


def _why_refused(path: Path) -> str:
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # as above
        objects = []
    if not objects:
        return "is damaged or holds objects other than tensors; expected a state dict"
    named = _first(sorted(map(visible, objects)))
    return (
        f"holds objects other than tensors ({named}), which can run code when "
        "read. If you trust its source, save its weights again where the network's code can be "
        f"imported: model = torch.load({str(path)!r}, weights_only=False); "
        f"safetensors.torch.save_model(model, {str(path.with_suffix('.safetensors'))!r})"
    )


def _state_in(content: Any, path: Path) -> dict[str, Tensor]:
    found = content
    if isinstance(content, dict) and not _is_state(content):
        inside = [key for key, value in content.items() if _is_state(value)]
        usual = [key for key in _NESTED if isinstance(content.get(key), dict)]
        if len(inside) > 1 and not usual:
            several = _first([str(key) for key in inside])
            raise ValueError(
                f"weights: {str(path)!r} holds several state dicts ({several}); save the one that "
                "is meant by itself"
            )
        for key in (usual or inside)[:1]:
            found = content[key]
            if key not in _NESTED:
                _log.info("weights: taken from %r of %r", key, str(path))
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


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(torch.is_tensor, value.values()))


def _cleaned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop what wrappers and profilers have put into names and entries."""
    counters = [key for key in state if key.rpartition(".")[2] in _COUNTERS]
    if counters:
        _log.info("weights: %d counters of a profiler left out (%s)", len(counters), counters[0])
    kept = {key: value for key, value in state.items() if key not in counters}
    for wrapper in _WRAPPERS:
        # DataParallel wraps whole models only; torch.compile any part.
        if wrapper == "_orig_mod" or all(key.startswith(f"{wrapper}.") for key in kept):
            kept = {_without(wrapper, key): value for key, value in kept.items()}
    return kept


def _without(wrapper: str, name: str) -> str:
    first, *rest = name.split(".")
    if wrapper == "module":
        return ".".join(rest) if first == wrapper else name
    return ".".join(part for part in (first, *rest) if part != wrapper)


def _first(names: list[str]) -> str:
    more = [f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join(names[:_NAMED] + more)
