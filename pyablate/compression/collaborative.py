"""Collaborative compression: input channels and singular values go together, shares are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn import functional

from pyablate._validation import check_count
from pyablate.compression._remove import AGREEMENT, silenced, without
from pyablate.compression.coupling import Coupling, torch_pruning
from pyablate.compression.decomposition import factors, pair, plain
from pyablate.compression.sgd import training
from pyablate.compression.transforms import Transformed, float_bits, output_axis, overwrite
from pyablate.data.dataset import Data
from pyablate.network import near_tie
from pyablate.network.classifier import giving_logits
from pyablate.network.forward import check_logits
from pyablate.network.model_checks import fit_inputs
from pyablate.network.sites import copied
from pyablate.runtime.progress import Report

MOST = 0.95
"""Share of a layer's weights that may go."""
AHEAD = 0.9
"""Weight of the look-ahead, as in Li et al. 2021."""
_LEAST = 1e-10
"""Share of a layer's largest loss that counts as none, so that it has a logarithm."""


def collaborative_compression(
    model: nn.Module,
    sample: Any,
    data: Any,
    fraction: float,
    *,
    layers: str | Sequence[str] = "*",
    step: float = 0.05,
    batch_size: int = 128,
    device: str | torch.device | None = None,
    progress: bool | Report | None = None,
) -> Transformed:
    """Remove input channels and singular values of each layer, those that cost the loss least.

    What a change of the weights ``W`` costs is ``S = sum (g (W_new - W))^2`` with ``g`` the
    gradient of the mean loss. How much of each layer goes: ``S``, as a share of its largest, is
    fitted by an exponential of the rate, and the sum over layers is least at the rates that make
    up the fraction. What goes, step by step: the channel or singular value with the smallest
    ``S + 0.9 A``, where ``A`` is the mean ``S`` once one more of those left has gone, too.

    Parameters
    ----------
    model : nn.Module
        It stays as it is.
    sample : Tensor, dict or tuple of Tensor
        A batch of inputs, ``[N, ...]``.
    data : pair of arrays, DataLoader or iterable of (images, labels)
        For the gradient; held in memory.
    fraction : float
        Share of the weights of these layers that goes, from 0 to 0.95; units that nobody reads any
        longer go besides. The last channel and value of a layer stay, so it may be less.
    layers : str or sequence of str
        Module names or globs; convolutions in groups and transposed ones stay as they are.
    step : float
        Share of a layer's channels and singular values that goes before the others are scored
        anew, above 0 and up to 1. A score takes an eigendecomposition for each channel.
    batch_size : int
        Of the passes for the gradient.
    device, progress
        As for :func:`pyablate.finetune`.

    Returns
    -------
    Transformed
        A layer that does not read all its inputs selects them first, which takes a bit an input;
        one of low rank is two layers. Units that nobody reads are ``removed``.

    Raises
    ------
    ImportError
        Torch-Pruning is not installed.
    ValueError, TypeError
        Bad arguments or data, or no layer matches.

    Notes
    -----
    Li, Lin, Liu, Ye, Wang, Chao, Yang, Ma, Tian, Ji 2021, *Towards Compact CNNs via Collaborative
    Compression*, arXiv:2105.11228. There rates are of operations, here of weights. Train the
    result: :func:`pyablate.finetune`.

    Examples
    --------
    >>> both = pa.compression.collaborative_compression(
    ...     model, images[:2], data, 0.5, layers="features.7", step=0.2
    ... )
    >>> both.ratio > 1
    True
    """
    if not 0 <= fraction <= MOST:
        raise ValueError(f"fraction: expected a number from 0 to {MOST}, got {fraction!r}")
    if not 0 < step <= 1:
        raise ValueError(f"step: expected a number above 0 and up to 1, got {step!r}")
    check_count("batch_size", batch_size)
    torch_pruning()
    with (
        training(model, data, device, progress) as (work, held, report),
        giving_logits(work),
    ):
        fit_inputs(work, held, held.first(2).images)
        chosen = dict(plain(work, layers))
        if not chosen:
            raise ValueError(
                f"layers: expected layers that are neither in groups nor transposed, got {layers!r}"
            )
        slopes = _gradients(work, held, [module.weight for module in chosen.values()], batch_size)
        found = [Layer.of(m.weight, g) for m, g in zip(chosen.values(), slopes, strict=True)]
        sizes = np.array([layer.weight.numel() for layer in found])
        rates = best_rates([layer.curve(step) for layer in found], sizes, fraction)
        ranks = {}
        for done, ((name, module), layer) in enumerate(zip(chosen.items(), found, strict=True), 1):
            left = layer.compressed(float(rates[done - 1]), step)
            overwrite(module, left.weight)
            ranks[name] = left.rank
            report(done, len(chosen), name)
    changed, removed = _without_unread(work, sample)
    bits = 0
    for name, rank in ranks.items():
        whole: Any = changed.get_submodule(name)
        smaller = _smaller(whole, rank)
        changed.set_submodule(name, smaller)
        selects = any(isinstance(part, Select) for part in smaller.children())
        bits += whole.weight.shape[1] if selects else 0
    return Transformed(changed, float_bits(changed) + bits, float_bits(model), removed=removed)


