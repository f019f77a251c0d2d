"""Weight compression: codebooks, quantized weights and masks, from model to model.

Filters and decompositions are in files of their own. What they do to classes is for
:func:`pyablate.compare` to say.
"""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torch.nn.utils import prune

from pyablate._validation import check_choice, check_count, check_fraction, nearest
from pyablate.network.sites import copied

FLOAT_BITS = 32


@dataclass(frozen=True, eq=False)
class Transformed:
    """A changed network and what its weights take.

    Attributes
    ----------
    model : nn.Module
        A network like the original, of ordinary modules with float weights.
    bits : int
        To store the parameters in the form that the transform allows; what it leaves alone takes
        32 bits a number.
    original_bits : int
        The same for the original.
    removed : tuple of str
        Labels of the units that are gone; see :func:`pyablate.compression.surviving`.
    history : pandas.DataFrame, optional
        Of a transform that trains, see :class:`pyablate.compression.FineTuned`.

    Examples
    --------
    >>> rounded = pa.compression.int8_weights(model)
    >>> rounded.bits < rounded.original_bits
    True
    """

    model: nn.Module
    bits: int
    original_bits: int
    removed: tuple[str, ...] = ()
    history: pd.DataFrame | None = None

    @property
    def ratio(self) -> float:
        """How many times smaller it is."""
        return self.original_bits / self.bits


def kernel_codebook(
    model: nn.Module, kernels: int, *, layers: str | Sequence[str] = "*", seed: int = 0
) -> Transformed:
    """Let the k x k kernels of each convolution share a codebook found by k-means.

    Parameters
    ----------
    model : nn.Module
        It stays as it is.
    kernels : int
        Size of the codebook of each layer; a layer with no more kernels than that, or with 1x1
        kernels, stays as it is.
    layers : str or sequence of str
        Module names or globs.
    seed : int
        Of k-means++.

    Returns
    -------
    Transformed
        A kernel takes ``ceil(log2(kernels))`` bits, so a weight that over ``kh kw``; a codebook
        takes 32 bits a number.

    Raises
    ------
    ValueError
        Fewer than two kernels, or no layer matches.

    Examples
    --------
    >>> pa.compression.kernel_codebook(model, 64, seed=0).ratio > 1
    True
    """
    check_count("kernels", kernels, 2)
    changed = copied(model)
    bits = float_bits(model)
    for _, module in weighted(changed, layers, in_place=True):
        weight = module.weight.detach()
        area = weight[0, 0].numel() if isinstance(module, nn.modules.conv._ConvNd) else 1
        count = weight.numel() // area
        if area == 1 or count <= kernels:
            continue
        rows = weight.reshape(count, area).double().cpu().numpy()
        with warnings.catch_warnings():
            # An empty cluster keeps its old centre, which does no harm.
            warnings.simplefilter("ignore", UserWarning)
            book, chosen = kmeans2(rows, kernels, minit="++", rng=np.random.default_rng(seed))
        overwrite(module, torch.from_numpy(book[chosen]).reshape(weight.shape))
        saved = FLOAT_BITS * weight.numel()
        bits += count * math.ceil(math.log2(kernels)) + FLOAT_BITS * book.size - saved
    return Transformed(changed, bits, float_bits(model))


def int8_weights(model: nn.Module, *, layers: str | Sequence[str] = "*") -> Transformed:
    """Round weights to 8 bits, symmetric, with a scale for each output channel.

    ``w = s round(w / s)`` with ``s = max |w| / 127`` over the channel; biases and batch norm stay.

    Parameters
    ----------
    model : nn.Module
        It stays as it is; the weights of the result are floats again.
    layers : str or sequence of str
        Module names or globs.

    Raises
    ------
    ValueError
        No layer matches.

    Examples
    --------
    >>> round(pa.compression.int8_weights(model).ratio, 1)
    3.9
    """
    changed = copied(model)
    bits = float_bits(model)
    for _, module in weighted(changed, layers, in_place=True):
        weight = module.weight.detach().double()
        others = [dim for dim in range(weight.ndim) if dim != output_axis(module)]
        scale = weight.abs().amax(dim=others, keepdim=True) / 127
        steps = torch.where(scale > 0, weight / scale.clamp(min=1e-300), 0).round()
        overwrite(module, steps * scale)
        bits += FLOAT_BITS * scale.numel() - (FLOAT_BITS - 8) * weight.numel()
    return Transformed(changed, bits, float_bits(model))


