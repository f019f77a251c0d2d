"""What a screened run will cost beside an exact one, before it is run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyablate.engine import clean_run
from pyablate.engine.job import Job
from pyablate.engine.microbenchmarks import undisturbed_clock
from pyablate.engine.rounding import Rounding
from pyablate.engine.score import DirectionCount
from pyablate.engine.suffix import Suffix, needed
from pyablate.result import AblationResult
from pyablate.results.screening import LayerScreening
from pyablate.runs.sampling_design import nearest
from pyablate.runs.screening_costs import behind
from pyablate.runs.screening_sample import IMAGES, chosen_places, pairs_wanted, predictor
from pyablate.runs.setup import Setup
from pyablate.runs.thresholds import JobThresholds, far_chance, measure, promising
from pyablate.runtime import out_of_memory

_FEW, _MORE = 2, 16
"""Images on which predictions are timed; the second where the first take less than the time below,
as those of a large network tell at once."""

_SHORT = 0.1
"""Seconds. The first pass, which prepares much, may take ten times as long."""

UNIT, COMPUTED = "unit", "computed"
"""Names of the first stage and the last, which have no place of their own."""


@dataclass(frozen=True)
class ScreenedPlan:
    """What a screened run would take.

    Attributes
    ----------
    prediction_seconds : float
        Of the gradients of all images.
    drawing_seconds : float
        Of those of them that an estimated run takes, which looks at the nearest classes only.
    measuring_seconds : float
        Of the pairs that are computed before the first block.
    layer_seconds : (float, float)
        Of the layers: if every live pair were settled, but for the sample, and if none were. The
        same twice where open shares were measured.
    directions : DirectionCount
        Over the classes, along which changes are predicted: those that a run would choose where
        open shares were measured, else as many as it may take.
    layers : tuple of str
        Those that a run would screen, as far as is known; the others it computes as a whole.
    stages : pandas.DataFrame or None
        Where they were, one row per layer and stage: ``layer``; ``stage``, "unit", a node of the
        graph, or "computed"; ``open``, the share of the live pairs that it leaves open, and of the
        last those that are computed, the sample among them; ``cost`` for each live pair, in passes
        through the network behind the unit, of which an exact run takes one; ``seconds``.

    Examples
    --------
    >>> pa.plan(model, data, "features.6").screened.layers  # on these few images
    ()
    >>> pa.plan(model, data, "features.6", images=100_000).screened.layers
    ('features.6',)
    """

    prediction_seconds: float
    drawing_seconds: float
    measuring_seconds: float
    layer_seconds: tuple[float, float]
    directions: DirectionCount
    layers: tuple[str, ...]
    stages: pd.DataFrame | None = None

    @property
    def seconds(self) -> tuple[float, float]:
        """Least and most of all of it, without the clean runs that an exact run has as well."""
        more = self.prediction_seconds + self.measuring_seconds
        return self.layer_seconds[0] + more, self.layer_seconds[1] + more


def plan_screened(
    setup: Setup, table: pd.DataFrame, images: int, slower: float, risk: float | None
) -> ScreenedPlan | None:
    """Plan the screened run beside an exact one; None where nothing can be screened.

    Parameters
    ----------
    setup : Setup
        The run.
    table : pandas.DataFrame
        Of the exact plan, one row per job.
    images : int
        For which it is.
    slower : float
        Time in full precision, in which pairs are measured, to that in the cheapest.
    risk : float, optional
        Measure which pairs stay open at this risk; None does not.
    """
    able = (table["strategy"] == "delta").to_numpy()
    if setup.graph is None or setup.abrupt or not able.any():
        return None
    jobs = [job for job, one in zip(setup.jobs, able, strict=True) if one]
    suffixes = {job: Suffix.of(setup.graph, job) for job in jobs}
    each = _prediction_seconds(setup, suffixes)
    if each is None:
        return None
    most = DirectionCount.most(setup.classes)
    drawing = each * images * nearest(setup.classes).total / most.total
    if risk is None:
        known = None
        live = dict(zip(jobs, table["live"][able], strict=True))
        chosen = promising(setup, live, images)
    else:
        begin = time.perf_counter()
        known = measure(setup, risk, seed=0, images=images)
        spent = time.perf_counter() - begin
        chosen = frozenset(j for j, one in zip(setup.jobs, known.jobs, strict=True) if one)
    each *= behind(suffixes[job] for job in chosen) / max(1.0, behind(suffixes.values()))
    if known is None:
        screened = np.array([job in chosen for job in setup.jobs])
        spent, ends = _unmeasured(table, screened, images, each, slower)
        stages, directions = None, most
    else:
        stages, whole = _measured(table, known.jobs)
        ends, directions = (whole, whole), known.directions
    predicting = each * images * directions.total / most.total
    names = tuple(job.name for job in jobs if job in chosen)
    return ScreenedPlan(predicting, drawing, spent, ends, directions, names, stages)


def _unmeasured(
    table: pd.DataFrame, screened: NDArray[np.bool_], images: int, each: float, slower: float
) -> tuple[float, tuple[float, float]]:
    """Seconds of measuring thresholds, and of the layers at both ends.

    ``each`` are those of the gradients of an image.
    """
    seconds, live = table["seconds"].to_numpy(), (table["pairs"] * table["live"]).to_numpy()
    wanted = [pairs_wanted(units, images) for units in table["units"]]
    share = np.where(screened, np.minimum(wanted, live) / np.maximum(live, 1), 0.0)
    measuring = each * min(IMAGES, images) + slower * float(share @ seconds)
    least = np.where(screened, far_chance(float(live[screened].sum())), 1.0)
    return measuring, (float(least @ seconds), float(seconds.sum()))


def _measured(
    table: pd.DataFrame, known: Sequence[JobThresholds | None]
) -> tuple[pd.DataFrame | None, float]:
    """Follow the pairs of all layers; the seconds of these, those without stages included."""
    rows = list(zip(table["layer"], table["pairs"], table["seconds"], known, strict=True))
    chance = far_chance(sum(one.settled * pairs for _, pairs, _, one in rows if one))
    parts = [_stages(layer, one, chance, taken) for layer, _, taken, one in rows if one]
    plain = sum(float(taken) for *_, taken, one in rows if one is None)
    if not parts:
        return None, plain
    stages = pd.concat(parts, ignore_index=True)
    return stages, plain + float(stages["seconds"].sum())


def stages_table(planned: ScreenedPlan | None, result: AblationResult | None) -> pd.DataFrame:
    """Tabulate the stages of layers, as planned, and as they were in a screened run."""
    stages = None if planned is None else planned.stages
    known = None if result is None else result.screening
    if known is None:
        return pd.DataFrame() if stages is None else stages
    rows = []
    for name, layer in known.layers.items():
        own = None if stages is None else stages["stage"][stages["layer"] == name].tolist()[:-1]
        rows += _actual(name, layer, own or [place or UNIT for place in layer.by_stage])
    actual = pd.DataFrame(rows, columns=["layer", "stage", "actual_open"])
    if stages is None:
        return actual
    stages = stages.merge(actual, how="left", on=["layer", "stage"])
    each = (stages["cost"] / _reached(stages, "open")).fillna(0.0)
    return stages.assign(actual_cost=each * _reached(stages, "actual_open"))


def _stages(layer: str, known: JobThresholds, chance: float, seconds: float) -> pd.DataFrame:
    """Follow the pairs of a layer, all of which would take some seconds."""
    rows, open_ = [], 1.0
    for stage in known.stages:
        rows.append((layer, stage.place or UNIT, stage.open, open_ * stage.cost))
        open_ = stage.open
    computed = open_ + (1.0 - open_) * chance
    rows.append((layer, COMPUTED, computed, computed))
    found = pd.DataFrame(rows, columns=["layer", "stage", "open", "cost"])
    return found.assign(seconds=found["cost"] * seconds)


def _reached(stages: pd.DataFrame, name: str) -> pd.Series:
    """Shares of the live pairs that get to each stage, where it leaves these open."""
    before = stages.groupby("layer", sort=False)[name].shift(fill_value=1.0)
    return before.where(stages["stage"] != COMPUTED, stages[name])


def _actual(
    name: str, layer: LayerScreening, stages: Sequence[str]
) -> list[tuple[str, str, float]]:
    """Shares of the live pairs that each stage left open, and that were computed."""
    live = max(1, layer.pairs - layer.silent)
    rows, open_ = [], live
    for stage in stages:
        open_ -= layer.by_stage.get("" if stage == UNIT else stage, 0)
        rows.append((name, stage, open_ / live))
    return [*rows, (name, COMPUTED, layer.computed / live)]


def _prediction_seconds(setup: Setup, suffixes: Mapping[Job, Suffix]) -> float | None:
    """Seconds of the gradients of an image: measured. None where the network has none."""
    assert setup.graph is not None
    choices = [DirectionCount.most(setup.classes)]
    guess = predictor(setup, suffixes, chosen_places(setup, suffixes), choices)
    keep = needed(suffixes.values())
    clock = undisturbed_clock(str(setup.data.device))
    taken = math.inf
    for number, size in enumerate((_FEW, _FEW, _MORE, _MORE)):  # the first pass prepares much
        batch = setup.data.first(size)
        clean = clean_run.run_graph(setup.graph, keep, setup.exact, batch, rounding=Rounding())
        begin = clock()
        try:
            guess.predict(batch, clean)
        except RuntimeError as error:
            if out_of_memory.is_shortage(error):
                raise
            return None
        spent = clock() - begin
        taken = min(taken, spent / len(batch))
        if spent > (_SHORT if number else 10 * _SHORT):
            break
    return taken
