"""Linear layers of the dense part: columns that stand still, and what all logits share."""

import pytest
import torch
from support import networks
from support.oracle import check
from torch import nn
from torch.nn import functional

from pyablate.engine import weighted_rules

pytestmark = pytest.mark.usefixtures("exports_kept")

_, IMAGES, LABELS = networks.network("residual")


def perceptron(wide=96, classes=7, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(12, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(wide, classes)).eval()
    model.known_as = "perceptron"
    return model


def data(images=9, classes=7):
    return torch.randn(images, 12), torch.arange(images) % classes


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32"])
def test_only_columns_that_change_are_multiplied(monkeypatch, precision):
    """The same predictions, from fewer columns than there are."""
    monkeypatch.setattr(weighted_rules, "WORTH_GATHERING", 1)
    monkeypatch.setattr(weighted_rules, "LEAST_RUN", 1)
    widths = []
    inner = weighted_rules._active_columns

    def spy(change, rows):
        widths.append(int((change != 0).any(dim=0).sum()) / len(rows))
        return inner(change, rows)

    monkeypatch.setattr(weighted_rules, "_active_columns", spy)
    check(perceptron(), data(), ["1"], precision=precision)
    assert widths
    assert min(widths) < weighted_rules.MOST_ACTIVE


@pytest.mark.parametrize("most", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_active_columns_are_a_matrix_product(monkeypatch, most, dtype):
    """Whether columns are left out or not, NaN and infinity among them included."""
    monkeypatch.setattr(weighted_rules, "MOST_ACTIVE", most)
    torch.manual_seed(0)
    change = torch.randint(-3, 4, (5, 40)).to(dtype)  # small integers: sums are exact
    change[:, ::3] = 0
    rows = torch.randint(-3, 4, (40, 6)).to(dtype)
    assert torch.equal(weighted_rules._active_columns(change, rows), change @ rows)
    change[2, 4] = torch.nan
    found = weighted_rules._active_columns(change, rows)
    assert found[2].isnan().all()
    assert found[[0, 1, 3, 4]].isfinite().all()
    assert not weighted_rules._active_columns(torch.zeros_like(change), rows).any()


def test_runs_are_the_images_in_turn():
    """Nothing to split where images come with too few pairs, or the layer is small."""

    class Pairs:
        image = torch.tensor([0, 0, 0, 2, 2, 5], dtype=torch.int32)

    change, small = torch.zeros(6, 4), torch.zeros(2, 4)
    assert weighted_rules._runs(Pairs, change, small) is None
    large = torch.zeros(1).expand(weighted_rules.WORTH_GATHERING, 1)
    assert weighted_rules._runs(Pairs, change, large) is None

    class Long(Pairs):
        image = Pairs.image.repeat_interleave(weighted_rules.LEAST_RUN)

    expected = [
        3 * weighted_rules.LEAST_RUN,
        2 * weighted_rules.LEAST_RUN,
        weighted_rules.LEAST_RUN,
    ]
    assert weighted_rules._runs(Long, torch.zeros(len(Long.image), 4), large) == expected


def test_what_all_logits_share_costs_no_digits():
    """A part that all classes have in common is far larger than what tells them apart."""
    model = perceptron()
    with torch.no_grad():
        model[4].weight += 40 * torch.randn(1, 96)
    result = check(model, data(40), ["1", "3"], precision="bf16")
    settled = result.effort.pairs_by_precision
    assert settled["bfloat16"] > 0.8 * sum(settled.values())


class Flattened(nn.Module):
    """One linear layer, read by a site of maps and by a site of single numbers."""

    def __init__(self):
        super().__init__()
        self.conv, self.maps, self.numbers = nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.ReLU()
        self.hidden, self.head = nn.Linear(8 * 16, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = functional.max_pool2d(self.maps(self.conv(x)), 3)
        return self.head(functional.relu(self.hidden(self.numbers(x.flatten(1)))))


def test_one_linear_layer_behind_maps_and_behind_numbers():
    check(networks.made(Flattened(), IMAGES), (IMAGES, LABELS), ["maps", "numbers"])


class Body(nn.Module):
    """What ``body`` makes of the first layer's units, read by a linear layer."""

    def __init__(self, body):
        super().__init__()
        self.body, self.known_as = body, body.__name__
        self.first, self.relu = nn.Conv2d(2, 16, 3, padding=1), nn.ReLU()
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.square, self.other = nn.Linear(16, 16), nn.Linear(16, 5)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.body(self, self.relu(self.first(x)))


def rows_per_image(net, x):
    """Every position is a row of its own."""
    y = functional.relu(net.second(x)).permute(0, 2, 3, 1).reshape(-1, 16)
    return net.head(functional.relu(net.square(y)).view(x.shape[0], -1, 16).mean(1))


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_a_linear_layer_on_several_rows_of_each_image(monkeypatch, precision):
    monkeypatch.setattr(weighted_rules, "WORTH_GATHERING", 1)
    monkeypatch.setattr(weighted_rules, "LEAST_RUN", 1)
    result = check(
        networks.made(Body(rows_per_image), IMAGES),
        (IMAGES[:8], LABELS[:8]),
        "relu",
        precision=precision,
    )
    assert result.strategy == {"relu": "delta"}


def bias_behind_the_dense_part(net, x):
    y = functional.relu(net.second(x)).mean((2, 3))
    return functional.linear(y, net.other.weight, net.head(y))


def bias_on_its_channel(net, x):
    """All that is left is the last layer, but not by the closed form."""
    y = x.mean((2, 3))
    return functional.linear(y, net.square.weight, y)


@pytest.mark.parametrize("body", [bias_behind_the_dense_part, bias_on_its_channel])
@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_a_bias_that_changes_with_the_image(body, precision):
    torch.manual_seed(0)
    model = Body(body).eval()
    networks.randomise(model, seed=1)
    if body is bias_behind_the_dense_part:
        networks.spread_logits(model, IMAGES)
    result = check(model, (IMAGES, LABELS), "relu", precision=precision)
    assert result.strategy == {"relu": "delta"}
