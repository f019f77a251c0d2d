"""What can be removed from a network, and what is lost when it is."""

from pyablate.compression.attributions import attribution_maps
from pyablate.compression.comparison import Comparison, compare, importance_preserved, surviving
from pyablate.compression.coupling import Coupled, couplings
from pyablate.compression.curves import prune_curve
from pyablate.compression.decomposition import prune_and_decompose, truncated_svd
from pyablate.compression.filters import filter_ranking, prune_filters
from pyablate.compression.finetuning import FineTuned, finetune
from pyablate.compression.interchange import importance, masked
from pyablate.compression.layer_sensitivity import sensitivity
from pyablate.compression.preservation import Preservation, attributions_preserved
from pyablate.compression.ranking import Ranking, rank
from pyablate.compression.removal import Removal, Size, remove, size
from pyablate.compression.saving import save_network
from pyablate.compression.soft_pruning import soft_filter_pruning
from pyablate.compression.timing import latency
from pyablate.compression.transforms import (
    Transformed,
    block_masks,
    int8_weights,
    kernel_codebook,
    magnitude_masks,
)

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
    "compare",
    "couplings",
    "filter_ranking",
    "finetune",
    "importance",
    "importance_preserved",
    "int8_weights",
    "kernel_codebook",
    "latency",
    "magnitude_masks",
    "masked",
    "prune_and_decompose",
    "prune_curve",
    "prune_filters",
    "rank",
    "remove",
    "save_network",
    "sensitivity",
    "size",
    "soft_filter_pruning",
    "surviving",
    "truncated_svd",
]
