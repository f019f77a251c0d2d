"""Two networks compared: every figure against a slow formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from support.simulated import simulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyablate as pa
from pyablate.comparison.evaluation import Evaluation
from pyablate.compression import importance_preserved, surviving


class Table(nn.Module):
    """Logits by image number: the image says which row of a table is its."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("table", torch.from_numpy(logits).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.table[x[:, 0].round().long()].to(x.dtype)


@pytest.fixture(scope="module")
def case() -> tuple[np.ndarray, np.ndarray, np.ndarray, pa.Comparison]:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 400)
    first = random.normal(size=(400, 4)) + 2 * np.eye(4)[labels]
    second = first + random.normal(size=(400, 4)) * np.array([0.2, 3.0, 0.2, 0.2])
    numbers = torch.arange(400.0)[:, None]
    found = pa.compare(
        Table(first), Table(second), (numbers, torch.from_numpy(labels)), class_names=list("abcd")
    )
    return first, second, labels, found


def test_both_networks_see_a_shuffling_loader_in_the_same_order(case, caplog):
    first, second, labels, found = case
    pairs = TensorDataset(torch.arange(400.0)[:, None], torch.from_numpy(labels))
    shuffled = pa.compare(Table(first), Table(second), DataLoader(pairs, 50, shuffle=True))
    assert len(shuffled.differing) == len(found.differing)
    assert shuffled.summary()["p"] == found.summary()["p"]
    assert "shuffles" in caplog.text


def test_classes_against_slow_formulas(case):
    first, second, labels, found = case
    table = found.classes().set_index("class")
    before, after = first.argmax(1), second.argmax(1)
    overall = (before == labels).mean() - (after == labels).mean()
    ps = []
    for k, name in enumerate("abc"):
        mine = labels == k
        lost = int((mine & (before == labels) & (after != labels)).sum())
        gained = int((mine & (before != labels) & (after == labels)).sum())
        drop = (before[mine] == k).mean() - (after[mine] == k).mean()
        ps.append(stats.binomtest(lost, lost + gained, 0.5).pvalue)
        row = table.loc[name]
        assert (row["lost"], row["gained"], row["images"]) == (lost, gained, mine.sum())
        assert row["drop"] == pytest.approx(drop)
        assert row["excess"] == pytest.approx(drop - overall)
        assert row["p"] == pytest.approx(ps[-1])
    assert table["q"][:3].tolist() == pytest.approx(stats.false_discovery_control(ps).tolist())
    assert table["significant"].tolist() == [*(table["q"][:3] <= 0.05), False]
    assert table["significant"].any()
    assert np.isnan(table.loc["d", "p"])  # a class without images is not tested


def test_images_on_which_they_differ(case):
    first, second, labels, found = case
    table = found.images()
    expected = [i for i in range(400) if first[i].argmax() != second[i].argmax()]
    assert table["image"].tolist() == expected
    assert table["label"].tolist() == ["abcd"[labels[i]] for i in expected]
    assert table["after"].tolist() == ["abcd"[second[i].argmax()] for i in expected]


def test_summary_against_slow_formulas(case):
    first, second, labels, found = case
    summary = found.summary()
    for name, logits in (("before", first), ("after", second)):
        probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        right = logits.argmax(1) == labels
        top = probability.max(1)
        error = 0.0
        for low in np.arange(15) / 15:
            inside = (top > low) & (top <= low + 1 / 15)
            if inside.any():
                error += inside.mean() * abs(right[inside].mean() - top[inside].mean())
        loss = -np.log(probability[np.arange(400), labels]).mean()
        assert summary[f"accuracy_{name}"] == pytest.approx(right.mean())
        assert summary[f"calibration_error_{name}"] == pytest.approx(error, rel=1e-4)
        assert summary[f"loss_{name}"] == pytest.approx(loss, rel=1e-4)
    lost, gained = found.lost.sum(), found.gained.sum()
    assert summary["p"] == pytest.approx(stats.binomtest(lost, lost + gained, 0.5).pvalue)
    assert summary["differing"] == len(found.differing) / 400


