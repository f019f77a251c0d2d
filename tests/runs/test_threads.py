"""Threads of one process do not disturb each other; an interrupt is heard within a second."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from support import networks
from support.runs import same
from support.shelled import ENVIRONMENT
from support.state import state_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyablate as pa
from pyablate.cli.model_specs import load_model
from pyablate.engine import float64
from pyablate.network.sites import copied
from pyablate.runtime import chunking
from pyablate.runtime.locks import run_lock


def together(works: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run functions in threads that begin at the same moment; raise what one of them raised."""
    begin = threading.Barrier(len(works))
    results: list[Any] = [None] * len(works)
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            begin.wait()
            results[number] = works[number]()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


def run_of(name: str, **options: Any) -> Callable[[], pa.AblationResult]:
    model, images, labels = networks.network(name)
    return lambda: pa.ablate(model, (images, labels), audit=20, progress=False, **options)


def test_runs_in_threads_give_what_single_runs_give():
    works = [
        run_of("residual", precision="bf16", intervention="noise:3"),
        run_of("vit", precision="fp32", intervention="mean"),
        run_of("pooling", precision="fp64", intervention="resample:1"),
        run_of("routed", intervention="zero"),  # cannot be captured: by replay
    ]
    alone = [work() for work in works]
    for result, expected in zip(together(works), alone, strict=True):
        assert same(result, expected)


def test_one_model_in_several_threads():
    model, images, _ = networks.network("residual")
    before = state_of(model)
    sites = pa.sites(model, images[:1])

    def survey() -> bool:
        return all(pa.sites(model, images[:1]) == sites for _ in range(20))

    ablate = run_of("residual", layers=["body.2"])
    oracle = run_of("residual", layers=["body.2"], strategy="replay")
    expected = ablate()
    first, second, surveyed, again = together([ablate, oracle, survey, ablate])
    assert surveyed
    assert same(first, expected)
    assert same(again, expected)
    assert np.array_equal(second.flips.image, expected.flips.image)
    assert state_of(model) == before


def test_copies_carry_no_hooks_of_other_threads():
    model, images, _ = networks.network("residual")

    def hooks() -> int:
        return sum(len(m._forward_hooks) for _ in range(30) for m in copied(model).modules())

    counted, _ = together([hooks, lambda: [pa.sites(model, images[:1]) for _ in range(30)]])
    assert counted == 0


def test_what_belongs_to_the_process_comes_back(tmp_path):
    pytest.importorskip("torch.export.pt2_archive", reason="torch 2.6 had another archive")
    model, images, _ = networks.network("mlp")
    path = tmp_path / "mlp.pt2"
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, path)

    def state() -> dict[str, Any]:
        return {
            "matmul": torch.get_float32_matmul_precision(),
            "tf32": torch.backends.cudnn.allow_tf32,
            "random": torch.random.get_rng_state().tolist(),
            "stderr": sys.stderr,
            "filters": list(warnings.filters),
            "path": list(sys.path),
            "environment": dict(os.environ),
            "autocast": torch.is_autocast_enabled("cpu"),
        }

    set_before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    works = [run_of("mlp"), run_of("residual", layers=["body.2"])]  # building them draws numbers
    try:
        before = state()
        together([*works, lambda: load_model(str(path)), lambda: load_model(str(path))])
        assert state() == before
    finally:
        torch.set_float32_matmul_precision(set_before)


def test_a_run_inside_a_run_of_the_same_thread_goes_on():
    model, images, labels = networks.network("mlp")
    inner: list[pa.AblationResult] = []

    def report(done: int, total: int, layer: str) -> None:
        if not inner:
            inner.append(pa.ablate(model, (images, labels), progress=False))

    outer = pa.ablate(model, (images, labels), progress=report)
    assert same(outer, inner[0])


def test_a_forked_process_does_not_wait_for_threads_it_has_not():
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with run_lock():
            held.set()
            release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks in threads, meant here
        child = os.fork()
    if child == 0:
        with run_lock():
            os._exit(7)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


# --- interrupts -----------------------------------------------------------------------------------


class Costliest(TorchDispatchMode):
    """Operations of the costliest convolution or matrix product, those in float64 twice."""

    most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket._qualified_op_name
        if name in ("aten::convolution", "aten::addmm", "aten::mm", "aten::bmm"):
            place = {"aten::addmm": 2}.get(name, 1)
            inner = args[1][0].numel() if name == "aten::convolution" else args[place].shape[-2]
            self.most = max(self.most, 2 * result.numel() * inner * result.element_size() // 4)
        return result


@pytest.mark.parametrize("strategy", ["auto", "replay"])
@pytest.mark.parametrize("intervention", ["zero", "mean", "resample"])
def test_no_call_takes_long(monkeypatch, intervention, strategy):
    torch.manual_seed(0)
    model = nn.Sequential(
        *[nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()],
        *[nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)],
    )
    images, labels = torch.randn(40, 2, 12, 12), torch.randint(3, (40,))
    limit = 900_000  # eight images, of which a run looks at first; at most ten of the batch of 40

    def run() -> tuple[pa.AblationResult, int]:
        with Costliest() as seen:
            result = pa.ablate(
                model,
                (images, labels),
                intervention=intervention,
                strategy=strategy,
                batch_size=40,
                memory=200_000,  # few pairs at a time; blocks stay as asked for
                precision="fp32",
                audit=60,
                progress=False,
            )
        return result, seen.most

    monkeypatch.setattr(float64, "DOUBLE_SLICE", 20_000)
    plain, most = run()
    assert most > limit
    monkeypatch.setattr(chunking, "LONGEST", limit)
    short, most = run()
    assert most <= limit
    assert same(plain, short)


