"""Experiments that ablate more than single units, or compare what single units do."""

from pyablate.experiments._cumulative import Cumulative, cumulative
from pyablate.experiments._minimal_sets import MinimalSets, minimal_sets
from pyablate.experiments._pairs import Pairs, pairs
from pyablate.experiments._shapley import Shapley, shapley
from pyablate.experiments.accuracies import balanced_accuracy
from pyablate.experiments.controls import RotationControl, compare_damage, rotation_control

__all__ = [
    "Cumulative",
    "MinimalSets",
    "Pairs",
    "RotationControl",
    "Shapley",
    "balanced_accuracy",
    "compare_damage",
    "cumulative",
    "minimal_sets",
    "pairs",
    "rotation_control",
    "shapley",
]
