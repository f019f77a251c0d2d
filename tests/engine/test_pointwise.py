"""1 x 1 convolutions in one pass with sum and ReLU: the kernel, its use, its choice."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from support.oracle import check
from torch import nn

from pyablate.engine import microbenchmarks, pointwise

pytestmark = pytest.mark.usefixtures("exports_kept")

KERNEL = """
import torch
from pyablate.engine import pointwise
torch.manual_seed(0)
last = torch.channels_last
sizes = [(3, 20, 24, 5, 7), (2, 64, 130, 9, 8), (1, 1, 1, 1, 1), (5, 33, 16, 4, 1)]
sizes.append((0, 4, 4, 2, 2))
for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 4e-3)):
    for pairs, inputs, outputs, high, wide in sizes:
        delta = torch.randn(pairs, inputs, high, wide).to(dtype)
        weight = (torch.randn(outputs, inputs, 1, 1) / inputs**0.5).to(dtype)
        base = torch.randn(2, outputs, high, wide)
        image = torch.tensor([1, 0, 5, -1, 0], dtype=torch.int32)[:pairs]
        good = (image >= 0) & (image < 2)
        for addend in (None, torch.randn(pairs, outputs, high, wide).to(dtype)):
            for rows in (base, base.bfloat16()):
                found = pointwise.one_pass(delta, weight, image, rows, addend)
                change = torch.nn.functional.conv2d(delta.double(), weight.double())
                change = change if addend is None else change + addend.double()
                clean = rows.double()[torch.where(good, image, 0).long()]
                truth = (clean + change).relu() - clean.relu()
                assert found.shape == truth.shape and found.dtype == dtype
                assert found.is_contiguous(memory_format=last)
                assert found[~good].isnan().all()
                error = (found.double() - truth)[good].abs()
                assert not error.numel() or error.max() <= limit, (dtype, inputs, error.max())
delta = torch.tensor([float("nan"), 1.0, 0.0, 2.0]).reshape(1, 1, 2, 2)
base = torch.tensor([0.5, float("nan"), -3.0, 700.0]).reshape(1, 1, 2, 2)
found = pointwise.one_pass(delta, torch.ones(1, 1, 1, 1), torch.zeros(1).int(), base).flatten()
assert found[:2].isnan().all() and found[2:].tolist() == [0.0, 2.0]
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_kernel_is_convolution_sum_and_relu():
    """In Triton's interpreter, which multiplies matrices of bfloat16 wrongly: not those."""
    settings = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KERNEL], env=settings, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr


@pytest.mark.cuda
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 256), (256, 64), (33, 20)])
def test_kernel_in_bfloat16_on_a_gpu(inputs, outputs):
    if not torch.cuda.is_available() or not pointwise.offered(torch.device("cuda")):
        pytest.skip("no CUDA device, or no Triton")
    torch.manual_seed(0)
    maps = {"device": "cuda", "dtype": torch.bfloat16}
    delta, addend = (torch.randn(5, n, 14, 14, **maps) for n in (inputs, outputs))
    weight = torch.randn(outputs, inputs, 1, 1, **maps) / inputs**0.5
    base = torch.randn(3, outputs, 14, 14, device="cuda")
    image = torch.tensor([0, 2, 1, 1, 0], dtype=torch.int32, device="cuda")
    change = torch.einsum("pchw,oc->pohw", delta.double(), weight[:, :, 0, 0].double())
    clean = base.double()[image.long()]
    truth = (clean + change + addend.double()).relu() - clean.relu()

    def error(found):
        return (found.double() - truth).abs().max()

    alone = error(pointwise.stepwise(delta, weight, image, base, addend))
    assert error(pointwise.one_pass(delta, weight, image, base, addend)) <= 2 * alone + 0.01


class Bottlenecks(nn.Module):
    """Two blocks as a ResNet-50 has them; the first with a convolution in its shortcut."""

    def __init__(self, first=True):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.relu = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()
        self.shortcut = nn.Conv2d(8, 12, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *[nn.Conv2d(inputs, 6, 1), nn.ReLU()],
                *[nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 12, 1)],
            )
            for inputs in (8, 12, 12)
        )
        self.last, self.head, self.first = nn.ReLU(), nn.Linear(12, 5), first

    def forward(self, x):
        x = self.relu(self.stem(x))
        for i, block in enumerate(self.blocks):
            beside = self.shortcut(x) if i == 0 else x
            both = beside + block(x) if self.first else block(x) + beside
            x = self.last(both)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("first", [True, False])
def test_predictions_are_the_same_in_one_pass(monkeypatch, first):
    """With two steps in the place of the kernel, which needs a GPU."""
    done = []

    def step(delta, weight, image, base, addend=None):
        done.append(addend is not None)
        return pointwise.stepwise(delta, weight, image, base, addend)

    monkeypatch.setattr(pointwise, "offered", lambda device: True)
    monkeypatch.setattr(pointwise, "faster", lambda *size: True)
    monkeypatch.setattr(pointwise, "_worthwhile", lambda device: frozenset())
    monkeypatch.setattr(pointwise, "one_pass", step)
    model = Bottlenecks(first).eval()
    model.known_as = f"bottlenecks {first}"
    torch.manual_seed(1)
    data = torch.randn(12, 1, 9, 9), torch.arange(12) % 5
    check(model, data, ["relu", "blocks.1.1"], precision="bf16")
    assert set(done) == {True, False}


def test_it_is_not_offered_on_a_processor():
    assert not pointwise.offered(torch.device("cpu"))
    assert pointwise.worthwhile(torch.device("cpu")) == frozenset()


def test_it_is_chosen_at_sizes_near_those_where_it_was_faster(monkeypatch):
    """Times decide, and what cannot be compiled is not chosen."""
    seconds = iter([3.0, 1.0, 2.0, 2.0, 4.0, 3.0, 1.0, 2.0])

    def best(work, device):
        found = next(seconds, None)
        if found is None:
            raise RuntimeError("no compiler")
        return found

    monkeypatch.setattr(pointwise, "NUMBERS", 1)
    monkeypatch.setattr(microbenchmarks, "best", best)
    pointwise._worthwhile.cache_clear()
    try:
        chosen = pointwise._worthwhile("cpu")
        sizes = pointwise.MEASURED
        assert chosen == {sizes[0], sizes[2]}
        monkeypatch.setattr(pointwise, "worthwhile", lambda device: chosen)
        device = torch.device("cpu")
        assert pointwise.faster(device, 60, 70)
        assert not pointwise.faster(device, 2048, 512)
        assert pointwise.faster(device, 64, 300)
    finally:
        pointwise._worthwhile.cache_clear()
