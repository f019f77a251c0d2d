"""All layers of a shipped network in one call, against the plain loop with a forward hook."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from measure import Job, Settings, compare, floor, planned
from rivals import Hooks
from subjects import SHIPPED

import pyablate as pa


@pytest.mark.parametrize("network", SHIPPED)
def test_network(benchmark: Any, settings: Settings, network: str) -> None:
    model = pa.demo.network(network).to(settings.device)
    images, labels = (part.to(settings.device) for part in pa.demo.images(settings.images))
    sites = pa.select(pa.sites(model, images[:2]))
    compare(
        benchmark,
        f"{network}, all layers",
        Job(model, images, "*"),
        lambda count: [Hooks(model, (images[:count], labels[:count]), sites)],
        replace(settings, seconds=5 * settings.seconds),  # many layers, each with its fixed costs
        group="networks",
        extra=lambda count, _: {
            "predicted_seconds": planned(network, settings.device).seconds / 1000 * count,
            **floor(planned(network, settings.device), count),
        },
    )
