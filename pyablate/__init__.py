"""Exhaustive unit ablation of neural image classifiers, exact and fast."""

from pyablate import compression, demo, directions, interventions, ops, reference
from pyablate._native import build_info
from pyablate.clusters import cluster_images, cluster_units
from pyablate.compression import (
    Comparison,
    Coupled,
    Ranking,
    Removal,
    compare,
    couplings,
    prune_curve,
    rank,
    remove,
    sensitivity,
)
from pyablate.correlation import correlate
from pyablate.experiments import (
    Cumulative,
    MinimalSets,
    Pairs,
    RotationControl,
    compare_damage,
    cumulative,
    minimal_sets,
    pairs,
    rotation_control,
)
from pyablate.interventions import Intervention
from pyablate.layers import Site, select, sites
from pyablate.planning import Plan, plan
from pyablate.result import AblationResult, Audit, Flips
from pyablate.run import ablate
from pyablate.store import load
from pyablate.unit_attributes import attributes

__all__ = [
    "AblationResult",
    "Audit",
    "Comparison",
    "Coupled",
    "Cumulative",
    "Flips",
    "Intervention",
    "MinimalSets",
    "Pairs",
    "Plan",
    "Ranking",
    "Removal",
    "RotationControl",
    "Site",
    "ablate",
    "attributes",
    "build_info",
    "cluster_images",
    "cluster_units",
    "compare",
    "compare_damage",
    "compression",
    "correlate",
    "couplings",
    "cumulative",
    "demo",
    "directions",
    "interventions",
    "load",
    "minimal_sets",
    "ops",
    "pairs",
    "plan",
    "prune_curve",
    "rank",
    "reference",
    "remove",
    "rotation_control",
    "select",
    "sensitivity",
    "sites",
]
