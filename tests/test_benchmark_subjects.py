"""What the benchmarks measure is what they say: cuts of networks, drawn networks, floors."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


class NormAndActivation(nn.BatchNorm2d):
    """A batch norm with more to do, as timm has them."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class Net(nn.Module):
    """One activation twice, a shortcut around it, a scale that does not depend on the images."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = NormAndActivation(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.act = nn.ReLU()
        self.gamma = nn.Parameter(torch.rand(6))
        self.fc = nn.Linear(6, 5)
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        y = self.act(self.bn2(self.conv2(x))) * self.gamma.reshape(1, -1, 1, 1)
        return self.fc(self.act(y + x).mean((2, 3)))


@pytest.mark.parametrize(
    ("layer", "kept"), [("conv1", 1), ("bn1.act", 1), ("act@1", 2), ("act", 2), ("act@2", 1)]
)
@torch.no_grad()
def test_a_cut_network_answers_as_the_whole_one(load, layer, kept):
    torch.manual_seed(0)
    model, images = Net().eval(), torch.randn(4, 3, 8, 8)
    expected = model(images)
    parts = load("subjects").cut(model, layer)
    tensors = parts.prefix(images)
    assert len(tensors) == kept
    torch.testing.assert_close(parts.suffix(*tensors), expected)
    if layer != "conv1":  # its output holds the batch norm as well, once that is folded
        name, _, call = layer.partition("@")
        calls = []

        def silence(_module, _inputs, output):
            calls.append(output)
            if len(calls) == int(call or 1):
                output[:, 2] = 0

        with_hook = model.get_submodule(name).register_forward_hook(silence)
        silenced = model(images)
        with_hook.remove()
        assert not torch.allclose(silenced, expected)
        tensors[0][:, 2] = 0
        torch.testing.assert_close(parts.suffix(*tensors), silenced)


@pytest.mark.parametrize("layer", ["act@3", "nothing", "bn3"])
def test_a_layer_that_is_not_called(load, layer):
    with pytest.raises(ValueError, match=f"layer: expected a module .* got '{layer}'"):
        load("subjects").cut(Net(), layer)


def test_some_units_of_the_last_axis(load):
    model = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(12, 3)).eval()
    images = torch.randn(6, 4, 3)
    cut = load("subjects").cut(model, "0")
    rival = load("rivals").Cached(cut, images, "0", axis=2, asked=[0, 2], compiling=False)
    assert (rival.units, rival.total) == ([0, 2], 2)
    found = rival._predict([images.clone()], lambda logits: logits.argmax(-1))
    for row, unit in enumerate(rival.units):
        silenced = images.index_fill(2, torch.tensor([unit]), 0)
        assert torch.equal(found[row], model(silenced).argmax(-1))


def test_units_of_the_hook_loop_are_among_those_of_a_whole_network(load):
    spread = load("rivals").spread
    for units in load("bench_imagenet").UNITS_OF_ALL.values():
        for count in (3904, 22720, 306, 307, 9200, 11520):
            assert set(spread(count, 6)) <= set(spread(count, units))


def test_a_drawn_network_tells_its_images_apart(load, monkeypatch):
    networks = load("timm_networks")
    monkeypatch.setattr(
        networks, "_imported", lambda: SimpleNamespace(create_model=lambda _: Net())
    )
    monkeypatch.setitem(networks.CERTAINTY, "resnet18", 50.0)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    model = networks.random_classifier("resnet18", images)
    assert torch.equal(torch.get_rng_state(), state)
    assert model(images).argmax(1).tolist() == [0, 1, 2, 3]
    assert not any(module.training for module in model.modules())
    gamma = model.gamma.detach()
    assert 0.1 <= gamma.min() <= gamma.max() <= 0.5
    statistics = model.conv1(images).detach().mean((0, 2, 3))
    torch.testing.assert_close(model.bn1.running_mean, statistics)
    again = networks.random_classifier("resnet18", images)
    assert torch.equal(again(images), model(images))


def test_timm_is_imported_without_torchvision(load, monkeypatch, tmp_path):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text(
        "import torchvision.transforms as transforms\n"
        "from torchvision.datasets import ImageFolder\n"
        "from torchvision.ops.misc import FrozenBatchNorm2d\n"
        "from torchvision.transforms.functional import InterpolationMode\n"
        "modes = {InterpolationMode.BICUBIC: 'bicubic'}\n"
        "class Own(transforms.RandomResizedCrop): pass\n"
        "frozen = isinstance(1, FrozenBatchNorm2d)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    there = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "torchvision", there)
    timm = load("timm_networks")._imported()
    assert timm.frozen is False
    assert sys.modules["torchvision"] is there
    assert "torchvision.ops.misc" not in sys.modules
    monkeypatch.delitem(sys.modules, "timm")


def test_a_floor_is_the_longer_of_arithmetic_and_bytes(load):
    rows = {"layer": ["a", "b"], "gflop": [30.0, 10.0], "gbyte": [1.0, 8.0]}
    table = pd.DataFrame(rows | {"live": [0.5, 1.0], "pairs": [300, 100]})
    peaks = SimpleNamespace(bandwidth=4e9)
    plan = SimpleNamespace(table=table, images=10, gflops=20.0, peaks=peaks)
    floor = load("measure").floor
    of_a = floor(plan, 20, ["a"])
    assert (of_a["gflop"], of_a["gbyte"], of_a["live"]) == (60.0, 2.0, 0.5)
    assert of_a["floor_seconds"] == 3.0
    assert floor(plan, 10, ["b"])["floor_seconds"] == 2.0
    both = floor(plan, 10)
    assert (both["live"], both["floor_seconds"]) == (0.625, 2.25)
    case = {"images": 10, "units": 40, "units_in_all": 1000, "seconds": [9.0], **both}
    cells = load("table")
    assert cells._floor(case) == "2.25 s, 25%: 160 MFLOP, 3.6e+04 kB a pair"
    assert cells._units(case) == "40 of 1,000"
    assert cells._floor({"units": 40}) == ""
