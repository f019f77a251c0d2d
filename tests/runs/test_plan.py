"""What a plan says, beside the run that was planned."""

import pytest
from support import networks
from torch import nn

import pyablate as pa


@pytest.fixture(scope="module")
def planned():
    model, images, labels = pa.demo.load("alexnet", limit=128)
    layers = ["features.4", "classifier.3"]
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
