"""Measure all networks and write the document: ``make paper``.

    python -m paper                         # docs/results/paper.md and its pictures
    python -m paper --quick --output /tmp/paper.md
    python -m paper --measure-only --families alexnet alexnet_bn

Measurements are kept in build/paper, one folder for each network; a run that was broken off goes on
where it stopped. Networks are measured side by side, each on one core.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

from paper import document
from paper.measure import FULL, QUICK, Measured, side_by_side
from paper.networks import FAMILIES, known

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Measure what is missing, then write."""
    parser = argparse.ArgumentParser(prog="python -m paper", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "paper.md")
    parser.add_argument("--images", type=Path, help="folder of the pictures; default: beside it")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "paper")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seeds", type=int, default=10, help="at most so many of a family")
    parser.add_argument("--quick", action="store_true", help="a few images, to see that it runs")
    parser.add_argument("--measure-only", action="store_true", help="fill the cache, write nothing")
    parser.add_argument(
        "--processes", type=int, default=min(os.cpu_count() or 1, 4), help="networks at a time"
    )
    options = parser.parse_args()
    logging.getLogger("pyablate").setLevel(logging.ERROR)
    begin = time.monotonic()
    networks = [each for each in known(tuple(options.families)) if each.seed < options.seeds]
    extent = QUICK if options.quick else FULL
    studied = [Measured(network, extent, options.cache) for network in networks]
    for number, lines in enumerate(side_by_side(studied, options.processes), 1):
        print(f"[{number}/{len(networks)}] {lines}", flush=True)
    if not options.measure_only:
        pictures = options.images or options.output.parent / "images"
        document.write(studied, options.output, pictures)
        print(f"wrote {options.output}")
    print(f"{(time.monotonic() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
