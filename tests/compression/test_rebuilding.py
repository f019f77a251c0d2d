"""Weights and code of a smaller network make the same network, without this package."""

from __future__ import annotations

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
