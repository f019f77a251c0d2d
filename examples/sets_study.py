"""Which units back each other up: all pairs of a layer, and what pairs that do have in common.

    python examples/sets_study.py [--images 1000]

All pairs of units of one layer of a shipped network are ablated, on two halves of the images apart,
so that what is found on one half can be looked for on the other. Each run is a file in the folder:
a killed study goes on where it stopped. Writes docs/results/sets.md and its picture; some nine
minutes of one core. Needs matplotlib and scikit-learn: ``pip install 'pyablate[plot,patterns]'``.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sets_page import BEYOND, write
from sets_statistics import (
    Comparison,
    Floats,
    Halves,
    Ints,
    compared,
    mean_of_pairs,
    repeated,
    square,
    tossed,
)
from torch import Tensor, nn

import pyablate as pa
from pyablate.analysis.clusters import profile_distances
from pyablate.analysis.statistics import adjusted, mcnemar
from pyablate.experiments.split import split

NETWORK, LAYER, INCOMING, OUTGOING = "alexnet", "features.7", "features.6", "features.8"
SHUFFLES = 1999
RESAMPLES = 1000
STRONGEST = 10
Images = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes
    ----------
    images : int
        In both halves together.
    units : int, optional
        Only the first units of the layer.
    shuffles, resamples : int
        Of every permutation test, and of every bootstrap interval.
    """

    images: int = 1000
    units: int | None = None
    shuffles: int = SHUFFLES
    resamples: int = RESAMPLES

    @property
    def chosen(self) -> range | None:
        """Units as `pa.pairs` takes them."""
        return None if self.units is None else range(self.units)


@dataclass(frozen=True)
class Reading:
    """Synergies of all pairs by one measure of damage.

    Attributes
    ----------
    halves : tuple of ndarray
        float64 ``[pair]``, on either half of the images.
    mean, repeat : tuple of float
        Mean over the pairs on all images, and rank correlation between the halves; each with its
        interval.
    """

    halves: Halves
    mean: tuple[float, float, float]
    repeat: tuple[float, float, float]


def halves(setting: Setting) -> tuple[Images, Images]:
    """Return two random halves of the images, class by class."""
    parts = split(pa.demo.load(NETWORK, limit=setting.images)[1:], seed=0)
    return parts.choosing, parts.measuring


def kept(path: Path, measure: Callable[[], pa.AblationResult]) -> pa.AblationResult:
    """Read a result, after measuring and writing it if it is not there."""
    if not path.exists():
        partial = path.with_suffix(".part")
        shutil.rmtree(partial, ignore_errors=True)
        measure().save(partial)
        partial.rename(path)
    return pa.load(path)


def measured(setting: Setting, folder: Path) -> tuple[list[pa.AblationResult], pa.AblationResult]:
    """Units and pairs of the layer: on either half exactly, and screened on both together."""
    model, parts = pa.demo.network(NETWORK), halves(setting)
    key = f"{setting.images}-{setting.units or 'all'}"
    common = {"units": setting.chosen, "class_names": pa.demo.CLASSES, "progress": False}

    def exact(part: Images) -> pa.AblationResult:
        # In float32: the loss is as exact as what decides the predictions, and synergies are small.
        options = {"measures": ["loss"], "precision": "fp32", **common}
        return pa.pairs(model, part, LAYER, **options).result

    def screened() -> pa.AblationResult:
        every = torch.cat([parts[0][0], parts[1][0]]), torch.cat([parts[0][1], parts[1][1]])
        return pa.pairs(model, every, LAYER, guarantee="screened", **common).result

    results = [
        kept(folder / f"{key}-{number}.zarr", lambda part=part: exact(part))
        for number, part in enumerate(parts)
    ]
    return results, kept(folder / f"{key}-screened.zarr", screened)


def beyond(damage: Floats, units: int) -> Floats:
    """Synergy of each pair: what ``[unit or pair, ...]`` has beyond the sum of the pair's units."""
    first, second = np.triu_indices(units, 1)
    synergy: Floats = damage[units:] - damage[first] - damage[second]
    return synergy


def broken(result: pa.AblationResult) -> NDArray[np.int8]:
    """Synergy on each image, int8 ``[pair, image]``: its mean is the interaction of `pa.pairs`."""
    intact = (result.baseline == result.labels).astype(np.int8)
    wrong = intact - (result.predictions() == result.labels).astype(np.int8)
    return beyond(wrong, count_of_units(result))


