"""What can be removed from a network, and what is lost when it is."""

from pyablate.compression.compare import Comparison, compare, importance_preserved, surviving
from pyablate.compression.coupling import Coupled, couplings
from pyablate.compression.curves import plot_curves, prune_curve
from pyablate.compression.ranking import Ranking, rank
from pyablate.compression.removal import Removal, Size, remove, size
from pyablate.compression.sensitivity import sensitivity

__all__ = [
    "Comparison",
    "Coupled",
    "Ranking",
    "Removal",
    "Size",
    "compare",
    "couplings",
    "importance_preserved",
    "plot_curves",
    "prune_curve",
    "rank",
    "remove",
    "sensitivity",
    "size",
    "surviving",
]
