"""Models named by a word: what is loaded, and what is said of bad input."""

from __future__ import annotations

import copy
import os
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pyablate import demo
from pyablate.cli.data_specs import Pixels
from pyablate.cli.model_specs import load_model, own_pixels
from pyablate.network import exported as exported_program
from pyablate.network.exported import original_type

FACTORIES = """
import torch

class Net(torch.nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.fc = torch.nn.Linear(6, classes)

    def forward(self, x):
        return self.fc(x.flatten(1))

class Namespace:
    make = Net

instance = Net()
constant = 3

def needs_argument(width):
    return Net(width)

def returns_text():
    return "net"
"""


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder that holds the module `some_nets`."""
    (tmp_path / "some_nets.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "some_nets", raising=False)
    return tmp_path


def _net(classes: int = 4) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Module()
    net.fc = nn.Linear(6, classes)
    return net


# --- models ---------------------------------------------------------------------------------------


def test_demo_model() -> None:
    model = load_model("demo:resnet")
    _, images, _ = demo.load("resnet", limit=4)
    assert torch.equal(model(images), demo.network("resnet")(images))
    assert not model.training


@pytest.mark.parametrize("name", ["Net", "Namespace.make", "instance"])
def test_module_in_the_working_directory(cwd: Path, name: str) -> None:
    before = list(sys.path)
    model = load_model(f"some_nets:{name}", device="cpu")
    assert model(torch.zeros(2, 1, 2, 3)).shape == (2, 4)
    assert not model.training
    assert sys.path == before


def _plain(state: dict[str, Any]) -> Any:
    return state


CHECKPOINTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "plain": _plain,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "model_state_dict": lambda state: {"model_state_dict": state, "best": 0.5},
    "data_parallel": lambda state: {f"module.{k}": v for k, v in state.items()},
    "compiled": lambda state: {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
}


@pytest.mark.parametrize("layout", CHECKPOINTS)
def test_checkpoint_layouts(cwd: Path, layout: str) -> None:
    state = _net().state_dict()
    torch.save(CHECKPOINTS[layout](state), "net.pth")
    model = load_model("some_nets:Net", "net.pth")
    assert torch.equal(model.fc.weight, state["fc.weight"])


def test_safetensors(cwd: Path) -> None:
    state = _net().state_dict()
    save_file({f"module.{key}": value for key, value in state.items()}, "net.safetensors")
    model = load_model("some_nets:Net", Path("net.safetensors"))
    assert torch.equal(model.fc.bias, state["fc.bias"])


def test_weights_replace_those_of_a_demo_network(tmp_path: Path) -> None:
    fresh = demo.build("vgg_bn")
    state = {k: v for k, v in fresh.state_dict().items() if "num_batches_tracked" not in k}
    save_file(state, tmp_path / "fresh.safetensors")
    model = load_model("demo:vgg_bn", tmp_path / "fresh.safetensors")
    assert torch.equal(model.classifier.weight, fresh.classifier.weight)


class _Touch:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def _weights(content: Any) -> Callable[[], None]:
    return lambda: torch.save(content, "net.pth")


def _text(name: str, text: str) -> Callable[[], Any]:
    return lambda: Path(name).write_text(text)


def _truncated_weights() -> None:
    torch.save(_net().state_dict(), "net.pth")
    Path("net.pth").write_bytes(Path("net.pth").read_bytes()[:700])


BAD_WEIGHTS: dict[str, tuple[Callable[[], Any], str]] = {
    "missing file": (lambda: None, "weights: expected a file, found none at 'net.pth'"),
    "text": (_text("net.pth", "hello"), "weights: 'net.pth' is damaged or holds objects"),
    "empty": (_text("net.pth", ""), "weights: 'net.pth' is damaged"),
    "truncated": (_truncated_weights, "weights: 'net.pth' is damaged"),
    "pickle": (_weights(_Touch()), "weights: 'net.pth' .* objects other than tensors"),
    "list": (_weights([torch.ones(1)]), "weights: expected a state dict in .* found list"),
    "no entries": (_weights({}), "weights: expected a state dict .* dict without entries"),
    "figures": (_weights({"fc.weight": 1}), "tensors only .* found 1 other entries .fc.weight"),
    "missing": (_weights({"fc.bias": torch.zeros(4)}), r"'net.pth' .* 1 missing \(fc.weight\)"),
    "unexpected": (
        _weights(_net().state_dict() | {f"head.{i}": torch.zeros(1) for i in range(5)}),
        r"5 unexpected \(head.0, head.1, head.2, and 2 more\)",
    ),
    "other shape": (
        _weights(_net(5).state_dict()),
        r"2 of another shape \(fc.weight: expected \[4, 6\], found \[5, 6\]",
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights(cwd: Path, case: str) -> None:
    prepare, message = BAD_WEIGHTS[case]
    prepare()
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load_model("some_nets:Net", "net.pth")
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()


def test_damaged_safetensors(cwd: Path) -> None:
    Path("net.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"weights: 'net.safetensors' is no safetensors file"):
        load_model("some_nets:Net", "net.safetensors")


BAD_MODELS: dict[str, tuple[type[Exception], str]] = {
    "vgg_bn": (ValueError, "model: expected demo:NAME .* got 'vgg_bn'; nearest: demo:vgg_bn"),
    "": (ValueError, "model: expected demo:NAME"),
    "demo:": (ValueError, "model: expected demo:NAME"),
    "demo:vgg": (ValueError, "got 'vgg'; nearest: vgg_bn"),
    "torchvison:resnet18": (ImportError, "cannot import .* one of demo, torchvision, timm"),
    "no_such_module:make": (ImportError, "model: cannot import 'no_such_module'"),
    "some_nets:mke": (ValueError, "model: no 'mke' in the module 'some_nets'"),
    "some_nets:constant": (ValueError, "expected a function or torch.nn.Module .* found int"),
    "some_nets:needs_argument": (ValueError, "failed: TypeError: .* missing 1 required"),
    "some_nets:returns_text": (ValueError, "to return a torch.nn.Module, got str"),
    "missing.pt2": (FileNotFoundError, "model: expected an exported program, found no file"),
    "some_text.pt2": (ValueError, "model: 'some_text.pt2' is no exported program"),
}


@pytest.mark.parametrize("spec", BAD_MODELS)
def test_bad_models(cwd: Path, spec: str) -> None:
    Path("some_text.pt2").write_text("hello")
    kind, message = BAD_MODELS[spec]
    with pytest.raises(kind, match=message) as caught:
        load_model(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        ("def make(weights=None): return net()", "weights="),
        ("def make(pretrained=False): return net()", "pretrained="),
        ("def make(pretrained=True): return net()", None),
        ("def make(): return net()", None),
    ],
)
def test_weights_that_a_factory_has_are_not_forgotten(
    cwd: Path, caplog: pytest.LogCaptureFixture, factory: str, told: str | None
) -> None:
    text = f"from torch import nn\nnet = lambda: nn.Linear(2, 2)\n{factory}\n"
    name = f"made_{abs(hash(factory))}"
    Path(f"{name}.py").write_text(text)
    save_file(nn.Linear(2, 2).state_dict(), "weights.safetensors")
    load_model(f"{name}:make", "weights.safetensors")
    assert not caplog.messages
    load_model(f"{name}:make")
    assert [told in message for message in caplog.messages] == ([True] if told else [])


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta:cpu", 3.5])
def test_device_that_does_not_exist(device: Any) -> None:
    with pytest.raises(ValueError, match=f"device: expected one this machine has, got '{device}'"):
        load_model("demo:alexnet", device=device)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"{library}:NAME needs {library}.* pip install"):
        load_model(f"{library}:resnet18")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize("own_weights", [False, True])
def test_library_is_asked_for_its_weights_unless_some_are_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str, own_weights: bool
) -> None:
    asked: list[Any] = []

    def make(name: str, **options: Any) -> nn.Module:
        asked.append((name, options))
        return _net()

    # Stands for the library, which pulls in much and needs the network for its weights.
    package = ModuleType(library)
    models = SimpleNamespace(list_models=lambda: ["resnet18"], get_model=make, create_model=make)
    monkeypatch.setitem(sys.modules, library, package if library == "torchvision" else models)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    save_file(_net().state_dict(), tmp_path / "net.safetensors")
    load_model(f"{library}:resnet18", tmp_path / "net.safetensors" if own_weights else None)
    if library == "torchvision":
        assert asked == [("resnet18", {"weights": None if own_weights else "DEFAULT"})]
    else:
        assert asked == [("resnet18", {"pretrained": not own_weights})]
    with pytest.raises(ValueError, match=f"name of a {library} model, got 'resnt18'; nearest: res"):
        load_model(f"{library}:resnt18")


TIMM = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "crop_pct": 0.95,
    "crop_mode": "center",
}


@pytest.mark.parametrize(
    ("changed", "size", "told"),
    [
        ({}, (235, 224), False),
        ({"crop_pct": 1.0, "input_size": (3, 288, 288)}, (288, 288), False),
        ({"crop_mode": "squash"}, (235, 224), True),
        ({"input_size": (3, 256, 128)}, None, True),
    ],
)
def test_images_of_a_timm_model(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changed: dict[str, Any],
    size: Any,
    told: bool,
) -> None:
    data = ModuleType("timm.data")
    data.resolve_data_config = lambda _, model: TIMM | changed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.data", data)
    found = own_pixels("timm:resnet18", _net())
    assert found == Pixels("timm:resnet18", size, "bicubic", TIMM["mean"], TIMM["std"])
    assert ("expected squares from the centre" in caplog.text) == told


def test_images_of_a_torchvision_model(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = SimpleNamespace(
        crop_size=[224],
        resize_size=[256],
        mean=[0.5, 0.4, 0.3],
        std=[0.2, 0.3, 0.4],
        interpolation=SimpleNamespace(value="bilinear"),
    )
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(transforms=lambda: preset))
    models = SimpleNamespace(get_model_weights=lambda _name: weights)
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    found = own_pixels("torchvision:resnet18", _net())
    assert found == Pixels("torchvision:resnet18", (256, 224), "bilinear", preset.mean, preset.std)


@pytest.mark.parametrize("spec", ["demo:vgg_bn", "some_nets:Net", "net.pt2"])
def test_other_models_say_nothing_of_their_images(spec: str) -> None:
    assert own_pixels(spec, _net()) is None


# --- exported programs ----------------------------------------------------------------------------


def _export(model: nn.Module, path: Path, *, dynamic: bool = True) -> Path:
    pytest.importorskip("torch.export.pt2_archive", reason="torch 2.6 had another archive")
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its exporter
        program = torch.export.export(model, (torch.rand(2, 1, 28, 28),), dynamic_shapes=shapes)
        torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(demo.network("resnet"), tmp_path_factory.mktemp("exported") / "resnet.pt2")


def test_exported_programs_of_a_torch_whose_archives_are_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exported_program, "CHECKED", False)
    zipfile.ZipFile(tmp_path / "net.pt2", "w").close()
    with pytest.raises(ValueError, match=r"not checked here: use a newer torch"):
        load_model(str(tmp_path / "net.pt2"))


def test_exported_program_gives_the_same_logits_and_names(exported: Path) -> None:
    model, images, _ = demo.load("resnet", limit=5)
    loaded = load_model(str(exported))
    assert not any(module.training for module in loaded.modules())
    assert set(loaded.state_dict()) == set(model.state_dict())
    torch.testing.assert_close(loaded(images), model(images))


def test_hooks_fire_on_the_submodules_of_an_exported_program(exported: Path) -> None:
    model, images, _ = demo.load("resnet", limit=3)
    loaded = load_model(str(exported))
    kinds: dict[str, str] = {}
    for name, module in loaded.named_modules():
        if name.endswith(("relu1", "relu2")):
            module.register_forward_hook(
                lambda module, _, out, name=name: (
                    kinds.update({name: module.type_name()}) or 0 * out
                )
            )
    blocks = [f"stage{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)]
    logits = loaded(images)
    assert kinds == {
        f"{block}.{relu}": "torch.nn.modules.activation.ReLU"
        for block in blocks
        for relu in ("relu1", "relu2")
    }
    # What a hook returns replaces the output: with the last block silent the bias is left.
    torch.testing.assert_close(logits, model.fc.bias.expand(3, 10))


def test_original_types_of_an_exported_program(exported: Path) -> None:
    original = dict(demo.network("resnet").named_modules())
    loaded = load_model(str(exported))
    # What ran in the export; an identity leaves an empty module.
    modules = {
        name: module
        for name, module in loaded.named_modules()
        if name in original and type(module) is not nn.Module
    }
    assert len(modules) >= 50
    for name, module in modules.items():
        kind = type(original[name])
        kept = kind.__module__.startswith("torch.nn")
        assert original_type(module) is (kind if kept else type(module)), name
        assert original_type(original[name]) is kind


def test_exported_program_can_be_copied_converted_and_exported_again(
    exported: Path, tmp_path: Path
) -> None:
    loaded = load_model(str(exported))
    images, _ = demo.images(6)
    double = copy.deepcopy(loaded).double()
    assert loaded(images).dtype == torch.float32
    exact = copy.deepcopy(demo.network("resnet")).double()(images.double())
    torch.testing.assert_close(double(images.double()), exact, rtol=1e-12, atol=1e-12)
    again = load_model(str(_export(loaded, tmp_path / "again.pt2")))
    torch.testing.assert_close(again(images), loaded(images))


class _Odd(nn.Module):
    """Constants, a module used twice, a buffer and a parameter at the top, not stored with it."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.outputs = outputs
        self.twice = nn.Conv2d(1, 1, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("offset", torch.tensor(0.5), persistent=False)

    def forward(self, images: torch.Tensor) -> Any:
        hidden = self.twice(torch.relu(self.twice(images))) * self.scale + self.offset
        logits = (hidden + torch.tensor([1.0])).flatten(1)[:, :10]
        return (logits,) * self.outputs if self.outputs > 1 else logits


def test_exported_program_with_oddities(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Odd().eval()
    loaded = load_model(str(_export(model, tmp_path / "odd.pt2")))
    images, _ = demo.images(3)
    torch.testing.assert_close(copy.deepcopy(loaded)(images), model(images))


def test_exported_program_with_two_outputs(tmp_path: Path) -> None:
    path = _export(_Odd(2).eval(), tmp_path / "two.pt2")
    with pytest.raises(ValueError, match=r"expected one output .the logits. of .* found 2"):
        load_model(str(path))


def test_exported_program_takes_other_weights(exported: Path, tmp_path: Path) -> None:
    fresh = demo.build("resnet").eval()
    save_file(fresh.state_dict(), tmp_path / "fresh.safetensors")
    loaded = load_model(str(exported), tmp_path / "fresh.safetensors")
    images, _ = demo.images(4)
    torch.testing.assert_close(loaded(images), fresh(images))


def test_exported_with_a_fixed_batch(tmp_path: Path) -> None:
    path = _export(demo.build("alexnet").eval(), tmp_path / "fixed.pt2", dynamic=False)
    with pytest.raises(ValueError, match="exported for batches of 2; expected a dynamic batch"):
        load_model(str(path))


@pytest.mark.parametrize("name", ["alexnet_dropout", "vgg_bn"])
def test_exported_in_training_mode(tmp_path: Path, name: str) -> None:
    path = _export(demo.build(name).train(), tmp_path / "training.pt2")
    with pytest.raises(ValueError, match="was exported in training mode"):
        load_model(str(path))


@pytest.mark.parametrize("member", ["models/model.json", "weights_config.json", "version"])
def test_damaged_exported_program(
    exported: Path, tmp_path: Path, member: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "damaged.pt2"
    with zipfile.ZipFile(exported) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if not name.endswith(member):
                new.writestr(name, old.read(name))
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    with pytest.raises(ValueError, match=r"'.*damaged.pt2' could not be loaded") as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == before
    assert capfd.readouterr().err == ""