def count_of_units(result: pa.AblationResult) -> int:
    """Units of a result that holds them and then all their pairs: n (n + 1) / 2 rows."""
    return round((np.sqrt(8 * len(result.units) + 1) - 1) / 2)


def added(images: Tensor, labels: Tensor, units: int) -> Floats:
    """Synergy of each pair by loss if what two units do to the logits simply added up.

    The loss is convex in the logits, so that two units which lower the same one do more harm
    together than apart even where nothing in the network interacts: float64 ``[pair]``.
    """
    model, gone = pa.demo.network(NETWORK), [0]

    def without(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, gone] = 0
        return output

    with torch.no_grad():
        intact = model(images).double()
        handle = model.get_submodule(LAYER).register_forward_hook(without)
        changes = []
        for unit in range(units):
            gone[:] = [unit]
            changes.append(model(images).double() - intact)
        handle.remove()

    def loss(logits: Tensor) -> float:
        return float(nn.functional.cross_entropy(logits, labels))

    single = [loss(intact + change) for change in changes]
    return np.array(
        [
            loss(intact + changes[i] + changes[j]) - single[i] - single[j] + loss(intact)
            for i, j in itertools.combinations(range(units), 2)
        ]
    )


def activations(images: Tensor) -> Floats:
    """Mean over positions of each unit on each image: float64 ``[unit, image]``."""
    model, seen = pa.demo.network(NETWORK), []
    handle = model.get_submodule(LAYER).register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.double().mean(dim=(2, 3)))
    )
    with torch.no_grad():
        model(images)
    handle.remove()
    return torch.cat(seen).numpy().T


def profiles(results: Sequence[pa.AblationResult], images: Sequence[Tensor]) -> dict[str, Halves]:
    """Return what units are compared by, on either half: float64 ``[unit, feature]``."""
    units, model = count_of_units(results[0]), pa.demo.network(NETWORK)
    incoming = model.get_submodule(INCOMING).weight.detach().double().flatten(1)
    outgoing = model.get_submodule(OUTGOING).weight.detach().double().transpose(0, 1).flatten(1)
    drops, losses, active = (
        tuple(np.asarray(values)[:units] for values in both)
        for both in (
            [result.class_accuracy_drop for result in results],
            [result.class_loss_change for result in results],
            [activations(part) for part in images],
        )
    )
    weights = [(np.asarray(w)[:units],) * 2 for w in (incoming, outgoing)]
    return {
        "class drops": drops,
        "class losses": losses,
        "activations": active,
        "incoming filters": weights[0],
        "outgoing filters": weights[1],
    }


def distances(
    units: int, readings: Mapping[str, Reading], seen: Mapping[str, Halves]
) -> tuple[dict[str, Halves], Ints]:
    """Distances of the units on either half, ``[unit, unit]``, and the units that have them all.

    Of synergies the negative: units that back each other up are close. A unit whose activations
    are the same on all images of a half has nothing to compare and stays out; one without any class
    drop is at distance 1 from all others, as profiles at right angles are.
    """
    constant = [np.ptp(part, axis=1) == 0 for part in seen["activations"]]
    inside = np.flatnonzero(~np.any(constant, axis=0))
    if len(inside) < 4:
        raise ValueError(f"units: expected at least 4 that are ever active, got {len(inside)}")
    within = np.ix_(inside, inside)
    found: dict[str, Halves] = {}
    for name, reading in readings.items():
        halves_of = tuple(-square(half, units)[within] for half in reading.halves)
        found[f"synergy, {name}"] = halves_of
    for name, rows in seen.items():
        metric = "correlation" if name == "activations" else "cosine"
        apart = [np.nan_to_num(profile_distances(part[inside], metric), nan=1.0) for part in rows]
        found[name] = tuple(square(half, len(inside)) for half in apart)
    return found, inside


