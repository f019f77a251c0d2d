"""What can be removed from a network, and what is lost when it is."""

from pyablate.compression.attributions import attribution_maps
from pyablate.compression.comparison import Comparison, compare, importance_preserved, surviving
from pyablate.compression.coupling import Coupled, couplings
from pyablate.compression.curves import prune_curve
from pyablate.compression.interchange import importance, masked
from pyablate.compression.layer_sensitivity import sensitivity
from pyablate.compression.preservation import Preservation, attributions_preserved
from pyablate.compression.ranking import Ranking, rank
from pyablate.compression.removal import Removal, Size, remove, size
from pyablate.compression.transforms import (
    Transformed,
    block_masks,
    filter_ranking,
    int8_weights,
    kernel_codebook,
    magnitude_masks,
    prune_filters,
    truncated_svd,
)

__all__ = [
    "Comparison",
    "Coupled",
    "Preservation",
    "Ranking",
    "Removal",
    "Size",
    "Transformed",
    "attribution_maps",
    "attributions_preserved",
    "block_masks",
    "compare",
    "couplings",
    "filter_ranking",
    "importance",
    "importance_preserved",
    "int8_weights",
    "kernel_codebook",
    "magnitude_masks",
    "masked",
    "prune_curve",
    "prune_filters",
    "rank",
    "remove",
    "sensitivity",
    "size",
    "surviving",
    "truncated_svd",
]
