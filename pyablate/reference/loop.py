"""The plain float64 hook loop: ablate a unit, run the whole network, look at the predictions.

This is the oracle of the delta engine. It shares no code with it, only the definitions: which
tensors hold units (:mod:`pyablate.network.sites`), what a random intervention draws
(:mod:`pyablate.interventions`), and how images are read (:mod:`pyablate.data.dataset`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import special
from torch import Tensor, nn

from pyablate._validation import check_choices, check_count
from pyablate.data.dataset import Batch, Data
from pyablate.interventions import Intervention, donors, gaussian, parse
from pyablate.network.classifier import Choice, classifier
from pyablate.network.forward import check_logits, device_of, forward, usable_device
from pyablate.network.hooks import FunctionResults
from pyablate.network.model_checks import check_weights, class_names_of, fit_inputs
from pyablate.network.near_tie import check, near_tie
from pyablate.network.sites import Site, check_model, sites
from pyablate.reference.rows import Row, rows_of
from pyablate.result import AblationResult
from pyablate.results.flips import Flips
from pyablate.results.measures import MEASURES, Measure
from pyablate.runtime.determinism import uncompiled
from pyablate.runtime.locks import export_lock
from pyablate.runtime.progress import Report, reporting

Change = Callable[[int, Tensor], Tensor | None]
"""Called with the number of a module's call (from 1) and its output; may return another output."""

Place = tuple[str, tuple[str, int] | None]
"""A module, and which function called after it gives the tensor; None if the module does."""


def ablate(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str] | None = None,
    *,
    intervention: str | Intervention = "zero",
    groups: Sequence[Sequence[str]] | None = None,
    axis: Mapping[str, int] | None = None,
    logits: Choice = None,
    class_names: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    measures: Sequence[str] = (),
    progress: bool | Report | None = None,
    batch_size: int | None = None,
) -> AblationResult:
    """Ablate units one at a time with a forward hook and a full float64 forward pass for each.

    Parameters
    ----------
    model : nn.Module
        A network that turns images ``[N, ...]`` into logits ``[N, K]``. It is copied, not touched.
    data : pair of arrays, DataLoader or iterable of (x, y)
        Images ``[N, ...]`` and integer labels ``[N]``; without labels see :func:`pyablate.ablate`.
    layers : str or sequence of str, optional
        Layer names, globs and single units ``"layer:unit"``. None is ``"*"``, or nothing if
        ``groups`` is given.
    intervention : str or Intervention
        What replaces a unit; see :class:`pyablate.interventions.Intervention`.
    groups : sequence of sequence of str, optional
        Units ``"layer:unit"`` that are ablated together, of one layer or of several.
    axis : dict, optional
        Axis of the units of some layers, by name.
    logits : str, int or callable, optional
        As of :func:`pyablate.ablate`.
    class_names : sequence of str, optional
        One name per class; by default as for :func:`pyablate.ablate`.
    device : str or torch.device, optional
        Where to compute; the model's own device by default.
    seed : int
        Seed of a random intervention that names none.
    measures : sequence of {"loss", "margin"}
        Changes to sum up over the images of each class; see
        :data:`pyablate.results.measures.MEASURES`.
    progress : bool or callable, optional
        See :func:`pyablate.runtime.progress.reporting`.
    batch_size : int, optional
        Images per forward pass; 256 by default.

    Returns
    -------
    AblationResult
        Rows are the units of the chosen layers, layers in the order in which the network computes
        them and units ascending, followed by the groups.

    Raises
    ------
    TypeError, ValueError
        An argument is not what is described here; the message says which and why.

    Examples
    --------
    >>> few = images[:5], labels[:5]
    >>> slow = pa.reference.ablate(model, few, ["features.16:14"])
    >>> np.array_equal(slow.predictions()[0], result.predictions()[14, :5])
    True
    """
    loop = _Loop.prepare(
        model, data, layers, intervention, groups, device, seed, batch_size, axis, logits
    )
    labels = torch.cat([batch.labels for batch in loop.batches]).cpu().numpy()
    pieces: list[tuple[Any, Any, Any]] = []
    baseline = np.empty(0, dtype=np.int64)
    names: tuple[str, ...] = ()
    chosen = check_choices("measures", measures, MEASURES)
    sums: dict[str, list[np.ndarray]] = {name: [] for name in chosen}
    with reporting(progress) as report:
        for row, values in loop.logits():
            predicted = predictions(values)
            if row < 0:
                check(torch.from_numpy(predicted >= 0), torch.arange(len(predicted)))
                baseline = predicted
                labels = labels if loop.labelled else baseline
                names = class_names_of(loop.model, class_names, values.shape[1])
            flipped = np.flatnonzero(predicted != baseline)
            pieces.append((np.full(len(flipped), row), flipped, predicted[flipped]))
            for name, found in sums.items():
                found.append(_class_sums(measure(name, values.numpy(), labels), labels, len(names)))
            report(row + 1, len(loop.rows), loop.rows[row].layer)
    return AblationResult(
        units=pd.DataFrame(
            {
                "label": [row.label for row in loop.rows],
                "layer": [row.layer for row in loop.rows],
                "unit": np.array([row.unit for row in loop.rows], dtype=np.int64),
            }
        ),
        labels=labels,
        baseline=baseline,
        flips=Flips.gather(len(loop.rows), pieces),
        class_names=names,
        intervention=str(loop.intervention),
        strategy={row.layer: "reference" for row in loop.rows},
        measures={name: Measure(np.array(found[1:]) - found[0]) for name, found in sums.items()},
        labelled=loop.labelled,
    )