@dataclass(frozen=True)
class Found:
    """All that the page tells.

    Attributes
    ----------
    network, layer : str
        Which.
    units, images : int
        How many.
    results : sequence of AblationResult
        Units and pairs on either half, exact.
    screened : AblationResult
        The same on all images, screened.
    other_predictions, other_pairs : int
        Predictions that differ between exact and screened, and pairs whose synergy does.
    readings : dict of str to Reading
        "accuracy", "loss", and what of the latter is beyond added logits.
    signs : pandas.DataFrame
        One row per pair, on all images: ``more``, ``less``, ``p``, ``q`` as in `pa.pairs`.
    tossed : ndarray
        int64 ``[toss]``, pairs with p at most 0.05 when the signs of images are tossed.
    strongest : pandas.DataFrame
        The pairs with the largest synergy on one half, and what they have on the other.
    inside : ndarray
        Units that have all the profiles.
    comparisons : list of Comparison
        Of the ways to compare units.
    """

    network: str
    layer: str
    units: int
    images: int
    results: Sequence[pa.AblationResult]
    screened: pa.AblationResult
    other_predictions: int
    other_pairs: int
    readings: dict[str, Reading]
    signs: pd.DataFrame
    tossed: Ints
    strongest: pd.DataFrame
    inside: Ints
    comparisons: list[Comparison]

    @property
    def best(self) -> str:
        """Name of the reading whose synergies repeat better on other images."""
        return best_of(self.readings)


def best_of(readings: Mapping[str, Reading]) -> str:
    """Name of the reading, accuracy or loss, whose synergies repeat better on other images."""

    def how_well(name: str) -> float:
        r = readings[name].repeat[0]
        return -2.0 if np.isnan(r) else r  # equal synergies have no correlation

    return max(("accuracy", "loss"), key=how_well)


def strongest(results: Sequence[pa.AblationResult], reading: str) -> pd.DataFrame:
    """Pairs with the largest synergy on the first half: what they have there and on the second.

    The class is that with the largest synergy on the first half; damages are of the second.
    """
    of_loss = reading == "loss"
    units = count_of_units(results[0])
    overall = [r.loss_change if of_loss else r.accuracy_drop for r in results]
    by_class = [r.class_loss_change if of_loss else r.class_accuracy_drop for r in results]
    chosen, measuring = (beyond(damage, units) for damage in overall)
    rows = np.argsort(-chosen, kind="stable")[:STRONGEST]
    first, second = (side[rows] for side in np.triu_indices(units, 1))
    cells, others = (beyond(damage, units)[rows] for damage in by_class)
    worst = np.nanargmax(cells, axis=1)
    labels = results[0].units["label"].to_numpy(dtype=str)
    return pd.DataFrame(
        {
            "first": labels[first],
            "second": labels[second],
            "chosen": chosen[rows],
            "measured": measuring[rows],
            "alone": overall[1][first],
            "other_alone": overall[1][second],
            "joint": overall[1][units:][rows],
            "class": np.array(results[0].class_names)[worst],
            "class_measured": others[np.arange(len(rows)), worst],
        }
    )


def study(setting: Setting, folder: Path) -> Found:
    """Measure what is missing and compare."""
    results, screened = measured(setting, folder)
    units = count_of_units(screened)
    both = [broken(result) for result in results]
    by_image = np.concatenate(both, axis=1)
    more, less = (by_image > 0).sum(axis=1), (by_image < 0).sum(axis=1)
    p = mcnemar(more, less)
    sizes = [len(result.labels) for result in results]
    parts = halves(setting)
    by_loss = tuple(beyond(result.loss_change, units) for result in results)
    expected = [added(*part, units) for part in parts]
    readings = {}
    for name, halves_of in (
        ("accuracy", tuple(part.mean(axis=1) for part in both)),
        ("loss", by_loss),
        (BEYOND, tuple(found - own for found, own in zip(by_loss, expected, strict=True))),
    ):
        every = np.average(halves_of, axis=0, weights=sizes)
        readings[name] = Reading(
            halves_of,
            mean_of_pairs(every, units, setting.resamples),
            repeated(*halves_of, units, setting.resamples),
        )
    exact = np.concatenate([result.predictions() for result in results], axis=1)
    ways, inside = distances(units, readings, profiles(results, [part[0] for part in parts]))
    return Found(
        NETWORK,
        LAYER,
        units,
        sum(sizes),
        results,
        screened,
        int((exact != screened.predictions()).sum()),
        int((by_image.sum(axis=1) != broken(screened).sum(axis=1)).sum()),
        readings,
        pd.DataFrame({"more": more, "less": less, "p": p, "q": adjusted(p)}),
        tossed(by_image, max(99, setting.shuffles // 5)),
        strongest(results, best_of(readings)),
        inside,
        compared(ways, setting.shuffles),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000, help="in both halves together")
    parser.add_argument("--units", type=int, help="only the first of the layer")
    parser.add_argument("--shuffles", type=int, default=SHUFFLES)
    parser.add_argument("--folder", type=Path, default=Path("sets_study"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/sets.md"))
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(options.images, options.units, options.shuffles)
    write(study(setting, options.folder), options.page)
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
