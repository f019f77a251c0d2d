"""Peak memory of one call in a process of its own; `bench_growth.py` starts it.

Prints JSON: bytes in use before the call, at its peak, and the difference.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path

import pyablate as pa


def peak_bytes() -> int:
    """Largest resident size of this process so far.

    Linux hands a parent's ``ru_maxrss`` on to its children, so the kernel's own note is read there.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="vgg_bn")
    parser.add_argument("--layer", default="features.6")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--memory", type=int, required=True, help="bytes, as for pyablate.ablate")
    arguments = parser.parse_args()
    model, images, labels = pa.demo.load(arguments.network, limit=arguments.images)
    # Export and the first convolutions load libraries that stay: they are not the sweep's.
    few = [f"{arguments.layer}:{unit}" for unit in range(2)]
    pa.ablate(model, (images[:2], labels[:2]), few, audit=2, progress=False)
    before = peak_bytes()
    pa.ablate(
        model,
        (images, labels),
        arguments.layer,
        memory=arguments.memory,
        audit=10,
        progress=False,
    )
    peak = peak_bytes()
    print(json.dumps({"before": before, "peak": peak, "grew": peak - before}))


if __name__ == "__main__":
    main()
