"""What a plan says, beside the run that was planned."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from support import networks
from support.screened import layers_case, screen_anyway
from torch import nn

import pyablate as pa
from pyablate.engine.score import DirectionCount, Scale
from pyablate.results.screening import LayerScreening, Sampled, Screening
from pyablate.runs import ScreenedPlan, screened_plan, thresholds
from pyablate.runs.thresholds import JobThresholds, Stage


@pytest.fixture(scope="module")
def planned():
    model, images, labels = pa.demo.load("alexnet", limit=128)
    layers = ["features.4", "classifier.3"]
    with pytest.MonkeyPatch.context() as patch:
        screen_anyway(patch)
        plan = pa.plan(model, (images, labels), layers)
    # Twice, since the first run also prepares filters and fetches memory.
    runs = [pa.ablate(model, (images, labels), layers, audit=0, progress=False) for _ in range(2)]
    return plan, runs[1]


def test_a_plan_has_the_strategies_of_the_run(planned):
    plan, result = planned
    assert dict(zip(plan.table["layer"], plan.table["strategy"], strict=True)) == result.strategy
    assert (plan.table["pairs"] == 128 * plan.table["units"]).all()


def test_explain_shows_what_the_layers_took(planned):
    plan, result = planned
    rows = {line.split()[0]: line.split() for line in plan.explain(result).splitlines()}
    assert "actual" not in plan.explain()
    for layer, seconds in result.effort.layer_seconds.items():
        assert rows[layer][-1] == f"{seconds:.2f}"


def test_a_plan_is_of_the_right_size(planned):
    """By a wide margin: the benchmarks compare the two on an idle machine."""
    plan, result = planned
    actual = sum(result.effort.layer_seconds.values())
    assert actual / 8 < plan.table["seconds"].sum() < 8 * actual
    assert plan.clean_seconds > 0


def test_the_total_is_that_of_the_call(planned):
    plan, result = planned
    assert set(plan.other_seconds) == {"preparation", "audit"}
    parts = [plan.table["seconds"].sum(), plan.clean_seconds, *plan.other_seconds.values()]
    assert min(parts) > 0
    assert plan.seconds == pytest.approx(sum(parts))
    said = plan.explain()
    for part in ("preparation", "audit", "clean runs", "layers"):
        assert f"\n  {part}: " in said
    for part, seconds in result.effort.other_seconds.items():
        assert f"\n  {part}: {seconds:,.1f} s" in plan.explain(result)


def test_planning_for_more_images_scales(planned):
    plan, _ = planned
    model, images, labels = pa.demo.load("alexnet", limit=128)
    ten = pa.plan(model, (images, labels), ["features.4"], images=1280)
    assert ten.table["pairs"].item() == 10 * plan.table.set_index("layer")["pairs"]["features.4"]


def test_a_network_that_is_not_captured_is_planned_by_replay(monkeypatch):
    model, images, labels = networks.network("residual", 8)
    monkeypatch.setattr("pyablate.runs.setup._capture", lambda *_: None)
    plan = pa.plan(model, (images, labels))
    assert set(plan.table["strategy"]) == {"replay"}
    assert plan.screened is None
    assert "screened: not planned, these pairs run by replay" in plan.explain()
    assert plan.seconds_at(0.1) == plan.seconds
    assert plan.clean_seconds > 0


def test_a_layer_that_reaches_no_logit_can_be_planned_and_run():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.head = nn.ReLU(), nn.Linear(288, networks.CLASSES)

        def forward(self, x):
            return self.head(x.flatten(1)) + 0 * self.idle(x).detach().shape[0]

    _, images, labels = networks.network("residual", 17)
    model = networks.made(Idle(), images)
    assert pa.plan(model, (images, labels), "idle").table["live"].tolist() == [0.0]
    assert len(pa.ablate(model, (images, labels), "idle").flips.image) == 0


def test_a_plan_has_the_ends_of_a_screened_run(planned):
    plan, _ = planned
    found = plan.screened
    assert found.stages is None
    least, most = found.seconds
    more = found.prediction_seconds + found.measuring_seconds
    assert more < least < most
    assert most == pytest.approx(plan.table["seconds"].sum() + more)
    cheap = replace(found, prediction_seconds=0.0, measuring_seconds=0.0)
    assert "if no pair has to be computed" in replace(plan, screened=cheap).explain()
    assert f"estimated: {plan.seconds_at(0.02):,.1f} s at a budget of 2% of" in plan.explain()
    assert 0 < found.drawing_seconds < found.prediction_seconds  # 2 of 9 directions
    none, half, every = (plan.seconds_at(share) for share in (0.0, 0.5, 1.0))
    assert none < half < every == pytest.approx(plan.seconds + found.drawing_seconds)
    with pytest.raises(ValueError, match="share: expected a number from 0 to 1"):
        plan.seconds_at(2.0)


@pytest.mark.parametrize("cost", [0.0, 1e6])
def test_a_plan_says_where_screening_does_not_pay(planned, cost):
    plan, _ = planned
    screened = replace(plan.screened, prediction_seconds=cost, measuring_seconds=0.0)
    said = replace(plan, screened=screened).explain()
    assert ("an exact run is no slower" in said) == (cost > 0)


def test_what_was_measured_stays_open_is_what_stays_open(monkeypatch):
    screen_anyway(monkeypatch)
    monkeypatch.setattr(thresholds, "ENOUGH", 300)
    model, images, labels = pa.demo.load("alexnet", limit=64)
    layers, risk = ["features.9", "classifier.3"], 0.01
    plan = pa.plan(model, (images, labels), layers, measure=True, risk=risk)
    options = {"guarantee": "screened", "risk": risk, "audit": 0, "progress": False}
    result = pa.ablate(model, (images, labels), layers, **options)
    stages = plan.screened.stages
    assert set(stages["layer"]) == {"features.9"}  # the other has a closed form
    layer = result.screening.layers["features.9"]
    live = layer.pairs - layer.silent
    open_, computed = stages["open"].iloc[-2:]
    assert 0.01 < open_ < 0.5
    assert open_ == pytest.approx(1 - sum(layer.by_stage.values()) / live, abs=0.05)
    assert computed == pytest.approx(layer.computed / live, abs=0.1)
    least, most = plan.screened.seconds
    assert least == most
    of_layers = plan.screened.layer_seconds[0]
    closed = plan.table.set_index("layer")["seconds"]["classifier.3"]
    assert of_layers == pytest.approx(stages["seconds"].sum() + closed)
    actual = [line.split()[-1] for line in plan.explain(result).splitlines() if "computed" in line]
    assert actual == [f"{layer.computed / live:.3f}"]  # of the last stage share and cost are one
    whole = plan.table.set_index("layer")["seconds"]["features.9"]
    assert stages["cost"].sum() < 0.9
    assert stages["seconds"].sum() == pytest.approx(whole * stages["cost"].sum())
    assert "actual_open" not in plan.explain()


def test_the_stages_of_a_run_are_shown_where_none_were_planned(monkeypatch):
    screen_anyway(monkeypatch)
    model, data = layers_case(100)
    plan = pa.plan(model, data, "act")
    result = pa.ablate(model, data, "act", guarantee="screened", audit=0, progress=False)
    assert "leave open" not in plan.explain()
    assert "actual_open" in plan.explain(result)


def test_the_cost_of_stages_follows_the_pairs_that_get_there():
    unit = Scale(0.1, 0.0)
    stages = Stage("", 1.0, unit, open=0.6), Stage("deep", 2.0, unit, cost=0.3, open=0.2)
    known = screened_plan._stages("a", JobThresholds(stages, 100, 0.7), 0.01, 10.0)
    assert known["cost"].tolist() == pytest.approx([0.0, 0.6 * 0.3, 0.2 + 0.8 * 0.01])
    assert known["seconds"].tolist() == pytest.approx((10.0 * known["cost"]).tolist())
    by_stage = {"": 400, "deep": 200}
    layer = LayerScreening(1000, 200, 260, Sampled(400, 40), Sampled(200, 20), by_stage)
    result = SimpleNamespace(screening=Screening(1e-5, 0.1, 0.1, 9, 0, {"a": layer}))
    plan = ScreenedPlan(1.0, 0.5, 1.0, (2.0, 2.0), DirectionCount(9, 0), ("a",), known)
    found = screened_plan.stages_table(plan, result)
    assert found["actual_open"].tolist() == pytest.approx([0.5, 0.25, 260 / 800])
    assert found["actual_cost"].tolist() == pytest.approx([0.0, 0.5 * 0.3, 260 / 800])
    unplanned = screened_plan.stages_table(None, result)
    assert unplanned["stage"].tolist() == ["unit", "deep", "computed"]
    assert unplanned["actual_open"].tolist() == found["actual_open"].tolist()


def test_a_risk_of_nothing_is_refused():
    model, data = layers_case(20)
    with pytest.raises(ValueError, match="risk: expected a number between 0 and 1, got 0"):
        pa.plan(model, data, "act", risk=0)
