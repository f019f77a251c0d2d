"""Screened runs: what they settle is right, what they miss is bounded, what they are is told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.faults import counted, suspected
from support.runs import Killed, stopping, told_cascades
from support.screened import careless_thresholds, layers_case, screen_anyway
from support.stores import contents
from torch import Tensor, nn

import pyablate as pa
from pyablate import demo
from pyablate.engine.score import Score
from pyablate.runs import _ablate, screening_costs, screening_sample, thresholds
from pyablate.runs.run_folder import StoreMismatch
from pyablate.runs.screening import Screen

pytestmark = pytest.mark.usefixtures("exports_kept")

LAYERS = ["features.6", "features.13"]
LATE = LAYERS[1:]


cascades = pytest.fixture(told_cascades)


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return demo.network("vgg_bn"), demo.images(80)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample less than a small run would, so that something is settled; measure on few pairs."""
    screen_anyway(monkeypatch)
    monkeypatch.setattr(thresholds, "ENOUGH", 300)
    monkeypatch.setattr(screening_sample, "LEAST", 512)
    monkeypatch.setattr(screening_sample, "IMAGES", 64)


def ablate(case: tuple[nn.Module, Any], layers: Any = LATE, **options: Any) -> pa.AblationResult:
    plain = {"audit": 0, "progress": False, "guarantee": "screened", **options}
    return pa.ablate(*case, layers, **plain)


def flips(result: pa.AblationResult) -> dict[tuple[int, int], int]:
    found = result.flips
    triples = zip(found.row.tolist(), found.image.tolist(), found.prediction.tolist(), strict=True)
    return {(row, image): new for row, image, new in triples}


def missed(screened: pa.AblationResult, exact: pa.AblationResult) -> int:
    """Count flips that are missing; those that are there must be right."""
    known, found = flips(exact), flips(screened)
    assert found.items() <= known.items()
    return len(known) - len(found)


@pytest.mark.parametrize(
    "intervention", ["zero", "mean", "class-mean", "constant:0.5", "resample", "noise", "direction"]
)
def test_no_flip_is_missed_and_most_pairs_are_settled(case, intervention):
    exact = ablate(case, intervention=intervention, guarantee="exact")
    screened = ablate(case, intervention=intervention)
    assert missed(screened, exact) == 0
    assert len(flips(exact)) > 1
    found = screened.screening
    assert found.pairs == 128 * 80
    assert found.settled > (0.01 if intervention == "constant:0.5" else 0.3) * found.pairs
    assert found.sampled > 10
    assert found.wrong == 0


def test_precisions_are_chosen_for_the_pairs_that_stay_open(case, cascades):
    found = ablate(case, LAYERS).screening
    for told, layer in zip(cascades, found.layers.values(), strict=True):
        # Which are silent is not known beforehand.
        assert 0.7 * layer.computed < told < 1.3 * (layer.computed + layer.silent)
        assert told < 0.7 * layer.pairs


def test_constants_of_the_units_own_are_screened_too(case):
    values = torch.linspace(-0.2, 0.6, 128)
    own = pa.Intervention("constant", values=values)
    exact = ablate(case, intervention=own, guarantee="exact")
    screened = ablate(case, intervention=own)
    assert missed(screened, exact) == 0
    assert len(flips(exact)) > 1
    assert screened.screening.wrong == 0


def test_groups_are_screened_too(case):
    groups = [[f"features.13:{n}", f"features.13:{n + 1}"] for n in range(8)]
    groups += [[f"features.6:{n}", f"features.13:{n}"] for n in range(8)]
    exact = ablate(case, groups=groups, layers=None, guarantee="exact")
    screened = ablate(case, groups=groups, layers=None)
    assert missed(screened, exact) == 0
    assert sum(layer.pairs for layer in screened.screening.layers.values()) == 16 * 80