@dataclass(frozen=True, eq=False)
class Left:
    """What is left of a layer: weights ``[outputs, inputs, kernel]``, inputs it reads, its rank."""

    weight: Tensor
    reads: Tensor
    rank: int

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor]:
        """Left singular vectors ``[outputs, rank]``, and the right ones times their values."""
        u, s, v = torch.linalg.svd(self.weight.flatten(1), full_matrices=False)
        return u[:, : self.rank], (s[:, None] * v)[: self.rank]

    @property
    def whole(self) -> int:
        """Weights of one layer."""
        return int(self.reads.sum()) * self.weight[:, 0].numel()

    @property
    def units(self) -> int:
        """Channels and singular values that are left."""
        return int(self.reads.sum()) + self.rank

    def size(self, channels: int = 0, values: int = 0) -> int:
        """Weights of one layer or of two, what is less, once so many more have gone."""
        outputs, _, kernel = self.weight.shape
        columns = (int(self.reads.sum()) - channels) * kernel
        rank = min(self.rank - values, columns)
        return min(outputs * columns, rank * (outputs + columns))

    def without(self, channels: Sequence[int], values: Sequence[int]) -> Left:
        """Take out input channels, and singular values by their place in ``parts``."""
        u, v = self.parts
        gone = (u[:, values] @ v[values]).reshape(self.weight.shape)
        reads = self.reads.clone()
        reads[channels] = False
        rank = min(self.rank - len(values), int(reads.sum()) * self.weight.shape[2])
        return Left((self.weight - gone) * reads[:, None], reads, rank)


