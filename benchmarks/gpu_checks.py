"""What `gpu.sh` checks and measures: whole runs against the oracle, rates, kernels, slices.

    python benchmarks/gpu_checks.py exact --device cuda --out gpu-results
    python benchmarks/gpu_checks.py speed --device cuda --out gpu-results

One line of JSON for each finding in `results.jsonl`, as soon as it is there. What has no time left
(``LIMIT`` seconds, as `gpu.sh` sets them) is said and left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_imagenet import LAYERS, classifier
from measure import stopwatch
from subjects import photograph_crops
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import pyablate as pa
from pyablate import ops
from pyablate.engine import cuda_graph, microbenchmarks, pointwise
from pyablate.reference import compare
from pyablate.runs import setup
from pyablate.runtime.determinism import undisturbed


@dataclass
class Visit:
    """Where the work is done, how long it may take, and what has been found.

    Attributes
    ----------
    device : str
        "cuda" or "cpu".
    small : bool
        As little of everything as shows that it runs.
    out : Path
        Folder of `results.jsonl`.
    end : float
        On the monotonic clock.
    bad : int
        Wrong predictions and errors.
    """

    device: str
    small: bool
    out: Path
    end: float
    bad: int = field(default=0)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def note(self, what: str, **record: Any) -> None:
        """Write a finding down at once."""
        with open(self.out / "results.jsonl", "a") as file:
            file.write(json.dumps({"what": what, **record}, default=str) + "\n")
        print(what, record, flush=True)

    def each(self, need: float, *parts: Callable[[], None]) -> None:
        """Do parts one after the other, as long as there is time; one that fails is no end."""
        for part in parts:
            name = getattr(part, "__name__", "part")
            if self.left < need:
                self.note("left out", part=name, seconds_left=round(self.left))
                continue
            try:
                part()
            except Exception as error:  # the next one may say more
                traceback.print_exc()
                self.bad += 1
                self.note("error", part=name, error=repr(error)[:300])

    def seconds(self, work: Callable[[], Any]) -> float:
        """Seconds of one call, warm, by the device's own clock."""
        for _ in range(1 if self.small else 3):
            work()
        return stopwatch(work, self.device, 1 if self.small else 20)

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Draw numbers, maps channels last."""
        made = torch.randn(*shape, device=self.device).to(dtype)
        return made.contiguous(memory_format=torch.channels_last) if made.ndim == 4 else made


# --- whole runs against the oracle --------------------------------------------------------------


def exact(visit: Visit) -> None:
    """Every unit of the shipped networks: interventions and precisions, the default ones first."""
    cases = [(name, "zero", "auto", 256) for name in ("resnet", "vgg_bn", "alexnet", "vit")]
    cases += [(name, "zero", "bf16", 128) for name in ("resnet", "vgg_bn", "convnext")]
    cases += [("resnet", "zero", "fp32", 128)]
    others = ("mean", "resample", "noise", "direction", "class_mean")
    cases += [("resnet", spec, "auto", 64) for spec in others]
    cases += [("alexnet_bn", spec, "auto", 128) for spec in ("zero", "noise")]
    if visit.small:
        cases = [("alexnet", "zero", "auto", 4)]
    for name, spec, precision, images in cases:
        visit.each(6, lambda case=(name, spec, precision, images): agree(visit, *case))


def agree(visit: Visit, name: str, spec: str, precision: str, count: int) -> None:
    """Compare one run with the plain float64 hook loop."""
    model, images, labels = pa.demo.load(name, limit=count)
    model, images = model.to(visit.device), images.to(visit.device)
    layers = ["features.9"] if visit.small else None
    begin = time.perf_counter()
    result = pa.ablate(
        model, (images, labels), layers, intervention=spec, precision=precision, progress=False
    )
    seconds = time.perf_counter() - begin
    every = layers or sorted(set(result.units["layer"]))
    agreed = compare(result, model, (images, labels), every, intervention=spec)
    visit.bad += agreed.mismatches + result.audit.mismatches
    visit.note(
        "exact",
        network=name,
        intervention=spec,
        precision=precision,
        images=len(images),
        units=len(result.units),
        pairs=agreed.pairs,
        near_ties=agreed.near_ties,
        mismatches=agreed.mismatches,
        audit=[result.audit.pairs, result.audit.mismatches],
        decided=result.effort.pairs_by_precision,
        strategy=sorted(set(result.strategy.values())),
        seconds=round(seconds, 2),
    )


# --- speed ----------------------------------------------------------------------------------------


def speed(visit: Visit) -> None:
    """Measure rates, kernels, a network, and sizes of slices, the most valuable first."""

    def ceilings() -> None:
        rates(visit)

    def own_kernels() -> None:
        kernels(visit)

    def one_pass() -> None:
        gains_of_one_pass(visit)

    def network() -> None:
        swept(visit, "default")

    def large_networks() -> None:
        for name in ("alexnet",) if visit.small else LARGE:
            profiled(visit, name)

    def slices() -> None:
        sizes_of_slices(visit)

    several = () if visit.small else (network,)
    need = 2 if visit.small else 20
    visit.each(need, ceilings, one_pass, large_networks, own_kernels, *several, slices)


def rates(visit: Visit) -> None:
    """Measure products, copies, and what plans and precisions rest on."""
    size = 256 if visit.small else 8192
    a, b = visit.random(size, size), visit.random(size, size)
    seconds = visit.seconds(lambda: a @ b)
    visit.note("matmul bf16", size=size, tflops=2 * size**3 / seconds / 1e12)
    held = torch.empty(1 << (20 if visit.small else 31), dtype=torch.uint8, device=visit.device)
    copy = torch.empty_like(held)
    visit.note("copy", tb_s=2 * held.numel() / visit.seconds(lambda: copy.copy_(held)) / 1e12)
    with undisturbed(visit.device):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            rate = microbenchmarks.convolution_rate(visit.device, dtype, alone=True)
            visit.note("convolution", dtype=dtype, tflops=rate / 1e12)
        visit.note(
            "plan's rates",
            unit_gops=microbenchmarks.unit_rate(visit.device) / 1e9,
            change_gb_s=microbenchmarks.change_rate(visit.device) / 1e9,
        )


def kernels(visit: Visit) -> None:
    """Time our kernels at the sizes of a ResNet-50's slices."""
    shapes = ((256, 56, 160), (64, 56, 160), (512, 28, 320), (1024, 14, 640), (2048, 7, 1280))
    for channels, side, pairs in ((8, 7, 16),) if visit.small else shapes:
        for dtype in (torch.float16, torch.bfloat16):
            passes(visit, pairs, channels, side, dtype)