def test_pairs_that_stay_open_are_looked_at_again_in_depth(monkeypatch):
    monkeypatch.setattr(screening_sample, "LEAST", 1400)  # of 1,920: or tails are too wide
    monkeypatch.setattr(screening_costs, "EIGHT_BITS", 1.0)  # or depth pays less with them
    case = demo.network("vgg_bn"), demo.images(60)
    exact = ablate(case, "features.2", guarantee="exact")
    screened = ablate(case, "features.2", risk=1e-3)
    [layer] = screened.screening.layers.values()
    places = {place: count for place, count in layer.by_stage.items() if place}
    assert sum(places.values()) > 0.1 * layer.pairs
    assert missed(screened, exact) <= screened.screening.missed_bound


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let thresholds be a factor of what was measured, 1 at most, and sample more."""
    return lambda factor: careless_thresholds(monkeypatch, factor)


def test_a_wrong_pair_is_corrected_raises_the_threshold_and_is_counted(case, careless):
    careless(1e-6)
    exact = ablate(case, LAYERS, guarantee="exact")
    screened = ablate(case, LAYERS)
    found = screened.screening
    assert found.wrong > 0
    assert any(layer.raised > 0 for layer in found.layers.values())
    assert missed(screened, exact) <= found.missed_bound
    assert found.wrong <= found.sampled


def test_batches_memory_and_threads_change_nothing(case, careless, tmp_path):
    careless(1e-3)  # so that thresholds are raised on the way
    plain = ablate(case, LAYERS, memory=1 << 30)
    assert plain.screening.wrong > 0
    kept: dict[str, Any] = {"batch_size": 7, "output": tmp_path / "run.zarr"}
    for options in ({"batch_size": 7}, {"batch_size": 33, "memory": 1 << 24}, kept):
        other = ablate(case, LAYERS, **options)
        assert flips(other) == flips(plain)
        assert other.screening == plain.screening
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert flips(ablate(case, LAYERS)) == flips(plain)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kept", [False, True])
def test_only_layers_whose_thresholds_were_raised_are_computed_again(
    case, careless, tmp_path, monkeypatch, caplog, kept
):
    careless(1e-3)
    done = counted(monkeypatch)
    options: dict[str, Any] = {"output": tmp_path / "run.zarr"} if kept else {}
    found = ablate(case, LAYERS, batch_size=20, **options)
    raised = {name for name, layer in found.screening.layers.items() if layer.raised}
    assert raised == {"features.6"}
    assert {name for (name, _), times in done.items() if times > 1} == raised
    assert done["features.6", 0] == 2
    assert set(done) == {(name, image) for name in LAYERS for image in (0, 20, 40, 60)}
    assert "with the care that others needed: features.6" in caplog.text


@pytest.mark.parametrize("kept", [False, True])
def test_a_layer_found_wrong_late_is_computed_as_a_whole_and_not_screened(
    case, tmp_path, monkeypatch, kept
):
    """Its single units, not a group of some, which are recorded under the same name."""
    asked: dict[str, Any] = {"groups": [["features.6:1", "features.6:2"]], "precision": "fp32"}
    exact = ablate(case, LAYERS, guarantee="exact", **asked)
    asked |= {"batch_size": 20, "audit": 40}
    plain = ablate(case, LAYERS, **asked)
    suspected(monkeypatch, 79, {"features.6": 1})
    done = counted(monkeypatch)
    options: dict[str, Any] = {"output": tmp_path / "run.zarr"} if kept else {}
    found = ablate(case, LAYERS, **asked, **options)
    assert found.strategy == {"features.6": "delta (float64)", "features.13": "delta"}
    before, after = plain.screening.layers, found.screening.layers
    assert (before["features.6"].pairs, after["features.6"].pairs) == (65 * 80, 80)
    assert after["features.13"] == before["features.13"]
    assert found.audit == pa.Audit(40, 0, 1)
    assert {name for (name, _), times in done.items() if times != 1} == {"features.6"}
    rows = (found.units["layer"] == "features.6").to_numpy()
    assert rows.sum() == 64 + 1
    known = flips(exact)
    assert {pair: new for pair, new in flips(found).items() if rows[pair[0]]} == {
        pair: new for pair, new in known.items() if rows[pair[0]]
    }


def test_the_audit_changes_nothing_of_the_sample_and_computes_its_pairs(case, careless):
    careless(1e-6)
    plain, audited = ablate(case), ablate(case, audit=400)
    assert audited.audit.pairs == 400
    assert audited.screening.computed - plain.screening.computed > 150
    for name in ("sampled", "wrong", "missed_bound"):
        assert getattr(audited.screening, name) == getattr(plain.screening, name)


def test_a_caller_in_inference_mode(case):
    with torch.inference_mode():
        images = case[1][0].clone()
        found = ablate((case[0], (images, case[1][1])))
    assert flips(found) == flips(ablate(case))
    assert found.screening.settled > 0


def test_shards_merge_to_the_whole(case, tmp_path):
    for number in (1, 2):
        ablate(case, shard=(number, 2), output=tmp_path / f"{number}.zarr")
    merged = pa.merge([tmp_path / "2.zarr", tmp_path / "1.zarr"])
    whole = ablate(case)
    assert flips(merged) == flips(whole)
    assert merged.screening == whole.screening


def test_merging_tells_where_only_some_shards_raised_a_threshold(case, tmp_path, careless, caplog):
    careless(1e-6)
    for number in range(1, 5):
        ablate(case, LAYERS[:1], shard=(number, 4), output=tmp_path / f"{number}.zarr")
    merged = pa.merge([tmp_path / f"{number}.zarr" for number in range(1, 5)])
    assert "the sample of some raised the threshold of layer features.6" in caplog.text
    assert (
        missed(merged, ablate(case, LAYERS[:1], guarantee="exact")) <= merged.screening.missed_bound
    )


def test_a_killed_run_goes_on_with_the_same_thresholds(case, tmp_path, monkeypatch, careless):
    careless(1e-3)
    ablate(case, LAYERS, output=tmp_path / "whole.zarr", batch_size=20)
    place = tmp_path / "killed.zarr"
    blocks: list[int] = []  # that were there when it was killed
    while not blocks or blocks[-1] < 4:  # then a layer of some of them is computed again
        progress = stopping(6)
        with pytest.raises(Killed):
            ablate(case, LAYERS, output=place, batch_size=20, progress=progress)
        blocks.append(len(list((place / "blocks").glob("?????????.npz"))))
        # They are read, not measured again.
        monkeypatch.setattr("pyablate.runs._ablate.measure", None)
    assert blocks == [1, 2, 3, 4]
    ablate(case, LAYERS, output=place, batch_size=20)
    assert contents(place) == contents(tmp_path / "whole.zarr")


def test_results_tell_what_they_are(case, tmp_path):
    place = tmp_path / "run.zarr"
    screened = ablate(case, output=place)
    assert screened.guarantee == pa.load(place).guarantee == "screened"
    assert pa.load(place).screening == screened.screening
    assert "screened: at most" in repr(screened)
    for options in ({"guarantee": "exact"}, {"risk": 1e-3}):
        with pytest.raises(StoreMismatch, match=r"guarantee|risk"):
            ablate(case, output=place, **options)
    exact = ablate(case, guarantee="exact")
    assert exact.guarantee == "exact"
    assert exact.screening is None
    assert "screened" not in repr(exact)


class Hidden(nn.Module):
    """Units whose gradient says little: gates are closed, a runner-up is far from the maximum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Linear(8, 24)
        self.act = nn.ReLU()
        self.gate = nn.Linear(24, 24)
        self.head = nn.Linear(48, 5)
        with torch.no_grad():
            self.gate.weight.mul_(4.0)
            self.gate.bias.fill_(-3.0)  # most gates are closed, and opened by an ablation
            self.head.weight.mul_(3.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x))
        gate = torch.relu(self.gate(h))
        top = torch.nn.functional.max_pool1d(h.unsqueeze(1) * 2.0, 2, 1, 1).squeeze(1)[:, :24]
        return self.head(torch.cat([gate, torch.sigmoid(8 * (top - 1))], dim=1))


