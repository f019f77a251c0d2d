"""Experiments that ablate more than single units, or compare what single units do."""

from pyablate.experiments.controls import RotationControl, compare_damage, rotation_control
from pyablate.experiments.cumulative_curves import Cumulative, cumulative
from pyablate.experiments.minimal_set_search import MinimalSets, minimal_sets
from pyablate.experiments.pair_interactions import Pairs, pairs

__all__ = [
    "Cumulative",
    "MinimalSets",
    "Pairs",
    "RotationControl",
    "compare_damage",
    "cumulative",
    "minimal_sets",
    "pairs",
    "rotation_control",
]
