"""Attribution of the labelled class to units: conductance and relevance (LRP, CLRP)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pyablate.attribution.lrp_modules import Unsupported, set_rules, traceable
from pyablate.attribution.maps import parts_of
from pyablate.attribution.propagation import Propagation, Relevance, contrasted
from pyablate.network.sites import Site
from pyablate.unit_attributes.gradients import per_unit

logger = logging.getLogger("pyablate")

STEPS = 32
"""Steps of the path of conductance, Gauss-Legendre."""


def conductance(
    model: nn.Module, images: Tensor, labels: Tensor, sites: Sequence[Site], size: int
) -> dict[str, Tensor]:
    """Conductance of the labelled class's logit through each unit, float64 ``[N, C]`` by site.

    The path leads from a zero image to the image. Parts of a module's calls (``name@k``) and what
    functions return are left out: Captum attributes to whole modules.
    """
    from captum.attr import LayerConductance

    found: dict[str, Tensor] = {}
    for site in sites:
        if site.call is not None or not site.plain:
            continue
        method = LayerConductance(model, model.get_submodule(site.module))
        parts = []
        for part, target in parts_of(images, labels, size):
            values = method.attribute(
                part,
                baselines=torch.zeros_like(part, requires_grad=False),
                target=target,
                n_steps=STEPS,
            )
            parts.append(per_unit(cast(Tensor, values).detach(), site).cpu())
        found[site.name] = torch.cat(parts)
    return found


def relevance(
    model: nn.Module, images: Tensor, labels: Tensor, sites: Sequence[Site], size: int
) -> dict[str, Tensor]:
    """Relevance of each unit for the labelled class's logit, float64 ``[N, C]`` by site.

    Captum's epsilon rule on a traced copy of the network in which every sum and average is a
    module. Networks with other functions than those of plain, batch-normalised and residual
    networks are left out, with a note in the log.
    """
    from captum.attr import LayerLRP

    try:
        traced, taps = traceable(model, images[:2], sites)
    except Unsupported as error:
        logger.warning("lrp is NaN: no rule for this network (%s)", error)
        return {}
    found: dict[str, list[Tensor]] = {name: [] for name in taps}
    by_name = {site.name: site for site in sites}
    layers = [traced.get_submodule(path) for path in taps.values()]
    for part, target in parts_of(images, labels, size) if taps else ():
        set_rules(traced)  # Captum takes them away each time
        values = LayerLRP(traced, layers).attribute(part, target=target)
        for name, value in zip(taps, values, strict=True):
            found[name].append(per_unit(value.detach(), by_name[name]).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def contrastive(
    model: nn.Module, images: Tensor, labels: Tensor, sites: Sequence[Site], size: int
) -> dict[str, Tensor]:
    """Contrastive relevance (CLRP1) of units for the labelled class, float64 ``[N, C]`` by site.

    Relevance by the z+ rule, summed over positions, divided by its sum over the layer, minus that
    of all other classes, likewise; positive part.
    """
    try:
        network = Propagation(model, images[:2], images.split(size), sites)
    except Unsupported as error:
        logger.warning("clrp is NaN: no rule for this network (%s)", error)
        return {}
    by_name = {site.name: site for site in network.found}

    def look(found: Relevance, start: Tensor) -> dict[str, Tensor]:
        return {n: per_unit(r, by_name[n]).cpu() for n, r in found.at_sites(start).items()}

    parts = [
        contrasted(network, part, target.to(part.device), "others", look)
        for part, target in zip(images.split(size), labels.split(size), strict=True)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def shares(values: Tensor) -> Tensor:
    """Each unit's share of the relevance of its layer ``[N, C]``, signed; 0 where there is none."""
    total = values.abs().sum(dim=1, keepdim=True)
    return torch.where(total > 0, values / total, 0.0)