def measure(name: str, values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy ("loss") or top-2 "margin" of each image: float64 ``[N, K]`` to ``[N]``."""
    if name == "loss":
        return np.asarray(-special.log_softmax(values, axis=1)[np.arange(len(labels)), labels])
    ordered = np.sort(values, axis=1)
    return np.asarray(ordered[:, -1] - ordered[:, -2])


def logits(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str] | None = None,
    *,
    intervention: str | Intervention = "zero",
    groups: Sequence[Sequence[str]] | None = None,
    axis: Mapping[str, int] | None = None,
    logits: Choice = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Logits of the intact network and then of each ablated one; arguments as for `ablate`.

    Yields
    ------
    row : int
        -1 for the intact network, then 0, 1, ... as in ``AblationResult.units``.
    logits : Tensor
        Float64 ``[N, K]``, on the CPU.

    Examples
    --------
    >>> few = images[:5], labels[:5]
    >>> [row for row, _ in pa.reference.logits(model, few, ["features.16:14"])]
    [-1, 0]
    """
    loop = _Loop.prepare(
        model, data, layers, intervention, groups, device, seed, batch_size, axis, logits
    )
    return loop.logits()


def predictions(values: Tensor) -> np.ndarray:
    """Class with the largest logit, the first one on equality: ``[N, K]`` to int64 ``[N]``.

    -1, no class, where a logit is NaN or plus infinity, or all are minus infinity.

    Examples
    --------
    >>> pa.reference.predictions(torch.tensor([[1.0, 3.0, 3.0]])).tolist()
    [1]
    """
    largest = values.amax(dim=1)  # NaN where there is one
    return torch.where(largest.isfinite(), values.argmax(dim=1), -1).numpy()


def near_ties(values: Tensor) -> np.ndarray:
    """Whether a prediction is too close to call in lower precision: ``[N, K]`` to bool ``[N]``.

    True where the top-2 margin is under :data:`~pyablate.reference.NEAR_TIE` times the scale of
    the logits that compete; see :func:`pyablate.network.near_tie.competing_scale`.

    Examples
    --------
    >>> pa.reference.near_ties(torch.tensor([[5.0, 5.00001, 0.0], [5.0, 1.0, 0.0]])).tolist()
    [True, False]
    """
    return np.asarray(near_tie(values).numpy())


@dataclass(frozen=True)
class _Moments:
    """What a site emits at one of its calls over all images and positions."""

    mean: Tensor  # [C]
    class_mean: Tensor  # [K, C], NaN for a class without images
    deviation: Tensor  # [C]


@dataclass
class _Loop:
    """The network in float64, the images, and what is to be done with them."""

    model: nn.Module
    batches: list[Batch]
    rows: list[Row]
    intervention: Intervention
    labelled: bool

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        data: Any,
        layers: str | Sequence[str] | None,
        intervention: str | Intervention,
        groups: Sequence[Sequence[str]] | None,
        device: str | torch.device | None,
        seed: int,
        batch_size: int | None,
        axis: Mapping[str, int] | None,
        logits: Choice,
    ) -> _Loop:
        """Check the arguments and make the float64 copy."""
        specification = parse(intervention, seed=seed)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        check_model(model)
        check_weights(model)
        place = device_of(model) if device is None else usable_device(device)
        double = classifier(model, logits=logits).to(place).double().eval()
        double.requires_grad_(False)
        images = Data(data, dtype=torch.float64, device=place, unlabelled=True)
        batches = list(images.batches(batch_size or 256))
        if specification.kind == "class_mean" and not images.labelled:
            raise ValueError("intervention: class_mean needs labels, these data have none")
        if images.inputs or images.integers:
            fit_inputs(double, images, batches[0].images)
        found = sites(double, batches[0].images[:1], axis=axis)
        rows = rows_of(found, layers, groups, specification)
        return cls(double, batches, rows, specification, images.labelled)

    def logits(self) -> Iterator[tuple[int, Tensor]]:
        """Logits of every row, the intact network first."""
        clean = torch.cat([self.run(batch.images, {}) for batch in self.batches])
        self._check_labels(clean.shape[1])
        yield -1, clean.cpu()
        if self.intervention.needs_statistics:
            self._moments  # noqa: B018  # here, because a pass inside a hook would meet that hook
        for number, row in enumerate(self.rows):
            yield number, torch.cat([self._ablated(row, batch) for batch in self.batches]).cpu()

    def run(self, images: Tensor, changes: Mapping[Place, Change]) -> Tensor:
        """One forward pass in which ``changes[place]`` may replace the tensors there."""
        calls: Counter[Place] = Counter()
        results = FunctionResults()

        def hook_of(place: Place) -> Callable[..., Tensor | None]:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
                calls[place] += 1
                if place[1] is None:
                    with results.paused():
                        return changes[place](calls[place], output)
                results.expect(place[1], partial(changes[place], calls[place]))
                return None

            return hook

        handles = []
        try:
            if any(function for _, function in changes):
                handles += results.watching(self.model)
            for place in changes:
                module = self.model.get_submodule(place[0])
                handles.append(module.register_forward_hook(hook_of(place)))
            with export_lock(), uncompiled(), torch.no_grad():
                values = forward(self.model, images)
        finally:
            for handle in handles:
                handle.remove()
        return check_logits(values, len(images))

    def _ablated(self, row: Row, batch: Batch) -> Tensor:
        """Logits of one batch with the units of a row replaced."""
        images = batch.images
        if self.intervention.kind == "resample":
            # The donors ride along intact in the second half: each call of a site then shows
            # their maps beside those that they replace.
            images = torch.cat([images, self._images[self._donor[batch.index]]])

        def change_of(place: Place) -> Change:
            def change(call: int, output: Tensor) -> Tensor:
                changed = output
                for site, units in row.targets.items():
                    if (site.module, site.function) == place and site.call in (None, call):
                        own = site.within.of(changed).clone()
                        self._replace(own, site.within.of(output), site, units, call, batch)
                        changed = site.within.put(changed, own)
                return changed

            return change

        places = {(site.module, site.function) for site in row.targets}
        values = self.run(images, {place: change_of(place) for place in places})
        return values[: len(batch.images)]

    def _replace(
        self, changed: Tensor, output: Tensor, site: Site, units: list[int], call: int, batch: Batch
    ) -> None:
        """Write the replacement of the units into ``changed``, a copy of the site's tensor."""
        rows = changed[: len(batch.images)]
        if self.intervention.kind == "direction":
            matrix = self.intervention.matrix(site.name, site.features)
            q = matrix[:, units].to(output.device)
            a = rows.movedim(site.axis, -1)  # a view: [N, ..., channels]
            a -= (a @ q) @ q.T
            return
        for unit in units:
            entries = rows.select(site.axis, unit)
            entries[...] = self._replacement(entries.shape, output, site, unit, call, batch)

    def _replacement(
        self,
        shape: torch.Size,
        output: Tensor,
        site: Site,
        unit: int,
        call: int,
        batch: Batch,
    ) -> Tensor | float:
        """Values that replace a unit's map ``[N, *positions]`` of the given shape."""
        kind = self.intervention.kind
        if kind in ("zero", "constant"):
            if self.intervention.values is not None:
                return float(self.intervention.constants(site.name, site.features)[unit])
            return 0.0 if kind == "zero" else self.intervention.value
        if kind == "resample":
            return output[len(batch.images) :].select(site.axis, unit)
        moments = self._moments[site.name, call]
        if kind == "mean":
            return moments.mean[unit]
        if kind == "class_mean":
            per_image = moments.class_mean[batch.labels, unit]
            return per_image.reshape(-1, *[1] * (len(shape) - 1))
        positions = shape[1:].numel()
        index = batch.index.to(output.device)
        which = torch.full_like(index, unit)
        draws = gaussian(self.intervention.seed, site.name, index, which, positions)
        return moments.mean[unit] + moments.deviation[unit] * draws.reshape(shape)

    @cached_property
    def _images(self) -> Tensor:
        return torch.cat([batch.images for batch in self.batches])

    @cached_property
    def _donor(self) -> Tensor:
        donor = donors(self.intervention.seed, len(self._images))
        return torch.from_numpy(donor).to(self._images.device)

    @cached_property
    def _moments(self) -> dict[tuple[str, int], _Moments]:
        """Statistics of every site in the rows, by site name and call; two clean passes."""
        touched = list({site: None for row in self.rows for site in row.targets})
        classes = 1 + max(0, *(int(batch.labels.max()) for batch in self.batches))
        sums: dict[tuple[str, int], Tensor] = {}  # [K, C]
        squares: dict[tuple[str, int], Tensor] = {}  # [C], about the mean
        positions: dict[tuple[str, int], int] = {}
        images = torch.zeros(classes, dtype=torch.float64)

        for batch in self.batches:
            labels = batch.labels.clamp(min=0)  # without labels no class mean is asked for
            images += torch.bincount(labels.cpu(), minlength=classes)
            for key, maps in self._clean_maps(touched, batch):
                per_image = maps.sum(dim=2)
                total = sums.setdefault(key, per_image.new_zeros(classes, maps.shape[1]))
                total.index_add_(0, labels, per_image)
                positions[key] = maps.shape[2]
        everything = {key: float(images.sum()) * positions[key] for key in sums}
        mean = {key: total.sum(dim=0) / everything[key] for key, total in sums.items()}
        for batch in self.batches if self.intervention.kind == "noise" else ():
            for key, maps in self._clean_maps(touched, batch):
                about = (maps - mean[key][:, None]).square().sum(dim=(0, 2))
                squares[key] = squares.get(key, torch.zeros_like(about)) + about
        return {
            key: _Moments(
                mean=mean[key],
                class_mean=total / (images[:, None].to(total.device) * positions[key]),
                deviation=(squares.get(key, torch.zeros_like(mean[key])) / everything[key]).sqrt(),
            )
            for key, total in sums.items()
        }

    def _clean_maps(
        self, touched: Sequence[Site], batch: Batch
    ) -> list[tuple[tuple[str, int], Tensor]]:
        """Collect maps ``[N, C, positions]`` of the intact network by site name and call."""
        maps: list[tuple[tuple[str, int], Tensor]] = []

        def watch(place: Place) -> Change:
            def note(call: int, output: Tensor) -> None:
                for site in touched:
                    if (site.module, site.function) == place and site.call in (None, call):
                        own = site.within.of(output)[: len(batch.images)]
                        units_first = own.movedim(site.axis, 1).unsqueeze(-1).flatten(2)
                        maps.append(((site.name, call), units_first.clone()))

            return note

        places = {(site.module, site.function) for site in touched}
        self.run(batch.images, {place: watch(place) for place in places})
        return maps

    def _check_labels(self, classes: int) -> None:
        for batch in self.batches:
            wrong = (batch.labels >= classes).nonzero()
            if len(wrong):
                label, image = int(batch.labels[wrong[0]]), int(batch.index[wrong[0]])
                raise ValueError(
                    f"data: label {label} of image {image} is outside the model's {classes} "
                    f"classes (0 to {classes - 1})"
                )


def _class_sums(values: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(labels, weights=values, minlength=classes)
