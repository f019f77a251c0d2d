"""Which layers a screened run screens: those that gain by it, told and planned."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import pyablate as pa
from pyablate import demo
from pyablate.engine.job import Job
from pyablate.engine.suffix import Suffix
from pyablate.interventions import parse
from pyablate.runs import screening_costs
from pyablate.runs.screening_costs import Work, behind, faster, worthwhile
from pyablate.runs.setup import Setup, SetupOptions, prepare
from pyablate.runs.thresholds import promising

LAYERS = ["features.2", "features.6", "features.9"]

pytestmark = pytest.mark.usefixtures("exports_kept")


@pytest.fixture(scope="module")
def setup() -> Setup:
    options = SetupOptions(LAYERS, None, parse("zero"), guarantee="screened")
    return prepare(demo.network("vgg_bn"), demo.images(20), options)


@pytest.fixture(scope="module")
def suffixes(setup: Setup) -> dict[Job, Suffix]:
    return {job: Suffix.of(setup.graph, job) for job in setup.jobs}


def works(suffixes: dict[Job, Suffix], saved: list[float]) -> dict[Job, Work]:
    """Work that is less by a share of it where a layer is screened."""
    return {
        job: Work(one, 1e12, 1e12 * (1 - part))
        for (job, one), part in zip(suffixes.items(), saved, strict=True)
    }


def test_a_layer_is_screened_where_it_saves_more_than_the_gradients_that_it_needs(suffixes):
    early, middle, _ = suffixes
    each = screening_costs.BACKWARD * behind([suffixes[early]])
    cheap, dear = 0.1e12 / each, 10e12 / each
    saving = works(suffixes, [0.6, 0.6, 0.6])
    assert worthwhile(saving, cheap) == (
        frozenset(suffixes),
        pytest.approx(3e12 - 1.8e12 + 0.1e12),
    )
    assert worthwhile(saving, dear) == (frozenset(), 3e12)
    assert worthwhile(saving, cheap, gain=0.7) == (frozenset(), 3e12)
    chosen, operations = worthwhile(works(suffixes, [-0.1, 0.6, 0.0]), cheap)
    assert chosen == {middle}
    assert operations == pytest.approx(
        2.4e12 + 0.1e12 * behind([suffixes[middle]]) / behind([suffixes[early]])
    )


def test_an_early_layer_is_left_out_that_does_not_pay_for_gradients_up_to_it(suffixes):
    early, middle, late = suffixes
    part = screening_costs.BACKWARD * behind([suffixes[early]], suffixes[middle].nodes)
    large = {
        job: Work(suffixes[job], 1e14, 1e13) if job != early else Work(suffixes[job], 1e12, 6e11)
        for job in suffixes
    }
    assert worthwhile(large, 0.3e12 / part)[0] == {early, middle, late}
    assert worthwhile(large, 0.5e12 / part)[0] == {middle, late}


def test_what_was_seen_is_not_counted_twice(suffixes):
    early, middle, _ = suffixes.values()
    whole = behind([early])
    assert behind([early, middle]) == whole > behind([middle]) > 0
    assert behind([early], middle.nodes) == pytest.approx(whole - behind([middle]))


@pytest.mark.parametrize(
    ("low", "device", "least", "most"),
    [
        ((), "cpu", 1.0, 1.0),
        ((torch.bfloat16,), "cpu", 1.0, 1.0),
        ((torch.int8, torch.bfloat16), "cpu", 1.5, screening_costs.EIGHT_BITS),
        ((torch.float16,), "cuda", screening_costs.HALF, screening_costs.HALF),
    ],
)
def test_how_fast_pairs_are_follows_the_precision(setup, suffixes, low, device, least, most):
    own = SimpleNamespace(low=low, data=SimpleNamespace(device=torch.device(device)))
    for suffix in suffixes.values():
        assert least <= faster(own, suffix) <= most


def test_more_images_make_screening_pay(setup):
    live = dict.fromkeys(setup.jobs, 1.0)
    assert promising(setup, live, 20) == frozenset()
    assert promising(setup, live, 100_000) == frozenset(setup.jobs)
    assert promising(setup, dict.fromkeys(setup.jobs, 0.0), 100_000) == frozenset()
    in_full = replace(setup, low=())
    assert promising(in_full, live, 2_000) >= promising(setup, live, 2_000)


def test_a_small_run_computes_all_pairs_and_says_so(caplog):
    data = demo.images(20)
    model, options = demo.network("vgg_bn"), {"audit": 0, "progress": False}
    with caplog.at_level(logging.INFO, logger="pyablate"):
        screened = pa.ablate(model, data, LAYERS, guarantee="screened", **options)
    exact = pa.ablate(model, data, LAYERS, **options)
    assert (screened.predictions() == exact.predictions()).all()
    assert "nothing is screened: to compute all pairs is reckoned to take no longer" in caplog.text
    assert screened.guarantee == "screened"
    assert screened.screening.layers == {}
    assert screened.screening.upper_bound == 0
    assert "no layer was screened" in str(screened.screening)


@pytest.mark.parametrize("measure", [False, True])
def test_a_plan_says_which_layers_a_run_screens(measure):
    model, data = demo.network("vgg_bn"), demo.images(20)
    few = pa.plan(model, data, LAYERS, measure=measure)
    assert few.screened.layers == ()
    assert few.screened.prediction_seconds == 0
    assert few.screened.seconds[0] == pytest.approx(
        few.table["seconds"].sum() + few.screened.measuring_seconds
    )
    assert "screened: as exact, since gradients and thresholds would take as long" in few.explain()
    assert few.seconds_at(0.02) > 0
    if not measure:
        many = pa.plan(model, data, LAYERS, images=1_000_000)
        assert many.screened.layers == tuple(LAYERS)
        assert many.screened.prediction_seconds > 0
