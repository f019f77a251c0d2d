"""Inputs, backends and tolerances for the tests of the native operations."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from pyablate import _native
from pyablate.ops import Activation, dispatch

# Set by test_cuda_on_cpu.py for a process in which the extension's CUDA backends run on the CPU.
CUDA_ON_CPU = os.environ.get("PYABLATE_CUDA_ON_CPU")


def _core() -> Any:
    if CUDA_ON_CPU is None:
        return _native.core
    spec = importlib.util.spec_from_file_location("pyablate._core", CUDA_ON_CPU)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CORE = _native.core = _core()

ACTIVATIONS = [
    Activation("identity"),
    Activation("relu"),
    Activation("hardtanh", -0.5, 0.7),
    Activation("hardtanh", 0.0, 6.0),
    Activation("leaky_relu", 0.1),
    Activation("leaky_relu", -0.2),
    Activation("elu", 1.3),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("silu"),
    Activation("hardswish"),
    Activation("hardsigmoid"),
    Activation("sigmoid"),
    Activation("tanh"),
]

# (delta, base): the combinations that the backends know; float16 on a processor is the reference's.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]

# How far results in low precision may be from the truth, by its last digit.
ROUGH = {torch.bfloat16: 1e-2, torch.float16: 1.25e-3}

# Families of operations and what their results may differ by: the largest error against the same
# formula in float64 is at most `factor` times that of plain PyTorch in the same dtype, plus `floor`
# units in the last place of the largest value. Decisions, counts and copies are exact.
TOLERANCES = {
    "elementwise": {"factor": 2, "floor": 4},
    "reduction": {"factor": 2, "floor": 8},
}

TWINS = [
    pytest.param("baseline", id="cpu-baseline"),
    pytest.param("avx2", id="cpu-avx2"),
    pytest.param("avx512", id="cpu-avx512"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.cuda),
]


@contextmanager
def using_backend(name: str) -> Iterator[torch.device]:
    """Use the kernels of one instruction set or of CUDA; skip, with the reason, if they are not.

    In a process whose CUDA backends run on the CPU, only the backend "cuda" can be asked for.
    """
    if CORE is None:
        pytest.skip(f"no native module: {_native.build_info()['why_not']}")
    if name == "cuda":
        if CUDA_ON_CPU is not None:
            with pytest.MonkeyPatch.context() as patch:  # ops sees tensors of the CPU
                patch.setattr(dispatch, "on_processor", lambda _: False)
                yield torch.device("cpu")
            return
        if not CORE.has_cuda:
            pytest.skip("the native module was built without CUDA")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device on this machine")
        yield torch.device("cuda")
        return
    before = CORE.build_info()["cpu_isa"]
    if not CORE.use_isa(name):
        pytest.skip(f"this processor has no {name}")
    try:
        yield torch.device("cpu")
    finally:
        CORE.use_isa(before)


@contextmanager
def without_native() -> Iterator[None]:
    """Run pyablate.ops on the reference, as where the extension is missing."""
    _native.core = None
    try:
        yield
    finally:
        _native.core = CORE


def on_reference(op: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """Call an operation of pyablate.ops on the PyTorch reference."""
    with without_native():
        return op(*args, **options)


def on_device(
    op: Callable[..., Tensor], device: torch.device, *args: Any, **options: Any
) -> Tensor:
    """Call an operation with all its tensors on ``device``; the result comes back to the CPU."""
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    named = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    return op(*moved, **named).cpu()


def index(values: Any) -> Tensor:
    """Return an int32 vector."""
    return torch.as_tensor(values, dtype=torch.int32)


def random_index(length: int, high: int, low: int = 0) -> Tensor:
    """Return ``length`` random indices in [low, high)."""
    return torch.randint(low, high, (length,), dtype=torch.int32)


def random_maps(*shape: int, dtype: torch.dtype = torch.float32, zeros: float = 0.0) -> Tensor:
    """Return normal values, a share ``zeros`` of them set to zero."""
    values = torch.randn(*shape)
    return torch.where(torch.rand(*shape) < zeros, 0.0, values).to(dtype)


def _sliced(x: Tensor) -> Tensor:
    wide = torch.full((x.shape[0] * 2, *x.shape[1:]), torch.nan, dtype=x.dtype)
    wide[::2] = x
    return wide[::2]


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(1, -1).contiguous().transpose(1, -1)


def _expanded(x: Tensor) -> Tensor:
    return x[:, :1].clone().expand(x.shape)


def _offset(x: Tensor) -> Tensor:
    memory = torch.full((x.numel() + 3,), torch.nan, dtype=x.dtype)
    memory[3:] = x.flatten()
    return memory[3:].view(x.shape)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": _channels_last,
    "sliced": _sliced,
    "transposed": _transposed,
    "expanded": _expanded,
    "offset": _offset,
}


def assert_near(result: Tensor, plain: Tensor, truth: Tensor, family: str) -> None:
    """Compare with float64; TOLERANCES says how far plain PyTorch's own error may be exceeded."""
    rule = TOLERANCES[family]
    assert result.shape == truth.shape
    assert result.dtype == plain.dtype
    assert torch.isfinite(result).all()
    if truth.numel() == 0:
        return
    truth = truth.double()
    unit = torch.finfo(result.dtype).eps * max(float(truth.abs().max()), 1e-6)
    error = float((result.double() - truth).abs().max())
    allowed = rule["factor"] * float((plain.double() - truth).abs().max()) + rule["floor"] * unit
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
