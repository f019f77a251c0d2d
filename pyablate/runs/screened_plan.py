"""What a screened run will cost beside an exact one, before it is run."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

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
"""Images on which predictions are timed; the second where the first take less than this."""

_SHORT = 0.5

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
    >>> planned = pa.plan(model, data, "features.13", measure=True).screened
    >>> planned.stages["stage"].iloc[[0, -1]].tolist()
    ['unit', 'computed']
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
    every = {
        job: Suffix.of(setup.graph, job) for job, one in zip(setup.jobs, able, strict=True) if one
    }
    each = _prediction_seconds(setup, every)
    if each is None:
        return None
    seconds = table["seconds"].to_numpy()
    most = DirectionCount.most(setup.classes)
    along_one = each * images / most.total
    drawing = along_one * nearest(setup.classes).total

    def part(jobs: Collection[Job]) -> float:
        return behind(every[job] for job in jobs) / max(1.0, behind(every.values()))

    if risk is not None:
        begin = time.perf_counter()
        known = measure(setup, risk, seed=0, images=images)
        spent = time.perf_counter() - begin
        stages, whole = _measured(table, known.jobs)
        screened = [job for job, one in zip(setup.jobs, known.jobs, strict=True) if one]
        return ScreenedPlan(
            along_one * known.directions.total * part(screened),
            drawing,
            spent,
            (whole, whole),
            known.directions,
            _names(screened),
            stages,
        )
    shares = zip(setup.jobs, table["live"], strict=True)
    chosen = promising(setup, {job: share for job, share in shares if job in every}, images)
    able = np.array([job in chosen for job in setup.jobs])
    live = (table["pairs"] * table["live"]).to_numpy()
    wanted = [
        min(pairs_wanted(units, images), most)
        for units, most in zip(table["units"], live, strict=True)
    ]
    share = np.where(able, wanted / np.maximum(live, 1), 0.0)
    each *= part(chosen)
    spent = each * min(IMAGES, images) + slower * float(share @ seconds)
    least = np.where(able, far_chance(float(live[able].sum())), 1.0)
    ends = float(least @ seconds), float(seconds.sum())
    return ScreenedPlan(
        each * images,
        drawing,
        spent,
        ends,
        most,
        _names(job for job in setup.jobs if job in chosen),
    )


def _names(jobs: Iterable[Job]) -> tuple[str, ...]:
    return tuple(job.name for job in jobs)


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