@dataclass(frozen=True, eq=False)
class Layer:
    """Weights ``[outputs, inputs, kernel]`` and their squared gradient, float64 on the CPU."""

    weight: Tensor
    squared: Tensor

    @classmethod
    def of(cls, weight: Tensor, gradient: Tensor) -> Layer:
        """Take weights and gradient of any shape ``[outputs, inputs, ...]``."""
        flat = [each.detach().double().cpu() for each in (weight, gradient)]
        w, g = (each.reshape(*each.shape[:2], -1) for each in flat)
        return cls(w, g.square())

    def intact(self) -> Left:
        """Return the layer before anything went."""
        outputs, inputs, kernel = self.weight.shape
        reads = torch.ones(inputs, dtype=torch.bool)
        return Left(self.weight, reads, min(outputs, inputs * kernel))

    def loss(self, weight: Tensor) -> float:
        """``S`` of other weights."""
        return float((self.squared * (weight - self.weight).square()).sum())

    def curve(self, step: float) -> tuple[list[float], list[float]]:
        """Rates and losses, units going in the order of what each alone costs."""
        start = self.intact()
        u, v = start.parts
        of_channels = (self.squared * self.weight.square()).sum((0, 2))
        of_values = ((u.square().T @ self.squared.flatten(1)) * v.square()).sum(1)
        order = torch.cat([of_channels, of_values]).argsort(stable=True)
        rates, losses = [0.0], [0.0]
        for count in range(1, start.units + 1):
            if count % max(1, round(step * start.units)) == 0 or count == start.units:
                left = start.without(*_by_kind(order[:count].tolist(), len(of_channels)))
                rate = 1 - left.size() / self.weight.numel()
                if rate > 0:
                    rates.append(rate)
                    losses.append(self.loss(left.weight))
        return rates, losses

    def compressed(self, rate: float, step: float) -> Left:
        """Remove what scores lowest until a share of the weights is gone, or all but one are."""
        left = self.intact()
        allowed = (1 - rate) * self.weight.numel()
        at_once = max(1, round(step * left.units))
        while left.size() > allowed and left.units > 2:
            left = self._less(left, at_once, allowed)
        if left.whole <= max(allowed, left.size()):
            # Without channels alone it is small enough: the weights it reads are as they were.
            return Left(self.weight * left.reads[:, None], left.reads, self.intact().rank)
        return left

    def scores(self, left: Left) -> Tensor:
        """Score each channel and then each singular value; infinite where it has to stay."""
        inputs = len(left.reads)
        found = torch.full((inputs + left.rank,), torch.inf, dtype=torch.float64)
        if left.reads.sum() > 1:
            for channel in left.reads.nonzero().flatten().tolist():
                after = left.without([channel], [])
                found[channel] = self._score(after, _squared_parts(after.weight.flatten(1)))
        if left.rank > 1:
            u, v = (each.square() for each in left.parts)
            whole = u @ v
            for value in range(left.rank):
                after = left.without([], [value])
                found[inputs + value] = self._score(after, whole - u[:, value, None] * v[value])
        return found

    def _score(self, after: Left, squares: Tensor) -> float:
        """``S + 0.9 A``, from the squared weights of each singular value, summed over them.

        With ``D = W_new - W``, ``A`` is the mean over parts ``P`` of ``sum g^2 (D - P)^2``. The
        channels sum to ``W_new``, and so do the singular values: all parts sum to twice that.
        """
        new, change = after.weight, after.weight - self.weight
        more = new.square() + squares.reshape(new.shape) - 4 * change * new
        now = self.loss(new)
        return now + AHEAD * (now + float((self.squared * more).sum()) / after.units)

    def _less(self, left: Left, at_once: int, allowed: float) -> Left:
        """Remove the units with the lowest scores, no more than needed, and the last of none."""
        inputs = len(left.reads)
        scores = self.scores(left)
        room = {True: int(left.reads.sum()) - 1, False: left.rank - 1}
        going: list[int] = []
        for unit in scores.argsort(stable=True)[:at_once].tolist():
            if room[unit < inputs] == 0 or scores[unit] == torch.inf:
                continue
            room[unit < inputs] -= 1
            going.append(unit)
            if left.size(*map(len, _by_kind(going, inputs))) <= allowed:
                break
        return left.without(*_by_kind(going, inputs))


def _by_kind(units: Sequence[int], inputs: int) -> tuple[list[int], list[int]]:
    """Channels, and places of singular values, of numbers that count one behind the other."""
    return [u for u in units if u < inputs], [u - inputs for u in units if u >= inputs]


def _squared_parts(matrix: Tensor) -> Tensor:
    """Square the part of each singular value, entry by entry, and sum over the values."""
    if len(matrix) > matrix.shape[1]:
        return _squared_parts(matrix.T).T
    _, u = torch.linalg.eigh(matrix @ matrix.T)
    found: Tensor = u.square() @ (u.T @ matrix).square()
    return found


