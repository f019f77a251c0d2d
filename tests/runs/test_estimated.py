"""Estimated runs: drawn as they say, without bias, the same however they are cut, told as such."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from support.faults import suspected
from support.runs import Killed, stopping, told_cascades
from support.stores import contents
from torch import Tensor, nn

import pyablate as pa
from pyablate.engine.precision_cascade import PrecisionCascade
from pyablate.runs import sampling_design
from pyablate.runs.run_folder import StoreMismatch
from pyablate.runs.sampling_design import Budget, JobDesign

pytestmark = pytest.mark.usefixtures("exports_kept")

IMAGES, UNITS = 300, 24


class Small(nn.Module):
    def __init__(self, *, stepped: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act = nn.Linear(8, UNITS), nn.ReLU()
        self.mix, self.head = nn.Linear(UNITS, 20), nn.Linear(20, 5)
        self.last = nn.ReLU()
        self.stepped = stepped

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x))
        if self.stepped:
            h = torch.floor(h * 3)
        return self.head(self.last(self.mix(h)))


Case = tuple[nn.Module, tuple[Tensor, Tensor]]


def made(*, stepped: bool = False) -> Case:
    draw = torch.Generator().manual_seed(1)
    model, images = Small(stepped=stepped), torch.randn(IMAGES, 8, generator=draw)
    with torch.no_grad():
        model.head.weight.mul_(3.0)
        labels = model(images + 0.3 * torch.randn(images.shape, generator=draw)).argmax(dim=1)
    return model, (images, labels)


cascades = pytest.fixture(told_cascades)


@pytest.fixture(scope="module")
def case() -> Case:
    return made()


@pytest.fixture(scope="module")
def exact(case: Case) -> pa.AblationResult:
    return ablate(case, ["act", "last"], guarantee="exact")


def ablate(case: Case, layers: Any = "act", **options: Any) -> pa.AblationResult:
    plain = {"guarantee": "estimated", "budget": "8%", "audit": 0, "progress": False, **options}
    if plain["guarantee"] != "estimated":
        del plain["budget"]
    return pa.ablate(*case, layers, **plain)


def same(one: pa.AblationResult, other: pa.AblationResult) -> bool:
    """Whether two results drew the same pairs and found the same."""
    pairs = zip(one.estimate.arrays.values(), other.estimate.arrays.values(), strict=True)
    flips = ("start", "image", "prediction", "weight")
    return all(np.array_equal(*some) for some in pairs) and all(
        np.array_equal(getattr(one.flips, name), getattr(other.flips, name)) for name in flips
    )


@pytest.mark.parametrize("stepped", [False, True])
def test_against_exact_results_with_many_seeds(stepped):
    """Where the network jumps there are no scores, and pairs are drawn with one chance."""
    case = made(stepped=stepped)
    exact = ablate(case, guarantee="exact")
    present = exact.class_sizes > 0
    repeats, share = (4, 0.2) if stepped else (6, 0.08)
    held: dict[str, float] = {}
    totals, drawn, squares = [], [], []
    for seed in range(repeats):
        found = ablate(case, seed=seed, budget=f"{100 * share:g}%")
        for name in ("accuracy_drop", "class_accuracy_drop", "lost", "gained"):
            error = getattr(found, name) - getattr(exact, name)
            inside = np.abs(error) <= found.half_width(name) + 1e-9
            inside = inside[:, present] if inside.ndim == 2 else inside
            held[name] = held.get(name, 0.0) + float(inside.mean()) / repeats
        error = found.accuracy_drop - exact.accuracy_drop
        totals.append(error.mean())
        squares.append((error**2).mean())
        drawn.append(found.estimate.drawn.sum() / (UNITS * IMAGES))
        assert (found.estimate.live.sum(axis=1) <= IMAGES).all()
    assert min(held.values()) >= (0.9 if stepped else 0.93), held  # of 96 units at least
    assert abs(np.mean(totals)) < 4 * np.std(totals) / np.sqrt(repeats)
    before = 0.0 if stepped else 0.2 * share
    assert np.mean(drawn) == pytest.approx(share - before, rel=0.25)
    if not stepped:  # scores are worth more than chance
        flips = np.diff(exact.flips.start).mean()
        assert np.mean(squares) < 0.4 * flips * (1 - share) / share / IMAGES**2


def test_precisions_are_chosen_for_the_pairs_that_are_drawn(case, cascades):
    found = ablate(case)
    assert cascades == [pytest.approx(found.estimate.drawn.sum(), rel=0.2)]
    before = asdict(JobDesign(1.0, above=(1.0,), below=(2.0,)))
    del before["drawn"]  # as in stores of older versions
    assert JobDesign.of(before) == JobDesign(1.0, above=(1.0,), below=(2.0,))


def test_batches_memory_and_threads_change_nothing(case):
    plain = ablate(case)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert same(ablate(case, batch_size=37, memory=1 << 24), plain)
    finally:
        torch.set_num_threads(threads)


def test_the_audit_changes_nothing_of_the_sample(case):
    audited = ablate(case, audit=400)
    assert (audited.audit.pairs, audited.audit.mismatches) == (400, 0)
    assert same(audited, ablate(case))


def test_the_audit_finds_what_is_wrong(case, exact, monkeypatch):
    classify = PrecisionCascade.classify

    def blind(self: Any, *arguments: Any, record: Any = None, **options: Any) -> Tensor:
        found = classify(self, *arguments, record=record, **options)
        return found if record is not None else torch.zeros_like(found)  # not those beforehand

    monkeypatch.setattr(PrecisionCascade, "classify", blind)
    found = ablate(case, audit=300)
    assert found.audit.mended > 0
    assert np.allclose(found.accuracy_drop, exact.accuracy_drop[:UNITS])  # all, more carefully


@pytest.mark.parametrize("kept", [False, True])
def test_a_layer_found_wrong_late_is_computed_again_and_the_others_are_kept(
    case, exact, monkeypatch, tmp_path, kept
):
    plain = ablate(case, ["act", "last"])
    suspected(monkeypatch, IMAGES - 1, {"act": 1})
    options: dict[str, Any] = {"batch_size": 100, "audit": 60, "precision": "fp32"}
    if kept:
        options["output"] = tmp_path / "run.zarr"
    found = ablate(case, ["act", "last"], **options)
    assert found.strategy == {"act": "delta (float64)", "last": "closed form"}
    assert found.audit == pa.Audit(60, 0, 1)
    assert np.array_equal(found.estimate.drawn[UNITS:], plain.estimate.drawn[UNITS:])
    assert found.estimate.drawn[:UNITS].sum() == 0 < plain.estimate.drawn[:UNITS].sum()
    assert (found.flips.weight == 1.0).all()
    for name in ("start", "image", "prediction"):  # all pairs of one are computed, and of the other
        assert np.array_equal(getattr(found.flips, name), getattr(exact.flips, name))


def test_a_whole_budget(case, exact):
    found = ablate(case, budget="100%")
    assert found.estimate.drawn.sum() > 0.7 * found.estimate.live.sum()
    error = np.abs(found.accuracy_drop - exact.accuracy_drop[:UNITS])
    assert error.mean() < 0.5 / IMAGES


def test_closed_forms_are_computed_as_a_whole(case, exact):
    found = ablate(case, ["act", "last"])
    assert not found.estimate.live[UNITS:].any()
    assert np.array_equal(found.lost[UNITS:], exact.lost[UNITS:])
    assert not found.half_width()[UNITS:].any()


def test_groups_and_other_interventions(case):
    groups = [[f"act:{n}", f"act:{n + 1}"] for n in range(10)]
    options = {"groups": groups, "layers": None, "intervention": "mean"}
    found = ablate(case, budget="30%", **options)
    exact = ablate(case, guarantee="exact", **options)
    error = np.abs(found.accuracy_drop - exact.accuracy_drop)
    assert (error <= found.half_width() + 1e-9).mean() >= 0.8
    assert len(found.estimate.drawn) == 10


def test_shards_merge_to_the_whole(case, tmp_path):
    for number in (1, 2):
        ablate(case, shard=(number, 2), output=tmp_path / f"{number}.zarr")
    merged = pa.merge([tmp_path / "2.zarr", tmp_path / "1.zarr"])
    assert same(merged, ablate(case))
    assert merged.guarantee == "estimated"


def test_a_killed_run_goes_on_with_the_same_design(case, tmp_path, monkeypatch):
    monkeypatch.setattr("pyablate.runs.run_folder.SECONDS", -1.0)  # every job is written down
    layers = ["act", "last"]
    ablate(case, layers, output=tmp_path / "whole.zarr", batch_size=50)
    place = tmp_path / "killed.zarr"
    with pytest.raises(Killed):
        ablate(case, layers, output=place, batch_size=50, progress=stopping(6))
    assert (place / "blocks").exists()
    monkeypatch.setattr("pyablate.runs._ablate.design", None)  # it is read, not reckoned again
    ablate(case, layers, output=place, batch_size=50)
    assert contents(place) == contents(tmp_path / "whole.zarr")


def test_results_tell_what_they_are(case, tmp_path):
    place = tmp_path / "run.zarr"
    found = ablate(case, output=place)
    assert found.guarantee == "estimated"
    assert same(pa.load(place), found)
    assert same(ablate(case, output=place), found)  # read again
    for options in ({"guarantee": "exact"}, {"budget": "9%"}):
        with pytest.raises(StoreMismatch, match=r"guarantee|budget"):
            ablate(case, output=place, **options)


def test_a_number_of_pairs(case):
    found = ablate(case, budget=900)
    assert found.estimate.expected == pytest.approx(900, rel=0.1)
    assert found.estimate.drawn.sum() < 900
    assert found.estimate.budget == "900 pairs"


def test_a_time(case, monkeypatch):
    """More pairs for more time, as many as the measured costs let be."""
    kept: list[Any] = []
    samples = sampling_design.samples

    def timed(*arguments: Any, **options: Any) -> Any:
        found = samples(*arguments, **options)
        found.batch_seconds[:] = [(0.016, 16)] * 3  # 0.3 s for the images
        for [sample] in found.scored.values():
            sample.seconds[:] = [1e-3 * len(some) for some in sample.actual]
        kept.append(found)
        return found

    monkeypatch.setattr(sampling_design, "samples", timed)
    found = [ablate(case, budget=f"{seconds}s").estimate for seconds in (0.8, 1.3)]
    for one, seconds in zip(found, (0.5, 1.0), strict=True):
        [[sample]] = kept.pop(0).scored.values()
        drawn = one.expected - sum(map(len, sample.actual))
        assert drawn == pytest.approx(1000 * seconds, rel=0.1)
    with pytest.raises(ValueError, match=r"budget: 0\.1 s are not enough for the images alone"):
        ablate(case, budget="0.1s")
    with pytest.raises(ValueError, match="budget: no pair could be timed"):
        ablate(case, strategy="replay", budget="10min")


def test_replay(case, exact):
    found = ablate(case, strategy="replay", budget="25%")
    share = found.estimate.drawn.sum() / (UNITS * IMAGES)
    assert share == pytest.approx(0.25, rel=0.1)
    held = np.abs(found.accuracy_drop - exact.accuracy_drop[:UNITS]) <= found.half_width() + 1e-9
    assert held.mean() > 0.85


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("2%", Budget(2.0, "%")),
        ("0.5 %", Budget(0.5, "%")),
        ("10min", Budget(600.0, "s")),
        ("2h", Budget(7200.0, "s")),
        ("500000", Budget(500_000.0, "pairs")),
        (500_000, Budget(500_000.0, "pairs")),
    ],
)
def test_budgets(given, expected):
    assert Budget.of(given) == expected


@pytest.mark.parametrize("given", [None, "", "0%", "101%", "2 m", "-3s", 0, -5, 0.5, True, "nan"])
def test_bad_budgets(case, given):
    with pytest.raises(ValueError, match="budget: expected a share of the pairs"):
        ablate(case, budget=given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guarantee": "exact", "budget": "2%"}, 'budget: expected with guarantee="estimated"'),
        ({"guarantee": "screened", "budget": 500}, "budget"),
        ({"guarantee": "estimated", "budget": "2%", "measures": ["loss"]}, "measures: loss need"),
    ],
)
def test_bad_arguments(case, options, message):
    with pytest.raises(ValueError, match=message):
        pa.ablate(*case, "act", progress=False, **options)


def test_experiments_refuse_a_sample(case):
    for run in (pa.cumulative, pa.pairs, pa.minimal_sets):
        with pytest.raises(ValueError, match="guarantee: expected 'exact' or 'screened'"):
            run(*case, "act", guarantee="estimated", budget="2%")
