"""What can be removed from a network, and what is lost when it is."""

from pyablate.attribution.maps import attribution_maps
from pyablate.comparison._compare import Comparison, compare, importance_preserved, surviving
from pyablate.comparison._latency import latency
from pyablate.comparison.preservation import Preservation, attributions_preserved
from pyablate.compression._finetune import FineTuned, finetune
from pyablate.compression._prune_curve import prune_curve
from pyablate.compression._rank import Ranking, rank
from pyablate.compression._remove import Removal, Size, remove, size
from pyablate.compression._sensitivity import sensitivity
from pyablate.compression.collaborative import collaborative_compression
from pyablate.compression.connections import learn_connections
from pyablate.compression.coupling import Coupled, couplings
from pyablate.compression.decomposition import prune_and_decompose, truncated_svd
from pyablate.compression.export import save_network
from pyablate.compression.filters import filter_ranking, prune_filters
from pyablate.compression.interchange import importance, masked
from pyablate.compression.low_rank import low_rank_training
from pyablate.compression.rebuilding import save_weights
from pyablate.compression.rls import rls_pruning
from pyablate.compression.soft_pruning import soft_filter_pruning
from pyablate.compression.transforms import (
    Transformed,
    block_masks,
    int8_weights,
    kernel_codebook,
    magnitude_masks,
)
from pyablate.compression.unification import unify_weights

__all__ = [
    "Comparison",
    "Coupled",
    "FineTuned",
    "Preservation",
    "Ranking",
    "Removal",
    "Size",
    "Transformed",
    "attribution_maps",
    "attributions_preserved",
    "block_masks",
    "collaborative_compression",
    "compare",
    "couplings",
    "filter_ranking",
    "finetune",
    "importance",
    "importance_preserved",
    "int8_weights",
    "kernel_codebook",
    "latency",
    "learn_connections",
    "low_rank_training",
    "magnitude_masks",
    "masked",
    "prune_and_decompose",
    "prune_curve",
    "prune_filters",
    "rank",
    "remove",
    "rls_pruning",
    "save_network",
    "save_weights",
    "sensitivity",
    "size",
    "soft_filter_pruning",
    "surviving",
    "truncated_svd",
    "unify_weights",
]