def passes(visit: Visit, pairs: int, channels: int, side: int, dtype: torch.dtype) -> None:
    """Time what goes over maps once; bytes are those that have to cross the memory."""
    relu = ops.Activation("relu")
    base = visit.random(4, channels, side, side, dtype=torch.float32)
    delta, other = (visit.random(pairs, channels, side, side, dtype=dtype) for _ in range(2))
    image = torch.arange(pairs, device=visit.device, dtype=torch.int32) * 4 // pairs

    size = (side, side)

    def rate(bytes_: int, work: Callable[[], Any]) -> float:
        return bytes_ * delta.numel() / visit.seconds(work) / 1e9

    visit.note(
        "passes, GB/s",
        dtype=dtype,
        shape=[pairs, channels, side, side],
        relu=rate(4, lambda: ops.delta_activation(base, delta, image, relu, out=delta)),
        add_relu=rate(
            6, lambda: ops.delta_activation(base, delta, image, relu, addend=other, out=delta)
        ),
        mean=rate(2, lambda: ops.delta_mean(base, delta, image, relu)),
        max_pool=rate(
            4,
            lambda: ops.delta_max_pool(
                base, delta, image, kernel=3, stride=1, padding=1, out_size=size
            ),
        ),
        product_in_place=rate(4, lambda: delta.mul_(1.0)),
    )


def gains_of_one_pass(visit: Visit) -> None:
    """Tell how much faster convolutions are in one pass with ReLU, where that is offered."""
    device = torch.device(visit.device)
    offered = pointwise.offered(device)
    for size in pointwise.MEASURED if offered else ():
        times = pointwise.gain(visit.device, size)
        visit.note("convolution in one pass", size=size, times=times)
    chosen = sorted(pointwise.worthwhile(device))
    visit.note("chosen for one pass", offered=offered, sizes=chosen)


