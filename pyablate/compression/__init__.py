"""What can be removed from a network, and what is lost when it is."""

from pyablate.compression.coupling import Coupled, couplings
from pyablate.compression.ranking import Ranking, rank
from pyablate.compression.removal import Removal, Size, remove

__all__ = ["Coupled", "Ranking", "Removal", "Size", "couplings", "rank", "remove"]