@pytest.mark.parametrize("intervention", ["zero", "constant:3", "resample"])
def test_what_gradients_do_not_show_is_caught_or_covered(intervention, careless):
    """Thresholds as measured settle nothing here; the certificate holds with any."""
    draw = torch.Generator().manual_seed(1)
    case = Hidden(), (torch.randn(400, 8, generator=draw), torch.arange(400) % 5)
    exact = ablate(case, "act", intervention=intervention, guarantee="exact")
    measured = ablate(case, "act", intervention=intervention)
    assert missed(measured, exact) <= 1e-3 * measured.screening.pairs
    careless(1.0)
    held = []
    for seed in range(5):
        found = ablate(case, "act", intervention=intervention, seed=seed, memory=1 << 28)
        [layer] = found.screening.layers.values()
        assert layer.near.pairs + layer.far.pairs > 1000  # at first
        known = exact
        if intervention == "resample":  # whose donors the seed draws
            known = ablate(case, "act", intervention=intervention, seed=seed, guarantee="exact")
        held.append(missed(found, known) <= found.screening.missed_bound)
    assert sum(held) >= 4


def test_a_unit_that_speaks_on_few_images_is_covered(careless):
    """It is active on one image in a hundred, and decides there."""

    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.act, self.mix, self.head = (
                nn.Linear(8, 16),
                nn.ReLU(),
                nn.Linear(16, 16),
                nn.Linear(16, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.mix(self.act(self.first(x)))))

    model = Rare()
    with torch.no_grad():
        model.first.weight[0], model.first.bias[0] = 0.0, -6.0
        model.first.weight[0, 0] = 1.0
        model.mix.weight[:, 0] = 4.0 * torch.randn(16)
    draw = torch.Generator().manual_seed(2)
    images = torch.randn(600, 8, generator=draw)
    images[::100, 0] = 12.0
    case = model, (images, torch.arange(600) % 3)
    careless(0.1)
    exact, screened = ablate(case, "act", guarantee="exact"), ablate(case, "act")
    assert screened.screening.settled > 100
    assert missed(screened, exact) <= screened.screening.missed_bound
    decided = {image for row, image in flips(exact) if row == 0}
    assert decided
    assert decided <= set(range(0, 600, 100))