def test_a_perfectly_calibrated_network_has_no_error():
    labels, right = np.zeros(10, dtype=np.int64), np.arange(10) < 8
    found = Evaluation(labels, np.where(right, 0, 1), np.full(10, 0.8), np.zeros(10), 2)
    assert found.calibration_error() == pytest.approx(0.0)
    sure = Evaluation(labels, np.where(right, 0, 1), np.ones(10), np.zeros(10), 2)
    assert sure.calibration_error(1) == pytest.approx(0.2)


def test_a_network_equals_itself_and_is_left_alone():
    model, pictures, labels = pa.demo.load("alexnet", limit=60)
    model.train()
    found = pa.compare(model, model, (pictures, labels))
    assert len(found.differing) == 0
    assert found.p == 1.0
    assert found.class_accuracy_drop.tolist() == [0.0] * 10
    assert model.training
    assert not found.classes()["significant"].any()


def test_near_ties_are_decided_in_float64():
    class Cancelling(nn.Module):
        """The second logit is larger by 1e-6 of the logits: float32 cannot tell."""

        def forward(self, x: Tensor) -> Tensor:
            large = x[:, :1] * 1e4
            return torch.cat([large + 0.003, large + 0.004], 1)

    pictures = torch.linspace(1, 2, 50)[:, None]
    found = pa.compare(Cancelling(), Cancelling(), (pictures, torch.ones(50, dtype=torch.long)))
    assert found.before.accuracy == 1.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"smaller": nn.Sequential(nn.Flatten(), nn.Linear(784, 3))}, ValueError, "10 classes"),
        ({"smaller": "other"}, TypeError, "smaller"),
        ({"smaller": nn.Identity()}, TypeError, "smaller: expected logits"),
        ({"model": 3}, TypeError, "model"),
        ({"class_names": ["a"]}, ValueError, "class_names"),
        ({"fdr": 1.0}, ValueError, "fdr"),
        ({"bins": 0}, ValueError, "bins"),
    ],
)
def test_bad_input(change, error, message):
    model, pictures, _ = pa.demo.load("alexnet", limit=4)
    labels = torch.zeros(4, dtype=torch.long)
    given = {"model": model, "smaller": model, "data": (pictures, labels)} | change
    with pytest.raises(error, match=message):
        pa.compare(given.pop("model"), given.pop("smaller"), given.pop("data"), **given)


def test_what_a_network_raises_itself_comes_through():
    class Odd(ValueError):
        def __init__(self, what: str, where: str) -> None:
            super().__init__(f"{what} in {where}")

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise Odd("no such thing", "here")

    model, pictures, labels = pa.demo.load("alexnet", limit=4)
    with pytest.raises(Odd, match="no such thing in here"):
        pa.compare(model, Fails(), (pictures, labels))


def test_importance_preserved_against_spearman():
    random = np.random.default_rng(0)
    rates = random.random((12, 3)) * 0.5
    layers = ["one"] * 8 + ["two"] * 4
    before = simulate(rates, 0.1, 40, random, layers)
    after = simulate(rates[1:], 0.1, 40, random, layers[1:])  # unit 0 of the first layer is gone
    removed = ["one:0"]
    matching = surviving(before.units["label"].tolist(), removed)
    assert matching["one:3"] == "one:2"
    assert matching["two:3"] == "two:3"
    assert "one:0" not in matching
    table = importance_preserved(before, after, matching=matching).set_index("layer")
    expected = stats.spearmanr(before.accuracy_drop[1:8], after.accuracy_drop[:7]).statistic
    assert table.loc["one", "spearman"] == pytest.approx(expected)
    assert table["units"].tolist() == [7, 4]
    profile = stats.spearmanr(
        before.class_accuracy_drop[:8].mean(0), after.class_accuracy_drop[:7].mean(0)
    ).statistic
    assert table.loc["one", "profile"] == pytest.approx(profile)
    unmatched = importance_preserved(before, after).set_index("layer")
    assert unmatched["units"].tolist() == [0, 4]
    assert np.isnan(unmatched.loc["one", "spearman"])
    same = importance_preserved(before, before, measure="max_class_drop")
    assert same["spearman"].tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="measure"):
        importance_preserved(before, after, measure="loss")
    with pytest.raises(ValueError, match="matching"):
        importance_preserved(before, after, matching={"one:0": "one:99"})