def swept(visit: Visit, how: str) -> None:
    """Ablate all units of a network and tell the seconds of its layers."""
    name, count, layers = ("alexnet", 4, ["features.9"]) if visit.small else ("resnet", 500, None)
    model, images, labels = pa.demo.load(name, limit=count)
    model, images = model.to(visit.device), images.to(visit.device)
    begin = time.perf_counter()
    result = pa.ablate(model, (images, labels), layers, audit=30, progress=False)
    memory = torch.cuda.max_memory_allocated() if visit.device == "cuda" else 0
    visit.bad += result.audit.mismatches
    visit.note(
        "network",
        how=how,
        network=name,
        images=count,
        units=len(result.units),
        call_seconds=time.perf_counter() - begin,
        layer_seconds=result.effort.layer_seconds,
        decided=result.effort.pairs_by_precision,
        audit=[result.audit.pairs, result.audit.mismatches],
        peak_bytes=memory,
    )


LARGE = ("resnet50", "deit_tiny_patch16_224", "EfficientNet-Lite0")
"""Networks of 224 x 224 pixels whose time is told kernel by kernel, as long as there is time."""


def profiled(visit: Visit, name: str) -> None:
    """Ablate three layers of a network and tell which kernels took the time."""
    if visit.left < 25:
        visit.note("left out", part=f"profile of {name}", seconds_left=round(visit.left))
        return
    if visit.small:
        model, (images, _), layers = pa.demo.network(name), pa.demo.images(4), ["features.9"]
    else:
        images = photograph_crops(64)
        model = classifier(name, images)
        layers = list(LAYERS[name][:3])
    model, images = model.to(visit.device), images.to(visit.device)
    data = images, torch.zeros(len(images), dtype=torch.int64)
    kinds = [ProfilerActivity.CUDA if visit.device == "cuda" else ProfilerActivity.CPU]
    for layer in layers:
        pa.ablate(model, data, layer, audit=0, progress=False)  # compiles and measures
        with profile(activities=kinds) as seen:
            begin = time.perf_counter()
            result = pa.ablate(model, data, layer, audit=0, progress=False)
            seconds = time.perf_counter() - begin
        rows = [(e.self_device_time_total, e.count, e.key) for e in seen.key_averages()]
        rows = sorted((row for row in rows if row[0] > 0), reverse=True)
        visit.note(
            "profile",
            network=name,
            layer=layer,
            images=len(images),
            units=len(result.units),
            call_seconds=round(seconds, 3),
            layer_seconds=result.effort.layer_seconds,
            other_seconds=dict(result.effort.other_seconds),
            busy_seconds=sum(row[0] for row in rows) / 1e6,
            decided=result.effort.pairs_by_precision,
            doubt=result.effort.error_bounds,
            kernels=[[round(t / 1e3, 2), count, key[:120]] for t, count, key in rows[:30]],
        )


def sizes_of_slices(visit: Visit) -> None:
    """Do the same with other sizes of slices, and without CUDA graphs."""
    before = setup.DEVICE_SLICE, cuda_graph.FIRST
    try:
        for mib in () if visit.small else (64, 256, 1024):
            setup.DEVICE_SLICE = mib << 20
            swept(visit, f"slices of {mib} MiB")
        setup.DEVICE_SLICE, cuda_graph.FIRST = before[0], 1 << 30
        swept(visit, "no graphs")
    finally:
        setup.DEVICE_SLICE, cuda_graph.FIRST = before


PARTS = {"exact": exact, "speed": speed, "kernels": kernels}


def main() -> int:
    """Do one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(format="log: %(message)s")
    logging.getLogger("pyablate").setLevel(logging.INFO)
    limit = float(os.environ.get("LIMIT", "600")) - 3
    visit = Visit(arguments.device, arguments.small, arguments.out, time.monotonic() + limit)
    PARTS[arguments.part](visit)
    print("wrong predictions and errors:", visit.bad)
    return int(visit.bad > 0)


if __name__ == "__main__":
    sys.exit(main())