def best_rates(
    curves: Sequence[tuple[Sequence[float], Sequence[float]]], sizes: np.ndarray, fraction: float
) -> np.ndarray:
    """Rates with the least sum of fitted losses that take a fraction of all weights.

    Each loss, as a share of its largest, is fitted by ``exp(a + b rate)``. At the optimum the slope
    of a loss over the weights that it takes is the same for all layers but those at an end.
    """
    fits = [_exponential(*map(np.asarray, curve)) for curve in curves]
    a, b = np.array(fits).T
    flat = a + np.log(b) - np.log(sizes)

    def rates(level: float) -> np.ndarray:
        return np.asarray(np.clip((level - flat) / b, 0, MOST))

    lowest, highest = flat.min(), (flat + MOST * b).max()
    wanted = min(fraction * sizes.sum(), rates(highest) @ sizes)
    return rates(brentq(lambda level: rates(level) @ sizes - wanted, lowest, highest))


def _exponential(rates: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    """Fit the logarithm by a line, large losses counting more."""
    shares = losses / (losses.max() or 1.0) + _LEAST
    slope, start = np.polyfit(rates, np.log(shares), 1, w=shares**0.25)
    return start, max(slope, 1e-6)


def _gradients(
    model: nn.Module, data: Data, weights: Sequence[Tensor], batch_size: int
) -> list[Tensor]:
    """Gradients of the mean cross entropy."""
    trained = [weight.requires_grad for weight in weights]
    sums = [torch.zeros_like(weight) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    with torch.enable_grad():
        for batch in data.batches(batch_size):
            logits = check_logits(model(batch.images), len(batch.images))
            loss = functional.cross_entropy(logits, batch.labels, reduction="sum")
            found = torch.autograd.grad(loss, list(weights), allow_unused=True)
            for total, gradient in zip(sums, found, strict=True):
                total += 0 if gradient is None else gradient
    for weight, flag in zip(weights, trained, strict=True):
        weight.requires_grad_(flag)
    return [total / len(data) for total in sums]


def _without_unread(model: nn.Module, sample: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """Remove the units that no layer reads with a weight other than zero."""
    coupling = Coupling(model, sample)
    classes = [one for one in coupling.classes if not one.obstacle and _unread(coupling, one.units)]
    units = tuple(unit for one in classes for unit in one.units)
    try:
        smaller, _, logits = without(coupling, units)
    except ValueError:  # sizes are written into its code
        return model, ()
    # What reads a unit without weights of its own is not in the graph: see what it does.
    same = near_tie.disagreement(logits, silenced(coupling, ())) <= AGREEMENT
    return (smaller, units) if same else (model, ())


def _unread(coupling: Coupling, units: Sequence[str]) -> bool:
    read = []
    for dependency, channels in coupling.channels(units):
        module = dependency.target.module
        weighted = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        if weighted and "out" not in dependency.handler.__name__:
            weight = module.weight.transpose(0, 1) if output_axis(module) else module.weight
            read.append(bool(weight[:, channels].any()))
    return bool(read) and not any(read)


def _smaller(module: Any, rank: int) -> nn.Module:
    """Return layers that compute the same from the inputs that it reads, by the least weights."""
    weight = module.weight.detach()
    reads = weight.reshape(*weight.shape[:2], -1).any(-1).any(0)
    reads[0] |= not reads.any()
    found = copied(module)
    found.weight = nn.Parameter(weight[:, reads], requires_grad=module.weight.requires_grad)
    setattr(found, "in_features" if weight.ndim == 2 else "in_channels", int(reads.sum()))
    sizes = len(weight), weight[0, reads].numel()
    if rank * sum(sizes) < found.weight.numel():
        found = pair(found, *factors(found, min(rank, *sizes), None, energy_transfer=False))
    selected = reads.nonzero().flatten()
    return found if reads.all() else nn.Sequential(Select(selected, 1 - weight.ndim), found)


class Select(nn.Module):
    """Some channels of a tensor.

    Parameters
    ----------
    channels : Tensor
        Their numbers.
    axis : int
        Where the channels are.
    """

    channels: Tensor

    def __init__(self, channels: Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("channels", channels)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Select them."""
        return x.index_select(self.axis, self.channels)
