"""Measure how far plans are from what calls take, and write the table of `performance.md`.

Each network is planned and then run, all layers, in one process on one thread::

    python benchmarks/plan_accuracy.py                     # 500 images, ten minutes
    python benchmarks/plan_accuracy.py --images 64 --page /dev/null

Everything is timed in CPU time, the plan's rates as well: what others do on the machine is in no
figure.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from table import ROOT, between

import pyablate as pa
from pyablate.runtime.processor import processor

NETWORKS = ("alexnet", "vgg_bn", "resnet", "vit", "convnext")
BEGIN, END = "<!-- plan: begin -->", "<!-- plan: end -->"


@dataclass(frozen=True)
class Row:
    """Seconds planned and taken of one network, of its layers and of the call."""

    network: str
    layers: tuple[float, float]
    call: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Planned to taken, of the call."""
        return self.call[0] / self.call[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "performance.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    time.perf_counter = time.process_time
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PYABLATE_CACHE"] = folder  # rates of this very run
        measured("alexnet_dropout", 16)  # the first call of a process loads libraries
        rows = []
        for network in arguments.networks:
            rows.append(measured(network, arguments.images))
            print(line(rows[-1]), flush=True)
            if arguments.page.is_file():  # at once: a run that is cut short leaves what it had
                text = table(rows, arguments.images)
                page = arguments.page.read_text()
                arguments.page.write_text(between(page, text, (BEGIN, END)))


def measured(network: str, images: int) -> Row:
    """Plan a call and make it."""
    model, pictures, labels = pa.demo.load(network, limit=images)
    plan = pa.plan(model, (pictures, labels))
    result = pa.ablate(model, (pictures, labels), progress=False)
    layers = float(plan.table["seconds"].sum()), sum(result.effort.layer_seconds.values())
    return Row(network, layers, (plan.seconds, result.seconds))


def table(rows: Sequence[Row], images: int) -> str:
    """Lay the rows out in Markdown, with what they were measured on."""
    ratios = [row.ratio for row in rows]
    head = ["network", "layers", "planned", "call", "planned", "planned / taken"]
    return "\n".join(
        [
            f"All layers on {images:,} images, CPU time of one thread of {processor()} "
            f"({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}:",
            "",
            f"| {' | '.join(head)} |",
            f"|{' --- |' * len(head)}",
            *map(line, rows),
            "",
            f"Median {median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}.",
        ]
    )


def line(row: Row) -> str:
    """One row of the table."""
    seconds = [
        f"{value:.1f} s" for planned, took in (row.layers, row.call) for value in (took, planned)
    ]
    return f"| {' | '.join([row.network, *seconds, f'{row.ratio:.2f}'])} |"


if __name__ == "__main__":
    main()
