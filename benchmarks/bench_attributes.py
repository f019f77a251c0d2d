"""What watching the units adds to a plain pass over the data."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest
import torch
from measure import Settings, in_turn, ratio, say, stopwatch, write
from torch import Tensor, nn

import pyablate as pa

BATCH = 128
FORWARD = ["activations", "selectivity", "information", "redundancy"]


def plain_pass(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Run the network over the images as one would to measure its accuracy; its logits."""
    logits = []
    with torch.inference_mode():
        for batch, _ in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            logits.append(model(batch.to(next(model.parameters()).device)))
    return torch.cat(logits)


@pytest.mark.parametrize("network", ["alexnet", "vgg_bn", "resnet"])
def test_forward_attributes(benchmark: Any, settings: Settings, network: str) -> None:
    """All layers of a shipped network, every attribute of one forward pass."""
    model, images, labels = pa.demo.load(network, limit=settings.images)
    model = model.to(settings.device).eval()

    def ours(which: list[str] = FORWARD) -> Any:
        return pa.attributes(model, (images, labels), "*", which, batch_size=BATCH, progress=False)

    def plain() -> Tensor:
        return plain_pass(model, images, labels)

    must_agree(model, images, labels, ours())
    seconds, theirs = in_turn(
        benchmark,
        lambda: stopwatch(ours, settings.device, 1),
        {"plain pass": lambda: stopwatch(plain, settings.device, 1)},
        max(5, settings.rounds),
    )
    found = ratio(theirs["plain pass"], seconds)
    overhead = 1 / found["ratio"] - 1
    units = int(ours(["mean"]).sizes["unit"])
    rivals = {"plain pass": {"seconds": theirs["plain pass"], **found}}
    record = {
        "group": "attributes",
        "images": len(images),
        "units": units,
        "seconds": seconds,
        "overhead": overhead,
        "rivals": rivals,
    }
    write(f"attributes of {network}", record, settings)
    benchmark.extra_info["overhead"] = round(overhead, 3)
    say(f"{network}: {len(images)} images, {median(seconds):.3g} s, {overhead:+.0%} over a pass")


def must_agree(model: nn.Module, images: Tensor, labels: Tensor, found: Any) -> None:
    """Compare the means of one layer with those of a hook.

    Raises
    ------
    AssertionError
        They differ.
    """
    layer = str(found["layer"].to_numpy()[0])
    sums: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda _m, _i, output: sums.append(output.flatten(2).mean(dim=2).double().sum(dim=0))
    )
    plain_pass(model, images, labels)
    handle.remove()
    mean = (torch.stack(sums).sum(dim=0) / len(images)).cpu()
    mine = torch.from_numpy(found["mean"].to_numpy()[found["layer"].to_numpy() == layer])
    torch.testing.assert_close(mine, mean, rtol=1e-4, atol=1e-6)
