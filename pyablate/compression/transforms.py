"""Ways to make a network smaller or its weights cheaper: each a function from model to model.

What they do to classes is for :func:`pyablate.compare` to say. None of them trains.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torch.nn.utils import prune

from pyablate.compression.coupling import Coupling
from pyablate.compression.ranking import Ranking, check_choice, rank
from pyablate.compression.removal import remove
from pyablate.layers import copied

CRITERIA = ("l1", "l2", "bn_scale")
_FLOAT_BITS = 32


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
    """

    model: nn.Module
    bits: int
    original_bits: int

    @property
    def ratio(self) -> float:
        """How many times smaller it is."""
        return self.original_bits / self.bits


def filter_ranking(
    model: nn.Module, sample: Tensor, criterion: str = "l1", *, scope: str = "layer"
) -> Ranking:
    """Rank units by the size of their weights.

    Parameters
    ----------
    model : nn.Module
        The network.
    sample : Tensor
        A batch of inputs, ``[N, ...]``.
    criterion : {"l1", "l2", "bn_scale"}
        Norm of all filters that make the unit (Li, Kadav, Durdanovic, Samet, Graf 2017, *Pruning
        Filters for Efficient ConvNets*), or the mean size of its batch norm scales (Liu, Li, Shen,
        Huang, Yan, Zhang 2017, *Learning Efficient Convolutional Networks through Network
        Slimming*).
    scope : {"global", "layer"}
        As for :func:`pyablate.rank`; norms of different layers hardly compare.

    Raises
    ------
    ImportError
        Torch-Pruning is not installed.
    ValueError, TypeError
        Bad arguments, or no batch norm in the network for ``bn_scale``.
    """
    check_choice("criterion", criterion, CRITERIA)
    coupling = Coupling(model, sample)
    scores = {one.label: _size(coupling, one.units, criterion) for one in coupling.classes}
    finite = {label: value for label, value in scores.items() if math.isfinite(value)}
    if not finite:
        raise ValueError(f"criterion: no unit of this network has what {criterion!r} looks at")
    # Whole classes are scored, so their labels name groups.
    return rank(model, sample, finite, scope=scope, name=criterion)


def prune_filters(
    model: nn.Module,
    sample: Tensor,
    fraction: float,
    *,
    criterion: str = "l1",
    scope: str = "layer",
) -> Transformed:
    """Remove the units with the smallest weights, see :func:`filter_ranking`.

    Parameters
    ----------
    model, sample, criterion, scope
        See :func:`filter_ranking`.
    fraction : float
        Share of the removable units, from 0 to 1.
    """
    ranking = filter_ranking(model, sample, criterion, scope=scope)
    removal = remove(model, ranking, sample, fraction=fraction)
    bits = _FLOAT_BITS * removal.after.parameters
    return Transformed(removal.model, bits, _FLOAT_BITS * removal.before.parameters)


