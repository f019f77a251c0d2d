"""Weights and code of a smaller network make the same network, without this package."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.compressible import Mobile, images, made
from torch import nn

import pyablate as pa
from pyablate.cli.model_specs import load_model
from pyablate.compression import save_weights

pytest.importorskip("torch_pruning")
pytestmark = pytest.mark.usefixtures("empty_folder")

_ALONE = """
import sys
sys.path.insert(0, "")
import torch
from small import load_model
model = load_model()
torch.save(model(torch.load("images.pt")), "logits.pt")
assert not {"pyablate", "torch_pruning"} & set(sys.modules)
"""


def test_the_code_alone_makes_the_network():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
    ).eval()
    Path("own.py").write_text(
        "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), "
        "nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))\n"
    )
    removal = pa.remove(network, ["2:1", "2:5"], images())
    save_weights(removal.model, network, "own:make", "small.safetensors")
    torch.save(images(), "images.pt")
    code = _ALONE
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load("logits.pt"), removal.model(images()))


@pytest.mark.parametrize("name", ["resnet", "convnext"])
def test_the_shell_reads_it(name):
    model, pictures, _ = pa.demo.load(name, limit=4)
    ranking = pa.rank(model, pictures[:1], "random", scope="layer", seed=3)
    removal = pa.remove(model, ranking, pictures[:2], fraction=0.3)
    save_weights(removal.model, model, f"demo:{name}", "small.safetensors")
    sys.modules.pop("small", None)
    again = load_model("small:make_model", "small.safetensors")
    sys.modules.pop("small", None)
    assert pa.compression.size(again, pictures[:1]) == removal.after
    with torch.no_grad():
        torch.testing.assert_close(again(pictures), removal.model(pictures))


_MAKER = """
from torch import nn


def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
"""


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_precision_of_the_weights_is_kept(dtype, monkeypatch):
    """The maker makes float32, into which others would be rounded when they are loaded."""
    monkeypatch.syspath_prepend(str(Path.cwd()))
    Path("exact.py").write_text(_MAKER)
    torch.manual_seed(0)
    model = runpy.run_path("exact.py")["make"]().to(dtype).eval()
    removal = pa.remove(model.float(), ["1:1"], images())
    smaller = removal.model.double()
    with torch.no_grad():
        smaller[0].weight += 1e-9  # float32 has no digit for it
    smaller = smaller.to(dtype)
    save_weights(smaller, model, "exact:make", "precise.safetensors")
    again = runpy.run_path("precise.py")["load_model"]()
    assert {each.dtype for each in again.parameters()} == {dtype}
    by_shell = load_model("precise:make_model", "precise.safetensors")
    sys.modules.pop("precise", None)
    with torch.no_grad():
        expected = smaller(images().to(dtype))
        assert torch.equal(again(images().to(dtype)), expected)
        assert torch.equal(by_shell(images().to(dtype)), expected)


def test_weights_of_several_precisions_are_the_makers_or_refused(monkeypatch):
    monkeypatch.syspath_prepend(str(Path.cwd()))
    Path("mixed.py").write_text(_MAKER)
    model = runpy.run_path("mixed.py")["make"]().eval()
    mixed = runpy.run_path("mixed.py")["make"]().eval()
    mixed[3].double()
    with pytest.raises(ValueError, match=r"dtype.*got torch\.float64 at 3\.weight"):
        save_weights(mixed, model, "mixed:make", "several.safetensors")
    assert not Path("several.safetensors").exists()
    save_weights(mixed, mixed, "mixed:make", "several.safetensors")
    with pytest.raises(ValueError, match=r"3\.weight: made in torch\.float32, saved in torch\.f"):
        runpy.run_path("several.py")["load_model"]()


def test_bad_arguments():
    model = made(Mobile)
    for path in ("small.pt", "no name.safetensors"):
        with pytest.raises(ValueError, match=r"path: expected a file called NAME\.safetensors"):
            save_weights(model, model, "a:b", path)
    for maker in ("a", "a:b()", "import os; a:b", 'timm:a"""'):
        with pytest.raises(ValueError, match="maker: expected module:factory"):
            save_weights(model, model, maker, "small.safetensors")
    with pytest.raises(ValueError, match="model: expected the modules of the original"):
        save_weights(nn.Sequential(model), model, "a:b", "small.safetensors")
    Path("small.py").write_text("mine = 1\n")
    with pytest.raises(FileExistsError, match=r"small\.py is there, and not written by pyablate"):
        save_weights(model, model, "a:b", "small.safetensors")
    assert Path("small.py").read_text() == "mine = 1\n"
    assert not Path("small.safetensors").exists()
