"""Plain replay: the whole forward pass with hooks, one row per pair.

Slow and independent of the delta engine. It decides what the engine leaves open, audits it, and
does the whole job for models that cannot be captured.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from pyablate.data.dataset import Batch, Data
from pyablate.engine.job import Job
from pyablate.engine.replacements import Key, Replacements, Statistics, donor_maps
from pyablate.network import near_tie
from pyablate.network.forward import forward
from pyablate.network.sites import Site, copied, hooked
from pyablate.runtime import chunking
from pyablate.runtime.host_to_device import sent

logger = logging.getLogger("pyablate")


@dataclass(frozen=True, eq=False)
class Replay:
    """A network in one precision, with what replacement values need.

    Attributes
    ----------
    model : nn.Module
        In evaluation mode, nobody else's: hooks come and go.
    dtype : torch.dtype
        Of its weights and of the images it takes.
    data : Data
        Where donors are found.
    statistics : mapping
        Of the sites, where an intervention needs them.
    rows : int
        Pairs at a time.
    """

    model: nn.Module
    dtype: torch.dtype
    data: Data
    statistics: Mapping[Key, Statistics]
    rows: int = chunking.REPLAYED

    def logits(self, batch: Batch, job: Job | None, row: Tensor, image: Tensor) -> Tensor:
        """Logits of each pair.

        Parameters
        ----------
        batch : Batch
            Where the images are.
        job : Job or None
            The ablations; None for the intact network.
        row, image : Tensor
            int64 ``[P]``, on the CPU: position in the job and in the batch.

        Returns
        -------
        Tensor
            ``[P, K]`` in this replay's dtype, on the CPU.
        """
        parts = zip(row.split(self.rows), image.split(self.rows), strict=True)
        return torch.cat([self._some(batch, job, *part) for part in parts])

    def _some(self, batch: Batch, job: Job | None, row: Tensor, image: Tensor) -> Tensor:
        if len(image) == 1:  # as in :func:`forward`
            return self._some(batch, job, row.repeat(2), image.repeat(2))[:1]
        used, inverse = image.unique(return_inverse=True)
        few = batch.take(used).to(self.dtype)
        row, inverse = sent(row, batch.device), sent(inverse, batch.device)
        images = few.images[inverse]
        with torch.no_grad():
            if job is None:
                intact: Tensor = forward(self.model, images)
                return intact.cpu()
            replacements = self.replacements(few, job)

            def change(site: Site, call: int, output: Tensor) -> Tensor:
                def replacement(pair: Tensor, unit: Tensor) -> Tensor:
                    return replacements.values(site, call, inverse[pair], unit)

                return job.change(site, output, row, replacement)

            with hooked(self.model, job.sites, change):
                logits: Tensor = self.model(images)
                return logits.cpu()

    def replacements(self, batch: Batch, job: Job) -> Replacements:
        """Prepare the replacement values of a job's sites for one batch."""
        maps: dict[Key, Tensor] = {}
        if job.intervention.kind == "resample":
            maps = donor_maps(self.model, self.data, batch, job, at_a_time=self.rows)
        return Replacements(job.intervention, batch, self.statistics, maps)

    def watch(self, batch: Batch, image: Tensor, keep: Iterable[fx.Node]) -> Tensor:
        """Logits of the intact network, as :meth:`Exact.watch` gives them."""
        return self.logits(batch, None, image, image)


@dataclass(frozen=True)
class Decision:
    """Classes by argmax of exact logits.

    Attributes
    ----------
    prediction : Tensor
        int32 ``[P]``, -1 where there is none; both are where the logits were.
    near_tie : Tensor
        bool ``[P]``: the two best logits are too close for the answer to mean anything.
    """

    prediction: Tensor
    near_tie: Tensor


def decision(logits: Tensor) -> Decision:
    """Take the best class of each row; of those that are equal but for rounding the first.

    Logits that are NaN or infinite (only masked classes may be minus infinity) predict none.
    """
    level = logits.amax(dim=1) - near_tie.ROUNDING * near_tie.magnitude(logits)
    prediction = (logits >= level.unsqueeze(1)).int().argmax(dim=1).to(torch.int32)
    prediction = prediction.masked_fill(~near_tie.usable(logits), -1)
    return Decision(prediction, near_tie.near_tie(logits))


def in_double(model: nn.Module, images: Tensor) -> tuple[nn.Module, torch.dtype]:
    """Copy a network in float64, or in its own precision where it cannot run in float64."""
    double = copied(model).double()
    try:
        with torch.no_grad():
            double(images.to(torch.float64, copy=True))  # it may work in place
    except RuntimeError as error:
        logger.warning(
            "the model does not run in float64 (%s): near ties are decided in %s",
            str(error).splitlines()[0],
            images.dtype,
        )
        return model, images.dtype
    return double, torch.float64
