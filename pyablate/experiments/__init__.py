"""Experiments that ablate more than single units, or compare what single units do."""

from pyablate.experiments._class_features import ClassFeatures, class_features
from pyablate.experiments._cumulative import Cumulative, cumulative
from pyablate.experiments._minimal_sets import MinimalSets, minimal_sets
from pyablate.experiments._optimal import OptimalConstants, optimal_constants
from pyablate.experiments._pairs import Pairs, pairs
from pyablate.experiments._patterns import activation_patterns
from pyablate.experiments._representative import Representative, representative
from pyablate.experiments._shapley import Shapley, shapley
from pyablate.experiments._spectral import influence_graph, spectral_profile
from pyablate.experiments._unit_sets import unit_sets
from pyablate.experiments.accuracies import balanced_accuracy
from pyablate.experiments.controls import RotationControl, compare_damage, rotation_control

__all__ = [
    "ClassFeatures",
    "Cumulative",
    "MinimalSets",
    "OptimalConstants",
    "Pairs",
    "Representative",
    "RotationControl",
    "Shapley",
    "activation_patterns",
    "balanced_accuracy",
    "class_features",
    "compare_damage",
    "cumulative",
    "influence_graph",
    "minimal_sets",
    "optimal_constants",
    "pairs",
    "representative",
    "rotation_control",
    "shapley",
    "spectral_profile",
    "unit_sets",
]
