"""Most activating images of each unit, in one pass that keeps a few of them per unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyablate.network.forward import forward
from pyablate.network.model_checks import open_up
from pyablate.network.sites import Site, hooked
from pyablate.results.arrays import Ints
from pyablate.results.record import Record
from pyablate.runtime.determinism import undisturbed

_BATCH = 128


@torch.no_grad()
def most_activating(
    model: nn.Module,
    data: Any,
    result: Record,
    *,
    count: int,
    device: str | torch.device | None = None,
) -> Ints:
    """Find the images with the largest A, the mean of a unit's map over its positions.

    Model and data are those of the run. Returns int64 ``[unit, count]``, the largest A first, of
    equal ones the first image; -1 where there are no more images, and for groups, which have no map
    of their own.
    """
    found = np.full((len(result.units), count), -1, dtype=np.int64)
    with undisturbed(model, device):
        ready = open_up(
            model, data, result.class_names, device, axis=result.given_axes, unlabelled=True
        )
        ready.data.hold_if_read_once()
        sites = _sites(ready.sites, result)
        best: dict[str, tuple[Tensor, Tensor]] = {}  # values and images, [C, count]
        totals: dict[str, Tensor] = {}

        def see(site: Site, _call: int, output: Tensor) -> Tensor:
            moved = (
                output.movedim(site.axis, 1).flatten(2) if output.ndim > 2 else output[..., None]
            )
            # A module that is called again adds to what it said before: A is over all calls.
            units = moved.mean(dim=2).unflatten(1, (site.channels, site.width)).mean(dim=2)
            totals[site.name] = totals.get(site.name, 0) + units
            return output

        with hooked(ready.model, sites, see):
            for batch in ready.data.batches(_BATCH):
                totals.clear()
                forward(ready.model, batch.images)
                for name, pooled in totals.items():
                    values = pooled[: len(batch)].t().double()
                    best[name] = _merged(best.get(name), values.cpu(), batch.index, count)
    for site in sites:
        rows = np.flatnonzero((result.units["layer"] == site.name).to_numpy())
        images = best[site.name][1].numpy()
        units = result.units["unit"].to_numpy()[rows]
        known = units >= 0
        found[rows[known], : images.shape[1]] = images[units[known]]
    return found


def _merged(
    held: tuple[Tensor, Tensor] | None, values: Tensor, index: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Keep the largest values [C, count] and their images; earlier images stand first."""
    images = index.expand(len(values), -1)
    if held is not None:
        values = torch.cat([held[0], values], dim=1)
        images = torch.cat([held[1], images], dim=1)
    # A stable sort, so that of equal values the first image stays.
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return values.gather(1, order), images.gather(1, order)


def _sites(found: Sequence[Site], result: Record) -> list[Site]:
    known = {site.name: site for site in found}
    single = result.units[result.units["unit"] >= 0]
    sites = []
    for layer, units in single.groupby("layer", sort=False)["unit"]:
        site = known.get(str(layer))
        if site is None:
            raise ValueError(f"model: the result has units of {str(layer)!r}, the model does not")
        if int(units.max()) >= site.channels:
            raise ValueError(
                f"model: the result has unit {int(units.max())} of {str(layer)!r}, the model has "
                f"{site.channels} units there"
            )
        sites.append(site)
    return sites
