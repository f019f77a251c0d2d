"""Time ``prune_curve`` against the usual loop: mask the units, evaluate, for each point.

Run: ``python benchmarks/bench_curves.py [images]``. Prints accuracies (which must agree) and times,
taken in turn, of both.
"""

from __future__ import annotations

import sys
import time

import torch

import pyablate as pa
from pyablate.compression.removal import silenced
from pyablate.layers import sites


def usual_loop(model, images, labels, ranking, fractions):
    """Accuracy with the units of each fraction at zero, by hooks, in float32."""
    found = sites(model, images[:1])
    accuracies = []
    for fraction in fractions:
        parts = [
            silenced(model, found, batch, ranking.units(fraction)).argmax(1)
            for batch in images.split(256)
        ]
        accuracies.append(float((torch.cat(parts) == labels).double().mean()))
    return accuracies


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    for name in pa.demo.NETWORKS:
        model, images, labels = pa.demo.load(name, limit=count)
        ranking = pa.compression.filter_ranking(model, images[:1], "l1")
        seconds: dict[str, list[float]] = {"loop": [], "curve": []}
        for _ in range(3):
            start = time.perf_counter()
            curve = pa.prune_curve(model, (images, labels), ranking, seeds=0, progress=False)
            seconds["curve"].append(time.perf_counter() - start)
            start = time.perf_counter()
            plain = usual_loop(model, images, labels, ranking, curve["fraction"])
            seconds["loop"].append(time.perf_counter() - start)
        worst = (curve["accuracy"] - plain).abs().max() * count
        ratio = min(seconds["loop"]) / min(seconds["curve"])
        print(
            f"{name}: loop {min(seconds['loop']):.1f} s, prune_curve "
            f"{min(seconds['curve']):.1f} s, ratio {ratio:.2f}; accuracies differ by at most "
            f"{worst:.0f} images"
        )


if __name__ == "__main__":
    main()
