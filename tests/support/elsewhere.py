"""A device that is not there: CPU tensors that behave as if they lay on a GPU.

Mixing them with host tensors is an error, as it would be there, and whatever the host would have
to wait for is noted with the line of ours that asked for it. Operations give their true results.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

import pyablate
from pyablate import ops

DEVICE = torch.device("xla:0")
"""A kind of device of which this PyTorch knows the name only, so that all calls come to us."""

OURS = str(Path(pyablate.__file__).parent)
aten = torch.ops.aten

# The size of the result, or a number for the host: CUDA waits in all of these.
WAITING = {
    aten._local_scalar_dense,
    aten._unique2,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.repeat_interleave,
    aten.unique_consecutive,
    aten.unique_dim,
}
MASKS = (torch.bool, torch.uint8)
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


@dataclass(frozen=True)
class Wait:
    """The host waits for the device."""

    operator: str
    place: str  # function of ours, innermost


@dataclass
class Notes:
    """What happened on the device, in order: names of operators that were launched, and waits."""

    events: list[str | Wait] = field(default_factory=list)
    tape: list[tuple[Any, Any, Any, Any]] | None = None  # what is being recorded

    @property
    def waits(self) -> list[Wait]:
        """Only the waits."""
        return [event for event in self.events if isinstance(event, Wait)]


class Elsewhere(Tensor):
    """A tensor that says it is on the device; what it holds is in a CPU tensor inside."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        # As PyTorch's own FakeTensor: "meta" below, for which nothing is ever looked up.
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @property
    def device(self) -> torch.device:
        """The device."""
        return DEVICE

    def new_tensor(self, data: Any, **_: Any) -> Tensor:
        """Numbers from the host."""
        return torch.tensor(data, dtype=self.dtype, device=DEVICE)

    def tolist(self) -> Any:
        """Numbers for the host."""
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of on_device()")


def there(value: Any) -> Any:
    """Put tensors on the device, in whatever lists and mappings they are."""

    def put(item: Any) -> Any:
        plain = isinstance(item, Tensor) and not isinstance(item, Elsewhere)
        return Elsewhere(item) if plain else item

    return tree_map(put, value)


def here(value: Any) -> Any:
    """Take them back, noting nothing."""
    return tree_map(lambda item: item.inner if isinstance(item, Elsewhere) else item, value)


def moved(module: nn.Module) -> nn.Module:
    """Put a network's weights on the device."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            held.update({name: there(None if t is None else t.data) for name, t in held.items()})
    return module


class _Device(TorchDispatchMode):
    """Runs every operator on what is inside, as the device would."""

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = _tensors((args, kwargs))
        away = any(isinstance(tensor, Elsewhere) for tensor in tensors)
        asked = kwargs.get("device")
        goes = away if asked is None else torch.device(asked).type == DEVICE.type
        if not away and not goes:
            return func(*args, **kwargs)
        self._note(func, args, kwargs, tensors, goes)
        if goes and asked is not None:
            kwargs["device"] = "cpu"
        given, named = here((args, kwargs))
        result = func(*given, **named)
        if self.notes.tape is not None:
            self.notes.tape.append((func, given, named, result))
        if not goes or not isinstance(result, (Tensor, list, tuple)):
            return result
        wrapped = there(result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if away else wrapped

    def _note(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], goes: bool) -> None:
        packet, crosses, waits = func.overloadpacket, False, False
        mixed = any(not isinstance(tensor, Elsewhere) and tensor.ndim for tensor in tensors)
        if packet in (aten._to_copy, aten.copy_):
            source, target = (args[1], args[0]) if packet is aten.copy_ else (args[0], None)
            goes = goes if target is None else isinstance(target, Elsewhere)
            crosses = isinstance(source, Elsewhere) != goes
            # Whoever reads a copy on the host has to wait for it, whatever was asked for.
            unasked = goes and kwargs.get("non_blocking") and getattr(source, "pinned", False)
            waits = crosses and not unasked
        elif packet in INDEXING:
            crosses = mixed  # a list of rows on the host is copied first
            waits = crosses or any(isinstance(t, Tensor) and t.dtype in MASKS for t in args[1])
        elif mixed:
            raise RuntimeError(f"{func}: tensors on two devices, at {_place()}")
        else:
            waits = packet in WAITING and kwargs.get("output_size") is None
        if self.notes.tape is not None and (waits or crosses):
            raise RuntimeError(f"{func}: not allowed while recording, at {_place()}")
        name = packet.__name__
        self.notes.events.append(Wait(name, _place()) if waits else name)


class Recorder:
    """CUDA graphs of the device: a replay does the same on the same memory, and no Python."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.works = True
        self.recordings = self.replays = 0

    def record(self, run: Any, few: Any) -> Any:
        """As :meth:`pyablate.engine.cuda_graph.Recorder.record`."""
        few()
        tape: list[Any] = []
        self.notes.tape = tape
        try:
            change = run()
        finally:
            self.notes.tape = None
        self.recordings += 1
        _forget(tape)
        replay = functools.partial(self._replay, tape)
        weakref.finalize(replay, _forget, tape)  # its memory goes to the next recording
        return replay, change

    def _replay(self, tape: list[Any]) -> None:
        self.replays += 1
        self.notes.events.append("replay")
        for func, given, named, result in tape:
            again = func(*given, **named)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _forget(tape: list[Any]) -> None:
    """Spoil what was computed while recording, as on a GPU nothing is."""
    known: set[int] = set()
    made: set[int] = set()
    for _, given, named, result in tape:
        known.update(_memory(t) for t in _tensors((given, named)) if _memory(t) not in made)
        for tensor in _tensors(result):
            if _memory(tensor) not in known:
                made.add(_memory(tensor))
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> list[Tensor]:
    return [item for item in tree_flatten(value)[0] if isinstance(item, Tensor)]


def _place() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            return frame.f_code.co_qualname
        frame = frame.f_back
    return "?"


@contextmanager
def on_device(monkeypatch: Any) -> Iterator[Notes]:
    """Let there be a device; native operations on it are one launch each."""
    notes = Notes()
    tensor = torch.tensor

    def from_host(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        made = tensor(data, *args, **kwargs)
        if device is None or torch.device(device).type != DEVICE.type:
            return made
        notes.events.append(Wait("tensor", _place()))
        return there(made)

    def pinned(self: Tensor) -> Tensor:
        copy = self.clone()
        copy.pinned = True
        return copy

    def launched(op: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            notes.events.append(op.__name__)
            given, named = here((args, kwargs))
            result = op(*given, **named)
            if notes.tape is not None:
                notes.tape.append((op, given, named, result))
            return there(result)

        return run

    with monkeypatch.context() as patch, _Device(notes):
        patch.setattr(torch, "tensor", from_host)
        patch.setattr(torch.Tensor, "pin_memory", pinned)
        for name in ops.__all__:
            op = getattr(ops, name)
            if callable(op) and not isinstance(op, type):
                patch.setattr(ops, name, launched(op))
        yield notes