def truncated_svd(
    model: nn.Module,
    share: float,
    *,
    layers: str | Sequence[str] = "*",
    energy_transfer: bool = False,
) -> Transformed:
    """Replace convolutions and linear maps by two smaller ones each.

    The weights as a matrix ``[outputs, inputs * kernel]`` are cut to the largest singular values,
    ``W = U S V``: first a layer with the filters ``sqrt(S) V``, then a 1x1 one with ``U sqrt(S)``.
    A layer for which two would be no smaller than one stays as it is, and so do convolutions in
    groups and transposed ones.

    Parameters
    ----------
    model : nn.Module
        It stays as it is.
    share : float
        Of the singular values that is kept, above 0 and up to 1, rounded up.
    layers : str or sequence of str
        Module names or globs.
    energy_transfer : bool
        Multiply the kept values by ``sqrt(sum s^2 / sum kept s^2)``, so that the weights keep
        their Frobenius norm.

    Raises
    ------
    ValueError
        The share is out of range, or no layer matches.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number above 0 and up to 1, got {share!r}")
    changed = copied(model)
    for name, module in list(_weighted(changed, layers)):
        if getattr(module, "groups", 1) > 1 or getattr(module, "transposed", False):
            continue
        matrix = module.weight.detach().flatten(1).double()
        kept = math.ceil(share * min(matrix.shape))
        if kept * sum(matrix.shape) >= matrix.numel():
            continue
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        values = s[:kept]
        if energy_transfer:
            values = values * (s.square().sum() / values.square().sum()).sqrt()
        root = values.sqrt()
        pair = _pair(module, root[:, None] * v[:kept], u[:, :kept] * root)
        owner, _, leaf = name.rpartition(".")
        setattr(changed.get_submodule(owner), leaf, pair.train(module.training))
    return Transformed(changed, _bits(changed), _bits(model))


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
    """
    if kernels < 2:
        raise ValueError(f"kernels: expected at least 2, got {kernels!r}")
    changed = copied(model)
    bits = _bits(model)
    for _, module in _weighted(changed, layers):
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
        _overwrite(module, torch.from_numpy(book[chosen]).reshape(weight.shape))
        saved = _FLOAT_BITS * weight.numel()
        bits += count * math.ceil(math.log2(kernels)) + _FLOAT_BITS * book.size - saved
    return Transformed(changed, bits, _bits(model))


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
    """
    changed = copied(model)
    bits = _bits(model)
    for _, module in _weighted(changed, layers):
        weight = module.weight.detach().double()
        axis = 1 if getattr(module, "transposed", False) else 0
        others = [dim for dim in range(weight.ndim) if dim != axis]
        scale = weight.abs().amax(dim=others, keepdim=True) / 127
        steps = torch.where(scale > 0, weight / scale.clamp(min=1e-300), 0).round()
        _overwrite(module, steps * scale)
        bits += _FLOAT_BITS * scale.numel() - (_FLOAT_BITS - 8) * weight.numel()
    return Transformed(changed, bits, _bits(model))


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
    """
    check_choice("scope", scope, ("global", "layer"))
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: expected a number from 0 to 1, got {fraction!r}")
    changed = copied(model)
    chosen = [(module, "weight") for _, module in _weighted(changed, layers)]
    if scope == "global":
        prune.global_unstructured(chosen, prune.L1Unstructured, amount=float(fraction))
    for module, name in chosen:
        if scope == "layer":
            prune.l1_unstructured(module, name, amount=float(fraction))
        prune.remove(module, name)
    return Transformed(changed, _sparse_bits(model, [one for one, _ in chosen]), _bits(model))


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
    """
    if blocks < 1:
        raise ValueError(f"blocks: expected at least 1, got {blocks!r}")
    changed = copied(model)
    bits = _bits(model)
    generator = np.random.default_rng(seed)
    for _, module in _weighted(changed, layers):
        weight = module.weight.detach()
        rows, columns = weight.shape[:2]
        if min(rows, columns) < blocks or blocks == 1:
            continue
        of_row = generator.permutation(np.arange(rows) * blocks // rows)
        of_column = generator.permutation(np.arange(columns) * blocks // columns)
        mask = torch.from_numpy(of_row[:, None] == of_column).to(weight.device)
        shaped = mask.reshape(rows, columns, *[1] * (weight.ndim - 2))
        _overwrite(module, weight * shaped)
        gone = (rows * columns - int(mask.sum())) * weight[0, 0].numel()
        bits += _FLOAT_BITS * (rows + columns - gone)
    return Transformed(changed, bits, _bits(model))


def _weighted(model: nn.Module, layers: str | Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Convolutions and linear maps whose names match, in order."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    known = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or list(known)[:3]
            raise ValueError(
                f"layers: no convolution or linear map matches {pattern!r}; "
                f"nearest: {', '.join(near)}"
            )
    for name, module in known.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            yield name, module


def _size(coupling: Coupling, units: Sequence[str], criterion: str) -> float:
    """Size of the weights that make some coupled units; NaN where there are none."""
    parts: list[Tensor] = []
    for dependency, channels in coupling.channels(units):
        module = dependency.target.module
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        makes = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        if criterion == "bn_scale" and norm and module.weight is not None:
            parts.append(module.weight.detach()[channels].abs())
        elif criterion != "bn_scale" and makes and "out" in dependency.handler.__name__:
            axis = 1 if getattr(module, "transposed", False) else 0
            taken = torch.tensor(channels, device=module.weight.device)
            parts.append(module.weight.detach().index_select(axis, taken).flatten())
    if not parts:
        return math.nan
    joined = torch.cat([part.double().cpu() for part in parts])
    reduce: dict[str, Callable[[Tensor], Tensor]] = {
        "l1": lambda w: w.abs().sum(),
        "l2": lambda w: w.square().sum().sqrt(),
        "bn_scale": lambda w: w.mean(),
    }
    return float(reduce[criterion](joined))


def _pair(module: Any, first: Tensor, second: Tensor) -> nn.Sequential:
    """Two layers with these matrices in place of a convolution or linear map."""
    like = {"device": module.weight.device, "dtype": module.weight.dtype}
    bias = module.bias is not None
    kept = len(first)
    before: Any
    after: Any
    linear = isinstance(module, nn.Linear)
    if linear:
        before = nn.Linear(module.in_features, kept, bias=False, **like)
        after = nn.Linear(kept, module.out_features, bias=bias, **like)
    else:
        kind = type(module)
        before = kind(
            module.in_channels,
            kept,
            module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            bias=False,
            padding_mode=module.padding_mode,
            **like,
        )
        after = kind(kept, module.out_channels, 1, bias=bias, **like)
    _overwrite(before, first)
    _overwrite(after, second)
    if bias:
        with torch.no_grad():
            after.bias.copy_(module.bias)
    return nn.Sequential(before, after)


def _overwrite(module: Any, values: Tensor) -> None:
    with torch.no_grad():
        module.weight.copy_(values.reshape(module.weight.shape))


def _bits(model: nn.Module) -> int:
    return _FLOAT_BITS * sum(parameter.numel() for parameter in model.parameters())


def _sparse_bits(model: nn.Module, masked: Sequence[Any]) -> int:
    total = sum(int(module.weight.numel()) for module in masked)
    kept = sum(int((module.weight != 0).sum()) for module in masked)
    return _bits(model) - _FLOAT_BITS * total + total + _FLOAT_BITS * kept
