"""What this machine was measured to do: the figures that plans and precisions rest on."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyablate import ops
from pyablate.engine import int8_conv
from pyablate.io.remembered import forget, recall, remember
from pyablate.ops.activations import ActivationName
from pyablate.runtime.chunking import SLICE
from pyablate.runtime.out_of_memory import ERRORS, is_shortage
from pyablate.runtime.processor import processor

LONG_ENOUGH = 0.2
"""Seconds that one measurement takes: several times the turn of a process on a busy machine."""

_METHOD = "3"
"""Changes with how rates are measured: what was kept of another method is no longer read."""

FINE = 1e-5
"""Seconds between two ticks of a clock that can measure runs of a millisecond."""

WARM_UPS, ROUNDS, LAUNCHES = 3, 3, 20
"""On a GPU: runs before anything is timed, and how many times how many of them are."""


def _once(measure: Callable[..., float]) -> Any:
    """Measure with the same arguments once: in this process, and on this machine."""

    @functools.cache
    @functools.wraps(measure)
    def rate(device: str, *given: object) -> float:
        machine = _machine(device)
        name = " ".join(map(str, (measure.__name__, _METHOD, device, *given)))
        known = recall(machine, name)
        if known is None:
            known = measure(device, *given)
            remember(machine, name, known)
        return known

    return rate


def _machine(device: str) -> str:
    """Tell apart where rates differ: the processor as torch sees it, or the GPU."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cores, threads = os.cpu_count(), torch.get_num_threads()
    kind = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{kind}, {threads} threads on {cores} cores, torch {torch.__version__}"


def measure_again() -> None:
    """Forget what is known of all machines, so that the next calls measure."""
    forget()
    for rate in (_convolution_rate, _matrix_rate, _unit_rate, _change_rate, _difference_rate):
        rate.cache_clear()


def convolution_rate(device: str, dtype: torch.dtype, *, alone: bool = False) -> float:
    """Operations per second of a 64 -> 64 channel 3 x 3 convolution, channels last.

    Parameters
    ----------
    device : str
        Where.
    dtype : torch.dtype
        Of images and weights; ``torch.int8`` for 8-bit integers.
    alone : bool
        On one thread of a processor. Threads wait for each other, and on a busy machine so long
        that all arithmetic looks alike: rates that are to be compared are measured like this.

    Returns
    -------
    float
        The best of many short runs; 0 where the device cannot do it. Measured once on a machine
        (:mod:`pyablate.io.remembered`), unless memory is too short for as much work as it should
        be.
    """
    return _as_memory_allows(
        _images(device), lambda images: _convolution_rate(device, dtype, alone, images)
    )


@_once
def _convolution_rate(device: str, dtype: torch.dtype, alone: bool, images: int) -> float:
    x = torch.ones(images, 64, 14, 14, device=device)
    w = torch.ones(64, 64, 3, 3, device=device)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    try:
        with torch.no_grad(), _one_thread() if alone else nullcontext():
            seconds = best(_convolution(x, w, dtype), device)
    except RuntimeError as error:
        if is_shortage(error):
            raise  # another time there may be enough
        return 0.0
    return 2.0 * x.numel() * 64 * 9 / seconds


def _as_memory_allows(work: int, measure: Callable[[int], float]) -> float:
    """Measure with this much work, or with half of it and so on as long as memory is short."""
    while True:
        try:
            return measure(work)
        except ERRORS as error:
            if work == 1 or not is_shortage(error):
                raise
        work //= 2


