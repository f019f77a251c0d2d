"""What is measured on each network, kept on disk so that a broken run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import pyablate as pa
from paper import analysis
from paper.networks import Network

SEED = 0  # of splits, rotations, random orders and resamples
RANKINGS = {"selectivity": "class_selectivity", "L1 norm": "l1_norm"}
CELL_SAMPLES = 8  # times as many sampled images where every class needs some
CURVE_ORDERS = ("measured drop", *RANKINGS, "random")


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes
    ----------
    images, glyph_images : int
        Images of ablations, attributes and curves, of either data set.
    rotation_images, rotations : int
        Images and random bases of the rotation control.
    sample : int
        Images of the attributes that look at a sample.
    repeats, steps : int
        Random orders, and points of a cumulative curve.
    resamples : int
        Of every bootstrap interval.
    """

    images: int = 4000
    glyph_images: int = 6000
    rotation_images: int = 3000
    rotations: int = 2
    sample: int = 48
    repeats: int = 5
    steps: int = 16
    resamples: int = 1000


FULL = Extent()
QUICK = Extent(
    images=240,
    glyph_images=240,
    rotation_images=240,
    rotations=1,
    sample=16,
    repeats=2,
    steps=4,
    resamples=50,
)


@dataclass(frozen=True)
class Measured:
    """All measurements of one network, made when first asked for and then read from disk.

    Attributes
    ----------
    network : Network
        Which.
    extent : Extent
        How much.
    cache : Path
        Folder of all networks; files of other weights or extents are never read.
    """

    network: Network
    extent: Extent
    cache: Path

    @cached_property
    def folder(self) -> Path:
        """Folder of these measurements."""
        extent = asdict(self.extent) | {"images": self._limit, "glyph_images": None}
        known = [self.network.digest, extent, pa.build_info()["version"]]
        key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
        folder = self.cache / f"{self.network.name}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def _limit(self) -> int:
        glyphs = self.network.family.reads_glyphs
        return self.extent.glyph_images if glyphs else self.extent.images

    @property
    def _images(self) -> tuple[Tensor, Tensor]:
        return self.network.images(self._limit)

    @cached_property
    def result(self) -> pa.AblationResult:
        """Every unit of every layer, one at a time, replaced by zero; with the loss."""
        path = self.folder / "ablation.zarr"
        if not path.exists():
            made = pa.ablate(
                self.network.model(),
                self._images,
                class_names=self.network.class_names,
                seed=SEED,
                measures=["loss"],
            )
            partial = path.with_name("unfinished.zarr")
            shutil.rmtree(partial, ignore_errors=True)
            made.save(partial)
            partial.rename(path)
        return pa.load(path)

    @cached_property
    def attributes(self) -> pd.DataFrame:
        """One row per unit label, one column per attribute."""

        def make() -> pd.DataFrame:
            found = pa.attributes(
                self.network.model(),
                self._images,
                sample=self.extent.sample,
            )
            single = [name for name, values in found.items() if values.dims == ("unit",)]
            return found[single].to_dataframe()[single].rename_axis("label").reset_index()

        return self._kept("attributes.csv", make).set_index("label")

    @cached_property
    def correlations(self) -> pd.DataFrame:
        """Spearman correlations of all attributes with all targets: `pa.correlate`."""
        return self._kept(
            "correlations.csv",
            lambda: pa.correlate(
                self.result,
                self.attributes,
                attributes=[name for name in self.attributes if not name.endswith("_class")],
                targets=list(analysis.TARGETS),
                methods=["spearman"],
                resamples=self.extent.resamples,
                shuffles=50,
                seed=SEED,
            ),
        )

    @cached_property
    def cells(self) -> pd.DataFrame:
        """What attributes say of a class against the drop of that class: `analysis.cells`."""

        def make() -> pd.DataFrame:
            images, labels = self._images
            half = analysis.half_of(labels.numpy(), SEED)
            found = pa.attributes(
                self.network.model(),
                (images[half], labels[half]),
                which=list(analysis.OF_CELLS),
                class_names=self.network.class_names,
                sample=CELL_SAMPLES * self.extent.sample,
            )
            return analysis.cells(
                self.result, found, half, resamples=self.extent.resamples // 5, seed=SEED
            )

        return self._kept("cells.csv", make)

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """Draws of mean correlations: see `analysis.prediction_draws`."""
        return self._kept(
            "predictions.csv",
            lambda: analysis.prediction_draws(
                self.result, self.attributes, resamples=self.extent.resamples, seed=SEED
            ),
        )

    @cached_property
    def _control(self) -> pa.RotationControl:
        return pa.rotation_control(
            self.network.model(),
            self.network.images(self.extent.rotation_images),
            self.network.family.top,
            rotations=self.extent.rotations,
            resamples=self.extent.resamples,
            seed=SEED,
            class_names=self.network.class_names,
        )

    @cached_property
    def rotation(self) -> pd.DataFrame:
        """Units against random directions of the top layer: `pa.rotation_control`."""
        return self._kept("rotation.csv", lambda: self._control.table)

    @cached_property
    def rotated_axes(self) -> pd.DataFrame:
        """`analysis.axes` of units and of directions, told apart by the column ``side``."""

        def make() -> pd.DataFrame:
            sides = {"units": self._control.units, "rotated": self._control.rotated}
            return pd.concat(
                [analysis.axes(result).assign(side=side) for side, result in sides.items()]
            )

        return self._kept("axes.csv", make)

    @cached_property
    def curves(self) -> pd.DataFrame:
        """Accuracy against units removed from the top layer: `pa.cumulative`."""

        def make() -> pd.DataFrame:
            top = self.attributes[
                self.attributes.index.str.startswith(self.network.family.top + ":")
            ]
            order = {title: top[name] for title, name in RANKINGS.items()}
            found = pa.cumulative(
                self.network.model(),
                self._images,
                self.network.family.top,
                order={"measured drop": "drop"} | order | {"random": "random"},
                steps=self.extent.steps,
                repeats=self.extent.repeats,
                seed=SEED,
                class_names=self.network.class_names,
            )
            columns = ["order", "repeat", "removed", "kept", "accuracy"]
            return found.to_dataframe()[columns]

        return self._kept("curves.csv", make)

    def _kept(self, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """Read a table, after making and writing it if it is not there."""
        path = self.folder / name
        if not path.exists():
            partial = path.with_suffix(".unfinished")
            make().to_csv(partial, index=False)
            os.replace(partial, path)
        return pd.read_csv(path)


STAGES = (
    "result",
    "attributes",
    "correlations",
    "cells",
    "predictions",
    "rotation",
    "rotated_axes",
    "curves",
)
"""Names of the measurements, in the order in which they need each other."""


def areas(curves: pd.DataFrame) -> pd.Series:
    """Area under each order's curve over the share of units removed, mean of its repeats."""

    def area(curve: pd.DataFrame) -> float:
        share = curve["removed"] / curve["removed"].max()
        return float(np.trapezoid(curve["accuracy"], share))

    of_each = {key: area(curve) for key, curve in curves.groupby(["order", "repeat"], sort=False)}
    return pd.Series(of_each).groupby(level=0, sort=False).mean()


def side_by_side(studied: Sequence[Measured], processes: int) -> Iterator[str]:
    """Measure what is missing of all networks; give what took how long of each.

    The last ones are the largest: they come first, so that none keeps one core busy at the end.
    """
    with ProcessPoolExecutor(processes, get_context("spawn"), _alone) as pool:
        yield from pool.map(_measure, reversed(studied))


def _alone() -> None:
    """Compute on one thread, beside other processes."""
    torch.set_num_threads(1)
    logging.getLogger("pyablate").setLevel(logging.ERROR)


def _measure(measured: Measured) -> str:
    lines = [measured.network.name]
    for stage in STAGES:
        start = time.monotonic()
        getattr(measured, stage)
        lines.append(f"    {stage}: {time.monotonic() - start:.1f} s")
    return "\n".join(lines)
