"""Determinism: no autocast or TF32 in a run; random generators and settings are restored."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from pyablate.runtime.locks import run_lock


@contextmanager
def undisturbed() -> Iterator[None]:
    """Work in plain arithmetic, and leave random generators and settings as they were.

    An ambient autocast or TF32 would round the clean run and all that is compared with it. All of
    this is the whole process's: other threads wait for their turn.
    """
    with run_lock(), _plain_arithmetic(), uncompiled():
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
def _plain_arithmetic() -> Iterator[None]:
    matmul = torch.get_float32_matmul_precision()
    tf32 = torch.backends.cudnn.allow_tf32
    cuda = torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext()
    with torch.random.fork_rng(), torch.autocast("cpu", enabled=False), cuda:
        try:
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)
            torch.backends.cudnn.allow_tf32 = tf32
