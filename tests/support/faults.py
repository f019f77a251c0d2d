"""Faults for the audit to find.

As a program: a run of two processes, of which only the last one's images show the fault.

    python faults.py FOLDER
"""

from __future__ import annotations

import operator
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

from pyablate.data.dataset import Batch
from pyablate.engine import rules
from pyablate.engine.care import Mismatch
from pyablate.engine.job import Job
from pyablate.engine.precision_cascade import PrecisionCascade
from pyablate.runs import _ablate
from pyablate.runs.audit import Audited, Auditor
from pyablate.runs.executor import BlockSweep
from support.ranked import ablate, together
from support.runs import IMAGES
from support.stores import contents

RELU = torch.ops.aten.relu.default


def break_relu(replace: Callable[[Any, Any, Any], None], *precisions: torch.dtype) -> None:
    """Let the rule for ReLU be wrong in some precisions; ``replace(mapping, key, value)``."""
    right = rules.RULES[RELU]

    def wrong(pairs: Any, node: fx.Node) -> Any:
        found = right(pairs, node)
        return -3 * pairs.delta(node.all_input_nodes[0]) if pairs.dtype in precisions else found

    replace(rules.RULES, RELU, wrong)


def unmeasured(*_: Any) -> None:
    """In place of a measurement, which would see these faults before the audit does."""


def audited(first: int) -> Callable[..., np.ndarray]:
    """Audit every unit on all images from ``first`` on."""

    def choose(setup: Any, *_: int) -> np.ndarray:
        rows, images = range(setup.rows), range(first, len(setup.data))
        return np.array([[row, image] for row in rows for image in images])

    return choose


def suspected(monkeypatch: pytest.MonkeyPatch, last: int, times: Mapping[str, int]) -> None:
    """Let the audit find a pair of layers wrong so many times, on the last image."""
    check, left = Auditor.check, Counter(times)

    def find(self: Auditor, job: Job, batch: Batch, *rest: Any) -> Audited:
        found = check(self, job, batch, *rest)
        if int(batch.index[-1]) != last or not left[job.name]:
            return found
        left[job.name] -= 1
        return replace(found, wrong=[Mismatch(job.rows.start, last, 0, 1)])

    monkeypatch.setattr(Auditor, "check", find)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """Count how often each layer is done on the batch that begins with each image."""
    plain, done = BlockSweep._job, Counter[tuple[str, int]]()

    def job(self: BlockSweep, job: Job, batch: Batch, *rest: Any) -> None:
        done[job.name, int(batch.index[0])] += 1
        plain(self, job, batch, *rest)

    monkeypatch.setattr(BlockSweep, "_job", job)
    return done


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    PrecisionCascade._measure_full = unmeasured  # type: ignore[method-assign]
    break_relu(operator.setitem, torch.float32)
    _ablate._audited_pairs = audited(IMAGES - 5)
    result = ablate(folder / "one.zarr", precision="fp32")
    assert result.strategy["1"] == "delta (float64)", result.strategy
    assert result.audit.mended > 0
    assert together(folder / "two.zarr", 2, precision="fp32") == [0, 0]
    assert contents(folder / "two.zarr") == contents(folder / "one.zarr")


if __name__ == "__main__":
    main()
