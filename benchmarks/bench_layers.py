"""Every layer of the shipped networks, against `cached`; one layer of each against `captum`."""

from __future__ import annotations

import functools
from typing import Any

import pandas as pd
import pytest
from measure import Job, Settings, compare
from rivals import Cached, Captum
from subjects import cut

import pyablate as pa

BY_CAPTUM = {"alexnet": "features.9", "vgg_bn": "features.9", "resnet": "stage2.1.relu2"}


def layers() -> list[tuple[str, str]]:
    images, _ = pa.demo.images(2)
    found = []
    for network in pa.demo.NETWORKS:
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
        extra=lambda count, seconds: prediction(network, layer, count, seconds, settings),
    )


def prediction(
    network: str, layer: str, images: int, seconds: float, settings: Settings
) -> dict[str, Any]:
    """Return what the plan said, and the share of the measured peak that the dense part reached."""
    table, gflops = planned(network, settings.device)
    row = table.loc[layer]
    scale = images / 1000
    return {
        "kind": "fully connected layers" if layer.startswith("classifier") else "conv layers",
        "predicted_seconds": row["seconds"] * scale,
        "gflop": row["gflop"] * scale,
        "peak_gflops": gflops,
        "peak_share": row["gflop"] * scale / seconds / gflops,
    }


@functools.cache
def planned(network: str, device: str) -> tuple[pd.DataFrame, float]:
    """Plan all layers of a network for 1,000 images."""
    model = pa.demo.network(network).to(device)
    images, labels = pa.demo.images(16)
    plan = pa.plan(model, (images.to(device), labels), images=1000)
    return plan.table.set_index("layer"), plan.gflops
