"""CPU seconds of screened and estimated runs of a large network, beside exact ones and `cached`.

All units of such a network take hours exactly, so the exact run takes every eighth unit of a layer,
`cached` two of these, and their times are scaled to all units. Screened and estimated runs are
whole calls for all units, capture and thresholds included. One thread; the answers are compared on
the units of the exact run::

    python benchmarks/screened_speed.py EfficientNet-Lite0 --images 64      # an hour and a half
    python benchmarks/screened_speed.py resnet50 --images 32 --layers layer2.1.act2 layer3.1.act2

Each run is noted in ``--output`` as it ends.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_screening import flips
from rivals import Cached
from subjects import LITE_SIZES, cut, efficientnet_lite, photograph_crops
from timm_networks import random_classifier
from torch import Tensor, nn

import pyablate as pa

RUNS = ("cached", "exact", "estimated", "screened")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("network", help="EfficientNet-Lite0 or 2, or a network of timm, drawn")
    add("--images", type=int, default=64, help="crops of photographs")
    add("--layers", nargs="+", default=["*"])
    add("--every", type=int, default=8, help="the exact run takes one unit of so many")
    add("--budget", default="2%", help="of the estimated run")
    add("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    add("--store", type=Path, help="where the screened run is kept")
    add("--output", type=Path, default=Path(".benchmarks/screened_speed.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    model, images = subject(options.network, options.images)
    pa.ablate(pa.demo.network("vgg_bn"), pa.demo.images(2), "*", progress=False)  # loads libraries
    exact: pa.AblationResult | None = None
    for run in options.runs:
        if run == "cached":
            found = cached(model, images, options.layers, options.every)
        elif run == "exact":
            found, exact = exactly(model, images, options.layers, options.every)
        else:
            more = {"budget": options.budget} if run == "estimated" else {"output": options.store}
            found = otherwise(model, images, options.layers, run, exact, **more)
        found = {"network": options.network, "images": options.images, "run": run, **found}
        print(json.dumps(found), flush=True)
        with options.output.open("a") as file:
            print(json.dumps(found), file=file)


def subject(network: str, count: int) -> tuple[nn.Module, Tensor]:
    """Make a network and its images."""
    if network.startswith("EfficientNet-Lite"):
        number = int(network[-1])
        return efficientnet_lite(number), photograph_crops(count, LITE_SIZES[number])
    images = photograph_crops(count)
    return random_classifier(network, images), images


def chosen(model: nn.Module, images: Tensor, layers: list[str]) -> list[Any]:
    """Sites of the layers."""
    return list(pa.select(pa.sites(model, images[:1]), layers))


def cached(model: nn.Module, images: Tensor, layers: list[str], every: int) -> dict[str, Any]:
    """Time `cached` on two units of each layer, one layer after the other."""
    total, by_layer = 0.0, {}
    for site in chosen(model, images, layers):
        asked = list(range(0, site.channels, every))
        rival = Cached(
            cut(model, site.name),
            images,
            site.name,
            site.axis,
            asked,
            compiling=False,
            units_timed=2,
            clock=time.process_time,
        )
        rival.total = site.channels
        by_layer[site.name] = rival.seconds()
        total += by_layer[site.name]
    return {"seconds": total, "by_layer": by_layer}


def exactly(
    model: nn.Module, images: Tensor, layers: list[str], every: int
) -> tuple[dict[str, Any], pa.AblationResult]:
    """Ablate every so many-th unit; the sweep's time is scaled, that of its preparation is not."""
    sites = chosen(model, images, layers)
    labels = [site.label(unit) for site in sites for unit in range(0, site.channels, every)]
    units = sum(site.channels for site in sites)
    marks: list[float] = []

    def progress(*_: Any) -> None:
        marks.append(time.process_time())

    begin = time.process_time()
    result = pa.ablate(model, (images,), labels, audit=0, progress=progress)
    ready, end = marks[0] - begin, time.process_time() - marks[0]
    found = {
        "units": units,
        "seconds": ready + end * units / len(labels),
        "units_timed": len(labels),
        "preparation": ready,
        "sweep": end,
        "flips": len(result.flips.row),
    }
    return found, result


def otherwise(
    model: nn.Module,
    images: Tensor,
    layers: list[str],
    guarantee: str,
    exact: pa.AblationResult | None,
    **options: Any,
) -> dict[str, Any]:
    """Run all units by another guarantee, and compare with the exact run."""
    begin = time.process_time()
    result = pa.ablate(
        model, (images,), layers, audit=0, guarantee=guarantee, progress=False, **options
    )
    found: dict[str, Any] = {"seconds": time.process_time() - begin, "units": len(result.units)}
    if result.screening is not None:
        known = result.screening
        found |= {
            "pairs": known.pairs,
            "silent": known.total.silent,
            "computed": known.computed,
            "sampled": known.sampled,
            "wrong": known.wrong,
            "certificate": known.upper_bound,
            "flips": len(result.flips.row),
            "by_layer": known.to_dataframe()[["layer", "pairs", "silent", "computed"]].to_dict(
                "list"
            ),
        }
    if exact is None:
        return found
    rows = result.rows(list(exact.units["label"]))
    if result.screening is not None:
        new = {row: number for number, row in enumerate(rows.tolist())}
        right = flips(exact)
        mine = {(new[r], i, p) for r, i, p in flips(result) if r in new}
        found |= {"missed": len(right - mine), "other": len(mine - right), "of": len(right)}
        return found
    width = result.half_width("accuracy_drop")[rows]
    error = result.accuracy_drop[rows] - exact.accuracy_drop
    return found | {
        "half_width_mean": float(width.mean()),
        "half_width_most": float(width.max()),
        "error_rms": float(np.sqrt(np.mean(error**2))),
        "inside": float(np.mean(np.abs(error) <= width + 1e-12)),
    }


if __name__ == "__main__":
    main()
