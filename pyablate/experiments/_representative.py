"""Representative interpretations: a convex region round an image, and the images that share it.

After Lam, Chu, Torkamani, Pei, Zhang 2021, *Finding Representative Interpretations on Convolutional
Neural Networks*, arXiv:2108.06384.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyablate._validation import check_count, check_fraction, check_seed
from pyablate.experiments.units import one_layer, opened
from pyablate.network.forward import forward
from pyablate.network.model_checks import Ready
from pyablate.network.sites import Site, hooked, select
from pyablate.results.arrays import Floats, Ints
from pyablate.runtime.determinism import undisturbed

BATCH = 64
"""Images at a time, unless told otherwise."""


def representative(
    model: nn.Module,
    data: Any,
    image: int,
    layer: str | None = None,
    *,
    boundaries: int = 200,
    allowed: float = 0.0,
    seed: int = 0,
    batch_size: int = BATCH,
    axis: Mapping[str, int] | None = None,
    device: str | torch.device | None = None,
) -> Representative:
    """Find the linear decision boundaries that an image shares with many of its prediction.

    Behind a layer a network with ReLU is linear in pieces. At the activations of some image its
    class c and another class j are told apart by ``w . a + b > 0``, w the gradient of
    ``z_c - z_j``: a boundary. Of boundaries sampled at one half of the images, few are chosen whose
    common region holds the image in question, as few images as are ``allowed`` of other
    predictions, and many of the same one: greedily, each the one that excludes most others for each
    image of the same prediction that it loses (submodular cover at a submodular cost). How good the
    region is is measured on the other half.

    Parameters
    ----------
    model, data, axis, device
        As for :func:`pyablate.attributes`; the images are held in memory.
    image : int
        Number of the image in the data.
    layer : str, optional
        One layer, with or without positions; by default the last activation or block.
    boundaries : int
        How many are sampled, at most.
    allowed : float
        Share of the other images that the region may hold on the half on which it is chosen.
    seed : int
        Of halves and samples.
    batch_size : int
        Images at a time.

    Raises
    ------
    ValueError, TypeError
        Bad arguments, several layers, fewer than four images.

    Examples
    --------
    >>> found = pa.representative(model, data, 3)
    >>> bool(found.images.size), found.map.shape
    (True, (7, 7))
    """
    check_count("boundaries", boundaries)
    check_count("image", image, 0)
    check_count("batch_size", batch_size)
    check_fraction("allowed", allowed)
    check_seed(seed)
    with undisturbed(model, device), torch.inference_mode(False):
        ready = opened(model, data, {"device": device, "axis": axis})
        ready.data.hold()
        chosen = select(ready.sites, layer)
        site = chosen[-1] if layer is None else one_layer(chosen, layer)
        a, decided = _activations(ready, site, batch_size)
        if len(a) < 4 or image >= len(a):
            raise ValueError(f"image: expected one of at least 4 images, got {image} of {len(a)}")
        drawn = np.random.default_rng(seed).permutation(len(a))
        choosing = np.zeros(len(a), dtype=bool)
        choosing[drawn[: len(a) // 2]] = True
        choosing[image] = True
        c = int(decided[image])
        sample = [int(n) for n in drawn if choosing[n]][:boundaries]
        w, b, against = _sampled(ready, site, sample, c, batch_size)
    flat = a.flatten(1)
    inside: Any = (flat @ w.flatten(1).t() + b > 0).numpy()
    usable = np.flatnonzero(inside[image])
    same: Any = decided.numpy() == c
    picked = usable[greedy(inside[np.ix_(choosing, usable)], same[choosing], allowed)]
    held = inside[:, picked].all(1)
    covered = held & ~choosing
    near = (flat - flat[image]).norm(dim=1).numpy()
    rest = np.flatnonzero(~choosing)
    nearest = rest[np.argsort(near[rest], kind="stable")[: covered.sum()]]
    normal = w[picked] / w[picked].flatten(1).norm(dim=1).clamp(min=1e-12).reshape(
        -1, *[1] * (w.ndim - 1)
    )
    speaks = (normal.mean(0) * a[image]) if len(picked) else torch.zeros_like(a[image])
    numbers = np.flatnonzero(held)
    return Representative(
        layer=site.name,
        prediction=c,
        images=numbers[np.argsort(near[numbers], kind="stable")],
        against=against[picked],
        precision=_share(same[covered]),
        coverage=_share(held[~choosing & same]),
        neighbour_precision=_share(same[nearest]),
        map=speaks.sum(site.axis - 1).numpy(),
    )


@dataclass(frozen=True, eq=False)
class Representative:
    """A region round an image.

    Attributes
    ----------
    layer : str
        In whose activations.
    prediction : int
        Class of the image.
    images : ndarray
        int64, images in the region, the nearest first (the image itself).
    against : ndarray
        int64, the class from which each chosen boundary parts the prediction.
    precision, coverage : float
        On the half that chose nothing: share of the images in the region with the same prediction;
        share of the images with the same prediction that are in it. NaN of none.
    neighbour_precision : float
        Share with the same prediction of as many nearest images of that half (Euclidean distance
        of the activations), to compare.
    map : ndarray
        float32, shape of the layer's positions: what speaks for the side that the image is on, the
        mean of the boundaries' normals of length 1 times the activations, summed over the units.

    Examples
    --------
    >>> found = pa.representative(model, data, 3)
    >>> int(found.images[0]), 0 <= found.coverage <= 1
    (3, True)
    """

    layer: str
    prediction: int
    images: Ints
    against: Ints
    precision: float
    coverage: float
    neighbour_precision: float
    map: Floats


def greedy(inside: Any, same: Any, allowed: float) -> list[int]:
    """Choose columns of ``inside`` [image, boundary] that together exclude the other images.

    Ends when at most a share ``allowed`` of the images that are not ``same`` is inside all of them,
    or none excludes any more.
    """
    left = np.ones(len(inside), dtype=bool)
    picked: list[int] = []
    others = int((~same).sum())
    while inside.shape[1] and (left & ~same).sum() > allowed * others:
        out = ~inside[left]
        gain, loss = out[~same[left]].sum(0), out[same[left]].sum(0)
        ratio = gain / (loss + 1)
        best = int(ratio.argmax())
        if gain[best] == 0:
            break
        picked.append(best)
        left &= inside[:, best]
    return picked


def _seen(ready: Ready, site: Site, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the layer's activations as leaves of their graph."""
    leaves: list[Tensor] = []

    def see(_site: Site, _call: int, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # what follows may work in place

    with torch.enable_grad(), hooked(ready.model, [site], see):
        logits: Tensor = forward(ready.model, images)
    if len(leaves) != 1:
        raise ValueError(f'layer: {site.name} runs {len(leaves)} times; name one call, "name@1"')
    return logits, leaves[0]


def _activations(ready: Ready, site: Site, size: int) -> tuple[Tensor, Tensor]:
    parts, decided = [], []
    for batch in ready.data.batches(size):
        logits, leaf = _seen(ready, site, batch.images)
        parts.append(leaf.detach()[: len(batch)].cpu())
        decided.append(logits.detach().argmax(1).cpu())
    return torch.cat(parts), torch.cat(decided)


def _sampled(
    ready: Ready, site: Site, sample: list[int], c: int, size: int
) -> tuple[Tensor, Tensor, Ints]:
    """Boundaries of class c at some images: normals, offsets, and the classes they part it from.

    The other class is the one that is predicted, or, where that is c, the second.
    """
    normals, offsets, against = [], [], []
    for images in ready.data.at(torch.tensor(sample)).split(size):
        logits, leaf = _seen(ready, site, images.to(ready.batch.images.dtype))
        two = logits.detach().topk(2).indices
        other = torch.where(two[:, 0] == c, two[:, 1], two[:, 0])
        margin = logits[:, c] - logits.gather(1, other[:, None])[:, 0]
        (w,) = torch.autograd.grad(margin.sum(), leaf)
        w, rows = w[: len(images)], leaf.detach()[: len(images)]
        offsets.append((margin.detach() - (w * rows).flatten(1).sum(1)).cpu())
        normals.append(w.cpu())
        against.append(other.cpu())
    return torch.cat(normals), torch.cat(offsets), torch.cat(against).numpy()


def _share(values: Any) -> float:
    return float(values.mean()) if len(values) else float("nan")
