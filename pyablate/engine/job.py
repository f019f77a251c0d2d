"""The ablations of one run: which rows there are, and what each does to a site's tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pyablate import ops
from pyablate.interventions import Intervention
from pyablate.network.sites import Site
from pyablate.runtime.host_to_device import sent


@dataclass(frozen=True, eq=False)
class Job:
    """Ablations that share their sites, and so the part of the network that they change.

    Attributes
    ----------
    sites : tuple of Site
        Where these ablations act.
    rows : range
        Their rows in the result.
    members : tuple of tuples of (site name, unit)
        What each of them ablates; a unit is a direction's number under ``direction``.
    intervention : Intervention
        What replaces the units.
    grouped : bool
        Whether these are groups that the caller named, of one unit or more.
    """

    sites: tuple[Site, ...]
    rows: range
    members: tuple[tuple[tuple[str, int], ...], ...]
    intervention: Intervention
    grouped: bool = False

    @property
    def name(self) -> str:
        """For people: the layers."""
        return "+".join(site.name for site in self.sites)

    @property
    def channelwise(self) -> bool:
        """Whether each ablation changes whole channels of one site, each by itself."""
        return len(self.sites) == 1 and self.intervention.kind != "direction"

    @cached_property
    def single(self) -> bool:
        """Whether each ablation changes one channel of one site, and nothing else there."""
        alone = self.channelwise and self.sites[0].width == 1
        return alone and all(len(members) == 1 for members in self.members)

    @cached_property
    def units(self) -> Tensor:
        """int64 [column]: the unit of each ablation, or all that channelwise groups are made of.

        Of attention heads, their features.
        """
        if self.single:
            return torch.tensor([members[0][1] for members in self.members])
        return self.masks[self.sites[0].name].any(dim=0).nonzero().squeeze(1)

    @cached_property
    def belongs(self) -> Tensor:
        """Bool [row, column]: whether a channelwise ablation changes the unit of a column."""
        return self.masks[self.sites[0].name][:, self.units]

    @cached_property
    def whole(self) -> bool:
        """Whether the columns are all units of the site in order."""
        return self.units.tolist() == list(range(self.sites[0].features))

    def on(self, device: torch.device) -> OnDevice:
        """Give what lists the members on a device, sent there once."""
        if device not in self._there:
            self._there[device] = OnDevice(self, device)
        return self._there[device]

    @cached_property
    def _there(self) -> dict[torch.device, OnDevice]:
        return {}

    def change(self, site: Site, values: Tensor, row: Tensor, replacement: PairValues) -> Tensor:
        """Ablate: row ``row[p]`` of this job on the p-th of some images.

        Parameters
        ----------
        site : Site
            Which of the job's sites ``values`` belongs to.
        values : Tensor
            ``[P, ...]``, the site's tensor for each pair.
        row : Tensor
            int64 ``[P]``, position in ``members``.
        replacement : callable
            ``replacement(pair, unit)`` gives replacement maps for int64 vectors of equal length.

        Returns
        -------
        Tensor
            ``[P, ...]``, a new tensor.
        """
        if self.intervention.kind == "direction":
            return self._project(site, values, row)
        if self.single:
            every = torch.arange(len(row), device=row.device)
            unit = self.on(row.device).units[row]
            return _masked(site, values, unit, replacement(every, unit))
        changed = values.clone()
        view = changed.movedim(site.axis, 1)
        pair, unit = self.on(row.device).members[site.name].of(row)
        value = replacement(pair, unit).to(values.dtype)
        view[pair, unit] = value.expand(len(pair), *view.shape[2:])
        return changed

    @cached_property
    def masks(self) -> dict[str, Tensor]:
        """Bool [row, features] of each site: what each ablation touches."""
        masks = {
            site.name: torch.zeros(len(self.members), site.channels, dtype=torch.bool)
            for site in self.sites
        }
        for row, members in enumerate(self.members):
            for name, unit in members:
                masks[name][row, unit] = True
        for site in self.sites:
            masks[site.name] = masks[site.name].repeat_interleave(site.width, dim=1)
        return masks

    def _project(self, site: Site, values: Tensor, row: Tensor) -> Tensor:
        """Take a - (a . q) q across the units; rows without a direction here are left alone."""
        q = self.on(values.device).axes(site, values.dtype)[row]
        last = values.movedim(site.axis, -1)
        along = torch.einsum("p...c,pc->p...", last, q)
        q = q.reshape(len(row), *[1] * (last.ndim - 2), -1)
        return (last - along.unsqueeze(-1) * q).movedim(-1, site.axis).contiguous()


@dataclass(frozen=True, eq=False)
class Members:
    """Units or columns of each ablation of a job.

    Attributes
    ----------
    listed : Tensor
        Bool ``[row, C]``, on the CPU: whether it has it.
    device : torch.device
        Where they are looked up.
    """

    listed: Tensor
    device: torch.device

    def of(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """List all (pair, member) of pairs with these rows, int64 ``[P]``; some may come twice.

        Their number is not known on the host, and on a device would have to be waited for: there
        every row is filled up with its own first member, which is harmless to write again.
        """
        if row.device.type == "cpu":
            pair, member = self.listed[row].nonzero(as_tuple=True)
            return pair, member
        member = self._padded[row]
        pair = torch.arange(len(row), device=row.device).unsqueeze(1).expand_as(member)
        return pair.reshape(-1), member.reshape(-1)

    @cached_property
    def mask(self) -> Tensor:
        """As :attr:`listed`, on the device."""
        return sent(self.listed, self.device)

    @cached_property
    def _padded(self) -> Tensor:
        """int64 ``[row, most]``."""
        members = [row.nonzero().squeeze(1) for row in self.listed]
        most = max(len(own) for own in members)
        padded = [torch.cat([own, own[:1].expand(most - len(own))]) for own in members]
        return sent(torch.stack(padded), self.device)


@dataclass(frozen=True, eq=False)
class OnDevice:
    """What the work on a device has to know of a job's members."""

    job: Job
    device: torch.device
    _axes: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)

    @cached_property
    def units(self) -> Tensor:
        """As :attr:`Job.units`."""
        return sent(self.job.units, self.device)

    @cached_property
    def columns(self) -> Members:
        """Columns of each channelwise ablation."""
        return Members(self.job.belongs, self.device)

    @cached_property
    def members(self) -> dict[str, Members]:
        """Units of each ablation, by site; each has some at every site of its job."""
        return {name: Members(mask, self.device) for name, mask in self.job.masks.items()}

    def axes(self, site: Site, dtype: torch.dtype) -> Tensor:
        """Direction of each row, ``[row, channels]``; zeros where a row has none here."""
        if (site.name, dtype) not in self._axes:
            matrix = self.job.intervention.matrix(site.name, site.features)
            axes = matrix.new_zeros(len(self.job.members), site.features)
            for number, members in enumerate(self.job.members):
                for name, unit in members:
                    if name == site.name:
                        axes[number] = matrix[:, unit]
            self._axes[site.name, dtype] = sent(axes.to(dtype), self.device)
        return self._axes[site.name, dtype]


PairValues = Callable[[Tensor, Tensor], Tensor]
"""``replacement(pair, unit)``: replacement maps for int64 vectors of equal length."""


def _masked(site: Site, values: Tensor, unit: Tensor, replacement: Tensor) -> Tensor:
    """Copy a site's tensor with one unit of each row replaced by ``[P, ...]`` maps or ones."""
    image = torch.arange(len(values), dtype=torch.int32, device=values.device)
    if replacement.numel() == len(values):
        replacement = replacement.reshape(len(values))
    replacement = replacement.to(values.dtype)
    return ops.masked_copies(values, image, unit.to(torch.int32), replacement, axis=site.axis)
