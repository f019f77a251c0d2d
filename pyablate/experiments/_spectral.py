"""Spectral profiles: what an image or class says along the singular vectors of a layer's weights.

After DeepDataProfiler (Pacific Northwest National Laboratory 2021,
https://github.com/pnnl/DeepDataProfiler), its profiles by singular value decomposition. The
influence between layers is measured here, by taking directions out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pyablate._validation import check_count, check_fraction
from pyablate.experiments.units import class_number, one_layer, opened
from pyablate.network.forward import forward
from pyablate.network.model_checks import Ready
from pyablate.network.sites import Site, hooked, select
from pyablate.results.arrays import Floats
from pyablate.runtime.determinism import undisturbed

if TYPE_CHECKING:
    import xarray as xr

BATCH = 128
"""Images at a time, unless told otherwise."""

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def spectral_profile(
    model: nn.Module,
    data: Any,
    layer: str,
    *,
    share: float = 0.9,
    class_names: Sequence[str] | None = None,
    batch_size: int = BATCH,
    axis: Mapping[str, int] | None = None,
    device: str | torch.device | None = None,
) -> xr.Dataset:
    """Profile images and classes by the singular vectors of a layer's weights.

    The weights W of a convolution or linear layer, unfolded to ``[units, rest]``, are
    ``U S V^T``. An image contributes ``mean over positions of U^T (y - b)`` along the directions U,
    y being what the layer returns and b its bias; its profile are the fewest directions that hold
    a share of the sum of the absolute contributions. That of a class is made of the mean over its
    images of these absolute values, each image's divided by their sum.

    Parameters
    ----------
    model, data, class_names, axis, device
        As for :func:`pyablate.attributes`.
    layer : str
        A convolution or linear layer, as ``"*"`` does not name them: see ``pyablate layers``.
    share : float
        Of the contribution that a profile holds.
    batch_size : int
        Images at a time.

    Returns
    -------
    xarray.Dataset
        ``contribution`` (float64 [image, direction], signed) and ``kept`` (bool, the same);
        ``class_contribution`` (float64 [class, direction]; NaN without images) and ``class_kept``
        (bool); ``direction_vectors`` (float64 [unit, direction], as
        :class:`pyablate.Intervention` takes them) and ``singular_value`` (float64 [direction]).

    Raises
    ------
    ValueError, TypeError
        Bad arguments, or something else than one convolution or linear layer.

    Examples
    --------
    >>> found = pa.spectral_profile(model, data, "features.14", share=0.8)
    >>> found["contribution"].shape, found["class_kept"].dims
    ((60, 128), ('class', 'direction'))
    """
    import xarray as xr  # slow to import: half a second

    check_fraction("share", share)
    check_count("batch_size", batch_size)
    with undisturbed(model, device), torch.inference_mode(False), torch.no_grad():
        options = {"class_names": class_names, "device": device, "axis": axis}
        ready = opened(model, data, options)
        spectrum = _Spectrum(ready, layer)
        parts: list[Tensor] = []
        labels = []
        with spectrum.watched(ready.model, parts):
            for batch in ready.data.batches(batch_size):
                forward(ready.model, batch.images)
                labels.append(batch.labels.cpu())
                spectrum.check_once(len(parts), len(labels))
                parts[-1] = parts[-1][: len(batch)]
    found, label = torch.cat(parts).numpy(), torch.cat(labels).numpy()
    by_class = np.full((ready.classes, found.shape[1]), np.nan)
    size = np.abs(found)
    relative = _relative(torch.from_numpy(found)).numpy()
    for k in np.unique(label):
        by_class[k] = relative[label == k].mean(0)
    return xr.Dataset(
        {
            "contribution": (("image", "direction"), found),
            "kept": (("image", "direction"), leading(size, share)),
            "class_contribution": (("class", "direction"), by_class),
            "class_kept": (("class", "direction"), leading(np.nan_to_num(by_class), share)),
            "direction_vectors": (("unit", "direction"), spectrum.vectors.numpy()),
            "singular_value": ("direction", spectrum.values.numpy()),
            "label": ("image", label),
        },
        coords={
            "unit": [spectrum.site.label(unit) for unit in range(spectrum.site.channels)],
            "class": list(ready.class_names),
        },
        attrs={"layer": spectrum.site.name, "share": share},
    )


def influence_graph(
    model: nn.Module,
    data: Any,
    layers: tuple[str, str],
    *,
    target: str | int | None = None,
    share: float = 0.9,
    class_names: Sequence[str] | None = None,
    batch_size: int = BATCH,
    axis: Mapping[str, int] | None = None,
    device: str | torch.device | None = None,
) -> xr.Dataset:
    """Measure which spectral directions of one layer feed which of a later one.

    The directions are those of the profiles (:func:`spectral_profile`) of all images given
    together, or of one class. Each of the first layer's is taken out of what that layer returns,
    bias left out; its influence on one of the second layer's is the contribution of that one
    intact, minus without it, mean over the images. A single image is a graph of its own.

    Parameters
    ----------
    model, data, class_names, axis, device, batch_size
        As for :func:`spectral_profile`. One pass, and one for each direction of the first layer.
    layers : pair of str
        Convolutions or linear layers, the earlier first.
    target : str or int, optional
        Only images of this class.
    share : float
        Of the contribution that the profiles hold.

    Returns
    -------
    xarray.Dataset
        ``influence`` (float64 [source, sink], signed), over the numbers of the directions in each
        layer's profile.

    Raises
    ------
    ValueError, TypeError
        Bad arguments, or something else than two convolutions or linear layers.

    Examples
    --------
    >>> data = images[:8], labels[:8]
    >>> found = pa.influence_graph(model, data, ("features.7", "features.11"), share=0.2)
    >>> found["influence"].dims
    ('source', 'sink')
    """
    import xarray as xr

    check_fraction("share", share)
    check_count("batch_size", batch_size)
    if isinstance(layers, str) or len(layers) != 2:
        raise ValueError(f"layers: expected a pair of names, got {layers!r}")
    with undisturbed(model, device), torch.inference_mode(False), torch.no_grad():
        options = {"class_names": class_names, "device": device, "axis": axis}
        ready = opened(model, data, options)
        ready.data.hold_if_read_once()
        source, sink = (_Spectrum(ready, name) for name in layers)
        if source.site.name == sink.site.name:
            raise ValueError(f"layers: expected two layers, got {source.site.name!r} twice")
        chosen = None if target is None else class_number(ready, target, "target")

        def mean_contributions(without: int | None) -> list[Floats]:
            """Means over images: contributions to the second layer, relative ones to each."""
            sums: list[Any] = [0.0, 0.0, 0.0]
            count = 0
            for batch in ready.data.batches(batch_size):
                here = torch.ones(len(batch), dtype=torch.bool)
                if chosen is not None:
                    here = batch.labels.cpu() == chosen
                first: list[Tensor] = []
                second: list[Tensor] = []
                order: list[str] = []
                with (
                    source.watched(ready.model, first, without, order),
                    sink.watched(ready.model, second, None, order),
                ):
                    forward(ready.model, batch.images)
                source.check_once(len(first), 1)
                sink.check_once(len(second), 1)
                if order[:2] != [source.site.name, sink.site.name]:
                    raise ValueError(f"layers: expected the earlier first, got {layers!r}")
                a, b = (parts[-1][: len(batch)][here] for parts in (first, second))
                for place, each in enumerate((b, _relative(a), _relative(b))):
                    sums[place] = sums[place] + each.sum(0)
                count += int(here.sum())
            if not count:
                raise ValueError(f"target: no images of class {target!r}")
            return [(each / count).numpy() for each in sums]

        intact, *sizes = mean_contributions(None)
        sources, sinks = (np.flatnonzero(leading(each[None], share)[0]) for each in sizes)
        rows = [intact - mean_contributions(int(number))[0] for number in sources]
    influence = np.array(rows).reshape(-1, len(intact))[:, sinks]
    return xr.Dataset(
        {"influence": (("source", "sink"), influence)},
        coords={"source": sources, "sink": sinks},
        attrs={"source_layer": layers[0], "sink_layer": layers[1], "share": share},
    )


def leading(sizes: Floats, share: float) -> Any:
    """Mark the fewest columns of each row that hold a share of its sum, the first of equal ones."""
    order = np.argsort(-sizes, axis=1, kind="stable")
    held = np.take_along_axis(sizes, order, axis=1).cumsum(1)
    total = held[:, -1:]
    # Those before which the share is not yet held.
    needed = np.concatenate([np.zeros_like(total), held[:, :-1]], axis=1) < share * total
    kept = np.zeros(sizes.shape, dtype=bool)
    np.put_along_axis(kept, order, needed, axis=1)
    return kept


def _relative(values: Tensor) -> Tensor:
    size = values.abs()
    return size / size.sum(1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)


class _Spectrum:
    """The singular vectors of one layer, and how its output is seen along them."""

    def __init__(self, ready: Ready, name: str) -> None:
        site = one_layer(select(ready.sites, name), name)
        layer = ready.model.get_submodule(site.module)
        if not isinstance(layer, _LAYERS) or not site.plain:
            raise ValueError(
                f"layer: expected a convolution or linear layer, {name!r} is a "
                f"{type(layer).__name__}"
            )
        self.site = site
        weight = layer.weight.detach().double().cpu().flatten(1)
        self.vectors: Tensor
        self.values: Tensor
        self.vectors, self.values, _ = torch.linalg.svd(weight, full_matrices=False)
        self.bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach()

    def check_once(self, calls: int, batches: int) -> None:
        """Refuse a layer that a network calls several times: its outputs are not one."""
        if calls != batches:
            raise ValueError(f'layer: {self.site.name} runs several times; name one, "name@1"')

    def watched(
        self,
        model: nn.Module,
        into: list[Tensor],
        without: int | None = None,
        order: list[str] | None = None,
    ) -> Any:
        """Append each batch's contributions ``[N, direction]``; perhaps take one direction out.

        The layer's name is appended to ``order``.
        """

        def see(site: Site, _call: int, output: Tensor) -> Tensor:
            maps = output.movedim(site.axis, -1)
            along = (maps - self.bias.to(maps)) @ self.vectors.to(maps)
            pooled = along.flatten(1, -2).mean(1) if along.ndim > 2 else along
            into.append(pooled.double().cpu())
            if order is not None:
                order.append(site.name)
            if without is None:
                return output
            taken = along[..., without, None] * self.vectors[:, without].to(maps)
            return (maps - taken).movedim(-1, site.axis)

        return hooked(model, [self.site], see)
