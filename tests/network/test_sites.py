"""Which tensors hold units, what they are called, and how they are chosen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import networks
from support.state import state_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pyablate as pa
from pyablate.network.sites import Site, parse_label, select, sites

IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def found(name: str) -> list[Site]:
    model, images, _ = networks.network(name)
    return sites(model, images[:1])


def site(name: str, layer: str) -> Site:
    return next(each for each in found(name) if each.name == layer)


# What "*" selects, with the number of units: every activation and block output, in order.
EVERYTHING = {
    "residual": "body.2:8 body.3.relu1:8 body.3.relu2:8 body.4.relu1:12 body.4.relu2:12",
    "dense": (
        "body.1.relu:4 body.1:8 body.2.relu:8 body.2:12 body.4:12 body.7.relu:6 body.7:10 body.9:10"
    ),
    "inverted_residual": (
        "body.2:6 body.3.act1:12 body.3.act2:12 body.3.excite.relu:4 body.3.excite.gate:12 "
        "body.3.excite:12 body.3:6 body.4.act1:12 body.4.act2:12 body.4.excite.relu:4 "
        "body.4.excite.gate:12 body.4.excite:12 body.4:6 body.7:14"
    ),
    "inception": (
        "body.1:8 body.3.one.2:3 body.3.three.2:4 body.3.three.5:4 body.3.five.2:3 body.3.pool.3:2 "
        "body.3:12 body.4.one.2:3 body.4.three.2:4 body.4.three.5:4 body.4.five.2:3 "
        "body.4.pool.3:2 body.4:12"
    ),
    "shuffle": (
        "body.2:8 body.3.right.2:4 body.3.right.5:4 body.3:8 body.4.right.2:4 body.4.right.5:4 "
        "body.4:8 body.6:10"
    ),
    "convnext": "first.gelu:14 first:8 second.gelu:14 second:8",
    "global_context": "body.1:8 body.2.transform.2:6 body.2:8 body.4:10",
    "vit": "blocks.0.mlp.1:16 blocks.0:8 blocks.1.mlp.1:16 blocks.1:8 blocks.2.mlp.1:16 blocks.2:8",
    # The library's attention has a module inside that is never called: it is a block of its own.
    "vit_library": (
        "blocks.0.attention:8 blocks.0.mlp.1:16 blocks.0:8 blocks.1.attention:8 blocks.1.mlp.1:16 "
        "blocks.1:8 blocks.2.attention:8 blocks.2.mlp.1:16 blocks.2:8"
    ),
    "grouped_dilated": "body.1:8 body.3:12 body.5:8",
    "pooling": "features.1:6 features.4:8 features.7:10",
    "conv1d": "relu1:8 relu2:8 relu3:10",
    "mlp": "2:16 4:12 7:12",
    "in_place": "act1:8 act2:8 act3:8",
    "used_twice": "act@1:8 act@2:8 gelu:8 act@3:8",
    "functional_relu": "conv1:8 norm2:10 conv3:12",
    "norm_after_relu": "body.1:8 body.4:8 body.7:12",
    "routed": "relu1:8 relu2:8 relu3:8",
    "guarded": "relu1:8 relu2:8 relu3:8",
}


def test_every_architecture_has_its_expectation():
    assert EVERYTHING.keys() == networks.ARCHITECTURES.keys()


@pytest.mark.parametrize("name", EVERYTHING)
def test_star_selects_activations_and_blocks(name):
    chosen = select(found(name))
    assert [f"{each.name}:{each.channels}" for each in chosen] == EVERYTHING[name].split()
    assert chosen == select(found(name), "*") == select(found(name), ["*"])


@pytest.mark.parametrize("name", EVERYTHING)
def test_sites_describe_the_tensors_that_modules_put_out(name):
    """Run the network with plain hooks: shape, axis and call of every site are what is seen."""
    model, images, _ = networks.network(name)
    outputs: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda _module, _inputs, output, key=key: outputs.setdefault(key, []).append(output)
        )
        for key, module in model.named_modules()
    ]
    with torch.no_grad():
        model(images[:3])
    for handle in handles:
        handle.remove()
    every = found(name)
    assert len({each.name for each in every}) == len(every)
    for each in every:
        if each.kind in ("heads", "part"):
            continue  # of which tests/network/test_transformers.py knows
        calls = outputs[each.module]
        shown = calls if each.call is None else [calls[each.call - 1]]
        assert each.name == each.module + (f"@{each.call}" if each.call else "")
        assert tuple(shown[0].shape) == (3, *each.shape)
        assert each.axis >= 1
        assert all(output.shape[each.axis] == each.channels for output in shown)


@pytest.mark.parametrize(
    ("name", "layer", "axis", "channels"),
    [
        ("residual", "body.0", 1, 8),  # convolution: [N, C, H, W]
        ("residual", "body.4.relu2", 1, 12),
        ("convnext", "first.depthwise", 1, 8),
        ("convnext", "first.norm", 3, 8),  # channels last: [N, H, W, C]
        ("convnext", "first.up", 3, 14),
        ("convnext", "first.gelu", 3, 14),
        ("convnext", "first.response", 3, 14),
        ("convnext", "first.down", 3, 8),
        ("convnext", "first", 1, 8),  # and back
        ("convnext", "norm", 1, 8),
        ("vit", "patches", 1, 8),
        ("vit", "blocks.1", 2, 8),  # tokens: [N, L, C]
        ("vit", "blocks.1.attention.qkv", 2, 24),
        ("vit", "blocks.1.mlp.1", 2, 16),
        ("vit_library", "blocks.0.attention", 2, 8),
        ("conv1d", "conv1", 1, 8),  # signal: [N, C, L]
        ("conv1d", "relu1", 1, 8),
        ("conv1d", "pool", 1, 8),
        ("conv1d", "norm", 1, 8),
        ("conv1d", "average", 1, 10),
        ("mlp", "1", 1, 16),
        ("mlp", "4", 1, 12),
        ("global_context", "body.2.transform.1", 1, 6),
        ("inverted_residual", "body.3.excite.pool", 1, 12),
        ("dense", "body.2", 1, 12),
    ],
)
def test_units_lie_along(name, layer, axis, channels):
    each = site(name, layer)
    assert (each.axis, each.channels) == (axis, channels)
    assert each.shape[axis - 1] == channels


@pytest.mark.parametrize(
    ("name", "head"),
    [("residual", "head"), ("mlp", "8"), ("vit", "head"), ("conv1d", "head")],
)
def test_logits_are_classes_not_units(name, head):
    assert head not in {each.name for each in found(name)}
    with pytest.raises(ValueError, match=f"no layer that holds units is called '{head}'"):
        select(found(name), head)


class Ended(nn.Module):
    """Something behind the last map by weights."""

    def __init__(self, end: Callable[[Tensor], Tensor], *, twice: bool = False) -> None:
        super().__init__()
        self.hidden, self.act, self.head = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)
        self.end, self.twice = end, twice

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(self.act(self.hidden(x)))
        if self.twice:  # a sum keeps the units of the scores, and a map by weights reads them, too
            scores = torch.sigmoid(scores)
            return scores + scores @ torch.eye(4)
        return self.end(scores)


ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda scores: scores.softmax(1),
    "log": lambda scores: torch.log(torch.sigmoid(scores) + 1e-6),
    "bounded": lambda scores: 30 * torch.tanh(scores / 30),
    "module": nn.Softplus(),
    "one label": lambda scores: torch.stack([1 - scores[:, 2], scores.sigmoid()[:, 2]], dim=1),
}


@pytest.mark.parametrize("name", ENDS)
def test_classes_are_no_units_whatever_lies_behind_them(name):
    every = sites(Ended(ENDS[name]), torch.randn(2, 6))
    assert {"head", "act"} <= {each.name for each in every}
    assert [each.name for each in select(every)] == ["act"]


def test_a_block_that_returns_classes_holds_no_units():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Ended(torch.sigmoid)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) / 3

    every = sites(Scaled(), torch.randn(2, 6))
    assert "net" in {each.name for each in every}
    assert [each.name for each in select(every)] == ["net.act"]


def test_units_that_something_else_reads_are_units():
    every = sites(Ended(torch.sigmoid, twice=True), torch.randn(2, 6))
    assert [each.name for each in select(every)] == ["act", "head"]


def test_flatten_holds_no_units():
    assert "0" not in {each.name for each in found("mlp")}


def test_order_is_that_of_execution():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 3)
            self.second = nn.ReLU()
            self.first = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(self.first(x)))

    names = [each.name for each in sites(Backwards(), torch.randn(1, 5))]
    assert names == ["first", "second"]
    order = [each.name for each in found("residual")]
    assert select(found("residual"), ["body.4", "body.2", "body.0"]) == [
        site("residual", layer) for layer in ("body.0", "body.2", "body.4")
    ]
    assert order.index("body.3.relu1") < order.index("body.3.relu2") < order.index("body.3")


def test_calls_of_a_module_used_several_times():
    every = {each.name: each for each in found("used_twice")}
    assert {name for name in every if name.startswith(("act", "conv"))} == {
        *("act", "act@1", "act@2", "act@3"),
        *("conv", "conv@1", "conv@2"),
    }
    assert every["act"].call is None
    assert every["act@3"].call == 3
    assert every["act@3"].shape == (8, 6, 6)
    assert every["act"].kind == every["conv"].kind == every["conv@2"].kind == "layer"
    assert every["act@2"].kind == "activation"
    assert "gelu@1" not in every


def test_calls_with_different_layouts_have_no_common_name():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 6, 3)
            self.act = nn.ReLU()
            self.fc = nn.Linear(6, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.conv(x)).mean(dim=(2, 3))
            return self.head(self.act(self.fc(y)))

    names = {each.name: each.channels for each in sites(Shared(), torch.randn(1, 1, 5, 5))}
    assert names == {"conv": 6, "act@1": 6, "fc": 4, "act@2": 4}


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        ("residual", "body.3*", "body.3.relu1 body.3.relu2"),  # a glob prefers what speaks
        ("residual", "body.3.*", "body.3.relu1 body.3.relu2"),
        ("residual", "*relu?", "body.3.relu1 body.3.relu2 body.4.relu1 body.4.relu2"),
        ("residual", "*relu[2]", "body.3.relu2 body.4.relu2"),
        ("residual", "body.?", "body.2"),
        ("residual", "*.inner.1", "body.3.inner.1 body.4.inner.1"),  # and finds the rest, too
        ("residual", "body.4", "body.4"),  # a name is taken as it is
        (
            "residual",
            ["body.4.relu?", "body.0", "body.4.relu1"],
            "body.0 body.4.relu1 body.4.relu2",
        ),
        ("used_twice", "act@*", "act@1 act@2 act@3"),
        ("used_twice", "act@2", "act@2"),
        ("used_twice", "act", "act"),
        ("used_twice", "conv", "conv"),
        ("mlp", "*", "2 4 7"),
        ("mlp", "6", "6"),
        ("vit", "blocks.*.mlp.1", "blocks.0.mlp.1 blocks.1.mlp.1 blocks.2.mlp.1"),
        ("vit", "*qkv", "blocks.0.attention.qkv blocks.1.attention.qkv blocks.2.attention.qkv"),
    ],
)
def test_choosing_layers(name, layers, expected):
    assert [each.name for each in select(found(name), layers)] == expected.split()


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ("body.3.relu3", ValueError, r"'body\.3\.relu3'; nearest: .*body\.3\.relu[12]"),
        ("body.4.reul1", ValueError, r"nearest: .*body\.4\.relu1"),
        ("nothing*", ValueError, r"no layer matches 'nothing\*'; nearest: "),
        ("", ValueError, r"no layer that holds units is called ''"),
        ([], ValueError, r"layers: .* got an empty list"),
        (["body.2", 3], TypeError, r"layers: expected strings, got int"),
    ],
)
def test_choosing_layers_that_are_not_there(layers, error, message):
    with pytest.raises(error, match=message):
        select(found("residual"), layers)  # type: ignore[arg-type]


def test_a_network_without_activations_says_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    every = sites(model, torch.randn(2, 4))
    assert [each.name for each in every] == ["0", "1"]
    with pytest.raises(ValueError, match=r"this network has none; name the layers.*'0', '1'"):
        select(every)


def test_parametrized_weights_make_no_block():
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(1, 4, 3)),
        nn.ReLU(),
        parametrizations.spectral_norm(nn.Conv2d(4, 5, 3)),
        nn.Flatten(start_dim=2),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(20, 3),
    )
    every = sites(model, torch.randn(1, 1, 6, 6))
    assert [(each.name, each.axis) for each in select(every)] == [("1", 1), ("5", 2)]
    assert [(each.name, each.axis) for each in every if each.kind == "layer"] == [
        ("0", 1),
        ("2", 1),
        ("4", 2),
    ]


def test_labels():
    every = found("used_twice")
    assert parse_label(every, "gelu:7") == (site("used_twice", "gelu"), 7)
    assert parse_label(every, "act@3:0") == (site("used_twice", "act@3"), 0)
    assert site("used_twice", "act@3").label(0) == "act@3:0"
    for each in every:
        assert parse_label(every, each.label(each.channels - 1)) == (each, each.channels - 1)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("gelu", r'expected "layer:unit".*got \'gelu\''),
        ("gelu:", r'expected "layer:unit"'),
        ("gelu:x", r'expected "layer:unit"'),
        ("gelu:-1", r'expected "layer:unit"'),
        ("gelu:8", r"unit 8 of layer 'gelu' is out of range: the layer has 8 units \(0 to 7\)"),
        ("gleu:1", r"called 'gleu'; nearest: gelu"),
    ],
)
def test_bad_labels(label, message):
    with pytest.raises(ValueError, match=message):
        parse_label(found("used_twice"), label)


def test_looking_leaves_the_network_alone():
    model = networks.ARCHITECTURES["norm_after_relu"].build().train()
    model.body[2].eval()  # a mixture of modes
    before = state_of(model)
    sites(model, torch.randn(1, 2, 12, 12, generator=torch.Generator().manual_seed(0)))
    assert state_of(model) == before


def test_hooks_are_gone_after_a_failure():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"the model fails on an input of shape \[5\]: mat1 and"):
        sites(model, torch.randn(1, 5))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", pa.demo.NETWORKS)
def test_shipped_networks_have_all_their_layers(name):
    chosen = select(sites(pa.demo.build(name), torch.zeros(1, 1, 28, 28)))
    sizes = {"vgg_bn": (5, 416), "resnet": (13, 464), "vit": (6, 576), "convnext": (8, 1120)}
    expected = sizes.get(name, (7, 760))  # else one of the alexnets
    assert (len(chosen), sum(each.channels for each in chosen)) == expected


def test_looking_in_inference_mode():
    model, images, _ = networks.network("in_place")
    with torch.inference_mode():
        assert sites(model, images[:1] * 1) == found("in_place")


@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, and still what people have on disk
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("compile_", [torch.jit.script, lambda net: torch.jit.trace(net, IMAGES)])
def test_torchscript_is_refused(compile_, whole):
    inner = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
    model = compile_(inner) if whole else nn.Sequential(compile_(inner), nn.Flatten())
    with pytest.raises(TypeError, match=f"model: {'this' if whole else '0'} is TorchScript"):
        sites(model, IMAGES)
    with pytest.raises(TypeError, match=r"model: .* is TorchScript"):
        pa.ablate(model, (IMAGES, torch.zeros(2, dtype=torch.int64)))


def test_old_weight_norm_after_training():
    _, images, labels = networks.network("residual", 17)
    model = networks.made(networks.Between(), images)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.conv1)
    model(images).sum().backward()  # leaves conv1.weight with a history
    assert len(pa.ablate(model, (images, labels)).units) == 8
