"""The stages of :func:`pyablate.attributes`: one pass over weights, data or sample each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyablate.data.dataset import Data
from pyablate.engine.job import Job
from pyablate.network.capture import CaptureError, capture
from pyablate.network.model_checks import Ready
from pyablate.network.sites import Site
from pyablate.ops.moments import class_moments, class_ranks
from pyablate.runtime.chunking import NUMBERS
from pyablate.runtime.progress import Report
from pyablate.unit_attributes import activations, concepts, information, selectivity
from pyablate.unit_attributes.catalog import Attribute
from pyablate.unit_attributes.gradients import by_class
from pyablate.unit_attributes.nisp import nisp
from pyablate.unit_attributes.observe import Observations, Observed, observe
from pyablate.unit_attributes.relevance import conductance, contrastive, relevance, shares
from pyablate.unit_attributes.weights import from_weights

logger = logging.getLogger("pyablate")

Share = Callable[[float], None]
"""Told which share of a stage is done."""


@dataclass(eq=False)
class Work:
    """What is asked for, and what has been found.

    Attributes
    ----------
    ready : Ready
        Model and data.
    jobs : list of Job
        One per layer, with its units.
    entries : list of Attribute
        What to compute.
    masks : Masks or None
        For concepts.
    bins, top, sample, batch_size : int
        As :func:`pyablate.attributes` takes them.
    found : dict
        By variable and layer, float64 ``[C]`` or ``[C, K]`` for all units of the layer.
    """

    ready: Ready
    jobs: list[Job]
    entries: list[Attribute]
    masks: concepts.Masks | None
    bins: int
    top: int
    sample: int
    batch_size: int
    found: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def run(self, report: Report) -> None:
        """Do everything that is asked for."""
        stages = list(self._stages())
        for number, (name, stage) in enumerate(stages):
            report(number * 1000, len(stages) * 1000, name)

            def inner(share: float, number: int = number, name: str = name) -> None:
                report(int((number + share) * 1000), len(stages) * 1000, name)

            stage(inner)
        report(len(stages) * 1000, len(stages) * 1000, stages[-1][0])

    @property
    def sites(self) -> list[Site]:
        """The layers asked for."""
        return [job.sites[0] for job in self.jobs]

    @property
    def maps(self) -> list[Site]:
        """Sites with maps of a height and a width, from one call."""
        return [s for s in self.sites if len(s.shape) == 3 and s.name not in self.repeated]

    @property
    def repeated(self) -> frozenset[str]:
        """Sites that take several calls of their module together."""
        several = {site.module for site in self.ready.sites if site.call is not None}
        return frozenset(s.name for s in self.sites if s.call is None and s.module in several)

    def wants(self, *names: str) -> bool:
        """Whether any of these attributes or families is asked for."""
        return any(entry.name in names or entry.family in names for entry in self.entries)

    def _stages(self) -> Iterator[tuple[str, Callable[[Share], None]]]:
        if self.wants("weights", "nisp"):
            yield "weights", self._weights
        if self.wants("activations", "selectivity", "information", "redundancy", "gradients"):
            yield "activations", self._observe
        if self.wants("rank", "conductance", "lrp", "clrp"):
            yield "sampled images", self._sampled
        if self.wants("concepts"):
            yield "concepts", self._concepts

    def _weights(self, _report: Share) -> None:
        model, sample = self.ready.model, self.ready.batch.images
        try:
            graph = capture(model, sample, self.sites, fold=False)
        except CaptureError as error:
            logger.warning("attributes of the weights are NaN: no graph (%s)", error)
            return
        if self.wants("weights"):
            for layer, values in from_weights(graph, self.sites).items():
                self._store(layer, values)
        if self.wants("nisp"):
            for layer, score in nisp(graph, self.sites).items():
                self._store(layer, {"nisp": score})

    def _observe(self, report: Share) -> None:
        images = len(self.ready.data)
        seen = observe(
            self.ready.model,
            self.ready.data,
            self.sites,
            repeated=self.repeated,
            classes=self.ready.classes,
            batch_size=self.batch_size,
            gradients=self.wants("gradients"),
            report=lambda done: report(0.8 * done / images),
        )
        probabilities = seen.probabilities.t()
        if self.wants("class_correlation"):
            probabilities = selectivity.standardised(probabilities)
        for layer in seen.layers:
            self._reduce(layer, seen, probabilities)
        signed = [layer.site.name for layer in seen.layers if bool((layer.maps.least < 0).any())]
        if signed and self.wants("class_selectivity"):
            logger.warning(
                "class_selectivity is NaN for units whose activation is negative somewhere, in %s",
                ", ".join(signed),
            )

    def _reduce(self, layer: Observed, seen: Observations, probabilities: Tensor) -> None:
        """Take from one layer what follows; ``probabilities`` ``[K, N]`` are standardised."""
        name, pooled = layer.site.name, layer.maps.pooled
        if self.wants("activations", "class_selectivity"):
            label = seen.labels.int()
            moments = class_moments(pooled, layer.maps.active, label, self.ready.classes)
            if self.wants("activations"):
                self._store(name, activations.moments(layer, moments))
            if self.wants("class_selectivity"):
                index = selectivity.class_selectivity(moments.total, layer.maps.least, seen.count)
                self._store(name, {"class_selectivity_per_class": index})
        if self.wants("class_correlation", "redundancy"):
            units = selectivity.standardised(pooled)
            if self.wants("class_correlation"):
                r = selectivity.class_correlation(units, probabilities)
                self._store(name, {"class_correlation_per_class": r})
            if self.wants("redundancy"):
                self._store(name, {"redundancy": selectivity.redundancy(units)})
        if self.wants("gradients"):
            for attribute, sums in (("taylor", layer.taylor), ("fisher", layer.fisher)):
                self._store(name, _means(attribute, sums, seen.count))
        if self.wants("auc", "informedness", "precision_at", "information"):
            self._rank(layer, seen)

    def _rank(self, layer: Observed, seen: Observations) -> None:
        """Rank the images, for some units at a time, and take what follows from that."""
        classes, device = self.ready.classes, self.ready.data.device
        label, count = seen.labels.int().to(device), seen.count
        step = max(1, NUMBERS // max(len(label), self.bins * classes))
        parts: list[dict[str, Tensor]] = []
        for pooled in layer.maps.pooled.split(step):
            ranks = class_ranks(pooled.to(device), label, classes, bins=self.bins, top=self.top)
            ranks = ranks.cpu()
            part: dict[str, Tensor] = {}
            if self.wants("precision_at"):
                part["precision_at_per_class"] = selectivity.precision_at(ranks)
            if self.wants("auc"):
                part["auc_per_class"] = selectivity.auc(ranks, count)
            if self.wants("informedness"):
                part["informedness_per_class"] = selectivity.informedness(ranks, count)
            if self.wants("entropy"):
                part["entropy"] = information.entropy(ranks.widths)
            if self.wants("mutual_information", "kl_selectivity"):
                counts = ranks.quantiles.double()
                part["mutual_information"] = information.mutual_information(counts)
                part["kl_selectivity_per_class"] = information.kl_selectivity(counts)
            parts.append(part)
        for key in parts[0]:
            self._store(layer.site.name, {key: torch.cat([part[key] for part in parts])})

    def _sampled(self, report: Share) -> None:
        images, labels = _evenly(self.ready.data, self.sample, self.batch_size)
        model, size = self.ready.model, min(32, self.batch_size)
        if self.wants("rank"):
            for layer, rank in activations.ranks(model, images, self.maps, size).items():
                self._store(layer, {"hrank": rank})
        found = {"conductance": conductance, "lrp": relevance, "clrp": contrastive}
        for name, attribute in found.items():
            if self.wants(name):
                single = [site for site in self.sites if site.name not in self.repeated]
                for layer, values in attribute(model, images, labels, single, size).items():
                    self._store(layer, _by_class(name, values, labels, self.ready.classes))
                    if name == "lrp":
                        share = _by_class("crp", shares(values), labels, self.ready.classes)
                        self._store(layer, share)

    def _concepts(self, _report: Share) -> None:
        assert self.masks is not None
        found = concepts.concept_iou(
            self.ready.model, self.ready.data, self.maps, self.masks, batch_size=self.batch_size
        )
        for layer, iou in found.items():
            self._store(layer, {"concept_iou_per_concept": iou})

    def _store(self, layer: str, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.found.setdefault(name, {})[layer] = value


def _by_class(name: str, values: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
    """Means of ``[N, C]`` over all images, and over those of each class."""
    return _means(name, by_class(values, labels, classes), labels.bincount(minlength=classes))


def _means(name: str, sums: Tensor, count: Tensor) -> dict[str, Tensor]:
    """Means over all images and over each class, from sums ``[C, K]`` over ``count`` images."""
    return {name: sums.sum(dim=1) / count.sum(), f"{name}_per_class": sums / count}


def _evenly(data: Data, count: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """About ``count`` images, evenly spaced in the data, with their labels in host memory."""
    total = len(data)
    wanted = torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).round().long()
    images, labels = [], []
    for batch in data.batches(batch_size):
        here = torch.isin(batch.index, wanted)
        images.append(batch.images[here.to(batch.device)])
        labels.append(batch.labels.cpu()[here])
    return torch.cat(images), torch.cat(labels)
