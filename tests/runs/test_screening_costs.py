"""Which layers a screened run screens: those that gain by it, told and planned."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.runs import Killed, stopping
from support.screened import screen_anyway

import pyablate as pa
from pyablate import demo
from pyablate.engine import int8_conv
from pyablate.engine.job import Job
from pyablate.engine.suffix import Suffix
from pyablate.interventions import parse
from pyablate.runs import screening_costs, thresholds
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
    early, middle, late = suffixes
    each = screening_costs.BACKWARD * behind([suffixes[early]])
    cheap, dear = 0.1e12 / each, 10e12 / each
    saving = works(suffixes, [0.6, 0.6, 0.6])
    assert worthwhile(saving, cheap) == (
        frozenset(suffixes),
        pytest.approx(3e12 - 1.8e12 + 0.1e12),
    )
    assert worthwhile(saving, dear) == (frozenset(), 3e12)
    assert worthwhile(saving, cheap, gain=0.7) == (frozenset(), 3e12)
    mixed = works(suffixes, [0.9, 0.1, 0.9])
    assert worthwhile(mixed, 0.0, gain=0.5)[0] == {early, late}
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
    ("precision", "dtype", "device", "least", "most"),
    [
        ("fp32", torch.float32, "cpu", 1.0, 1.0),
        ("auto", torch.float64, "cpu", 1.0, 1.0),
        ("bf16", torch.float32, "cpu", 1.0, 1.0),
        ("auto", torch.float32, "cpu", 1.5, screening_costs.EIGHT_BITS),
        ("fp16", torch.float32, "cuda", screening_costs.HALF_ON_GPU, screening_costs.HALF_ON_GPU),
        ("fp32", torch.float32, "cuda", 1.0, 1.0),
    ],
)
def test_how_fast_pairs_are_follows_the_precision(
    suffixes, monkeypatch, precision, dtype, device, least, most
):
    monkeypatch.setattr(int8_conv, "available", lambda: True)
    data = SimpleNamespace(device=torch.device(device), dtype=dtype)
    own = SimpleNamespace(precision=precision, data=data)
    for suffix in suffixes.values():
        assert least <= faster(own, suffix) <= most
    monkeypatch.setattr(int8_conv, "available", lambda: False)
    if device == "cpu":
        assert {faster(own, suffix) for suffix in suffixes.values()} == {1.0}


def test_more_images_and_dearer_pairs_make_screening_pay(setup, monkeypatch):
    live = dict.fromkeys(setup.jobs, 1.0)
    assert promising(setup, live, 20) == frozenset()
    assert promising(setup, live, 100_000) == frozenset(setup.jobs)
    assert promising(setup, dict.fromkeys(setup.jobs, 0.0), 100_000) == frozenset()
    monkeypatch.setattr(int8_conv, "available", lambda: True)
    counts = [20 * 2**n for n in range(13)]
    in_full = replace(setup, precision="fp32")
    gain = {count: len(promising(setup, live, count)) for count in counts}
    more = {count: len(promising(in_full, live, count)) for count in counts}
    assert all(more[count] >= gain[count] for count in counts)
    assert more != gain


def test_fewer_layers_are_chosen_until_the_larger_sample_pays_for_them(suffixes):
    """Each takes the more the fewer there are: the last one would not gain by itself."""
    costs = dict(zip(suffixes, (2.0, 0.8, 0.5), strict=True))
    asked = []

    def works(jobs):
        asked.append(len(jobs))
        return {job: Work(suffixes[job], 1.0, costs[job] + (len(jobs) < 3)) for job in jobs}

    chosen, operations = thresholds._chosen(works, frozenset(suffixes), 0.0)
    assert (chosen, operations) == (frozenset(), 3.0)
    assert asked == [3, 2, 0]


def test_a_part_of_the_layers_is_screened_alike_however_it_is_cut(tmp_path, monkeypatch):
    """Batches, shards, and a run that goes on."""
    screen_anyway(monkeypatch)
    every = thresholds.worthwhile

    def late_ones(works, passes, gain):
        late = {job: work for job, work in works.items() if job.name == "features.13"}
        return frozenset(late), every(late, passes, gain)[1]

    monkeypatch.setattr(thresholds, "worthwhile", late_ones)
    monkeypatch.setattr(thresholds, "ENOUGH", 300)
    model, data = demo.network("vgg_bn"), demo.images(80)
    layers = ["features.6:0", "features.6:9", "features.13"]

    def ablate(**options):
        plain = {"audit": 0, "progress": False, "guarantee": "screened", **options}
        return pa.ablate(model, data, layers, **plain)

    whole = ablate()
    assert list(whole.screening.layers) == ["features.13"]
    assert whole.screening.settled > 0
    exact = pa.ablate(model, data, layers[:2], audit=0, progress=False)
    assert (whole.predictions()[:2] == exact.predictions()).all()
    cut = ablate(batch_size=17)
    assert cut.screening == whole.screening
    for number in (1, 2):
        ablate(shard=(number, 2), output=tmp_path / f"{number}.zarr")
    merged = pa.merge([tmp_path / "1.zarr", tmp_path / "2.zarr"])
    assert merged.screening == whole.screening
    with pytest.raises(Killed):
        ablate(output=tmp_path / "killed.zarr", batch_size=20, progress=stopping(2))
    monkeypatch.setattr("pyablate.runs._ablate.measure", None)  # it is read, not chosen again
    resumed = ablate(output=tmp_path / "killed.zarr", batch_size=20)
    for other in (cut, merged, resumed):
        assert (other.predictions() == whole.predictions()).all()
    assert resumed.screening == whole.screening


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
    told = few.explain()
    assert ("s to find that out" in told) == measure
    assert "since gradients and thresholds would take as long" in told
    assert few.seconds_at(0.02) > 0
    if not measure:
        many = pa.plan(model, data, LAYERS, images=1_000_000)
        assert many.screened.layers == tuple(LAYERS)
        assert many.screened.prediction_seconds > 0
