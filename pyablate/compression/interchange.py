"""A ranking in the forms of other tools: masks of ``torch.nn.utils.prune``, Torch-Pruning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pyablate.compression._rank import Ranking
from pyablate.compression._remove import labels_of
from pyablate.compression.coupling import Coupling
from pyablate.compression.transforms import output_axis


def masked(model: nn.Module, ranking: Ranking, fraction: float, sample: Any) -> nn.Module:
    """Mask the weights that make the units a ranking removes, by ``torch.nn.utils.prune``.

    Masked are the filters and biases of convolutions and linear maps, and scale and shift of the
    batch norm behind them: a filter at zero before batch norm still puts out a constant.

    Parameters
    ----------
    model : nn.Module
        It stays as it is.
    ranking : Ranking
        From :func:`pyablate.rank`.
    fraction : float
        Share of its removable places.
    sample : Tensor, dict or tuple of Tensor
        A batch of inputs, ``[N, ...]``.

    Returns
    -------
    nn.Module
        A copy with ``weight_orig`` and ``weight_mask`` in place of each masked ``weight``; it can
        be trained, and ``torch.nn.utils.prune.remove`` makes the zeros permanent.

    Raises
    ------
    ImportError
        Torch-Pruning is not installed.
    ValueError, TypeError
        Bad arguments, a ranking of another network, or a unit that something else than these
        makes.

    Examples
    --------
    >>> norms = pa.compression.filter_ranking(model, images[:2], "l1")
    >>> masked = pa.compression.masked(model, norms, 0.3, images[:2])
    >>> masked(images).shape
    torch.Size([60, 10])
    """
    coupling = Coupling(model, sample)
    changed = coupling.without(())
    for dependency, channels in coupling.channels(labels_of(ranking, fraction)):
        module = dependency.target.module
        if "out" not in dependency.handler.__name__ or not isinstance(module, nn.Module):
            continue
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if not set(own) <= {"weight", "bias"}:
            raise ValueError(f"model: {type(module).__name__} has parameters that no mask is for")
        target = changed.get_submodule(coupling.name_of(module)) if own else module
        for name in own:
            value = getattr(module, name)
            axis = output_axis(module) if name == "weight" else 0
            if value.shape[axis] == 1 < len(channels):
                continue  # one slope of a PReLU for all channels
            mask = torch.ones_like(value)
            mask.index_fill_(axis, torch.tensor(channels, device=value.device), 0)
            prune.custom_from_mask(target, name, mask)
    return changed


def importance(model: nn.Module, ranking: Ranking, sample: Any) -> Callable[..., Tensor]:
    """Make of a ranking what Torch-Pruning's pruners take as ``importance``.

    Parameters
    ----------
    model : nn.Module
        The network that was ranked and that the pruner gets.
    ranking : Ranking
        From :func:`pyablate.rank`.
    sample : Tensor, dict or tuple of Tensor
        A batch of inputs, ``[N, ...]``.

    Returns
    -------
    callable
        Of one of Torch-Pruning's groups; float32 ``[channels of its root]``, the place of each
        in the ranking, infinite for what is never to go.

    Raises
    ------
    ImportError
        Torch-Pruning is not installed.
    ValueError
        Later, if a group begins at a layer that the model does not have.

    Examples
    --------
    >>> norms = pa.compression.filter_ranking(model, images[:2], "l1")
    >>> callable(pa.compression.importance(model, norms, images[:2]))  # for Torch-Pruning's pruners
    True
    """
    coupling = Coupling(model, sample)
    never = float("inf")
    pairs = enumerate(zip(ranking.order, ranking.notes, strict=True))
    place = {
        unit: never if note else float(number)
        for number, (one, note) in pairs
        for unit in one.units
    }

    def score(group: Any, *_: Any, **__: Any) -> Tensor:
        dependency, channels = group[0]
        name = group._DG._module2name.get(dependency.target.module, "")
        found = [coupling.find(f"{name}:{channel}").units[0] for channel in channels]
        return torch.tensor([place.get(unit, never) for unit in found])

    return score
