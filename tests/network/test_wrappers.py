"""Networks that are wrapped, compiled or declared unusually: the same units, by the same names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.oracle import check
from torch import Tensor, distributed, nn

import pyablate as pa
from pyablate.network.copies import copied

LAYERS = ["body.conv", "body.bn", "body.act", "body"]


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class AnyArguments(Plain):
    def forward(self, *args: Tensor) -> Tensor:
        return super().forward(*args)


class Options(Plain):
    def forward(self, x: Tensor, *, flag: bool = False, **_: Any) -> Tensor:
        return super().forward(x)


def undescribed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate without telling what was decorated."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return run


class Decorated(Plain):
    @undescribed
    def forward(self, x: Tensor) -> Tensor:
        return Plain.forward(self, x)


class CompiledForward(Plain):
    @torch.compile(backend="eager")
    def forward(self, x: Tensor) -> Tensor:
        return Plain.forward(self, x)


def made(kind: type[nn.Module] = Plain) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind()
        nn.init.normal_(model.head.weight)
    return model.eval()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def with_compiled_body(model: nn.Module) -> nn.Module:
    model.body = compiled(model.body)
    model(torch.randn(3, 1, 8, 8))  # which compiles it
    return model


def with_compiled_activation(model: nn.Module) -> nn.Module:
    model.body.act = compiled(model.body.act)
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    model.body.compile(backend="eager")
    model(torch.randn(3, 1, 8, 8))
    return model


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "any_arguments": lambda: made(AnyArguments),
    "options": lambda: made(Options),
    "decorated": lambda: made(Decorated),
    "compiled_forward": lambda: made(CompiledForward),
    "data_parallel": lambda: nn.DataParallel(made()),
    "compiled": lambda: compiled(made()),
    "compiled_body": lambda: with_compiled_body(made()),
    "compiled_activation": lambda: with_compiled_activation(made()),
    "compiled_twice": lambda: compiled(with_compiled_body(made())),
    "compiled_in_place": lambda: compiled_in_place(made()),
    "parallel_of_compiled": lambda: nn.DataParallel(compiled(made())),
    "compiled_parallel": lambda: compiled(nn.DataParallel(made())),
}


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(20, 1, 8, 8, generator=draw) + torch.randn(20, 1, 1, 1, generator=draw)
    return images, torch.arange(20) % 4


def check_like_plain(model: nn.Module) -> None:
    images, labels = data()
    names = [name for name, _ in model.named_modules()]
    assert [site.name for site in pa.sites(model, images[:1])] == LAYERS
    result = check(model, (images, labels))
    plain = pa.ablate(made(), (images, labels), progress=False)
    assert list(result.units["label"]) == list(plain.units["label"])
    assert (result.predictions() == plain.predictions()).all()
    assert result.flips.image.size > 5
    assert "replay" not in result.strategy.values()
    replayed = pa.ablate(model, (images, labels), strategy="replay", progress=False)
    assert (replayed.predictions() == plain.predictions()).all()
    assert [name for name, _ in model.named_modules()] == names  # the caller's is as it was


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_are_seen_through(name: str) -> None:
    check_like_plain(WRAPPED[name]())


@contextmanager
def process_group(place: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def test_distributed_data_parallel_is_seen_through(tmp_path: Path) -> None:
    with process_group(tmp_path / "group"):
        check_like_plain(nn.parallel.DistributedDataParallel(made()))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_part_that_is_shared_stays_shared() -> None:
    model = made()
    model.again = model.body = compiled(model.body)
    found = copied(model)
    assert found.again is found.body
    assert type(found.body) is Body
    assert model.again is model.body
