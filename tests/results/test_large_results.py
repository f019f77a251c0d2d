"""A hundredth of a large result: what is computed from it is right and takes little memory."""

from __future__ import annotations

import importlib.util
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse, stats
from scipy.spatial import distance
from support.report_pages import data_of

import pyablate as pa
from pyablate.analysis import clusters, statistics
from pyablate.report.numbers import MOST_MOVES

_SPEC = importlib.util.spec_from_file_location(
    "made_up", Path(__file__).parents[2] / "benchmarks" / "made_up.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
made_up = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(made_up)

UNITS, IMAGES, CLASSES, SHARE = 2_656, 5_000, 100, 0.01
ALLOWED = (2 << 30) // 100
"""Bytes: of 26,560 units x 50,000 images x 1,000 classes, 2 GiB."""

PAGE = 16 << 20
"""Bytes that a report takes however small it is: its scripts, several times."""

SOME = range(0, UNITS, 241)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "run.zarr"
    made_up.random_result(UNITS, IMAGES, CLASSES, SHARE).save(path)
    pa.load(path).significance()  # libraries are loaded once
    return path


def grew(work):
    tracemalloc.start()
    try:
        found = work()
        return found, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def hits(result, predicted):
    return [
        sum(p == t for p, t in zip(predicted, result.labels, strict=True) if t == k)
        for k in range(CLASSES)
    ]


CALLS = {
    "load": lambda result: result,
    "class_accuracy_drop": lambda result: result.class_accuracy_drop,
    "significance": lambda result: result.significance(),
    "to_dataframe": lambda result: result.to_dataframe(),
    "confusion": lambda result: result.confusion(7),
}


@pytest.mark.parametrize("call", CALLS)
def test_memory(stored, call):
    _, most = grew(lambda: CALLS[call](pa.load(stored)))
    assert most < ALLOWED


def test_answers(stored):
    result = pa.load(stored)
    assert len(result.flips.image) == pytest.approx(UNITS * IMAGES * SHARE, rel=0.05)
    table, tests = result.to_dataframe(), result.significance()
    before, sizes = hits(result, result.baseline), np.bincount(result.labels)
    for row in SOME:
        after = result.baseline.copy()
        run = range(result.flips.start[row], result.flips.start[row + 1])
        for entry in run:
            after[result.flips.image[entry]] = result.flips.prediction[entry]
        drop = (np.array(before) - hits(result, after)) / sizes
        np.testing.assert_array_equal(result.class_accuracy_drop[row], drop)
        np.testing.assert_array_equal(table.filter(like="drop: ").iloc[row], drop)
        right, stays = result.baseline == result.labels, after == result.labels
        for k in range(0, CLASSES, 33):
            mine = result.labels == k
            lost = int((mine & right & ~stays).sum())
            gained = int((mine & ~right & stays).sum())
            expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
            assert float(tests["p"][row, k]) == pytest.approx(expected)
        counts = np.zeros((CLASSES, CLASSES), dtype=int)
        for true, predicted in zip(result.labels, after, strict=True):
            counts[true, predicted] += 1
        np.testing.assert_array_equal(result.confusion(row), counts)


def test_a_report_by_blocks(stored, tmp_path, monkeypatch):
    result = pa.load(stored)
    _, most = grew(lambda: result.report(tmp_path / "whole.html"))
    assert most < ALLOWED + PAGE
    moves = data_of((tmp_path / "whole.html").read_text("ascii"))["moves"]
    for row in SOME:
        run = slice(result.flips.start[row], result.flips.start[row + 1])
        image = result.flips.image[run]
        kinds = set(
            zip(
                result.labels[image].tolist(),
                result.baseline[image].tolist(),
                result.flips.prediction[run].tolist(),
                strict=True,
            )
        )
        listed = slice(moves["start"][row], moves["start"][row + 1])
        columns = (moves[name][listed].tolist() for name in ("label", "before", "after"))
        assert set(zip(*columns, strict=True)) == kinds
        assert moves["total"][row] == len(kinds) < MOST_MOVES
    monkeypatch.setattr(statistics, "NUMBERS", 1 << 15)
    result.report(tmp_path / "parts.html")
    assert (tmp_path / "parts.html").read_bytes() == (tmp_path / "whole.html").read_bytes()


def test_distances_of_many_profiles(monkeypatch):
    profiles = np.random.default_rng(0).normal(size=(600, 7))
    monkeypatch.setattr(clusters, "_QUICK", 0)
    found = clusters.profile_distances(profiles, "cosine")
    np.testing.assert_allclose(found, distance.pdist(profiles, "cosine"), atol=1e-14)


def test_sparse_confusion():
    result = made_up.random_result(3, 2_000, 21_843, SHARE)
    found, most = grew(lambda: result.confusion(1))
    assert isinstance(found, sparse.csr_array)
    assert most < 4 << 20
    assert found.shape == (21_843, 21_843)
    after = result.predictions(1)[0]
    assert found.sum() == len(after)
    assert found.diagonal().sum() == (after == result.labels).sum()
    label, predicted = found.nonzero()
    assert set(zip(label, predicted, strict=True)) == set(zip(result.labels, after, strict=True))
    assert len(result.confusion()) == 3


@pytest.mark.parametrize("rows", [slice(None), [2, 0], "layer5:0"])
def test_a_confusion_is_sparse_where_asked(rows):
    result = made_up.random_result(16, 500, 9, 0.1)
    few, whole = result.confusion(rows, sparse=True), result.confusion(rows)
    assert isinstance(whole, np.ndarray)
    assert few[0].dtype == whole.dtype
    dense = few.toarray() if isinstance(rows, str) else [each.toarray() for each in few]
    np.testing.assert_array_equal(dense, whole)
    np.testing.assert_array_equal(result.confusion(rows, sparse=False), whole)