def _images(device: str) -> int:
    """Images of the convolution: a GPU needs 50 GFLOP to be busy for longer than a launch takes."""
    return 4096 if device.startswith("cuda") else 64


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _convolution(x: Tensor, w: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    if dtype != torch.int8:
        x, w = x.to(dtype), w.to(dtype)
        return lambda: functional.conv2d(x, w, padding=1)
    if x.device.type != "cpu" or not int8_conv.available():
        raise RuntimeError("no convolutions in 8-bit integers here")
    filters = int8_conv.prepare(w, ([1, 1], [1, 1], [1, 1]), list(x.shape))
    quantized = x.to(torch.uint8)
    return lambda: int8_conv.convolve(quantized, filters)


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a linear layer of 64 -> 256 features on a slice of pairs.

    Its result is as large as the widest delta of a slice: with so few operations per number,
    caches count as much as arithmetic. On one core with AVX2 it is half the rate of convolutions.
    """
    return _as_memory_allows(_times(device), lambda times: _matrix_rate(device, dtype, times))


@_once
def _matrix_rate(device: str, dtype: torch.dtype, times: int) -> float:
    x = torch.ones(_rows(dtype) * times, 64, device=device, dtype=dtype)
    w = torch.ones(_WIDTH, 64, device=device, dtype=dtype)
    with torch.no_grad():
        seconds = best(lambda: functional.linear(x, w), device)
    return 2.0 * x.numel() * len(w) / seconds


_WIDTH = 256
"""Features of the slices that linear layers and differences are measured on."""


def _rows(dtype: torch.dtype) -> int:
    return SLICE // (_WIDTH * dtype.itemsize)


def unit_rate(device: str) -> float:
    """Operations per second of the first convolution after a unit (``ops.unit_delta``)."""
    return _as_memory_allows(_times(device), lambda times: _unit_rate(device, times))


@_once
def _unit_rate(device: str, times: int) -> float:
    maps = torch.ones(16, 16, 14, 14, device=device)
    filters = torch.ones(16, 3, 3, 64, device=device)
    pairs = 256 * times
    channel, pair = (torch.arange(n, dtype=torch.int32, device=device) for n in (16, pairs))
    image, column = pair % 16, pair // 16 % 16

    def work() -> Tensor:
        return ops.unit_delta(maps, filters, channel, image, column, padding=1)

    return 2.0 * work().numel() * 9 / best(work, device)


def change_rate(
    device: str, dtype: torch.dtype = torch.bfloat16, activation: ActivationName = "relu"
) -> float:
    """Bytes per second of differences read and written by ``ops.delta_activation``.

    On a CPU they lie in a cache mostly, so this is more than memory gives.
    """
    return _as_memory_allows(
        _times(device), lambda times: _change_rate(device, dtype, activation, times)
    )


@_once
def _change_rate(device: str, dtype: torch.dtype, activation: ActivationName, times: int) -> float:
    delta, base, image = _slice(device, dtype, times)
    function = ops.Activation(activation)

    def work() -> Tensor:
        return ops.delta_activation(base, delta, image, function, out=delta)

    return 2.0 * delta.numel() * delta.itemsize / best(work, device)


def difference_rate(device: str, dtype: torch.dtype) -> float:
    """Bytes per second of differences read and written by the rule that holds for every operator.

    ``f(base + delta) - f(base)`` of a layer norm: seven passes of PyTorch, a tenth of the rate of a
    native operation.
    """
    return _as_memory_allows(_times(device), lambda times: _difference_rate(device, dtype, times))


@_once
def _difference_rate(device: str, dtype: torch.dtype, times: int) -> float:
    delta, base, image = _slice(device, dtype, times)
    delta, base = (t.unflatten(1, (-1, _WIDTH)) for t in (delta, base))
    clean, chosen = functional.layer_norm(base, (_WIDTH,)), image.long()

    def work() -> Tensor:
        after, before = functional.layer_norm(base[chosen] + delta, (_WIDTH,)), clean[chosen]
        return torch.where(after == before, torch.zeros_like(after), after - before)

    with torch.no_grad():
        seconds = best(work, device)
    return float(2 * delta.numel() * delta.itemsize / seconds)


def _slice(device: str, dtype: torch.dtype, times: int) -> tuple[Tensor, Tensor, Tensor]:
    """Differences ``[P, 4096]`` of pairs, clean values of four images, which image each is of."""
    pairs = 512 * times
    delta = torch.ones(pairs, 4096, device=device, dtype=dtype)
    base = torch.ones(4, 4096, device=device, dtype=_clean(dtype))
    return delta, base, torch.arange(pairs, dtype=torch.int32, device=device) * 4 // pairs


def _clean(dtype: torch.dtype) -> torch.dtype:
    """Precision of the clean run beside differences of this one."""
    return torch.promote_types(dtype, torch.float32)


def _times(device: str) -> int:
    """How many times the work that occupies a processor a GPU is given."""
    return 64 if device.startswith("cuda") else 1


def best(work: Callable[[], Tensor], device: str) -> float:
    """Seconds of the fastest of many runs: others may be at work, and a few runs hit upon them."""
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            return _by_events(work)
    work()  # the first run fetches memory and prepares
    clock = undisturbed_clock(device)
    fastest, end = float("inf"), clock() + LONG_ENOUGH
    begin = 0.0
    while begin < end:
        begin = clock()
        work()
        fastest = min(fastest, clock() - begin)
    return fastest


def undisturbed_clock(device: str) -> Callable[[], float]:
    """Return the clock that others' work moves least.

    Where torch works on this thread alone, the thread's own time: on a busy machine every run of
    some milliseconds is interrupted, the fastest as well, and half a rate would be kept for good.
    """
    fine = time.get_clock_info("thread_time").resolution < FINE
    alone = device == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if fine and alone else time.perf_counter


def _by_events(work: Callable[[], Tensor]) -> float:
    """Seconds of a run on the current GPU by its own clock: waits would be timed too."""
    for _ in range(WARM_UPS):
        work()
    found = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(LAUNCHES):
            work()
        end.record()
        end.synchronize()
        found.append(float(begin.elapsed_time(end)) / 1e3 / LAUNCHES)
    return min(found)