def test_the_bound_is_above_the_truth_in_95_of_100_repeats(monkeypatch):
    """Every pair is settled and no threshold raised, so that hundreds are wrong."""
    careless_thresholds(monkeypatch, 0.1, 0.2)
    measured = once(_ablate.measure)
    monkeypatch.setattr(_ablate, "_capture", once(_ablate._capture))
    monkeypatch.setattr(
        _ablate, "measure", lambda setup, risk, seed: replace(measured(setup, risk, 0), seed=seed)
    )
    case = layers_case(300)
    ablate(case, "act")
    monkeypatch.setattr(Score, "relative", lambda score, scale: torch.full_like(score.lowest, 1e9))
    monkeypatch.setattr(Screen, "learn", lambda *_: False)
    exact = ablate(case, "act", guarantee="exact")
    found = [ablate(case, "act", seed=seed) for seed in range(200)]
    missing = [missed(one, exact) for one in found]
    held = [m <= one.screening.missed_bound for m, one in zip(missing, found, strict=True)]
    assert min(missing) > 150
    assert sum(held) >= 0.95 * len(held)
    # A bound that half of the samples exceed is too small for about half of them.
    likely = [one.screening.total.far.missed(0.2, 0.5) for one in found]
    assert 60 < sum(m <= bound for m, bound in zip(missing, likely, strict=True)) < 140


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function the first time only."""
    found: list[Any] = []

    def call(*arguments: Any, **options: Any) -> Any:
        if not found:
            found.append(function(*arguments, **options))
        return found[0]

    return call


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("intervention", ["zero", "resample"])
def test_on_a_gpu(case, intervention):
    exact = ablate(case, LAYERS, intervention=intervention, guarantee="exact")
    screened = ablate(case, LAYERS, intervention=intervention, device="cuda")
    assert missed(screened, exact) <= screened.screening.missed_bound
    assert screened.screening.wrong <= 1
    assert screened.screening.settled > 0.3 * screened.screening.pairs


@pytest.mark.parametrize("risk", [1e-2, 1e-3])
def test_no_more_predictions_are_wrong_than_was_asked_for(risk):
    """On average over seeds, with thresholds that are no more careful than they have to be."""
    case = demo.network("alexnet"), demo.images(60)
    exact = ablate(case, "features.9", guarantee="exact")
    wrong, pairs = 0, 0
    for seed in range(6):
        screened = ablate(case, "features.9", risk=risk, seed=seed)
        wrong += missed(screened, exact) + screened.screening.wrong
        pairs += screened.screening.pairs
    assert wrong <= risk * pairs


class Stepped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.head = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.floor(self.act(self.first(x)) * 3))


@pytest.mark.parametrize("options", [{}, {"strategy": "replay"}])
def test_what_cannot_be_screened_is_computed_and_told(options, caplog):
    data = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    with caplog.at_level(logging.WARNING, logger="pyablate"):
        screened = ablate((Stepped(), data), "act", **options)
    assert "nothing is screened" in caplog.text
    assert screened.guarantee == "screened"
    assert screened.screening.pairs == 0
    assert flips(screened) == flips(ablate((Stepped(), data), "act", guarantee="exact"))


def test_closed_forms_are_computed(case):
    screened = ablate(case, "features.16")
    assert not screened.screening.layers
    assert flips(screened) == flips(ablate(case, "features.16", guarantee="exact"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guarantee": "screend"}, "guarantee.*screened"),
        ({"measures": ["loss"]}, 'measures: loss need.*guarantee="exact"'),
        ({"risk": 0}, "risk: expected a share between 0 and 1, got 0"),
        ({"risk": 1.0}, "risk"),
        ({"risk": "1e-5"}, "risk"),
    ],
)
def test_bad_arguments(case, options, message):
    with pytest.raises(ValueError, match=message):
        ablate(case, **options)


def test_the_bound_is_a_share_of_all_pairs(case):
    found = ablate(case, LAYERS).screening
    assert found.upper_bound == pytest.approx(found.missed_bound / found.pairs)
    by_layer = found.to_dataframe()["missed_bound"]
    assert by_layer.max() <= found.missed_bound < by_layer.sum()  # one sample speaks for all
