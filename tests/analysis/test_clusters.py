"""Clusters of units and images: planted groups come back, distances as scipy has them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster import hierarchy
from scipy.spatial import distance
from support.simulated import from_predictions, simulate

import pyablate as pa
from pyablate.analysis import clusters


@pytest.fixture(scope="module")
def planted() -> pa.AblationResult:
    """Units 0-9 hurt class 0, 10-14 classes 1 and 2, 15-17 class 3, 18 and 19 nothing."""
    loss = np.zeros((20, 5))
    loss[:10, 0] = np.linspace(0.3, 0.9, 10)
    loss[10:15, 1:3] = 0.7
    loss[15:18, 3] = 0.5
    layers = ["one"] * 10 + ["two"] * 10
    return simulate(loss, 0.0, 40, np.random.default_rng(0), layers)


def test_units_of_one_profile_are_one_cluster(planted):
    found = pa.cluster_units(planted, clusters=3)
    expected = [0] * 10 + [1] * 5 + [2] * 3 + [-1] * 2
    assert found["cluster"].to_numpy().tolist() == expected
    assert found["size"].to_numpy().tolist() == [10, 5, 3]
    drops = planted.class_accuracy_drop
    np.testing.assert_allclose(found["mean_drop"][1], drops[10:15].mean(axis=0))
    places = found["position"].to_numpy()
    assert sorted(places[:18]) == list(range(18))
    assert (places[18:] == -1).all()
    for k in range(3):  # neighbours in the tree lie side by side
        assert np.ptp(np.sort(places[np.array(expected) == k])) == found["size"][k] - 1


@pytest.mark.parametrize("metric", clusters.METRICS)
@pytest.mark.parametrize("method", clusters.METHODS)
def test_tree_of_units_is_scipys(metric, method):
    loss = np.random.default_rng(1).random((12, 4))
    result = simulate(loss, 0.1, 30, np.random.default_rng(2))
    found = pa.cluster_units(result, clusters=4, metric=metric, method=method)
    tree = hierarchy.linkage(distance.pdist(result.class_accuracy_drop, metric), method)
    np.testing.assert_allclose(found["linkage"], tree)
    cut = hierarchy.fcluster(tree, 4, criterion="maxclust")
    label = found["cluster"].to_numpy()
    np.testing.assert_array_equal(label[:, None] == label, cut[:, None] == cut)
    assert (np.diff(found["size"]) <= 0).all()


def test_images_that_the_same_units_break_are_one_cluster(planted):
    found = pa.cluster_images(planted, clusters=4)
    label = found["cluster"].to_numpy()
    broken = (planted.predictions() != planted.labels) & (planted.baseline == planted.labels)
    np.testing.assert_array_equal(label >= 0, broken.any(axis=0))
    assert broken.any(axis=0).sum() > 50
    # No unit breaks images of class 0 and of another.
    of_zero = planted.labels == 0
    assert not set(label[of_zero & (label >= 0)]) & set(label[~of_zero & (label >= 0)])
    for k in range(len(found["size"])):
        np.testing.assert_allclose(found["broken"][k], broken[:, label == k].mean(axis=1))
    np.testing.assert_array_equal(found["label"], planted.labels)


def test_tree_of_images_is_scipys(monkeypatch):
    monkeypatch.setattr(clusters, "DISTANCE_ROWS", 7)
    result = simulate(np.full((9, 2), 0.4), 0.4, 30, np.random.default_rng(3))
    found = pa.cluster_images(result, fewest=2, method="complete")
    broken = (result.predictions() != result.labels) & (result.baseline == result.labels)
    inside = broken.sum(axis=0) >= 2
    np.testing.assert_array_equal(found["cluster"] >= 0, inside)
    pairs = distance.pdist(broken.T[inside], "jaccard")
    np.testing.assert_allclose(
        clusters._jaccard(clusters._breaks(result, np.arange(9))[inside]), pairs
    )
    np.testing.assert_allclose(found["linkage"], hierarchy.linkage(pairs, "complete"))


def test_one_layer_alone(planted):
    found = pa.cluster_units(planted, layer="two", clusters=2)
    assert list(found["unit"].to_numpy()) == [f"two:{unit}" for unit in range(10)]
    assert found["cluster"].to_numpy().tolist() == [0] * 5 + [1] * 3 + [-1] * 2
    images = pa.cluster_images(planted, layer="two")
    assert images.sizes["unit"] == 10
    assert (images["cluster"].to_numpy()[planted.labels == 0] == -1).all()


def test_nothing_or_one_thing_to_cluster():
    labels = np.zeros(4, dtype=np.int64)
    predictions = np.array([[0, 0, 0, 1], [0, 0, 0, 0]])
    one = from_predictions(predictions, labels, labels, 2)
    assert pa.cluster_units(one)["cluster"].to_numpy().tolist() == [0, -1]
    assert pa.cluster_images(one)["cluster"].to_numpy().tolist() == [-1, -1, -1, 0]
    none = from_predictions(predictions[1:], labels, labels, 2)
    assert pa.cluster_units(none)["size"].size == 0
    assert pa.cluster_images(none)["broken"].shape == (0, 1)
    assert pa.cluster_units(one, fewest=2)["size"].size == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: pa.cluster_units(r, clusters=0), r"clusters: expected at least 1, got 0"),
        (lambda r: pa.cluster_images(r, fewest=0), r"fewest: expected at least 1, got 0"),
        (lambda r: pa.cluster_units(r, layer="on"), r"layer: .*no layer 'on'; nearest: one"),
        (lambda r: pa.cluster_units(r, metric="cosin"), r"metric: .*'cosin'; nearest: cosine"),
        (lambda r: pa.cluster_images(r, method="ward"), r"method: .*got 'ward'"),
    ],
)
def test_bad_input(planted, call, message):
    with pytest.raises(ValueError, match=message):
        call(planted)


def test_too_many_to_cluster(planted, monkeypatch):
    monkeypatch.setattr(clusters, "_MOST", 17)
    with pytest.raises(ValueError, match=r"units: 18 would need too much memory, at most 17"):
        pa.cluster_units(planted)
