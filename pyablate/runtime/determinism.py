"""Determinism: no autocast or TF32 in a run; random generators and settings are restored."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from pyablate.runtime.locks import run_lock

_PRECISIONS = (
    *("mkldnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"),
    *("cudnn", "cudnn.conv", "cudnn.rnn", "cuda.matmul"),
)
"""Of ``torch.backends``, what has an ``fp32_precision``; each inherits from one before it."""

_given: ContextVar[torch.device | None] = ContextVar("default device of the caller", default=None)


@contextmanager
def undisturbed(*on: nn.Module | str | torch.device | None) -> Iterator[None]:
    """Work in plain arithmetic, and leave random generators and settings as they were.

    An ambient autocast or TF32 would round the clean run and all that is compared with it. All of
    this is the whole process's: other threads wait for their turn.

    Parameters
    ----------
    *on : nn.Module, str or torch.device, optional
        Models and devices that are worked with: of GPUs, the generators of these are restored.
    """
    with run_lock(), tensors_on_cpu(), _plain_arithmetic(gpus(on)), uncompiled():
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let functions of torch.compile run as they are written: compiled, they call no hooks."""
    if "torch._dynamo" in sys.modules:  # which takes seconds to import, and every torch.compile did
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


@contextmanager
def tensors_on_cpu() -> Iterator[None]:
    """Make tensors on the CPU where no device is named, whatever the caller's default is."""
    device = torch.get_default_device()
    if device.type == "cpu":
        yield
        return
    token = _given.set(device)
    try:
        with torch.device("cpu"):
            yield
    finally:
        _given.reset(token)


def callers_device() -> torch.device | None:
    """Tell where the caller's model makes its tensors; None where we do so too."""
    return _given.get()


@contextmanager
def float32_as(precision: str) -> Iterator[None]:
    """Let float32 arithmetic be "ieee" or "tf32" in all libraries for a while."""
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9
        with _float32_by_flags(allowed=precision == "tf32"):
            yield
        return
    backends: Any = torch.backends  # whose modules are classes of their own, unknown to mypy
    cudnn, changed = backends.cudnn, []
    of_libraries = {each: each.fp32_precision for each in (backends.mkldnn, cudnn)}
    of_cudnn = {part: part.fp32_precision for part in (cudnn.conv, cudnn.rnn)}
    flag, wanted = _older_flag(), "high" if precision == "tf32" else "highest"
    matmul, of_matmul = wanted, {}
    with suppress(RuntimeError):  # it contradicts the newer settings, and cannot be read at all
        matmul = torch.get_float32_matmul_precision()
    try:
        if matmul != wanted:  # else reading the older flag of matrix products is an error inside
            parts = backends.cuda.matmul, backends.mkldnn.matmul
            of_matmul = {part: part.fp32_precision for part in parts}
            torch.set_float32_matmul_precision(wanted)
        for owner in (backends, *(attrgetter(name)(backends) for name in _PRECISIONS)):
            before = owner.fp32_precision
            if before != precision:  # what inherits is as it should be by now, and goes on to
                owner.fp32_precision = precision
                changed.append((owner, before))
        # torch.export reads the older flag, an error where it contradicts the newer settings.
        cudnn.allow_tf32 = precision == "tf32"
        yield
    finally:
        cudnn.allow_tf32 = flag
        if matmul != wanted:
            torch.set_float32_matmul_precision(matmul)
        for owner, before in reversed(changed):
            owner.fp32_precision = before
        # torch.export has set both to what they inherited. Of mkldnn, the attribute sets the
        # general precision instead (torch 2.13); set_flags sets its own.
        for library, before in of_libraries.items():
            library.set_flags(_fp32_precision="none")
            if library.fp32_precision != before:
                library.set_flags(_fp32_precision=before)
        for part, before in (of_cudnn | of_matmul).items():  # which the flags have set
            part.fp32_precision = "none"
            if part.fp32_precision != before:
                part.fp32_precision = before


def _older_flag() -> bool:
    """Tell ``cudnn.allow_tf32``; where it contradicts the newer settings it cannot be read."""
    cudnn: Any = torch.backends.cudnn
    try:
        return bool(cudnn.allow_tf32)
    except RuntimeError:
        return {cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision} != {"tf32"}


@contextmanager
def _float32_by_flags(*, allowed: bool) -> Iterator[None]:
    matmul = torch.get_float32_matmul_precision()
    tf32 = torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = tf32


@contextmanager
def _plain_arithmetic(gpus: list[int]) -> Iterator[None]:
    cuda = torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext()
    with (
        torch.random.fork_rng(devices=gpus),
        torch.autocast("cpu", enabled=False),
        cuda,
        float32_as("ieee"),
        _fixed_algorithms(),
    ):
        yield


FIXED = (
    ("cudnn", "benchmark", False),
    ("cudnn", "deterministic", True),
    ("cuda.matmul", "allow_fp16_accumulation", False),
    ("cuda.matmul", "allow_fp16_reduced_precision_reduction", False),
    ("cuda.matmul", "allow_bf16_reduced_precision_reduction", False),
)
"""cuDNN chooses by rules: by the clock, it would round differently from run to run. Products in
half precision are added up in float32."""


@contextmanager
def _fixed_algorithms() -> Iterator[None]:
    fixed = [(attrgetter(name)(torch.backends), *rest) for name, *rest in FIXED]
    fixed = [each for each in fixed if hasattr(*each[:2])]  # older versions lack some
    before = [(owner, setting, _as_set(owner, setting)) for owner, setting, _ in fixed]
    try:
        for owner, setting, value in fixed:
            setattr(owner, setting, value)
        yield
    finally:
        for owner, setting, value in before:
            setattr(owner, setting, value)


def _as_set(owner: Any, setting: str) -> Any:
    """Return a setting as it would be set: some are read in two parts (torch 2.13)."""
    value, second = getattr(owner, setting), getattr(owner, f"{setting}_split_k", None)
    return value if second is None else (value, second)


def gpus(on: tuple[nn.Module | str | torch.device | None, ...]) -> list[int]:
    """Numbers of the GPUs among some devices and those that hold some models."""
    found = set()
    for each in on:
        if isinstance(each, nn.Module):
            held = next(iter([*each.parameters(), *each.buffers()]), None)
            each = None if held is None else held.device
        try:
            device = torch.device("cpu" if each is None else each)
        except (RuntimeError, TypeError):  # which is told where it is used
            continue
        if device.type == "cuda" and torch.cuda.is_available():
            found.add(torch.cuda.current_device() if device.index is None else device.index)
    return sorted(found)
