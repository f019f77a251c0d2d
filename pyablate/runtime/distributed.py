"""Distributed runs: ranks, their parts of the images, and what they broadcast and reduce.

Every process reads its own images and writes its own blocks to the folder they share; what goes
over the wire is where to begin, and sums of activations where an intervention needs means.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

MODULUS = 1 << 256


T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long one process waits for another: the slowest may have much left to do."""


@dataclass(frozen=True)
class Ranks:
    """The processes of one run: the number of this one, from 0, and how many there are."""

    number: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process opens the folder, reports and writes the result."""
        return self.number == 0

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """Return the consecutive items that are this process's own."""
        own = self.range_part(len(items))
        return items[own.start : own.stop]

    def range_part(self, count: int) -> range:
        """Return which of ``count`` things are this process's own."""
        return range(count * self.number // self.count, count * (self.number + 1) // self.count)

    def tell(self, value: Any) -> Any:
        """Give what the first process says to all; JSON."""
        if self.count == 1:
            return value
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(text)], device=_place())
        dist.broadcast(length, 0)
        held = torch.zeros(int(length), dtype=torch.uint8, device=_place())
        if self.first:
            held.copy_(text)
        dist.broadcast(held, 0)
        return json.loads(held.cpu().numpy().tobytes())

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor, in place, by its sum over the processes."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """Take the largest of each of some numbers over the processes."""
        if self.count == 1:
            return list(numbers)
        held = torch.tensor(list(numbers), device=_place())
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return [int(number) for number in held.tolist()]

    def add_hashes(self, own: int) -> int:
        """Sum hashes of images over the processes."""
        if self.count == 1:
            return own
        digits = torch.frombuffer(bytearray(own.to_bytes(32, "big")), dtype=torch.uint8)
        table = torch.zeros(self.count, 32, dtype=torch.uint8, device=_place())
        table[self.number] = digits.to(table.device)
        dist.all_reduce(table)  # each row is one process's, the others add zeros
        rows = table.cpu().numpy()
        return sum(int.from_bytes(row.tobytes(), "big") for row in rows) % MODULUS

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Wait for the other processes, calling ``meanwhile`` now and then."""
        if self.count == 1:
            return
        arrived = dist.all_reduce(torch.zeros(1, device=_place()), async_op=True)
        assert arrived is not None
        while not arrived.is_completed():
            meanwhile()
            time.sleep(0.1)
        arrived.wait()


@contextmanager
def taking_part(distributed: bool, device: str | torch.device | None) -> Iterator[Ranks]:
    """Find this process's place among those of `torchrun`; one alone unless ``distributed``.

    Where the work is done on a GPU they talk by NCCL, elsewhere by gloo.
    """
    if not distributed:
        yield Ranks()
        return
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if "WORLD_SIZE" not in os.environ:
        raise RuntimeError("distributed: expected to be started by torchrun; WORLD_SIZE is not set")
    gpu = device is not None and torch.device(device).type == "cuda"
    store, rank, count = next(dist.rendezvous("env://", timeout=PATIENCE))  # type: ignore[attr-defined]
    # torchrun's store outlives a restart: under the keys of the last attempt stand the addresses of
    # processes that are gone, and who reads them too early waits for those.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=dist.PrefixStore(f"attempt {attempt}", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=count,
        timeout=PATIENCE,
    )
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def own_device(distributed: bool, device: str | torch.device | None) -> str | torch.device | None:
    """Give each process of a machine a GPU of its own, where ``"cuda"`` was asked for."""
    if distributed and device is not None and str(device) == "cuda":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


def started_by_torchrun() -> bool:
    """Whether this is one of several processes that `torchrun` or the like started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def is_first() -> bool:
    """Whether this process reports for all."""
    return os.environ.get("RANK", "0") == "0" or not started_by_torchrun()


def _place() -> torch.device:
    """Where tensors must lie that go over the wire."""
    only_gpu = "gloo" not in str(dist.get_backend_config())
    return torch.device("cuda", torch.cuda.current_device()) if only_gpu else torch.device("cpu")
