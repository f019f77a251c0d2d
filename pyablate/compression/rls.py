"""Recursive least squares: training that knows its inputs, and pruning by what it has learnt."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from pyablate._validation import check_count, check_fraction
from pyablate.comparison._compare import surviving
from pyablate.comparison.evaluation import evaluate
from pyablate.compression._rank import Ranking, rank
from pyablate.compression._remove import remove
from pyablate.compression.coupling import Coupling
from pyablate.compression.sgd import Augment, Schedule, cross_entropy, fit, training
from pyablate.compression.transforms import Transformed, check_own, float_bits, is_plain, weighted
from pyablate.data.dataset import Data
from pyablate.network.sites import check_model
from pyablate.runtime.progress import Report

ROWS = 256
"""Input rows that one step adds to an autocorrelation; of more (positions), these are drawn."""


def rls_pruning(
    model: nn.Module,
    sample: Any,
    data: Any,
    fraction: float,
    *,
    rounds: int = 3,
    forgetting: float = 1.0,
    epochs: int = 3,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    augment: Augment | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | Report | None = None,
) -> Transformed:
    """Train by recursive least squares, remove what is needed least, recover, and repeat.

    Parameters
    ----------
    model : nn.Module
        It stays as it is.
    sample : Tensor, dict or tuple of Tensor
        A batch of inputs, ``[N, ...]``.
    data : pair of arrays, DataLoader or iterable of (images, labels)
        To train on; held in memory.
    fraction : float
        Share of the removable units of each layer that is gone at the end, from 0 to 1.
    rounds : int
        In how many parts they go.
    forgetting : float
        Weight of earlier inputs at each step, above 0 and up to 1.
    epochs : int
        Passes over the data before the first removal. Behind every removal the network recovers:
        it is trained until its loss is no higher than before, for as many passes at most.
    learning_rate : float
        It falls along a cosine to 0 within every pass.
    momentum, weight_decay, batch_size, augment, seed, device, progress
        As for :func:`pyablate.finetune`.

    Returns
    -------
    Transformed
        The network without these units, with the ``history`` of training; its column ``removed``
        counts the units that were gone.

    Raises
    ------
    ImportError
        Torch-Pruning is not installed.
    ValueError, TypeError
        Bad arguments or data, a loss that is no longer finite, layers that share their weights, or
        whose weights are computed from others, as by weight norm.

    Notes
    -----
    Yu, Zhang, Wang, Ma, Song 2022, *Recursive Least Squares for Training and Pruning Convolutional
    Neural Networks*, arXiv:2201.04813. A layer's input autocorrelation starts as the identity and
    becomes ``R = forgetting R + mean(x x^T)`` at each step, the mean over the batch and, for
    convolutions, over the patches that meet the kernel (of 256 drawn of both). Its inverse ``P`` is
    updated by the matrix form of the Sherman-Morrison formula; the paper adds the patches' mean
    instead. Weights ``[outputs, inputs]`` take steps along their gradient times ``P``. An input
    channel counts the sum of ``w^2 / P_ii`` over its weights, ``i`` being the input of the weight:
    what the squared error of the layer grows by if one is set to zero and the others make up for it
    (Hassibi, Stork 1993, *Optimal Brain Surgeon*). Biases, batch norms and convolutions in
    groups or transposed take plain steps. ``P`` starts anew behind each removal.

    Examples
    --------
    >>> pruned = pa.compression.rls_pruning(model, images[:2], data, 0.3, rounds=1, epochs=1)
    >>> pruned.ratio > 1, pruned.history["removed"].tolist()[0]
    (True, 0)
    """
    check_fraction("fraction", fraction)
    check_count("rounds", rounds)
    if not 0 < forgetting <= 1:
        raise ValueError(f"forgetting: expected a number above 0 and up to 1, got {forgetting!r}")
    _check_weights(model)
    schedule = Schedule(
        epochs, learning_rate, momentum, weight_decay, batch_size, seed=seed, augment=augment
    )
    removed: list[str] = []
    history: list[dict[str, Any]] = []
    with training(model, data, device, progress) as (trained, held, report):
        original = {unit: unit for one in Coupling(trained, sample).classes for unit in one.units}
        sizes: dict[tuple[str, ...], int] = {}
        before = -math.inf  # which no loss reaches: at first all passes are made
        for part in range(rounds + 1):
            inverses = Inverses(trained, forgetting)
            for _ in range(epochs):
                passes = len(history)
                turn = replace(schedule, epochs=1, seed=seed + passes)
                row = _one_pass(trained, held, inverses, turn, report)
                history.append({**row, "epoch": passes + 1, "removed": len(removed)})
                loss = evaluate(trained, held).loss
                if loss <= before:
                    break
            before = loss
            if part == rounds:
                break
            ranking = _scored(trained, sample, inverses)
            going = _going(ranking, sizes, fraction * (part + 1) / rounds)
            removal = remove(trained, going, sample)
            trained = removal.model
            removed += [original[unit] for unit in removal.units]
            left = surviving(list(original), removal.units)
            original = {now: original[unit] for unit, now in left.items()}
    return Transformed(
        trained, float_bits(trained), float_bits(model), tuple(removed), pd.DataFrame(history)
    )


def _check_weights(model: nn.Module) -> None:
    """Refuse weights that take no steps of their own: one autocorrelation belongs to one weight."""
    check_model(model)
    first: dict[nn.Parameter, str] = {}
    for name, module in weighted(model, "*"):
        if not is_plain(module) or not module.weight.requires_grad:
            continue
        check_own(module, name)
        other = first.setdefault(module.weight, name)
        if other != name:
            raise ValueError(
                f"model: {other} and {name} share their weights; expected weights of one layer "
                "each, since a step follows from what this one layer reads"
            )


def _one_pass(
    model: nn.Module, data: Data, inverses: Inverses, schedule: Schedule, report: Report
) -> dict[str, Any]:
    with inverses.applied(model):
        return fit(model, data, cross_entropy(model), schedule, report=report)[0]


def _scored(model: nn.Module, sample: Any, inverses: Inverses) -> Ranking:
    """Rank units by what the layers that read them make of them."""
    coupling = Coupling(model, sample)
    importance = inverses.importance(model)
    scores = {}
    for one in coupling.classes:
        parts = [
            float(importance[coupling.name_of(dependency.target.module)][channels].sum())
            for dependency, channels in coupling.channels(one.units)
            if "in_channels" in dependency.handler.__name__
            and coupling.name_of(dependency.target.module) in importance
        ]
        if parts:
            scores[one.label] = sum(parts)
    return rank(model, sample, scores, scope="layer", name="rls")


def _going(ranking: Ranking, sizes: dict[tuple[str, ...], int], share: float) -> list[str]:
    """Units that go now, so that of each layer such a share is gone in all.

    ``sizes``, the removable places of each layer, is filled in when nothing has gone.
    """
    left = Counter(one.layers for one in ranking.order if not one.obstacle)
    going: list[str] = []
    for layers, places in left.items():
        size = sizes.setdefault(layers, places)
        mine = [one for one in ranking.sequence if one.layers == layers]
        count = max(0, round(share * size) - (size - places))
        going += [unit for one in mine[:count] for unit in one.units]
    return going


class Inverses:
    """Inverse input autocorrelations of a network's layers, which follow it while it trains.

    Parameters
    ----------
    model : nn.Module
        The network; linear maps and convolutions that are neither in groups nor transposed have
        one, if their weights are trained.
    forgetting : float
        Weight of earlier inputs.
    start : float
        Each begins as the identity times this.

    Attributes
    ----------
    matrices : dict of str to Tensor
        By the layer's name, float64 ``[inputs, inputs]``, of convolutions ``channels * kernel``.
    """

    def __init__(self, model: nn.Module, forgetting: float, start: float = 1.0) -> None:
        self.forgetting = forgetting
        self.matrices: dict[str, Tensor] = {}
        for name, module in weighted(model, "*"):
            if is_plain(module) and module.weight.requires_grad:
                size, device = module.weight[0].numel(), module.weight.device
                one = torch.eye(size, dtype=torch.float64, device=device)
                self.matrices[name] = start * one

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Take in what the layers read in training mode, and turn their gradients for a while."""
        hooks = []
        for name in self.matrices:
            module: Any = model.get_submodule(name)
            read = partial(self._read, name)
            hooks.append(module.register_forward_pre_hook(read, with_kwargs=True))
            hooks.append(module.weight.register_hook(partial(self._turned, name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def update(self, name: str, rows: Tensor) -> None:
        """Add the mean of ``x x^T`` over the rows ``[N, inputs]`` to a layer's autocorrelation."""
        inverse, rows = self.matrices[name], rows.double() / math.sqrt(len(rows))
        read = rows @ inverse
        inner = self.forgetting * torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        half = torch.linalg.solve_triangular(
            torch.linalg.cholesky(inner + read @ rows.T), read, upper=False
        )
        self.matrices[name] = (inverse - half.T @ half) / self.forgetting

    def importance(self, model: nn.Module) -> dict[str, Tensor]:
        """Sum ``w^2 / P_ii`` over the weights of each input channel of each layer, ``[inputs]``."""
        found = {}
        for name, inverse in self.matrices.items():
            module: Any = model.get_submodule(name)
            weight = module.weight.detach().double()
            size = weight.flatten(1).square().sum(0) / inverse.diagonal()
            found[name] = size.reshape(weight.shape[1], -1).sum(1).cpu()
        return found

    def _read(self, name: str, module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if module.training:
            inputs = given[0] if given else named["input"]
            self.update(name, input_rows(module, inputs.detach()))

    def _turned(self, name: str, gradient: Tensor) -> Tensor:
        turned = gradient.flatten(1).double() @ self.matrices[name]
        return turned.reshape(gradient.shape).to(gradient.dtype)


def input_rows(module: Any, inputs: Tensor) -> Tensor:
    """Rows ``[N, inputs]`` that meet a layer's weights, ``ROWS`` of them at most, drawn."""
    patches = inputs
    if not isinstance(module, nn.Linear):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        patches = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
        sizes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
        for axis, (size, stride, dilation) in enumerate(sizes, start=2):
            patches = patches.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        patches = patches.movedim(1, inputs.ndim - 1)  # images, positions, channels, kernel
    places = patches.shape[: inputs.ndim - 1]
    count = math.prod(places)
    chosen = torch.arange(count) if count <= ROWS else torch.randint(count, (ROWS,))
    return patches[torch.unravel_index(chosen, places)].flatten(1)
