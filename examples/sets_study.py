"""Units that stand in for each other, units that belong together, and the smallest sets.

    python examples/sets_study.py                        # docs/results/sets.md, some minutes
    python examples/sets_study.py --images 200 --output /tmp/sets.md

All pairs of units of a layer are ablated, exactly and screened; clusters by damage are compared
with clusters by weights and by activations; for each class the smallest set of units is searched.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.cluster import hierarchy
from scipy.spatial import distance
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

import pyablate as pa

NETWORK = "vgg_bn"
PAIRED = "features.9"
LAYERS = {
    "features.2": "features.0",
    "features.6": "features.4",
    "features.9": "features.7",
    "features.13": "features.10",
    "features.16": "features.14",
}
"""Layers, and the convolution in which the weights of their units lie."""

TOP = "features.16"
CLUSTERS, FEWEST = 8, 10
SHUFFLES = 999
LEVEL = 0.05

Floats = NDArray[np.float64]


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("docs/results/sets.md"))
    options = parser.parse_args()
    model, images, labels = pa.demo.load(NETWORK, limit=options.images)
    parts = [
        introduction(options.images),
        backing(model, images, labels),
        belonging(model, images, labels),
        smallest(model, images, labels),
    ]
    options.output.write_text("\n\n".join(parts) + "\n")
    print(f"wrote {options.output}")


def introduction(images: int) -> str:
    """Say what was measured."""
    return f"""# Sets of units

Written by `python examples/sets_study.py --images {images}`; do not edit. The network is
`demo:{NETWORK}`, the images are the first {images:,} shipped ones, units are zeroed.
What the calls do is told in [experiments](../guides/experiments.md)."""


# --- pairs ----------------------------------------------------------------------------------------


def backing(model: nn.Module, images: Tensor, labels: Tensor) -> str:
    """Ablate all pairs of a layer both ways, and tell which of them interact."""
    found = pa.pairs(model, (images, labels), PAIRED, progress=False)
    other = pa.pairs(model, (images, labels), PAIRED, guarantee="screened", progress=False)
    differ = int((found.result.predictions() != other.result.predictions()).sum())
    known = other.result.screening
    assert known is not None
    table = found.data[["joint_drop", "interaction", "more", "less", "q"]].to_dataframe()
    single = dict(zip(found.data["unit"].to_numpy(), found.data["drop"].to_numpy(), strict=True))
    sure = table[table["q"] < LEVEL]
    up, down = (int((sign * sure["interaction"] > 0).sum()) for sign in (1, -1))
    lines = [
        (
            f"`{row.first}`, `{row.second}`",
            _points(single[row.first]),
            _points(single[row.second]),
            _points(row.joint_drop),
            _points(row.interaction),
            f"{row.q:.1g}",
        )
        for row in sure.sort_values("interaction", ascending=False).head(8).itertuples()
    ]
    shown = _table("units|drop|drop|together|interaction|q", lines) if lines else "None."
    computed = known.computed / max(1, known.pairs - known.total.silent)
    return f"""## Which pairs back each other up

All {len(table):,} pairs of the {len(single)} units of `{PAIRED}`. The interaction is the drop of
both together less the sum of the single drops, in points; images that say more or less than that
sum are counted by McNemar's test, q by Benjamini and Hochberg over all pairs. At q below {LEVEL}
**{up} pairs back each other up** (together they cost more) and {down} overlap (together they cost
less). Those that back each other up most:

{shown}

Screened, the same {known.pairs:,} predictions agree but for {differ}; {computed:.1%} of those that
an ablation changes were computed, and the certificate bounds the wrong ones by
{known.upper_bound:.1e}."""


# --- clusters -------------------------------------------------------------------------------------


def belonging(model: nn.Module, images: Tensor, labels: Tensor) -> str:
    """Compare distances by damage with distances by weights and by activations."""
    result = pa.ablate(model, (images, labels), list(LAYERS), progress=False)
    lines, agree = [], 0
    for layer, convolution in LAYERS.items():
        rows = np.flatnonzero(result.units["layer"] == layer)
        changed = (result.lost[rows] + result.gained[rows]).sum(axis=1)
        drops = result.class_accuracy_drop[rows]
        told = (changed >= FEWEST) & (np.abs(drops).max(axis=1) > 0)
        if told.sum() <= CLUSTERS:  # too few to be clustered
            continue
        weight = model.get_submodule(convolution).weight.detach().flatten(1).double().numpy()
        damage = distance.pdist(drops[told], "cosine")
        rivals = {
            "weights": distance.pdist(weight[told], "cosine"),
            "activations": distance.pdist(means(model, layer, images)[told], "correlation"),
        }
        for name, far in rivals.items():
            r, p = mantel(damage, far)
            alike = adjusted_rand_score(clusters(damage), clusters(far))
            agree += r > 0 and p * len(LAYERS) * len(rivals) < LEVEL
            lines.append((f"`{layer}`", str(told.sum()), name, _sign(r), f"{p:.3f}", _sign(alike)))
    count = len(lines)
    verdict = (
        f"In {agree} of {count} cases units that damage the same classes are alike otherwise "
        f"(correlation above 0, p times {count} below {LEVEL})"
    )
    return f"""## Do units that damage the same classes look alike?

