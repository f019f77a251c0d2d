"""Every layer of the shipped networks, against `cached`; one layer of each against `captum`."""

from __future__ import annotations

from typing import Any

import pytest
from measure import Job, Settings, compare, floor, planned
from rivals import Cached, Captum
from subjects import SHIPPED, cut
from torch.profiler import ProfilerActivity, profile

import pyablate as pa

BY_CAPTUM = {"alexnet": "features.9", "vgg_bn": "features.9", "resnet": "stage2.1.relu2"}


def layers() -> list[tuple[str, str]]:
    images, _ = pa.demo.images(2)
    found = []
    for network in SHIPPED:
        sites = pa.select(pa.sites(pa.demo.network(network), images))
        found += [(network, site.name) for site in sites]
    return found


@pytest.mark.parametrize(("network", "layer"), layers(), ids=lambda text: text)
def test_layer(benchmark: Any, settings: Settings, network: str, layer: str) -> None:
    model = pa.demo.network(network).to(settings.device)
    images = pa.demo.images(settings.images)[0].to(settings.device)

    def rivals(count: int) -> list[Any]:
        ready: list[Any] = [
            Cached(cut(model, layer), images[:count], layer, compiling=settings.compiling)
        ]
        if BY_CAPTUM.get(network) == layer:
            try:
                ready.append(Captum(model, images[:count], layer))
            except ImportError as error:
                print(f"captum skipped: {error}")
        return ready

    compare(
        benchmark,
        f"{network} {layer}",
        Job(model, images, layer),
        rivals,
        settings,
        group="layers",
        extra=lambda count, seconds: {
            **prediction(network, layer, count, seconds, settings),
            **dense_part(network, layer, Job(model, images, layer), count, settings),
        },
    )


def prediction(
    network: str, layer: str, images: int, seconds: float, settings: Settings
) -> dict[str, Any]:
    """Return what the plan said: time, floor, and the share of its peak that was reached."""
    plan = planned(network, settings.device)
    row = plan.table.set_index("layer").loc[layer]
    scale = images / plan.images
    least = floor(plan, images, [layer])
    return {
        "kind": "fully connected layers" if layer.startswith("classifier") else "conv layers",
        "predicted_seconds": (row["seconds"] + plan.clean_seconds) * scale,
        "tiers": plan.tiers,
        "peak_share": least["gflop"] / seconds / plan.gflops,
        **least,
    }


DENSE = {
    "int8": "onednn::qconv2d_pointwise",
    "bfloat16": "aten::mkldnn_convolution",
}


def dense_part(
    network: str, layer: str, job: Job, count: int, settings: Settings
) -> dict[str, Any]:
    """Return the rate of the dense convolutions of the cheapest tier, while they run."""
    plan = planned(network, settings.device)
    gflop = plan.table.set_index("layer").loc[layer, "dense"] * count / plan.images
    operation = DENSE.get(plan.tiers[0])
    if operation is None or settings.device != "cpu" or layer.startswith("classifier"):
        return {}
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        settled = job.run(count)[0].effort.pairs_by_precision
    if settled.get(plan.tiers[0], 0) < sum(settled.values()) / 2:
        return {}  # found too coarse for this layer
    spent = sum(e.self_cpu_time_total for e in seen.key_averages() if e.key == operation) / 1e6
    if gflop < 1 or not spent:
        return {}
    return {"dense_seconds": spent, "dense_share": gflop / spent / plan.gflops}
