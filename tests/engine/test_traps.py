"""Networks and data that are easily got wrong: tensors with several readers, mixed dtypes, ..."""

import numpy as np
import pytest
import torch
from support import networks
from support.clean import Clean
from support.oracle import check
from torch import nn
from torch.nn import functional

import pyablate as pa
from pyablate import reference
from pyablate.engine import int8_conv, precision_cascade, weighted_rules
from pyablate.engine.logit_change import Changed
from pyablate.engine.precision_cascade import PrecisionCascade

needs_eight_bits = pytest.mark.skipif(
    not int8_conv.available(), reason="this processor has no exact 8-bit products"
)


def images(count=24, size=12):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, size, size, generator=generator)
    return x, torch.randint(0, 5, (count,), generator=generator)


def spread(model):
    """Random weights whose logits tell the classes apart."""
    networks.randomise(model, seed=1)
    networks.spread_logits(model, images()[0])
    return model.eval()


class Shared(nn.Module):
    """A convolution, behind something that passes it on, is read twice."""

    def __init__(self, twice):
        super().__init__()
        self.twice = twice
        self.first, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()
        self.second, self.third, self.fourth = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(16, 5)

    def forward(self, x):
        x = functional.relu(self.second(self.relu(self.first(x))))
        y = self.drop(self.third(x))
        if self.twice == "sum":
            return self.head(functional.elu(y + y).mean((2, 3)))
        return self.head(functional.relu(self.fourth(functional.relu(y)) + y).mean((2, 3)))


