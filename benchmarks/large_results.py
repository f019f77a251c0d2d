"""Time and peak memory of what is done with large results, made up; prints a table in Markdown.

    python benchmarks/large_results.py [--part 100]

Every call runs in a process of its own, which reads the result first: the seconds are those of the
call, the memory is what the process grew by from before reading on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from made_up import random_result
from peak_memory import peak_bytes

from pyablate.result import AblationResult, load

SHARE = 0.01
"""Flipped predictions among all pairs."""

SIZES = {"resnet": (26_560, 50_000, 1_000), "many classes": (100, 50_000, 21_843)}
"""Units, images and classes: as of a ResNet-50 on ImageNet's validation images, and as of all of
ImageNet's classes."""

CALLS: dict[str, tuple[str, Callable[[AblationResult, Path], Any]]] = {
    "load": ("resnet", lambda result, _: result),
    "class_accuracy_drop": ("resnet", lambda result, _: result.class_accuracy_drop),
    "significance": ("resnet", lambda result, _: result.significance()),
    "to_dataframe": ("resnet", lambda result, _: result.to_dataframe()),
    "confusion of one unit": ("resnet", lambda result, _: result.confusion(0)),
    "report": ("resnet", lambda result, folder: result.report(folder / "report.html")),
    "confusion of one unit, 21,843 classes": (
        "many classes",
        lambda result, _: result.confusion(0),
    ),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, default=1, help="one unit of so many")
    parser.add_argument("--call", choices=CALLS, help="only this one, of the result in --folder")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.call:
        print(json.dumps(measured(arguments.call, arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, (units, images, classes) in SIZES.items():
            made = random_result(max(1, units // arguments.part), images, classes, SHARE)
            made.save(Path(folder, f"{name}.zarr"))
            del made
        print("| call | units | images | classes | flips | seconds | of CPU | memory |")
        print("|" + 8 * "---|", flush=True)
        for call in CALLS:
            print(line(call, folder), flush=True)


def line(call: str, folder: str) -> str:
    """Row of the table: measured in another process."""
    command = [sys.executable, __file__, "--call", call, "--folder", folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    cells = [call, *(f"{found[name]:,}" for name in ("units", "images", "classes", "flips"))]
    cells += [f"{found[name]:.2f}" for name in ("seconds", "busy")]
    return " | ".join(["", *cells, f"{found['grew'] / (1 << 20):,.0f} MiB", ""]).strip()


def measured(call: str, folder: Path) -> dict[str, Any]:
    """Read the result, make the call, and tell what it took."""
    for name in ("pyablate.report", "xarray"):
        importlib.import_module(name)  # beforehand, so that only the call is measured
    before = peak_bytes()
    size, work = CALLS[call]
    start = time.perf_counter(), time.process_time()
    result = load(folder / f"{size}.zarr")
    if call != "load":
        start = time.perf_counter(), time.process_time()
        work(result, folder)
    seconds, busy = time.perf_counter() - start[0], time.process_time() - start[1]
    return {
        "units": len(result.units),
        "images": len(result.labels),
        "classes": result.classes,
        "flips": len(result.flips.image),
        "seconds": seconds,
        "busy": busy,
        "grew": peak_bytes() - before,
    }


if __name__ == "__main__":
    main()
