"""Count what screened runs miss: all layers of the shipped networks, six interventions.

Each case is an exact run and then a screened one of the same pairs in this process. Missed flips
are those of the exact run that the screened one has not; other differences are pairs that both
computed and decided otherwise (near ties). All layers that can be are screened, also those that
gain nothing by it on so few images. It fails where more is missed than the certificate
says::

    python benchmarks/screened_exactness.py --images 100      # about half an hour on two cores

Each case is noted in ``--output``; a second start goes on behind the last one, and the table of all
is printed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from bench_screening import compared

import pyablate as pa
from pyablate.engine.job import Job
from pyablate.runs import thresholds
from pyablate.runs.screening_costs import Work

INTERVENTIONS = ("zero", "mean", "class_mean", "constant:0.5", "resample", "direction")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--images", type=int, default=100)
    add("--network", nargs="+", choices=pa.demo.NETWORKS, default=list(pa.demo.NETWORKS))
    add("--intervention", nargs="+", default=list(INTERVENTIONS))
    add("--output", type=Path, default=Path(".benchmarks/screened_exactness.jsonl"))
    options = parser.parse_args()
    thresholds.worthwhile = whatever_it_saves
    thresholds.promising = lambda _setup, live, _images: frozenset(live)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.touch()
    known = [json.loads(line) for line in options.output.read_text().splitlines()]
    found = {(one["network"], one["intervention"], one["images"]): one for one in known}
    cases = [(n, i, options.images) for n in options.network for i in options.intervention]
    for case in cases:
        if case not in found:
            found[case] = checked(*case)
            with options.output.open("a") as file:
                print(json.dumps(found[case]), file=file)
        print(row(found[case]), flush=True)
    chosen = [found[case] for case in cases]
    total = {name: sum(one[name] for one in chosen) for name in ("pairs", "flips", "missed")}
    print(f"{total['missed']} of {total['flips']:,} flips missed, {total['pairs']:,} pairs")


def whatever_it_saves(
    works: dict[Job, Work], passes: float, gain: float = 0.0
) -> tuple[frozenset[Job], float]:
    """Screen all layers that can be, along the directions with which fewest pairs are open."""
    return frozenset(works), sum(work.screened for work in works.values())


def checked(network: str, intervention: str, images: int) -> dict[str, Any]:
    """Run both ways; counts, and CPU seconds of each."""
    model, data = pa.demo.network(network), pa.demo.images(images)
    options: dict[str, Any] = {"intervention": intervention, "audit": 0, "progress": False}
    runs, seconds = [], []
    for guarantee in ("exact", "screened"):
        begin = time.process_time()
        runs.append(pa.ablate(model, data, "*", guarantee=guarantee, **options))
        seconds.append(time.process_time() - begin)
    exact, screened = runs
    known = screened.screening
    live = known.pairs - known.total.silent
    return {
        "network": network,
        "intervention": intervention,
        "images": images,
        "pairs": len(exact.units) * images,
        "screened": known.pairs,
        "open": (known.computed - known.sampled) / max(1, live),
        "certificate": known.upper_bound,
        **compared(exact, screened),
        "seconds": dict(zip(("exact", "screened"), seconds, strict=True)),
        "torch": torch.__version__,
        "pyablate": pa.__version__,
    }


def row(one: dict[str, Any]) -> str:
    """Write a case as a row of a table."""
    cells = (
        f"`{one['network']}`",
        one["intervention"],
        f"{one['pairs']:,}",
        f"{one['open']:.1%}",
        f"{one['missed']} of {one['flips']:,}",
        f"{one['certificate']:.1e}",
        str(one["other"]),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
