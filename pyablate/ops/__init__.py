"""One thin function per native operation: checks, layout, output allocation, dispatch.

*Pairs*: two int32 vectors of length P, the image and the unit of each pair; a delta is a tensor
``[P, ...]``, the change that an ablation makes to a tensor of the clean run. Base tensors
``[N, ...]`` belong to the clean run and are read by image index, never copied per pair.

Tensors on the CPU go to the C++ backend, tensors on a CUDA device to the CUDA backend, all others
(and all tensors where the compiled module is missing) to ``pyablate.ops.reference``. No operation
records gradients. On the CPU an index out of range raises ``ValueError``; on CUDA, where looking
would stop the stream, such a row comes back as NaN (-1 where the result is an integer).
"""

from pyablate.ops._classify import classify, confusion_counts, head_flips
from pyablate.ops.activations import Activation
from pyablate.ops.convolution import delta_winograd, depthwise, winograd_filters
from pyablate.ops.difference import delta_product, perturbed, subtracted
from pyablate.ops.elementwise import delta_activation, delta_max_pool, delta_mean, encode
from pyablate.ops.quantized import Quantized
from pyablate.ops.units import masked_copies, unit_delta

__all__ = [
    "Activation",
    "Quantized",
    "classify",
    "confusion_counts",
    "delta_activation",
    "delta_max_pool",
    "delta_mean",
    "delta_product",
    "delta_winograd",
    "depthwise",
    "encode",
    "head_flips",
    "masked_copies",
    "perturbed",
    "subtracted",
    "unit_delta",
    "winograd_filters",
]
