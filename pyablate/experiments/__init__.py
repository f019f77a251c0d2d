"""Experiments that ablate more than single units, or compare what single units do."""

from pyablate.experiments.cumulative import Cumulative, cumulative
from pyablate.experiments.pairs import Pairs, pairs

__all__ = ["Cumulative", "Pairs", "cumulative", "pairs"]
