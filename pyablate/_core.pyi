# Generated from the compiled module: python tests/check_stubs.py --write
"""
Native operations of pyablate; call them through pyablate.ops.
"""
from __future__ import annotations
import collections.abc
import torch
import typing
__all__: list[str] = ['build_info', 'class_moments', 'class_ranks', 'class_ranks_scratch', 'classify', 'confusion_counts', 'delta_activation', 'delta_max_pool', 'delta_mean', 'delta_product', 'delta_winograd', 'depthwise', 'grid_size', 'has_cuda', 'head_flips', 'map_moments', 'masked_copies', 'perturbed', 'subtracted', 'tensor_access', 'unit_delta', 'use_isa']
def build_info() -> dict[str, typing.Any]:
    """
    What was built and which CPU kernels are in use.
    """
def class_moments(pooled: torch.Tensor, active: torch.Tensor, label: torch.Tensor, total: torch.Tensor, square: torch.Tensor, maximum: torch.Tensor, active_images: torch.Tensor, threads: int, stream: int) -> None:
    ...
def class_ranks(x: torch.Tensor, label: torch.Tensor, count: torch.Tensor, rank_sum: torch.Tensor, gain: torch.Tensor, first: torch.Tensor, quantiles: torch.Tensor, widths: torch.Tensor, top: int, scratch: torch.Tensor, threads: int, stream: int) -> None:
    ...
def class_ranks_scratch(x: torch.Tensor, classes: int) -> int:
    """
    Columns of the scratch of class_ranks; its rows are as many as threads or GPU blocks.
    """
def classify(logits: torch.Tensor, delta: torch.Tensor, image: torch.Tensor, tolerance: torch.Tensor, out: torch.Tensor, relative: float, threads: int, stream: int) -> None:
    ...
def confusion_counts(prediction: torch.Tensor, label: torch.Tensor, out: torch.Tensor, threads: int, stream: int) -> None:
    ...
def delta_activation(base: torch.Tensor, delta: torch.Tensor, image: torch.Tensor, *, scale: torch.Tensor | None, addend: torch.Tensor | None, addend_scale: torch.Tensor | None, out: torch.Tensor | None, codes: tuple[torch.Tensor | None, torch.Tensor | None], activation: tuple[int, float, float], threads: int, stream: int) -> None:
    ...
def delta_max_pool(base: torch.Tensor, delta: torch.Tensor, image: torch.Tensor, *, scale: torch.Tensor | None, out: torch.Tensor | None, codes: tuple[torch.Tensor | None, torch.Tensor | None], channels_last: bool, kernel: collections.abc.Sequence[int], stride: collections.abc.Sequence[int], padding: collections.abc.Sequence[int], dilation: collections.abc.Sequence[int], activation: tuple[int, float, float], threads: int, stream: int) -> None:
    ...
def delta_mean(base: torch.Tensor, delta: torch.Tensor, image: torch.Tensor, *, scale: torch.Tensor | None, addend: torch.Tensor | None, addend_scale: torch.Tensor | None, out: torch.Tensor, channels_last: bool, activation: tuple[int, float, float], threads: int, stream: int) -> None:
    ...
def delta_product(base: torch.Tensor, delta: torch.Tensor, other_base: torch.Tensor, other: torch.Tensor, image: torch.Tensor, *, out: torch.Tensor, threads: int, stream: int) -> None:
    ...
def delta_winograd(delta: torch.Tensor, filters: torch.Tensor, *, base: torch.Tensor | None, image: torch.Tensor | None, addend: torch.Tensor | None, out: torch.Tensor, padding: collections.abc.Sequence[int], activation: tuple[int, float, float], threads: int) -> None:
    ...
def depthwise(x: torch.Tensor, filters: torch.Tensor, out: torch.Tensor, *, stride: collections.abc.Sequence[int], padding: collections.abc.Sequence[int], dilation: collections.abc.Sequence[int], threads: int, stream: int) -> None:
    ...
def grid_size(elements: int, per_block: int) -> int:
    """
    Blocks of a CUDA launch, for tests.
    """
def head_flips(logits: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, bounds: torch.Tensor, baseline: torch.Tensor, tolerance: torch.Tensor, out: torch.Tensor, threads: int, stream: int) -> None:
    ...
def map_moments(x: torch.Tensor, pooled: torch.Tensor, active: torch.Tensor, least: torch.Tensor, positive: torch.Tensor, outer: int, units: int, inner: int, threads: int, stream: int) -> None:
    ...
def masked_copies(x: torch.Tensor, image: torch.Tensor, unit: torch.Tensor, value: torch.Tensor, out: torch.Tensor, *, outer: int, units: int, inner: int, threads: int, stream: int) -> None:
    ...
def perturbed(base: torch.Tensor, delta: torch.Tensor, image: torch.Tensor, *, out: torch.Tensor, threads: int, stream: int) -> None:
    ...
def subtracted(after: torch.Tensor, base: torch.Tensor, image: torch.Tensor, *, out: torch.Tensor, threads: int, stream: int) -> None:
    ...
def tensor_access(use_table: bool) -> str:
    """
    Read tensors by the exchange table if allowed and there; tell how they are read.
    """
def unit_delta(delta: torch.Tensor, weight: torch.Tensor, channel: torch.Tensor, image: torch.Tensor, column: torch.Tensor, *, base: torch.Tensor | None, base_image: torch.Tensor, out: torch.Tensor | None, codes: tuple[torch.Tensor | None, torch.Tensor | None], stride: collections.abc.Sequence[int], padding: collections.abc.Sequence[int], dilation: collections.abc.Sequence[int], activation: tuple[int, float, float], threads: int, stream: int) -> None:
    ...
def use_isa(name: str) -> bool:
    """
    Use the CPU kernels 'baseline', 'avx2' or 'avx512'; False if this machine cannot.
    """
has_cuda: bool
