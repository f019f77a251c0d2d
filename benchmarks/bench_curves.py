"""Time ``prune_curve`` against the usual loop: mask the units, evaluate, for each point.

Run: ``python benchmarks/bench_curves.py [images]``. Accuracies must agree. Prints the CPU time,
which a busy machine disturbs less, of both and of a loop with the channels last and batches that
fit the caches, all taken in turn.
"""

from __future__ import annotations

import copy
import sys
import time

import torch
from subjects import SHIPPED

import pyablate as pa
from pyablate.compression._remove import silenced
from pyablate.network.sites import sites


def usual_loop(model, images, labels, ranking, fractions, *, batch=256):
    """Accuracy with the units of each fraction at zero, by hooks, in float32."""
    found = sites(model, images[:1])
    accuracies = []
    for fraction in fractions:
        parts = [
            silenced(model, found, some, ranking.units(fraction)).argmax(1)
            for some in images.split(batch)
        ]
        accuracies.append(float((torch.cat(parts) == labels).double().mean()))
    return accuracies


def tuned_loop(model, images, labels, ranking, fractions):
    """Do the same in the layout and batch size that are fastest on a CPU."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    pictures = images.contiguous(memory_format=torch.channels_last)
    return usual_loop(last, pictures, labels, ranking, fractions, batch=64)


def timed(job, *given, **options):
    """Return what a function gives, and its CPU time in seconds."""
    start = time.process_time()
    return job(*given, **options), time.process_time() - start


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    for name in SHIPPED:
        model, images, labels = pa.demo.load(name, limit=count)
        ranking = pa.compression.filter_ranking(model, images[:1], "l1")
        seconds: dict[str, list[float]] = {"curve": [], "loop": [], "tuned": []}
        for _ in range(3):
            curve, spent = timed(
                pa.prune_curve, model, (images, labels), ranking, seeds=0, progress=False
            )
            seconds["curve"].append(spent)
            for rival, loop in (("loop", usual_loop), ("tuned", tuned_loop)):
                plain, spent = timed(loop, model, images, labels, ranking, curve["fraction"])
                seconds[rival].append(spent)
                # Images without a clear answer may fall either way in float32.
                assert ((curve["accuracy"] - plain).abs() * count <= 2).all(), (rival, plain)
        best = {what: min(values) for what, values in seconds.items()}
        print(
            f"{name}: prune_curve {best['curve']:.1f} s; usual loop {best['loop']:.1f} s, "
            f"{best['loop'] / best['curve']:.2f} x; tuned loop {best['tuned']:.1f} s, "
            f"{best['tuned'] / best['curve']:.2f} x",
            flush=True,
        )


if __name__ == "__main__":
    main()