@needs_eight_bits
@pytest.mark.parametrize("twice", ["branches", "sum"])
def test_a_convolution_read_twice_is_not_overwritten(twice, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(precision_cascade, "USELESS", 0.9)  # half of these pairs are close calls
    model, data = spread(Shared(twice)), images()
    result = pa.ablate(model, data, "relu", precision="int8", progress=False)
    assert reference.compare(result, model, data, "relu").mismatches == 0
    assert (
        result.effort.error_bounds["relu"]["int8"] < 0.6
    )  # garbage was off by more than the change
    assert result.effort.pairs_by_precision["int8"] > 100


class Flattened(nn.Module):
    """One linear layer, read by a site of maps and by a site of single numbers."""

    def __init__(self):
        super().__init__()
        self.conv, self.maps, self.numbers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ReLU()
        self.hidden, self.head = nn.Linear(8 * 16, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = functional.max_pool2d(self.maps(self.conv(x)), 3)
        return self.head(functional.relu(self.hidden(self.numbers(x.flatten(1)))))


def test_one_linear_layer_behind_maps_and_behind_numbers():
    check(spread(Flattened()), images(), ["maps", "numbers"])


class Half(nn.Module):
    """A network that computes a part of itself in float16."""

    def __init__(self, pooled):
        super().__init__()
        self.pooled = pooled
        self.first, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()
        self.second, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x):
        x = functional.relu(self.second(self.relu(self.first(x))).half())
        x = functional.max_pool2d(x, 2) if self.pooled else x
        return self.head(x.mean((2, 3)).to(self.head.weight.dtype))


@pytest.mark.parametrize("pooled", [False, True])
def test_a_part_in_float16(pooled):
    model, data = Half(pooled).eval(), images(8)
    result = pa.ablate(model, data, "relu", progress=False)
    assert result.audit.mismatches + result.audit.mended == 0
    assert result.strategy == {"relu": "replay"}


def test_a_change_that_is_not_a_number_hides_no_error():
    """One NaN among the measured pairs, and a rough tier that is wrong on all others."""
    row = torch.arange(120)

    def change(row, image, dtype):
        exact = torch.zeros(len(row), 2)
        exact[:, 1] = -0.5
        if dtype == torch.bfloat16:
            exact[:, 1] += 3.0
            exact[row == 0] = torch.nan
        return Changed(exact)

    cascade = PrecisionCascade([torch.bfloat16, torch.float32])
    found = cascade.classify(change, row, row % 3, Clean(), lambda _: 1000)
    assert cascade.tiers == [torch.float32]
    expected = (Clean.logits[row % 3] + change(row, row, torch.float32).logits).argmax(1)
    assert torch.equal(found.long(), expected)


def test_few_pairs_are_decided_in_full_precision_until_enough_are_measured():
    cascade = PrecisionCascade([torch.bfloat16, torch.float32])

    def change(row, image, dtype):
        return Changed(torch.stack([torch.zeros(len(row)), 0.3 * torch.sin(row.float())], dim=1))

    for start in range(0, 100, 10):
        row = torch.arange(start, start + 10)
        cascade.classify(change, row, row % 3, Clean(), lambda _: 1000)
        if start < 50:
            assert torch.bfloat16 not in cascade.classified
    assert cascade.measured == 100
    assert cascade.classified[torch.bfloat16] > 0


class Refilled:
    """A source that hands out the same memory again and again."""

    def __iter__(self):
        x, y = images(16)
        memory = np.empty((4, 3, 12, 12), np.float32)
        for start in range(0, 16, 4):
            memory[:] = x[start : start + 4].numpy()
            yield memory, y[start : start + 4].numpy()


@pytest.mark.parametrize("intervention", ["zero", "resample"])
def test_a_source_that_refills_its_memory(intervention):
    model = spread(Flattened())
    options = {"intervention": intervention, "audit": 0, "progress": False}
    expected = pa.ablate(model, images(16), "maps", **options)
    found = pa.ablate(model, Refilled(), "maps", **options)
    assert found.baseline.tolist() == expected.baseline.tolist()
    assert found.flips.image.tolist() == expected.flips.image.tolist()


def test_a_network_that_works_in_place_leaves_the_images_alone():
    class InPlace(Flattened):
        def forward(self, x):
            return super().forward(x.mul_(0.5))

    (x, y), before = images(8), images(8)[0]
    pa.ablate(InPlace().eval(), (x, y), "maps", audit=5, progress=False)
    assert torch.equal(x, before)


class AroundSum(nn.Module):
    """A first convolution, a shortcut that stands still or changes as well, and what reads both."""

    def __init__(self, order):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.relu = nn.ReLU()
        self.last = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Sequential(
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
        )
        self.order = order

    def forward(self, x):
        stem = self.stem(x)
        branch = self.conv(self.inner(stem))
        if self.order == "shortcut second":
            both = branch + stem
        elif self.order == "shortcut first":
            both = stem + branch
        elif self.order == "subtracted":
            both = stem - branch
        elif self.order == "twice":
            both = branch + branch
        else:
            both = branch + stem.mean(dim=(2, 3), keepdim=True)
        return self.head(self.last(self.relu(both)) + both)


@pytest.mark.parametrize(
    "order", ["shortcut second", "shortcut first", "subtracted", "twice", "broadcast"]
)
@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_sums_of_what_is_pending(order, precision):
    """Units of the stem change both summands, those of the branch one of them."""
    model = AroundSum(order).eval()
    torch.manual_seed(1)
    data = torch.randn(12, 1, 9, 9), torch.arange(12) % 5
    check(model, data, ["stem.1", "inner.1", "relu"], precision=precision)


class Body(nn.Module):
    """What ``body`` makes of the first layer's units, read by a linear layer."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.first, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()
        self.second, self.third = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
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
    result = check(spread(Body(rows_per_image)), images(8), "relu", precision=precision)
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
        networks.spread_logits(model, images()[0])
    result = check(model, images(), "relu", precision=precision)
    assert result.strategy == {"relu": "delta"}


def infinite_inside(net, x):
    """The logarithm of 0, which a bound brings back."""
    y = functional.relu(net.third(functional.relu(net.second(x))))
    return net.head(y.log().clamp(min=-3.0).mean((2, 3)))


def test_infinities_inside_the_intact_network():
    """They have no difference: such pairs are decided by the network itself."""
    check(spread(Body(infinite_inside)), images(8), "relu")


class HalfPart(nn.Module):
    """Averages in half precision, as networks trained that way do."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(1, 17, 3), nn.ReLU(), nn.Conv2d(17, 9, 3))
        self.head = nn.Linear(9, 5)
        self.dtype = dtype

    def forward(self, x):
        return self.head(self.stem(x).to(self.dtype).mean((2, 3)).to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_that_round_to_half_precision_run_by_replay(dtype, caplog):
    """The network rounds the average of what is left, not the average of a difference."""
    torch.manual_seed(1)
    data = torch.randn(10, 1, 9, 9), torch.arange(10) % 5
    result = check(HalfPart(dtype).eval(), data, ["stem.1"], ties=1.0)
    assert set(result.strategy.values()) == {"replay"}
    assert "half precision" in caplog.text
