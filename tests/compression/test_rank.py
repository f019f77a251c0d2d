"""Which units hang together, and in what order they go."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from support.compressible import Dense, Grouped, Mobile, images, made
from support.screened import careless_thresholds, layers_case
from support.simulated import simulate
from support.state import state_of
from torch import nn

import pyablate as pa
from pyablate.analysis.shrinkage import shrunken_drop
from pyablate.results.measures import Measure

pytest.importorskip("torch_pruning")

SAMPLE = pa.demo.images(2)[0]
RESIDUAL = [  # which outputs of the shipped residual network are sums of one another
    ("stem.2", "stage1.0.relu2", "stage1.1.relu2"),
    ("stage2.0.relu2", "stage2.1.relu2"),
    ("stage3.0.relu2", "stage3.1.relu2"),
]


def labels(layer: str, count: int) -> list[str]:
    return [f"{layer}:{unit}" for unit in range(count)]


def test_sums_of_a_residual_network_hang_together():
    found = pa.couplings(pa.demo.network("resnet"), SAMPLE)
    together = {one.layers for one in found if len(one.units) > 1}
    assert together == set(RESIDUAL)
    for one in found:
        assert len({unit.rpartition(":")[2] for unit in one.units}) == 1
        assert not one.obstacle
    assert len(found) == 16 + 32 + 64 + 2 * (16 + 32 + 64)


def test_without_sums_every_unit_is_alone_also_before_flattening():
    found = pa.couplings(pa.demo.network("alexnet_dropout"), SAMPLE)
    assert {len(one.units) for one in found} == {1}
    assert {one.obstacle for one in found} == {""}
    assert len(found) == 24 + 48 + 64 + 64 + 48 + 256 + 256


def test_depthwise_gate_and_linear_bottleneck():
    found = pa.couplings(made(Mobile), images())
    assert {one.layers for one in found} == {
        *((f"blocks.{i}.expand.2", f"blocks.{i}.depthwise.2", f"blocks.{i}.gate.4") for i in "012"),
        *((f"blocks.{i}.gate.2",) for i in "012"),
        ("blocks.0.project.1", "blocks.1"),  # no activation behind it, but it is read
        ("blocks.2.project.1",),
    }


def test_joined_channels_are_followed_to_each_reader():
    found = pa.couplings(made(Dense), images())
    assert [one.units for one in found] == [
        *((f"norms.0:{i}", f"norms.1:{i}", f"last:{i}") for i in range(4)),
        *((f"norms.1:{i}", f"last:{i}") for i in range(4, 7)),
        *((f"last:{i}",) for i in range(7, 10)),
    ]


def test_what_cannot_be_removed_is_marked_and_never_goes():
    model = made(Grouped)
    ranking = pa.rank(model, images(), "random")
    table = ranking.to_dataframe().set_index("layer")
    assert set(table.loc["first.1", "note"]) == {"a convolution in groups makes or reads it"}
    assert set(table.loc["grouped.1", "note"]) == {"a convolution in groups makes or reads it"}
    assert set(table.loc["free.1", "note"]) == {""}
    assert set(table.loc["classes.1", "note"]) == {"its channels are the classes"}
    going = {one.layers for one in ranking.first(1.0)}
    assert going == {("free.1",)}
    assert len(ranking.first(1.0)) == 5  # of 6: one stays


def test_order_follows_the_scores():
    model = pa.demo.network("vgg_bn")
    own = dict(zip(labels("features.2", 32), np.random.default_rng(0).random(32), strict=True))
    ranking = pa.rank(model, SAMPLE, own, layers="features.2")
    assert [one.label for one in ranking.order] == sorted(own, key=own.__getitem__)
    assert ranking.scores.tolist() == sorted(own.values())
    down = pa.rank(model, SAMPLE, pd.Series(own), layers="features.2", highest_first=True)
    assert [one.label for one in down.order] == [one.label for one in ranking.order][::-1]
    assert ranking.units(0.25) == tuple(one.label for one in ranking.order[:8])
    assert len(ranking.first(1.0)) == 31
    assert set(ranking.units(0.25)) < set(ranking.units(0.5))


def test_layer_scope_takes_the_same_share_of_each_layer():
    model = pa.demo.network("vgg_bn")
    sizes = {"features.2": 32, "features.6": 64, "features.16": 128}
    own = {label: 0.0 for layer, count in sizes.items() for label in labels(layer, count)}
    for i, label in enumerate(own):
        own[label] = float(i)  # all of the first layer below all of the second
    one_scale = pa.rank(model, SAMPLE, own, layers=list(sizes))
    assert {one.layers for one in one_scale.first(0.1)} == {("features.2",)}
    shares = pa.rank(model, SAMPLE, own, layers=list(sizes), scope="layer")
    gone = pd.Series([one.layers[0] for one in shares.first(0.25)]).value_counts()
    assert gone.to_dict() == {layer: count // 4 for layer, count in sizes.items()}


@pytest.mark.parametrize(("combine", "expected"), [("max", 3.0), ("mean", 2.0), ("sum", 6.0)])
def test_scores_of_what_hangs_together_are_combined(combine, expected):
    model = pa.demo.network("resnet")
    own = {
        label: score
        for layer, score in zip(RESIDUAL[0], (1.0, 3.0, 2.0), strict=True)
        for label in labels(layer, 16)
    }
    ranking = pa.rank(model, SAMPLE, own, layers="stem.2", combine=combine)
    assert set(ranking.scores) == {expected}


def test_a_group_that_was_measured_goes_before_its_parts():
    model, images, classes = pa.demo.load("resnet", limit=60)
    found = pa.couplings(model, SAMPLE, layers="stem.2")
    groups = [one.units for one in found]
    result = pa.ablate(model, (images, classes), layers=["stem.2"], groups=groups, audit=0)
    ranking = pa.rank(model, SAMPLE, result, column="max_class_drop", layers="stem.2")
    by_label = dict(zip(result.units["label"], result.max_class_drop, strict=True))
    assert [by_label[one.label] for one in ranking.order] == ranking.scores.tolist()
    assert all(len(one.units) == 3 for one in ranking.order)
    # Of the single units only those of the stem were ablated: that is no test of the whole.
    alone = pa.ablate(model, (images, classes), layers=["stem.2"], audit=0)
    with pytest.raises(ValueError, match="not tested: no score of stage1"):
        pa.rank(model, SAMPLE, alone, layers="stem.2")


def test_untested_units_come_last_and_stay():
    model = pa.demo.network("vgg_bn")
    own = dict.fromkeys(labels("features.2", 32), 1.0)
    own["features.2:5"], own["features.2:6"] = np.nan, np.inf
    del own["features.2:7"]
    ranking = pa.rank(model, SAMPLE, own, layers="features.2")
    assert [one.label for one in ranking.order[-3:]] == [f"features.2:{i}" for i in (5, 6, 7)]
    assert all(note.startswith("not tested") for note in ranking.notes[-3:])
    assert not {"features.2:5", "features.2:6", "features.2:7"} & set(ranking.units(1.0))
    assert len(ranking.first(1.0)) == 29


def test_a_channel_may_be_scored_under_the_name_of_its_convolution():
    model = pa.demo.network("vgg_bn")
    norms = model.get_submodule("features.0").weight.detach().abs().sum((1, 2, 3)).numpy()
    table = pd.DataFrame({"l1_norm": norms}, index=labels("features.0", 32))
    ranking = pa.rank(model, SAMPLE, table, layers="features.2")
    assert ranking.name == "l1_norm"
    order = [f"features.2:{unit}" for unit in np.argsort(norms, kind="stable")]
    assert [one.label for one in ranking.order] == order
    same = pa.rank(model, SAMPLE, table.to_xarray().rename(index="unit"), layers="features.2")
    assert [one.label for one in same.order] == order


def test_random_depends_on_the_seed_only():
    model = pa.demo.network("resnet")
    first, again, other = (pa.rank(model, SAMPLE, "random", seed=seed) for seed in (0, 0, 1))
    assert first.order == again.order
    assert first.order != other.order
    assert set(first.order) == set(other.order)


def test_the_model_is_left_alone():
    model = made(Mobile).train()
    next(model.parameters()).requires_grad_(False)
    before = state_of(model)
    pa.rank(model, images(), "random")
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": "randon"}, ValueError, "scores: expected one of random"),
        ({"scores": {"features.3:0": 1.0, "features.22:0": 1.0}}, ValueError, "features.22"),
        ({"scores": {"features.2:99": 1.0}}, ValueError, "99"),
        ({"scores": {}}, ValueError, "no unit that could be ranked"),
        ({"scores": 3}, TypeError, "table"),
        ({"scope": "layers"}, ValueError, "nearest: layer"),
        ({"combine": "median"}, ValueError, "combine"),
        ({"layers": "features.222"}, ValueError, "features.22"),
        ({"seed": -1}, ValueError, "seed"),
        ({"sample": SAMPLE[0, 0, 0]}, TypeError, "sample"),
        ({"model": 3}, TypeError, "model"),
    ],
)
def test_bad_input(change, error, message):
    given = {"model": pa.demo.network("vgg_bn"), "sample": SAMPLE, "scores": "random"} | change
    with pytest.raises(error, match=message):
        pa.rank(given.pop("model"), given.pop("sample"), given.pop("scores"), **given)


def test_measured_change_of_the_loss():
    model, images, labels = pa.demo.load("vgg_bn", limit=40)
    result = pa.ablate(model, (images, labels), "features.16", measures=["loss"], audit=0)
    ranking = pa.rank(model, SAMPLE, result, column="loss_change", layers="features.16")
    with torch.no_grad():
        features = model.features(model.normalize(images))
        losses = []
        for unit in (None, *range(128)):
            left = features.clone()
            if unit is not None:
                left[:, unit] = 0
            logits = model.classifier(left.mean((2, 3)))
            losses.append(float(nn.functional.cross_entropy(logits, labels)))
    change = np.array(losses[1:]) - losses[0]
    units = [int(one.label.rpartition(":")[2]) for one in ranking.order]
    np.testing.assert_allclose(ranking.scores, change[units], atol=1e-5)
    assert np.all(np.diff(ranking.scores) >= 0)


def test_table_with_several_attributes_needs_a_name():
    table = pd.DataFrame({"a": [1.0], "b": [2.0]}, index=["features.2:0"])
    model = pa.demo.network("vgg_bn")
    with pytest.raises(ValueError, match="column: expected one of a, b"):
        pa.rank(model, SAMPLE, table)
    assert pa.rank(model, SAMPLE, table, column="b").scores[0] == 2.0


def test_missing_torch_pruning_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'pyablate\[compression\]'"):
        pa.rank(pa.demo.network("vgg_bn"), SAMPLE, "random")


def test_units_along_an_axis_of_ones_own_are_refused():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(5, 3)).eval()
    data = torch.randn(12, 1, 8, 8), torch.arange(12) % 3
    options = {"layers": ["1", "3"], "audit": 0, "progress": False}
    for axis in ({"1": 2}, {"3": -1}):  # as many rows as channels in the first
        result = pa.ablate(model, data, axis=axis, **options)
        with pytest.raises(ValueError, match=r"scores: the units of '[13]' lie along axis [23], "):
            pa.rank(model, data[0], result)
    same = pa.ablate(model, data, axis={"1": 1}, **options)
    assert same.given_axes == {"1": 1}
    own = pa.rank(model, data[0], pa.ablate(model, data, **options))
    assert pa.rank(model, data[0], same).units(0.5) == own.units(0.5)


def test_a_ranking_by_a_screened_run_keeps_its_certificate(monkeypatch):
    careless_thresholds(monkeypatch, 0.1)
    model, data = layers_case(400)
    options = {"audit": 0, "progress": False}
    exact = pa.ablate(model, data, "act", **options)
    screened = pa.ablate(model, data, "act", **options, guarantee="screened")
    sample = data[0][:2]
    ranking = pa.rank(model, sample, screened, layers="act")
    assert ranking.screening == screened.screening
    assert ranking.within(("act",)).screening == screened.screening
    assert repr(ranking).endswith("12 may be removed, by a screened run)")
    assert pa.rank(model, sample, exact, layers="act").screening is None
    assert ranking.shuffled(0).screening is None
    with pytest.raises(ValueError, match="guarantee: expected 'exact', since nothing is ablated"):
        pa.rank(model, sample, screened, guarantee="screened")


def of_features(rates: np.ndarray, gain: np.ndarray | float) -> pa.AblationResult:
    """A result on 200 images made up for the first layer of a shipped network."""
    return simulate(rates, gain, 100, np.random.default_rng(0), ["features.1"] * 24)


def test_drops_that_are_mostly_chance_are_told(caplog):
    model = pa.demo.network("alexnet")
    harmless, harmful = np.full((24, 2), 0.05), np.full((24, 2), 0.6)
    options = {"layers": "features.1"}
    coarse = of_features(harmless, 0.05)
    with caplog.at_level("INFO", "pyablate"):
        recorded = replace(coarse, measures={"loss": Measure(np.arange(48.0).reshape(24, 2))})
        for result in (coarse, recorded):
            ranking = pa.rank(model, SAMPLE, result, **options)
            assert ranking.name == "shrunken_drop"
            assert ranking.scores.tolist() == sorted(shrunken_drop(coarse).tolist())
        said = caplog.text
        assert "rank: the accuracy drops of 24 of 24 units cannot be told from 0 on 200" in said
        assert {record.levelname for record in caplog.records} == {"INFO"}
        by_loss = pa.rank(model, SAMPLE, recorded, column="loss_change", **options)
        assert [one.label for one in by_loss.order] == labels("features.1", 24)
        caplog.clear()
        # What is asked for is done, and the other columns are nobody's business.
        assert pa.rank(model, SAMPLE, recorded, column="accuracy_drop", **options).name == (
            "accuracy_drop"
        )
        assert {record.levelname for record in caplog.records} == {"WARNING"}
        caplog.clear()
        resolved = replace(of_features(harmful, 0.0), measures=recorded.measures)
        assert pa.rank(model, SAMPLE, resolved, **options).name == "accuracy_drop"
        assert not caplog.records
