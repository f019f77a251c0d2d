"""Attribution preservation: whether a changed network still looks at the same pixels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyablate._validation import check_choices, check_count, check_level
from pyablate.analysis.bootstrap import resample
from pyablate.attribution import similarity
from pyablate.attribution.collapsed import (
    VARIANTS,
    collapse,
    distances,
    draw_dropped,
    map_site,
    tapped,
)
from pyablate.attribution.maps import METHODS, attribution_maps
from pyablate.comparison.evaluation import Evaluation, evaluate, prepared_pair
from pyablate.data.dataset import Data
from pyablate.network.forward import device_of
from pyablate.network.sites import Site
from pyablate.results.arrays import Floats, Ints
from pyablate.runtime.determinism import undisturbed

logger = logging.getLogger("pyablate")

COLLAPSED = "collapsed"
Layers = tuple[str | None, str | None]


@dataclass(frozen=True, eq=False)
class Preservation:
    """How alike the attributions of two networks are, image by image.

    Attributes
    ----------
    maps : pandas.DataFrame
        One row per method and image: ``method``, ``image`` (its number in the data), ``target``
        (the class that both predict and that is explained), ``cosine``, ``pearson``,
        ``spearman``, ``ssim``, ``iou`` (of the pixels above the quantile); with masks also
        ``auc_before``, ``auc_after``, ``pointing_before``, ``pointing_after``. NaN where a figure
        is not defined, such as the cosine of a map of zeros.
    distances : pandas.DataFrame
        One row per image: ``image``, ``target``, and the weighted-collapsed-attribution distance in
        its variants ``weighted``, ``equal`` and ``stochastic``; NaN where one of the maps is zero.

    Examples
    --------
    >>> preserved = pa.compression.attributions_preserved
    >>> kept = preserved(model, model, data, methods="grad_cam", images=8)
    >>> kept.summary().shape[0] > 0
    True
    """

    maps: pd.DataFrame
    distances: pd.DataFrame

    def summary(
        self, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        """Mean of each figure over the images, with its percentile bootstrap interval.

        Parameters
        ----------
        resamples, confidence, seed
            Of the bootstrap over images.

        Returns
        -------
        pandas.DataFrame
            ``method`` (``"collapsed"`` for the distances), ``figure``, ``mean``, ``low``,
            ``high``, ``images`` (with a value) and ``undefined`` (without one).

        Raises
        ------
        ValueError
            ``resamples`` below 1 or ``confidence`` outside 0 to 1.
        """
        check_count("resamples", resamples)
        check_level("confidence", confidence)
        tables = [*self.maps.groupby("method", sort=False), (COLLAPSED, self.distances)]
        lines = []
        for method, table in tables:
            for figure in table.columns.difference(["method", "image", "target"], sort=False):
                values = table[figure].to_numpy(dtype=np.float64)
                head = {"method": method, "figure": figure}
                lines.append(head | _interval(values, resamples, confidence, seed))
        return pd.DataFrame(lines)


def attributions_preserved(
    model: nn.Module,
    smaller: nn.Module,
    data: Any,
    *,
    methods: str | Sequence[str] = METHODS,
    masks: Any = None,
    layers: Layers = (None, None),
    images: int | None = 128,
    quantile: float = 0.9,
    seed: int = 0,
    device: str | torch.device | None = None,
    batch_size: int = 64,
) -> Preservation:
    """Compare what two networks attribute their predictions to.

    Only images on which both predict the same class are looked at; that class is explained.

    Parameters
    ----------
    model, smaller : nn.Module
        The original and the other network: images ``[N, C, H, W]`` to logits ``[N, classes]``.
    data : pair of arrays, DataLoader or iterable of (images, labels)
        As for :func:`pyablate.ablate`.
    methods : str or sequence of str
        Of :func:`attribution_maps`: ``"grad_cam"``, ``"integrated_gradients"``, ``"lrp"``. Of a
        network for which LRP has no rule the figures are NaN, with a note in the log.
    masks : array, optional
        ``[N, H, W]``, not 0 where the object is, in the order of the data. With it come the ROC
        area of the pixels and whether the highest one lies in the mask.
    layers : pair of str or None
        Layer of either network for Grad-CAM and for the distances; None is the last activation or
        block with maps.
    images : int, optional
        Agreeing images, drawn at random; None takes all.
    quantile : float
        Of the pixels, above which they count as the top; between 0 and 1.
    seed : int
        Of the images drawn and of the channels that the stochastic distance leaves out.
    device : str or torch.device, optional
        Where to work; by default where the original is.
    batch_size : int
        Images at a time.

    Raises
    ------
    ImportError
        Captum or scikit-image is not installed.
    ValueError, TypeError
        Bad arguments or data, different classes, or no image on which the two agree.

    Examples
    --------
    >>> preserved = pa.compression.attributions_preserved
    >>> kept = preserved(model, model, data, methods="grad_cam", images=8)
    >>> round(float(kept.maps["cosine"].min()), 3)
    1.0
    """
    with undisturbed(model, smaller, device):
        original, other, dtype = prepared_pair(model, smaller, device)
        held = Data(data, dtype=dtype, device=device_of(original))
        held.hold()
        before = evaluate(original, held)
        after = evaluate(other, held)
        return preserved_between(
            original,
            other,
            held,
            before,
            after,
            methods=methods,
            masks=masks,
            layers=layers,
            count=images,
            quantile=quantile,
            seed=seed,
            batch_size=batch_size,
        )


def preserved_between(
    original: nn.Module,
    other: nn.Module,
    held: Data,
    before: Evaluation,
    after: Evaluation,
    *,
    methods: str | Sequence[str],
    masks: Any,
    layers: Layers = (None, None),
    count: int | None = 128,
    quantile: float = 0.9,
    seed: int = 0,
    batch_size: int = 64,
) -> Preservation:
    """As :func:`attributions_preserved`, of networks that were prepared and evaluated already."""
    names = check_choices("methods", methods, METHODS)
    check_level("quantile", quantile)
    if len(tuple(layers)) != 2:
        raise ValueError(f"layers: expected two names, one per network, got {layers!r}")
    chosen = _agreeing(before, after, count, seed)
    target = torch.from_numpy(before.prediction[chosen])
    pictures = held.at(torch.from_numpy(chosen))
    inside = None if masks is None else _masks(masks, pictures, len(before.labels))[chosen]
    head = {"image": chosen, "target": before.prediction[chosen]}
    tables = [
        pd.DataFrame({"method": name, **head, **figures})
        for name in names
        for figures in [
            _figures(
                *_both_maps(original, other, pictures, target, name, layers, batch_size),
                inside=inside,
                quantile=quantile,
            )
        ]
    ]
    apart = _distances(original, other, pictures, target, layers, seed, batch_size)
    columns = ["method", *head]
    maps = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
    return Preservation(maps, pd.DataFrame({**head, **apart}))


def _both_maps(
    original: nn.Module,
    other: nn.Module,
    images: Tensor,
    target: Tensor,
    method: str,
    layers: Layers,
    batch_size: int,
) -> tuple[Floats, Floats]:
    found = []
    for network, layer in zip((original, other), layers, strict=True):
        try:
            maps = attribution_maps(
                network, images, target, method, layer=layer, batch_size=batch_size
            )
        except ValueError as error:
            if method != "lrp" or not str(error).startswith("method:"):
                raise
            logger.warning("compare: figures of lrp are NaN: %s", error)
            maps = np.full((len(images), *images.shape[2:]), np.nan)
        found.append(maps)
    return found[0], found[1]


def _figures(
    a: Floats, b: Floats, *, inside: NDArray[np.bool_] | None, quantile: float
) -> dict[str, Floats]:
    """All figures of two sets of maps; NaN everywhere if one set is."""
    known = bool(np.isfinite(a).all() and np.isfinite(b).all())
    nothing = np.full(len(a), np.nan)
    figures = {
        "cosine": similarity.cosine(a, b) if known else nothing,
        "pearson": similarity.pearson(a, b) if known else nothing,
        "spearman": similarity.spearman(a, b) if known else nothing,
        "ssim": similarity.structure(a, b) if known else nothing,
        "iou": similarity.top_overlap(a, b, quantile) if known else nothing,
    }
    if inside is not None:
        for name, maps in (("before", a), ("after", b)):
            there = bool(np.isfinite(maps).all())
            figures[f"auc_{name}"] = similarity.pixel_auc(maps, inside) if there else nothing
            pointing = similarity.points_inside(maps, inside) if there else nothing
            figures[f"pointing_{name}"] = pointing
    return figures


def _distances(
    original: nn.Module,
    other: nn.Module,
    images: Tensor,
    target: Tensor,
    layers: Layers,
    seed: int,
    batch_size: int,
) -> dict[str, Floats]:
    """Distance of the collapsed maps in every variant; NaN where one is zero."""
    pairs = [
        (network, map_site(network, images[:1], layer))
        for network, layer in zip((original, other), layers, strict=True)
    ]
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {variant: [] for variant in VARIANTS}
    for part, classes in zip(images.split(batch_size), target.split(batch_size), strict=True):
        dropped = draw_dropped(len(part), pairs[0][1].channels, generator).to(part.device)
        for variant in VARIANTS:
            maps = [
                _collapsed(network, site, part, classes.to(part.device), variant, left_out)
                for (network, site), left_out in zip(pairs, (dropped, None), strict=True)
            ]
            apart = distances(*maps).double()
            silent = [one.flatten(1).abs().amax(1) == 0 for one in maps]
            found[variant].append(apart.masked_fill(silent[0] | silent[1], np.nan).cpu())
    return {variant: torch.cat(parts).numpy() for variant, parts in found.items()}


def _collapsed(
    network: nn.Module,
    site: Site,
    images: Tensor,
    classes: Tensor,
    variant: str,
    dropped: Tensor | None,
) -> Tensor:
    logits, output = tapped(network, site, images)
    left_out = dropped if variant == "stochastic" else None
    return collapse(site, logits, output, classes, variant, dropped=left_out).detach()


def _agreeing(before: Evaluation, after: Evaluation, count: int | None, seed: int) -> Ints:
    """Images of which both predict the same class, some of them drawn, ascending."""
    agreeing = np.flatnonzero(before.prediction == after.prediction)
    if count is not None:
        check_count("images", count)
    if len(agreeing) == 0:
        raise ValueError("data: the two networks agree on no image; there are no maps to compare")
    if count is None or count >= len(agreeing):
        return agreeing
    drawn = np.random.default_rng(seed).choice(agreeing, count, replace=False)
    return np.sort(drawn)


def _masks(masks: Any, images: Tensor, count: int) -> NDArray[np.bool_]:
    given = np.asarray(masks.cpu() if isinstance(masks, Tensor) else masks)
    found: NDArray[np.bool_] = given != 0
    expected = (count, *images.shape[2:])
    if found.shape != expected:
        raise ValueError(f"masks: expected {list(expected)}, got {list(found.shape)}")
    return found


def _interval(values: Floats, resamples: int, confidence: float, seed: int) -> dict[str, Any]:
    finite = values[np.isfinite(values)]
    counts = {"images": len(finite), "undefined": len(values) - len(finite)}
    if not len(finite):
        return {"mean": np.nan, "low": np.nan, "high": np.nan, **counts}
    drawn = resample(len(finite), resamples, np.random.default_rng(seed)) @ finite / len(finite)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"mean": float(finite.mean()), "low": float(low), "high": float(high), **counts}
