"""Pictures of results and curves, drawn by matplotlib (extra ``plot``).

Everything here draws into ``ax``, or into a new figure, and returns the axes, so that titles,
limits and scales can be changed afterwards and several plots can share a figure. Shares are drawn
in percent, drops in percentage points.
"""

from pyablate.plots.curves import cumulative_curves, prune_curves
from pyablate.plots.results import ResultPlots

__all__ = ["ResultPlots", "cumulative_curves", "prune_curves"]
