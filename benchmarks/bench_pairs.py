"""Time ``pa.pairs`` on all pairs of a 64-unit layer, and check a few of them by hooks.

Run: ``python benchmarks/bench_pairs.py [images [network ...]]``. Prints the time and the rate;
stops if a joint drop differs from that of a float64 forward pass with both units at zero.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from torch import Tensor, nn

import pyablate as pa

LAYERS = {"alexnet": "features.9", "vgg_bn": "features.9", "resnet": "stage3.0.relu1"}
CHECKED = 5


def accuracy_without(
    model: nn.Module, images: Tensor, labels: Tensor, layer: str, units: list[int]
) -> float:
    """Accuracy in float64 with some units of a layer at zero, by a hook."""

    def switch_off(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output.index_fill(1, torch.tensor(units, dtype=torch.int64), 0.0)

    handle = model.get_submodule(layer).register_forward_hook(switch_off)
    with torch.inference_mode():
        right = [
            (model(batch).argmax(1) == label).sum()
            for batch, label in zip(images.double().split(256), labels.split(256), strict=True)
        ]
    handle.remove()
    return float(sum(right)) / len(labels)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    for name in sys.argv[2:] or LAYERS:
        model, images, labels = pa.demo.load(name, limit=count)
        start = time.perf_counter()
        found = pa.pairs(model, (images, labels), LAYERS[name], progress=False)
        seconds = time.perf_counter() - start
        pairs = found.data.sizes["pair"]
        double = model.double().eval()
        intact = accuracy_without(double, images, labels, LAYERS[name], [])
        for pair in np.random.default_rng(0).choice(pairs, CHECKED, replace=False):
            labels_of = [str(found.data[which][pair].item()) for which in ("first", "second")]
            units = [int(label.rpartition(":")[2]) for label in labels_of]
            drop = intact - accuracy_without(double, images, labels, LAYERS[name], units)
            assert abs(drop - float(found.data["joint_drop"][pair])) < 1.5 / count, labels_of
        print(
            f"{name} {LAYERS[name]}: {pairs:,} pairs on {count:,} images in {seconds:.1f} s, "
            f"{pairs * count / seconds:,.0f} ablations of an image a second; {found.result.audit}"
        )


if __name__ == "__main__":
    main()