def magnitude_masks(
    model: nn.Module,
    fraction: float,
    *,
    layers: str | Sequence[str] = "*",
    scope: str = "global",
) -> Transformed:
    """Set the smallest weights to zero, wherever they are (``torch.nn.utils.prune``).

    Parameters
    ----------
    model : nn.Module
        It stays as it is.
    fraction : float
        Share of the weights, from 0 to 1.
    layers : str or sequence of str
        Module names or globs.
    scope : {"global", "layer"}
        Smallest of all layers, or of each.

    Returns
    -------
    Transformed
        A weight takes one bit, and 32 more if it is not zero.

    Raises
    ------
    ValueError
        The fraction is out of range, or no layer matches.

    Examples
    --------
    >>> sparse = pa.compression.magnitude_masks(model, 0.8).model
    >>> round(float((sparse.features[14].weight == 0).double().mean()), 1) > 0.5
    True
    """
    check_choice("scope", scope, ("global", "layer"))
    check_fraction("fraction", fraction)
    changed = copied(model)
    chosen = [(module, "weight") for _, module in weighted(changed, layers, in_place=True)]
    if scope == "global":
        prune.global_unstructured(chosen, prune.L1Unstructured, amount=float(fraction))
    for module, name in chosen:
        if scope == "layer":
            prune.l1_unstructured(module, name, amount=float(fraction))
        prune.remove(module, name)
    return Transformed(changed, sparse_bits(model, [one for one, _ in chosen]), float_bits(model))


def block_masks(
    model: nn.Module, blocks: int, *, layers: str | Sequence[str] = "*", seed: int = 0
) -> Transformed:
    """Keep the weights of a block diagonal whose rows and columns are shuffled at random.

    The mask over ``[outputs, inputs]`` is ``P D Q`` with ``D`` block diagonal and ``P``, ``Q``
    permutations, so that one weight in ``blocks`` stays; a kernel stays or goes as a whole.
    Undoing the permutations gives dense blocks.

    Parameters
    ----------
    model : nn.Module
        It stays as it is.
    blocks : int
        On the diagonal. A layer with fewer inputs or outputs stays as it is.
    layers : str or sequence of str
        Module names or globs.
    seed : int
        Of the permutations.

    Returns
    -------
    Transformed
        Weights that stay take 32 bits, the permutations 32 bits a number.

    Raises
    ------
    ValueError
        Fewer than one block, or no layer matches.

    Examples
    --------
    >>> blocks = pa.compression.block_masks(model, 4, layers="features.14", seed=0).model
    >>> float((blocks.features[14].weight == 0).double().mean())
    0.75
    """
    check_count("blocks", blocks)
    changed = copied(model)
    bits = float_bits(model)
    generator = np.random.default_rng(seed)
    for _, module in weighted(changed, layers, in_place=True):
        weight = module.weight.detach()
        rows, columns = weight.shape[:2]
        if min(rows, columns) < blocks or blocks == 1:
            continue
        of_row = generator.permutation(np.arange(rows) * blocks // rows)
        of_column = generator.permutation(np.arange(columns) * blocks // columns)
        mask = torch.from_numpy(of_row[:, None] == of_column).to(weight.device)
        shaped = mask.reshape(rows, columns, *[1] * (weight.ndim - 2))
        overwrite(module, weight * shaped)
        gone = (rows * columns - int(mask.sum())) * weight[0, 0].numel()
        bits += FLOAT_BITS * (rows + columns - gone)
    return Transformed(changed, bits, float_bits(model))


def weighted(
    model: nn.Module, layers: str | Sequence[str], *, in_place: bool = False
) -> Iterator[tuple[str, Any]]:
    """Convolutions and linear maps whose names match, in order.

    To be changed ``in_place``: each weight once, of whichever layer has it first, and an error
    where weights are computed from others, as by weight norm.
    """
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    known = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise ValueError(
                f"layers: no convolution or linear map matches {pattern!r}{nearest(pattern, known)}"
            )
    held = set()
    for name, module in known.items():
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        if in_place:
            check_own(module, name)
            if module.weight in held:
                continue
            held.add(module.weight)
        yield name, module


def is_plain(module: Any) -> bool:
    """Whether a layer is one matrix: linear, or a convolution of one group, not transposed."""
    return getattr(module, "groups", 1) == 1 and not getattr(module, "transposed", False)


def output_axis(module: Any) -> int:
    """Axis of a layer's weights along which its outputs lie."""
    return 1 if getattr(module, "transposed", False) else 0


def check_own(module: Any, name: str = "") -> None:
    """Refuse a layer whose weights are computed at each pass, so that they cannot be set."""
    if "weight" not in module._parameters:
        raise ValueError(
            f"layers: the weights of {name or type(module).__name__} are computed from others (by "
            "weight norm or another parametrization); make them plain first, for example by "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )


def overwrite(module: Any, values: Tensor) -> None:
    """Give a layer other weights, whatever their shape."""
    check_own(module)
    with torch.no_grad():
        module.weight.copy_(values.reshape(module.weight.shape))


def float_bits(model: nn.Module) -> int:
    """Bits of all parameters as float32."""
    return FLOAT_BITS * sum(parameter.numel() for parameter in model.parameters())


def sparse_bits(model: nn.Module, masked: Sequence[Any]) -> int:
    """Bits of all parameters where a masked weight takes one, and 32 more if it is not zero."""
    total = sum(int(module.weight.numel()) for module in masked)
    kept = sum(int((module.weight != 0).sum()) for module in masked)
    return float_bits(model) - FLOAT_BITS * total + total + FLOAT_BITS * kept