Distances of units: by damage, the cosine of their accuracy drops by class; by weights, the cosine
of their filters; by activations, the correlation of their mean activation over the images. Units
that change fewer than {FEWEST} predictions are left out. The rank correlation of distances is
tested by shuffling units ({SHUFFLES} times; Mantel 1967), and the {CLUSTERS} clusters of average
linkage are compared by the adjusted Rand index, which is 0 for clusters that have nothing to do
with each other and 1 for equal ones. {verdict}.

{_table("layer|units|damage against|rank correlation|p|adjusted Rand index", lines)}"""


def means(model: nn.Module, layer: str, images: Tensor) -> Floats:
    """Mean activation of each unit on each image, float64 ``[unit, image]``."""
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda _module, _inputs, output: kept.append(output.flatten(2).mean(dim=2))
    )
    with torch.inference_mode():
        for part in images.split(256):
            model(part)
    handle.remove()
    return torch.cat(kept).t().double().numpy()


def mantel(first: Floats, second: Floats, *, seed: int = 0) -> tuple[float, float]:
    """Rank correlation of two condensed distances, and its one-sided p by shuffled units.

    Mantel 1967, The detection of disease clustering and a generalized regression approach.
    """
    draw = np.random.default_rng(seed)
    one, other = (stats.rankdata(each) for each in (first, second))
    square = distance.squareform(other)
    found = float(np.corrcoef(one, other)[0, 1])
    reached = 0
    for _ in range(SHUFFLES):
        order = draw.permutation(len(square))
        shuffled = distance.squareform(square[np.ix_(order, order)], checks=False)
        reached += np.corrcoef(one, shuffled)[0, 1] >= found
    return found, (1 + reached) / (1 + SHUFFLES)


def clusters(far: Floats) -> NDArray[np.int64]:
    """Cut the tree of average linkage."""
    tree = hierarchy.linkage(np.maximum(far, 0.0), "average")
    return hierarchy.fcluster(tree, CLUSTERS, criterion="maxclust").astype(np.int64)


# --- smallest sets --------------------------------------------------------------------------------


def smallest(model: nn.Module, images: Tensor, labels: Tensor) -> str:
    """Search the smallest set of each class, all pairs included."""
    names = pa.demo.CLASSES
    found = pa.minimal_sets(
        model, (images, labels), TOP, exhaust=2, class_names=names, audit=0, progress=False
    )
    shown = found.shown
    lines = [
        (
            row["class"],
            row["size"] if row["reached"] else "none found",
            row["minimal"],
            _points(row["baseline_accuracy"]),
            _points(row["accuracy"]) if row["reached"] else "",
            _points(row["others_drop"]) if row["reached"] else "",
        )
        for row in shown.to_dict("records")
    ]
    proved = int((found.table["minimal"] & found.table["reached"]).sum())
    head = "class|units|minimal|accuracy before|without them|others lose"
    return f"""## Smallest sets

For each class, units of `{TOP}` whose removal takes it to chance, found on half of the images and
measured on the other. Single units and all pairs were tried; what three do together is bounded by
nothing that is known of fewer, so that larger sets are not proved to be the smallest. {proved} of
{len(lines)} are.

{_table(head, lines)}"""


# --- text -----------------------------------------------------------------------------------------


def _table(head: str, lines: list[tuple[object, ...]]) -> str:
    names = head.split("|")
    rows = [names, ["---"] * len(names), *(list(map(str, line)) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _points(share: float) -> str:
    return f"{100 * share:.2f}"


def _sign(value: float) -> str:
    return f"{value:+.2f}"


if __name__ == "__main__":
    main()
