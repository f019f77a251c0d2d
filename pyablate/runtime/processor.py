"""What the processor calls itself. Nothing here needs torch."""

from __future__ import annotations

import functools
import platform


@functools.cache
def processor() -> str:
    """Name the processor's model, or its architecture where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
