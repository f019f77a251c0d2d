"""Class-specific features: the few inputs of the last layer that keep a class's decisions.

After Badola, Roy, Padmanabhan, Lal 2021, *Decomposing the Deep: Finding Class Specific Filters in
Deep CNNs*, arXiv:2112.07719. The choice of features is greedy here, by their contributions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pyablate._validation import check_count, check_fraction, nearest
from pyablate.data.dataset import Data
from pyablate.experiments.split import split
from pyablate.experiments.units import opened
from pyablate.network.forward import forward
from pyablate.network.model_checks import Ready
from pyablate.runtime.determinism import undisturbed

BATCH = 128
"""Images at a time, unless told otherwise."""


def class_features(
    model: nn.Module,
    data: Any,
    *,
    keep: float = 0.99,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    batch_size: int = BATCH,
    device: str | torch.device | None = None,
) -> ClassFeatures:
    """Find, for each class, few inputs of the last layer that keep its decisions.

    The last layer is linear: ``z = W h + b``. For class k features are added by their mean
    contribution against the other classes, ``h_d (W_kd - mean_j W_jd)`` over the images that are
    decided for k, until a share ``keep`` of these images is still decided for k with all other
    features 0; then each is left out again, the last added first, without which that stays so. With
    the features of each class in its own row of W only, the layer falls apart into one subspace a
    class.

    The images are split at random into halves, class by class: features are chosen on one half,
    and all that is reported is measured on the other.

    Parameters
    ----------
    model, data, class_names, device
        As for :func:`pyablate.ablate`; the images are held in memory.
    keep : float
        Share of the decisions.
    seed : int
        Of the split.
    batch_size : int
        Images at a time.

    Raises
    ------
    ValueError, TypeError
        Bad arguments, or logits that are not what one linear layer returns.

    Examples
    --------
    >>> found = pa.class_features(model, data, keep=0.9)
    >>> found.table.columns.tolist()
    ['class', 'size', 'features', 'decisions', 'kept']
    >>> found.mask.shape
    (10, 128)
    """
    check_fraction("keep", keep)
    check_count("batch_size", batch_size)
    halves = split(data, seed=seed)
    with undisturbed(model, device), torch.inference_mode(False), torch.no_grad():
        ready = opened(model, halves.choosing, {"class_names": class_names, "device": device})
        layer = _last(ready)
        weight = layer.weight.double().cpu()
        bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.cpu()
        bias = bias.double()
        h = _inputs(ready, ready.data, layer, batch_size)
        decided = (h @ weight.t() + bias).argmax(1)
        sets = [_chosen(h[decided == k], weight, bias, k, keep) for k in range(len(weight))]
        device_, dtype = ready.batch.images.device, ready.batch.images.dtype
        other = Data(halves.measuring, dtype=dtype, device=device_)
        h = _inputs(ready, other, layer, batch_size)
    labels = halves.measuring[1]
    decided = (h @ weight.t() + bias).argmax(1)
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    lines = []
    for k, features in enumerate(sets):
        mask[k, features] = True
        mine = h[decided == k]
        kept = _decisions(mine[:, features], weight[:, features], bias) == k
        lines.append(
            {
                "class": ready.class_names[k],
                "size": len(features),
                "features": tuple(features),
                "decisions": len(mine),
                "kept": kept.double().mean().item() if len(mine) else np.nan,
            }
        )
    apart = _decisions(h, weight * mask, bias)
    right = [(each == labels).double().mean().item() for each in (decided, apart)]
    return ClassFeatures(pd.DataFrame(lines), mask.numpy(), *right)


@dataclass(frozen=True, eq=False)
class ClassFeatures:
    """Which inputs of the last layer each class needs.

    Attributes
    ----------
    table : pandas.DataFrame
        One row per class: ``class``; ``size`` and ``features`` (tuple of numbers, the largest
        contribution first); and on the half on which is measured ``decisions``, images decided for
        the class, and ``kept``, the share of them that its features alone decide for it.
    mask : ndarray
        Bool ``[class, feature]``.
    baseline_accuracy, accuracy : float
        Of the network, and of its last layer made of subspaces (weights times ``mask``), on that
        half.

    Examples
    --------
    >>> found = pa.class_features(model, data, keep=0.9)
    >>> found.mask.sum(1).tolist() == found.table["size"].tolist()
    True
    """

    table: pd.DataFrame
    mask: Any
    baseline_accuracy: float
    accuracy: float

    def overlap(self, others: Mapping[str, Sequence[str | int]]) -> pd.DataFrame:
        """Compare with other sets of units by class, those of ``minimal_sets`` for instance.

        Parameters
        ----------
        others : mapping
            By class, numbers or labels ``"layer:unit"`` of units of the layer that the features are
            of: unit u is feature u, behind global pooling or a linear layer.

        Returns
        -------
        pandas.DataFrame
            One row per class of ``others``: ``class``, ``size``, ``other``, ``shared`` (how many
            are in both) and ``expected`` (of sets drawn at random).

        Examples
        --------
        >>> found = pa.class_features(model, data, keep=0.9)
        >>> found.overlap({"8": ["features.16:3", "features.16:5"]})["other"].tolist()
        [2]
        """
        sets = dict(zip(self.table["class"], self.table["features"], strict=True))
        layers = {str(unit).rpartition(":")[0] for units in others.values() for unit in units}
        if len(layers - {""}) > 1:
            raise ValueError(f"others: expected units of one layer, got {sorted(layers)}")
        features = self.mask.shape[1]
        lines = []
        for name, units in others.items():
            if name not in sets:
                raise ValueError(f"others: no class {name!r}{nearest(name, sets)}")
            numbers = {int(str(unit).rpartition(":")[2]) for unit in units}
            if not numbers <= set(range(features)):
                raise ValueError(
                    f"others: expected units 0 to {features - 1}, got {sorted(numbers)}"
                )
            mine = set(sets[name])
            lines.append(
                {
                    "class": name,
                    "size": len(mine),
                    "other": len(numbers),
                    "shared": len(mine & numbers),
                    "expected": len(mine) * len(numbers) / features,
                }
            )
        return pd.DataFrame(lines)


def _last(ready: Ready) -> nn.Linear:
    """Find the linear layer that returns the logits."""
    returned: dict[nn.Linear, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, _i, output: returned.update({m: output}))
        for module in ready.model.modules()
        if isinstance(module, nn.Linear)
    ]
    logits = forward(ready.model, ready.batch.images)
    for handle in handles:
        handle.remove()
    for layer, output in returned.items():
        if output.shape[1:] == logits.shape[1:] and torch.equal(output[: len(logits)], logits):
            return layer
    raise ValueError("model: expected logits that one linear layer returns, and found none")


def _inputs(ready: Ready, data: Data, layer: nn.Linear, size: int) -> Tensor:
    """Return what the last layer reads of all images, float64 ``[N, features]``."""
    parts: list[Tensor] = []
    handle = layer.register_forward_pre_hook(
        lambda _module, inputs: parts.append(inputs[0].double().cpu())
    )
    try:
        for batch in data.batches(size):
            forward(ready.model, batch.images)
            parts[-1] = parts[-1][: len(batch)]
    finally:
        handle.remove()
    return torch.cat(parts)


def _decisions(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (h @ weight.t() + bias).argmax(1)


def _chosen(h: Tensor, weight: Tensor, bias: Tensor, k: int, keep: float) -> list[int]:
    """Features that keep a share of the decisions for class k, of images ``h`` ``[n, features]``.

    None where no image is decided for the class.
    """
    if not len(h):
        return []
    margin = weight[k] - weight.mean(0)
    order = (h.mean(0) * margin).argsort(descending=True, stable=True).tolist()
    logits = bias.expand(len(h), -1).clone()
    chosen: list[int] = []
    for feature in order:
        if _holds(logits, k, keep):
            break
        logits += h[:, feature, None] * weight[:, feature]
        chosen.append(feature)
    for feature in reversed(list(chosen)):
        without = logits - h[:, feature, None] * weight[:, feature]
        if _holds(without, k, keep):
            logits = without
            chosen.remove(feature)
    return chosen


def _holds(logits: Tensor, k: int, keep: float) -> bool:
    return float((logits.argmax(1) == k).double().mean()) >= keep
