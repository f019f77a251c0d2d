"""What :func:`pyablate.ablate` returns: the record, with tests, pictures, reports and saving.

The record itself stands in :mod:`pyablate.results.record`, below all that is called here. This
module has the address that was documented in 0.1.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from pyablate.analysis import statistics
from pyablate.results import store
from pyablate.results.arrays import Floats
from pyablate.results.audit import Audit
from pyablate.results.effort import Effort
from pyablate.results.flips import Flips
from pyablate.results.notebook import page
from pyablate.results.record import Record

if TYPE_CHECKING:
    import xarray as xr

    from pyablate.plots import ResultPlots

__all__ = [
    "AblationResult",
    "Audit",
    "Effort",
    "Flips",
    "load",
]


@dataclass(frozen=True, eq=False, repr=False, init=False)
class AblationResult(Record):
    """Predictions of a network with each unit ablated, and what follows from them.

    Attributes
    ----------
    units : pandas.DataFrame
        One row per ablated unit (or group): ``label``, ``layer``, ``unit`` (-1 for a group).
    labels, baseline : int64 [image]
        True class and the intact network's prediction.
    flips : Flips
        Predictions that changed.
    class_names : tuple of str
        One name per class.
    intervention : str
        What replaced the units.
    audit : Audit
        The run's own check.
    strategy : dict of str to str
        Per layer, how it was computed.
    seconds : float
        Wall time of the run; 0 if not known. Not saved: a result's bytes depend on its inputs.
    effort : Effort
        What the run took; not saved either.
    measures : dict of str to Measure
        Changes of the "loss" and the "margin", summed over the images of each class, with their
        accuracy; those that the run was asked to record.
    provenance : dict
        Hashes of model and options, versions, and of runs with ``output`` or ``shard`` the hash of
        the data, where :func:`pyablate.ablate` made the result; see
        :mod:`pyablate.runs.fingerprint`.
    labelled : bool
        Whether the data had labels. If not, ``labels`` are the intact network's predictions, and
        every accuracy is agreement with it.
    screening : Screening or None
        Of a screened run, what was settled by prediction, and the certificate: see
        :class:`pyablate.results.screening.Screening`. None in other runs.
    estimate : Estimate or None
        Of an estimated run, which pairs were computed: see
        :class:`pyablate.results.estimate.Estimate`. Then accuracies, drops, ``lost`` and ``gained``
        are estimates, of which :meth:`half_width` tells the 95 % intervals; what needs every
        prediction raises ValueError. None in other runs.

    Examples
    --------
    >>> worst = int(result.max_class_drop.argmax())
    >>> result.units.label[worst], result.class_names[result.max_class[worst]]
    ('features.16:22', 'Dress')
    >>> int(result.confusion(worst).sum())  # one row per class, all images
    60
    """

    def significance(self, *, fdr: float = 0.05) -> xr.Dataset:
        """Test every class of every unit; see :func:`pyablate.analysis.statistics.significance`."""
        return statistics.significance(self, fdr=fdr)

    def noise_floor(self) -> Floats:
        """float64 [unit]: see :func:`pyablate.analysis.statistics.noise_floor`."""
        return statistics.noise_floor(self)

    def split_half_drop(self, *, splits: int = 10, seed: int = 0) -> Floats:
        """float64 [unit]: see :func:`pyablate.analysis.statistics.split_half_drop`."""
        return statistics.split_half_drop(self, splits=splits, seed=seed)

    def max_class_test(self, *, splits: int = 10, seed: int = 0) -> pd.DataFrame:
        """One row per unit: see :func:`pyablate.analysis.statistics.max_class_test`."""
        return statistics.max_class_test(self, splits=splits, seed=seed)

    def _repr_html_(self) -> str:
        """Show the units with the largest class drops, worst first."""
        columns = ["layer", "unit", "accuracy_drop", "max_class_drop", "max_class"]
        units = self.to_dataframe()[columns]
        worst = units.sort_values("max_class_drop", ascending=False, kind="stable")
        audit = f"Audit: {self.audit}" if self.audit.pairs else "Audit: none"
        return page(repr(self), worst, notes=[audit])

    @property
    def plot(self) -> ResultPlots:
        """Pictures: ``result.plot.drops()`` and others, see :class:`pyablate.plots.ResultPlots`."""
        from pyablate.plots import ResultPlots  # slow to import

        return ResultPlots(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result as a Zarr group; see :func:`pyablate.results.save`."""
        store.save(self, path)

    def report(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write the result as one HTML file; see :func:`pyablate.report.write_report`."""
        from pyablate.report import write_report  # as above

        write_report(self, path, **options)


def load(path: str | os.PathLike[str]) -> AblationResult:
    """Read a result that :meth:`AblationResult.save <pyablate.AblationResult.save>` wrote.

    Raises
    ------
    OSError
        Nothing there, not a result of this format, or not as it was written.

    Examples
    --------
    >>> result.save("run.zarr")
    >>> pa.load("run.zarr").units.equals(result.units)
    True
    """
    return store.read(path, AblationResult)
