"""Exhaustive unit ablation of neural image classifiers, exact and fast."""

from pyablate import demo, interventions, ops, reference
from pyablate._native import build_info
from pyablate.attributes import attributes
from pyablate.clusters import cluster_images, cluster_units
from pyablate.correlation import correlate
from pyablate.experiments import Cumulative, Pairs, cumulative, pairs
from pyablate.interventions import Intervention
from pyablate.plan import Plan, plan
from pyablate.result import AblationResult, Audit, Flips
from pyablate.run import ablate
from pyablate.sites import Site, select, sites
from pyablate.store import load

__all__ = [
    "AblationResult",
    "Audit",
    "Cumulative",
    "Flips",
    "Intervention",
    "Pairs",
    "Plan",
    "Site",
    "ablate",
    "attributes",
    "build_info",
    "cluster_images",
    "cluster_units",
    "correlate",
    "cumulative",
    "demo",
    "interventions",
    "load",
    "ops",
    "pairs",
    "plan",
    "reference",
    "select",
    "sites",
]
