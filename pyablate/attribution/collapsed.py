"""Attribution maps of one layer, collapsed over its channels: compared, and trained to be kept.

The maps and their distance are those of Park, Yang, Hwang, Yang 2020, *Attribution Preservation in
Network Compression for Reliable Network Interpretation*, arXiv:2010.15054.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyablate.network.classifier import giving_logits
from pyablate.network.sites import Site, hooked, select, sites

VARIANTS = ("weighted", "equal", "stochastic")
DROPPED = 0.3
"""Share of the original's channels that the stochastic variant leaves out."""


def map_site(model: nn.Module, sample: Tensor, layer: str | None = None) -> Site:
    """Find a layer with maps: by default the last activation or block with positions."""
    found = sites(model, sample)
    if layer is None:
        spatial = [site for site in select(found) if len(site.shape) > 1]
        if not spatial:
            raise ValueError("layer: no layer of this network has positions; there are no maps")
        return spatial[-1]
    chosen = select(found, layer)
    if len(chosen) != 1 or len(chosen[0].shape) < 2:
        shapes = ", ".join(f"{site.name} {list(site.shape)}" for site in chosen)
        raise ValueError(f"layer: expected one layer with channels and positions, got {shapes}")
    return chosen[0]


def tapped(model: nn.Module, site: Site, images: Tensor) -> tuple[Tensor, Tensor]:
    """Run a network and see one layer on the way: logits ``[N, classes]`` and its output.

    The layer is called once; its output is part of the graph of the logits.
    """
    seen: list[Tensor] = []

    def see(_site: Site, _call: int, output: Tensor) -> Tensor:
        seen.append(output if output.requires_grad else output.detach().requires_grad_())
        return seen[-1].clone()  # what follows may work in place

    with torch.enable_grad(), giving_logits(model), hooked(model, [site], see):
        logits = model(images)
    if len(seen) != 1:
        raise ValueError(f'layer: {site.name} runs {len(seen)} times; name one call, "name@1"')
    return logits, seen[0]


def collapse(
    site: Site,
    logits: Tensor,
    output: Tensor,
    target: Tensor,
    variant: str = "weighted",
    *,
    dropped: Tensor | None = None,
    create_graph: bool = False,
) -> Tensor:
    """Collapse the channels of a layer to one map per image.

    Parameters
    ----------
    site : Site
        The layer.
    logits, output : Tensor
        From ``tapped``.
    target : Tensor
        int64 ``[N]``, the class of each image that is explained.
    variant : {"weighted", "equal", "stochastic"}
        ``ReLU(sum_c w_c f_c)`` with ``w_c`` the gradient of the class's logit summed over the
        positions of channel c; ``mean_c f_c^2``; or the first of those channels that stay.
    dropped : Tensor, optional
        Bool ``[N, channels]``: left out of the stochastic variant.
    create_graph : bool
        So that the map itself can be differentiated.

    Returns
    -------
    Tensor
        ``[N, 1, ...]`` with the positions of the layer.

    Examples
    --------
    >>> from pyablate.attribution import collapse
    >>> site = pa.select(pa.sites(model, images[:1]), "features.16")[0]
    >>> output = model.features(model.normalize(images[:4])).detach().requires_grad_()
    >>> logits = model.classifier(output.mean(dim=(2, 3)))
    >>> collapse(site, logits, output, labels[:4]).shape
    torch.Size([4, 1, 7, 7])
    """
    channels = output.movedim(site.axis, 1)
    if variant == "equal":
        return channels.square().mean(1, keepdim=True)
    chosen = logits.gather(1, target[:, None]).sum()
    (gradient,) = torch.autograd.grad(
        chosen, output, create_graph=create_graph, retain_graph=create_graph
    )
    weight = gradient.movedim(site.axis, 1).flatten(2).sum(2)
    if dropped is not None:
        weight = weight.masked_fill(dropped, 0)
    return torch.einsum("nc,nc...->n...", weight, channels).relu().unsqueeze(1)


def draw_dropped(count: int, channels: int, generator: torch.Generator) -> Tensor:
    """Draw which channels of which image are left out, bool ``[N, channels]``, on the CPU."""
    return torch.rand(count, channels, generator=generator) < DROPPED


def distances(original: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of two maps ``[N, 1, ...]``, both divided by their L2 norms: ``[N]``.

    ``|a/|a| - b/|b||^2`` over the number of positions; a map of zeros stays zeros. A map of another
    size than the original's is resized to that, bilinear.
    """
    if other.shape != original.shape:
        if original.ndim != 4 or other.ndim != 4:
            raise ValueError(
                f"layers: maps of {list(original.shape[2:])} and {list(other.shape[2:])} positions "
                "do not compare"
            )
        size = (original.shape[2], original.shape[3])
        other = functional.interpolate(other, size, mode="bilinear", align_corners=False)
    a, b = functional.normalize(original.flatten(1)), functional.normalize(other.flatten(1))
    return (a - b).square().mean(1)
