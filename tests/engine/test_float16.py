"""float16, the low precision of GPUs, on a processor: the rules, what is too large or too small."""

import pytest
import torch
from support import networks
from support.oracle import check
from support.runs import measured_pairs
from torch import nn

import pyablate as pa
from pyablate.engine import pointwise, precision_cascade
from pyablate.runs import setup

pytestmark = pytest.mark.usefixtures("exports_kept")
measured = pytest.fixture(measured_pairs)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Let float16 be tried first; what processors have no kernels for is left to the reference."""
    monkeypatch.setattr(setup, "_low_precisions", lambda *_: (torch.float16,))
    monkeypatch.setattr(precision_cascade, "WORTHWHILE", 0)


def decided(result):
    return result.effort.pairs_by_precision.get("float16", 0)


def share(result, measured):
    """Share that float16 decided of the pairs that were not measured."""
    return decided(result) / (sum(result.effort.pairs_by_precision.values()) - sum(measured))


@pytest.mark.parametrize("name", [n for n, made in networks.ARCHITECTURES.items() if made.exports])
def test_every_architecture(name, measured):
    model, images, labels = networks.network(name)
    layers = list(networks.ARCHITECTURES[name].layers)
    result = check(model, (images, labels), layers, ties=0.05)
    assert share(result, measured) > 0.9


@pytest.mark.parametrize("name", ["vgg_bn", "resnet", "vit", "convnext"])
def test_it_decides_nearly_all_pairs_of_trained_networks(name, measured):
    model, images, labels = networks.demo(name, 24)
    layer = pa.select(pa.sites(model, images[:2]))[-2].name
    result = check(model, (images, labels), layer)
    assert share(result, measured) > 0.98


def scaled(factor):
    """Make a network whose changes are this large inside, and as usual at its end."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)),
    )
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(factor)
        for layer in (model[2], model[4]):
            layer.bias.mul_(factor)
        model[7].weight.div_(factor)
    images = torch.randn(40, 1, 9, 9)
    return model.eval(), images, model(images).argmax(1)


@pytest.mark.parametrize("factor", [1e-6, 1e-4, 1.0, 1e3, 1e6])
def test_numbers_beyond_its_range_are_left_to_others(factor, measured):
    model, images, labels = scaled(factor)
    result = check(model, (images, labels), ["1", "3"])
    assert (share(result, measured) > 0.9) == (factor in (1.0, 1e3))
    if factor in (1e-6, 1e-4, 1e6):
        assert decided(result) == 0


class Spread(nn.Module):
    """Changes of one unit are a million times as large as those of the others, or as small."""

    def __init__(self):
        super().__init__()
        self.net = scaled(1.0)[0]
        with torch.no_grad():
            self.net[0].weight[3] *= 1e6
            self.net[2].weight[:, 3] *= 1e-6
            self.net[0].weight[5] *= 1e-6
            self.net[2].weight[:, 5] *= 1e6

    def forward(self, x):
        return self.net(x)


def test_one_unit_beyond_the_range_spoils_no_other():
    model = Spread().eval()
    torch.manual_seed(1)
    images = torch.randn(60, 1, 9, 9)
    result = check(model, (images, model(images).argmax(1)), ["net.1", "net.3"])
    pairs = result.effort.pairs_by_precision
    assert 0.4 * sum(pairs.values()) < decided(result) < 0.95 * sum(pairs.values())


class Normed(nn.Module):
    """A root mean square, spelt out, of numbers whose squares float16 has no room for."""

    def __init__(self, size=400.0):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu, self.mix = nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3)
        self.head, self.size = nn.Linear(16, 5), size

    def forward(self, x):
        x = self.size * self.mix(self.relu(self.conv(x))).amax((2, 3))
        return self.head(x * torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("size", [1.0, 400.0, 4e4])
def test_what_is_divided_by_more_than_it_has_room_for(size):
    model = Normed(size).eval()
    torch.manual_seed(1)
    images = torch.randn(60, 1, 9, 9)
    check(model, (images, model(images).argmax(1)), ["relu"])


class TinyWeights(nn.Module):
    """Weights of one layer that float16 rounds to a digit or two."""

    def __init__(self):
        super().__init__()
        self.net, _, _ = scaled(1.0)
        with torch.no_grad():
            self.net[2].weight *= 1e-6
            self.net[2].bias *= 1e-6
            self.net[4].weight *= 1e6

    def forward(self, x):
        return self.net(x)


def test_weights_that_it_has_few_digits_for():
    model = TinyWeights().eval()
    torch.manual_seed(1)
    images = torch.randn(60, 1, 9, 9)
    result = check(model, (images, model(images).argmax(1)), ["net.1"])
    assert decided(result) == 0


def test_1x1_convolutions_as_products_of_matrices(monkeypatch):
    done = []
    real = pointwise.product
    monkeypatch.setattr(pointwise, "by_products", lambda device: True)
    monkeypatch.setattr(pointwise, "product", lambda *given: (done.append(1), real(*given))[1])
    model, images, labels = networks.network("inverted_residual")
    check(model, (images, labels), ["body.2", "body.7"])
    assert done
