"""Exhaustive unit ablation of neural image classifiers, exact and fast."""

# The table of the public names: type checkers read it, and __init__.py loads from it what is asked
# for. A name must not be that of a module or package beside it, except where it is that module.

from . import compression as compression
from . import demo as demo
from . import directions as directions
from . import interventions as interventions
from . import ops as ops
from . import plots as plots
from . import reference as reference
from ._native import build_info as build_info
from ._version import __version__ as __version__
from .analysis.clusters import cluster_images as cluster_images
from .analysis.clusters import cluster_units as cluster_units
from .analysis.correlation import correlate as correlate
from .compression import Comparison as Comparison
from .compression import Coupled as Coupled
from .compression import Ranking as Ranking
from .compression import Removal as Removal
from .compression import compare as compare
from .compression import couplings as couplings
from .compression import finetune as finetune
from .compression import prune_curve as prune_curve
from .compression import rank as rank
from .compression import remove as remove
from .compression import sensitivity as sensitivity
from .engine.care import AuditError as AuditError
from .experiments import Cumulative as Cumulative
from .experiments import MinimalSets as MinimalSets
from .experiments import Pairs as Pairs
from .experiments import RotationControl as RotationControl
from .experiments import Shapley as Shapley
from .experiments import activation_patterns as activation_patterns
from .experiments import compare_damage as compare_damage
from .experiments import cumulative as cumulative
from .experiments import influence_graph as influence_graph
from .experiments import minimal_sets as minimal_sets
from .experiments import pairs as pairs
from .experiments import rotation_control as rotation_control
from .experiments import shapley as shapley
from .experiments import spectral_profile as spectral_profile
from .interventions import Intervention as Intervention
from .network.classifier import classifier as classifier
from .network.sites import Site as Site
from .network.sites import select as select
from .network.sites import sites as sites
from .result import AblationResult as AblationResult
from .result import load as load
from .results.record import Audit as Audit
from .results.record import Flips as Flips
from .runs._ablate import ablate as ablate
from .runs._merge import merge as merge
from .runs._plan import Plan as Plan
from .runs._plan import plan as plan
from .unit_attributes import attributes as attributes
