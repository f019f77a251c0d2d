"""Faults for the audit to find.

As a program: a run of two processes, of which only the last one's images show the fault.

    python faults.py FOLDER
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from pyablate.engine import rules
from pyablate.engine.precision_cascade import PrecisionCascade
from pyablate.runs import _ablate
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
