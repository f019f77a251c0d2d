"""Pairs that stay open behind a narrow place go on from there: same answers, less arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.screened import layers_case
from torch import Tensor, nn

import pyablate as pa
from pyablate import demo
from pyablate.engine import precision_cascade
from pyablate.engine.pair_slice import logit_change
from pyablate.engine.score import Scale
from pyablate.engine.suffix import Suffix
from pyablate.interventions import parse
from pyablate.runs import executor, screened_plan, thresholds
from pyablate.runs.screening_sample import chosen_places
from pyablate.runs.setup import Setup, SetupOptions, prepare
from pyablate.runs.thresholds import JobThresholds, Stage, Thresholds

pytestmark = pytest.mark.usefixtures("exports_kept")

LAYER = "features.2"

Flips = dict[tuple[int, int], int]


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return demo.network("vgg_bn"), demo.images(24)


@pytest.fixture(scope="module")
def exact(case: tuple[nn.Module, Any]) -> Flips:
    return flips(pa.ablate(*case, LAYER, audit=0, progress=False))


@pytest.fixture(autouse=True)
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the units and at two places, whether it pays or not."""
    monkeypatch.setattr("pyablate.runs._ablate.measure", in_depth)


def in_depth(setup: Setup, risk: float, seed: int) -> Thresholds:
    """Thresholds that miss nothing here."""
    suffixes = {job: Suffix.of(setup.graph, job) for job in setup.jobs}
    places = [place.name for place in chosen_places(setup, suffixes)]
    bounds = zip(("", *places[:2]), (9.0, 3.0, 2.0), strict=True)
    job = JobThresholds(tuple(Stage(*stage, Scale(1.0, 1.0)) for stage in bounds), 0, 0.5)
    return Thresholds(risk, seed, 0.1, 0.1, (job,) * len(setup.jobs))


@pytest.fixture
def from_units(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs that were computed from their units on, slice by slice."""
    found: list[int] = []

    def counted(sweep: Any, row: Tensor, image: Tensor, dtype: torch.dtype) -> Any:
        found.append(len(row))
        return logit_change(sweep, row, image, dtype)

    monkeypatch.setattr(executor, "logit_change", counted)
    return found


def ablate(case: tuple[nn.Module, Any], layers: Any = LAYER, **options: Any) -> pa.AblationResult:
    plain = {"audit": 0, "progress": False, "guarantee": "screened", **options}
    return pa.ablate(*case, layers, **plain)


def flips(result: pa.AblationResult) -> Flips:
    found = result.flips
    triples = zip(found.row.tolist(), found.image.tolist(), found.prediction.tolist(), strict=True)
    return {(row, image): new for row, image, new in triples}


def test_what_is_open_behind_a_place_is_not_computed_from_the_unit_again(case, exact, from_units):
    screened = ablate(case)
    [layer] = screened.screening.layers.values()
    assert sum(1 for count in layer.by_stage.values() if count) == 3
    assert layer.computed > 150
    assert sum(from_units) < 0.5 * layer.computed  # of the sample, and to measure precision
    assert flips(screened) == exact


@pytest.mark.parametrize(
    "options", [{"batch_size": 5}, {"batch_size": 11, "memory": 1 << 24}, {"audit": 300}]
)
def test_batches_memory_and_the_audit_change_nothing(case, exact, options):
    plain, other = ablate(case), ablate(case, **options)
    assert flips(other) == flips(plain) == exact
    for name in ("sampled", "wrong", "missed_bound"):
        assert getattr(other.screening, name) == getattr(plain.screening, name)
    if "audit" in options:
        assert other.audit.mismatches + other.audit.mended == 0
    else:
        assert other.screening == plain.screening


@pytest.mark.parametrize("groups", [None, [[f"{LAYER}:{n}", f"{LAYER}:{n + 1}"] for n in range(9)]])
def test_other_ablations(case, groups):
    options = {"groups": groups, "layers": None if groups else LAYER, "intervention": "mean"}
    screened = ablate(case, **options)
    assert flips(screened) == flips(ablate(case, **options, guarantee="exact"))
    assert screened.screening.settled > 0


def test_what_full_precision_leaves_open_there_is_decided_in_float64(
    case, exact, from_units, monkeypatch
):
    monkeypatch.setitem(precision_cascade.FLOOR, torch.float32, 1e6)
    screened = ablate(case)
    assert flips(screened) == exact
    assert sum(from_units) >= screened.screening.computed
    assert screened.effort.pairs_by_precision == {"float64": screened.screening.computed}


def test_precisions_are_counted_once(case):
    screened = ablate(case)
    assert sum(screened.effort.pairs_by_precision.values()) == screened.screening.computed


def test_lower_precisions_begin_at_the_units(case, exact, from_units):
    screened = ablate(case, precision="bf16")
    assert sum(from_units) >= screened.screening.computed
    assert flips(screened) == exact


def test_a_raised_threshold_opens_pairs_that_had_not_gone_on(case, exact, monkeypatch):
    def careless(setup: Setup, risk: float, seed: int) -> Thresholds:
        found = in_depth(setup, risk, seed)
        [job] = found.jobs
        low = tuple(Stage(stage.place, 1e-3, stage.scale) for stage in job.stages)
        return Thresholds(risk, seed, 0.3, 0.3, (JobThresholds(low, 0, 0.5),))

    monkeypatch.setattr("pyablate.runs._ablate.measure", careless)
    screened = ablate(case)
    [layer] = screened.screening.layers.values()
    assert layer.raised > 0
    assert flips(screened).items() <= exact.items()
    assert len(exact) - len(flips(screened)) <= screened.screening.missed_bound


@pytest.mark.parametrize(("precision", "goes_on"), [("fp32", True), ("bf16", False)])
def test_the_plan_reckons_with_it(precision: str, goes_on: bool) -> None:
    model, data = layers_case(200)
    options = SetupOptions("act", None, parse("zero"), guarantee="screened", precision=precision)
    setup = prepare(model, data, options)
    deep, unit = {}, thresholds._with
    for wanted in (False, True):

        def only(sample: Any, stages: Any, done: Any, going: bool, deep: bool = wanted) -> Any:
            cost, known = unit(sample, stages, done, going)
            return (cost if (len(stages) > 1) == deep else cost + 9.0), known

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(thresholds, "_with", only)
            [deep[wanted]] = thresholds.measure(setup, 1e-2, 0).jobs
    assert [len(deep[wanted].stages) for wanted in (False, True)] == [1, 2]
    assert deep[False].rest == 1.0
    assert (deep[True].rest < 1.0) == goes_on
    [*_, last] = screened_plan._stages("act", deep[True], 0.1, 1.0)["cost"]
    open_ = deep[True].stages[-1].open
    assert last == pytest.approx(open_ * deep[True].rest + (1 - open_) * 0.1)