def test_linear_maps_of_weights_alone_are_left_whole():
    """As the position bias of some transformers: no image, nothing to cut."""

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 4))
            self.relu, self.map, self.head = nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.relu(x.flatten(1)) + self.map(self.table))

    images, labels = torch.randn(6, 4), torch.arange(6) % 3
    result = pa.ablate(Bias(), (images, labels), progress=False)
    assert "replay" not in result.strategy.values()


def test_linear_maps_whose_bias_has_a_row_per_image_are_left_whole(monkeypatch):
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 5)
            self.weight = nn.Parameter(torch.randn(5, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.first(x).relu(), self.weight, self.second(x))

    torch.manual_seed(0)
    data = torch.randn(12, 6), torch.arange(12) % 5
    plain = pa.ablate(model := Rows(), data, "first", progress=False)
    monkeypatch.setattr(chunking, "LONGEST", 50)
    assert same(plain, pa.ablate(model, data, "first", progress=False))
    assert "replay" not in plain.strategy.values()


_INTERRUPTED = """
import signal, sys, time, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
import torch
from torch import nn
import pyablate as pa
torch.set_num_threads(1)
{work}
try:
    work(lambda: print("working", flush=True))
except KeyboardInterrupt:
    print("interrupted", time.process_time(), flush=True)
"""

_WORKS = {
    "runs": """
model = nn.Sequential(
    nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
    nn.MaxPool2d(2), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
x, y = torch.randn(32, 3, 40, 40), torch.randint(10, (32,))
def work(said):
    while True:
        pa.ablate(model, (x, y), progress=lambda *_: said(), audit=0)
""",
    "a wait for another run": """
from pyablate.runtime.locks import run_lock
def hold():
    with run_lock():
        time.sleep(30)
def work(said):
    threading.Thread(target=hold, daemon=True).start()
    time.sleep(0.2)
    said()
    with run_lock():
        pass
""",
}


def _used(process: int) -> float:
    """Seconds of the processor that a process has had."""
    times = psutil.Process(process).cpu_times()
    return times.user + times.system


@pytest.mark.parametrize("kind", _WORKS)
def test_an_interrupt_returns_within_a_second(kind):
    """Of the processor's time, which no other work on the machine can stretch."""
    source = _INTERRUPTED.replace("{work}", _WORKS[kind])
    started = subprocess.Popen(
        [sys.executable, "-c", source],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    with started as child:
        try:
            assert child.stdout is not None
            said = child.stdout.readline()
            time.sleep(0.7)
            sent, began = _used(child.pid), time.monotonic()
            child.send_signal(signal.SIGINT)
            while said == "working\n":
                said = child.stdout.readline()
            waited = time.monotonic() - began
        finally:
            child.kill()
    word, _, used = said.partition(" ")
    assert word == "interrupted"
    assert float(used) - sent < 1.0
    assert waited < 20.0  # whoever waits uses no processor; the other run would take 30 seconds


@pytest.mark.parametrize("becomes", ["nothing", "an error"])
def test_an_interrupt_that_tracing_swallows_is_raised_after_it(becomes):
    """As it happens in callbacks of weak references, and in torch's C++."""

    class Swallowing(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.compiler.is_compiling():
                try:
                    signal.raise_signal(signal.SIGINT)
                except KeyboardInterrupt as interrupt:
                    if becomes == "an error":
                        raise RuntimeError("in other words") from interrupt
            return super().forward(x)

    model = Swallowing(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pa.ablate(model, (torch.randn(6, 4), torch.arange(6) % 3), progress=False)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


_LARGE = """
import random, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import torch
from torch import nn
import pyablate as pa
torch.set_num_threads(1)
torch.manual_seed(0)
# What VGG-16 has at its widest is a gigaflop per image and convolution; so have these.
model = nn.Sequential(
    nn.Conv2d(3, 256, 5, stride=2, padding=2), nn.ReLU(),
    nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)).eval()
images, labels = torch.randn(120, 3, 56, 56), torch.randint(10, (120,))
weights = [parameter.clone() for parameter in model.parameters()]
for intervention in {interventions!r}:
    try:
        print("begun", flush=True)
        pa.ablate(
            model, (images, labels), intervention=intervention, batch_size=120, progress=False
        )
    except KeyboardInterrupt:
        print(time.process_time(), flush=True)
    assert all(map(torch.equal, weights, model.parameters()))
    assert not any(module._forward_hooks for module in model.modules())
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_interrupts_at_random_moments_of_a_large_network():
    """Measured in the time of the processor, which no other work on the machine can stretch."""
    interventions = ["zero", "mean", "resample", "zero"]
    chance = random.Random(0)
    started = subprocess.Popen(
        [sys.executable, "-c", _LARGE.format(interventions=interventions)],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    taken = []
    with started as child:
        try:
            assert child.stdout is not None
            for _ in interventions:
                assert child.stdout.readline() == "begun\n"
                moment = _used(child.pid) + chance.uniform(0.0, 7.0)
                while _used(child.pid) < moment:
                    time.sleep(0.02)
                sent = _used(child.pid)
                child.send_signal(signal.SIGINT)
                taken.append(float(child.stdout.readline()) - sent)
        finally:
            child.kill()
    assert max(taken) < 1.0, taken
