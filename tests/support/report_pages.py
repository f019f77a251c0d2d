"""Results and helpers for the tests of the report: structured damage, awkward names, decoding."""

from __future__ import annotations

import base64
import gzip
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from pyablate.result import AblationResult
from pyablate.results.audit import Audit
from support.simulated import simulate

AWKWARD = (
    "<script>window.hurt = 1</script>",
    "</script><img src=x onerror='window.hurt = 2'>",
    '" onmouseover="window.hurt = 3',
    "{{ data }} & &lt;b&gt; <!--",
    "na\u00efve \u2028 \U0001f600 class",
)

_TYPES = {"Uint8Array": "u1", "Uint16Array": "<u2", "Uint32Array": "<u4", "Int32Array": "<i4"}


def structured(
    units: int,
    classes: int,
    images: int,
    layers: int,
    names: tuple[str, ...] | None = None,
    seed: int = 0,
) -> AblationResult:
    """A result in which later layers hurt single classes and some units hurt many of them."""
    random = np.random.default_rng(seed)
    depth = np.arange(units) * layers // units
    chance = np.full((units, classes), 0.004)
    favourite = random.integers(0, classes, units)
    strong = random.random(units) < 0.3
    harm = strong * random.beta(1.2, 2.5, units) * (0.3 + 0.6 * depth / max(1, layers - 1))
    chance[np.arange(units), favourite] += harm
    broad = random.random(units) < 0.02
    chance[broad] += 0.08
    result = simulate(chance, 0.004, images, random, [f"block{d}.relu" for d in depth])
    from dataclasses import replace

    return replace(
        result,
        class_names=names or tuple(f"class {k}" for k in range(classes)),
        audit=Audit(300, 0),
        strategy={f"block{d}.relu": "delta" for d in range(layers)},
    )


def attributes_of(result: AblationResult, count: int, seed: int = 0) -> pd.DataFrame:
    """Made-up attributes, the first of which goes with the largest class drop."""
    random = np.random.default_rng(seed)
    columns = {f"attribute_{i}": random.normal(size=len(result.units)) for i in range(count)}
    columns["attribute_0"] = result.max_class_drop + 0.05 * columns["attribute_0"]
    return pd.DataFrame(columns, index=pd.Index(result.units["label"]))


def cells_of(result: AblationResult, seed: int = 0) -> xr.Dataset:
    """Made-up attributes of units, two of which have a value for each class."""
    random = np.random.default_rng(seed)
    shape = result.class_accuracy_drop.shape
    noise = random.normal(size=shape)
    return xr.Dataset(
        {
            "auc": ("unit", noise.max(axis=1), {"formula": "P(a > b)"}),
            "auc_per_class": (("unit", "class"), noise),
            "own": (("unit", "class"), result.class_accuracy_drop + 0.01 * noise),
        },
        coords={"unit": result.units["label"].tolist()},
    )


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of script and style elements."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data


def elements(page: str) -> Elements:
    parsed = Elements()
    parsed.feed(page)
    parsed.close()
    return parsed


def data_of(page: str) -> dict[str, Any]:
    """The data of a page, arrays decoded."""
    return decoded(json.loads(elements(page).scripts[0]))


def decoded(node: Any) -> Any:
    if isinstance(node, list):
        return [decoded(each) for each in node]
    if not isinstance(node, dict):
        return node
    if set(node) == {"type", "shape", "gzip"}:
        raw = gzip.decompress(base64.b64decode(node["gzip"]))
        kind = _TYPES.get(node["type"], "<f4")
        return np.frombuffer(raw, kind).reshape(node["shape"])
    return {name: decoded(value) for name, value in node.items()}


def shaded(result: AblationResult) -> torch.Tensor:
    """Images 100 x 60 whose grey tells their number."""
    shade = torch.arange(len(result.labels)) / (len(result.labels) - 1)
    return shade[:, None, None, None].expand(-1, 1, 100, 60) * 4 - 2  # as normalised ones may be
