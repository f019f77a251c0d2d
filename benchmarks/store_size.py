"""How large a stored result is, against the arrays that it stands for.

    python benchmarks/store_size.py [run.zarr ...]

Without arguments: a result as of a network with 2,000 units on 50,000 images of 1,000 classes, made
up, with the share of flips that was measured on the shipped networks.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from made_up import random_result

from pyablate.result import load
from pyablate.results.store import save

SHARE = 0.006
"""Flipped predictions among all pairs, as on the shipped networks."""


def describe(path: Path) -> str:
    """One row of a table in Markdown."""
    result = load(path)
    units, images, classes = len(result.units), len(result.labels), result.classes
    stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    flips = len(result.flips.image)
    confusion, logits = 4 * units * classes**2, 4 * units * images * classes
    width = 1 if classes <= 256 else 2
    return (
        f"| {units:,} | {images:,} | {classes:,} | {100 * flips / units / images:.2f} % "
        f"| {stored:,} | {width * units * images:,} ({width * units * images / stored:,.0f} x) "
        f"| {confusion:,} ({confusion / stored:,.0f} x) | {logits:,} ({logits / stored:,.0f} x) |"
    )


def main() -> None:
    """Print the table."""
    print("| units | images | classes | flips | stored | predictions | confusion | logits |")
    print("|---|---|---|---|---|---|---|---|")
    for name in sys.argv[1:]:
        print(describe(Path(name)))
    if not sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(os.path.join(folder, "run.zarr"))
            save(random_result(2_000, 50_000, 1_000, SHARE), place)
            print(describe(place))


if __name__ == "__main__":
    main()
