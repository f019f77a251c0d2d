"""1 x 1 convolutions in one pass with sum and ReLU: the kernel, its use, its choice."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from support.oracle import check
from torch import nn
from torch.nn import functional

from pyablate.engine import microbenchmarks, pointwise

pytestmark = pytest.mark.usefixtures("exports_kept")

CASES = [(3, 20, 24, 5, 7), (2, 64, 130, 9, 8), (1, 1, 1, 1, 1), (5, 33, 16, 4, 1), (0, 4, 4, 2, 2)]
"""Pairs, inputs, outputs, height and width."""

ON_A_GPU = [(5, 64, 256, 14, 14), (5, 256, 64, 14, 14), *CASES[1:4]]
"""Few: each is compiled, for a second or two."""


def drawn(size, dtype, device="cpu"):
    """Draw delta, weight, the image of each pair, some out of range."""
    pairs, inputs, outputs, height, width = size
    delta = torch.randn(pairs, inputs, height, width, device=device).to(dtype)
    weight = (torch.randn(outputs, inputs, 1, 1, device=device) / inputs**0.5).to(dtype)
    image = torch.tensor([1, 0, 5, -1, 0], dtype=torch.int32, device=device)[:pairs]
    return delta, weight, image


def exact(delta, weight, image, base, addend):
    """Do the same in float64; NaN where there is no such image."""
    change = functional.conv2d(delta.double(), weight.double())
    change = change if addend is None else change + addend.double()
    there = (image >= 0) & (image < len(base))
    clean = base.double()[torch.where(there, image, 0).long()]
    result = (clean + change).relu() - clean.relu()
    return torch.where(there.reshape(-1, 1, 1, 1), result, float("nan"))


def error(found, truth):
    assert found.shape == truth.shape
    assert torch.equal(found.isnan(), truth.isnan())
    return (found.double() - truth).nan_to_num().abs().amax().item() if truth.numel() else 0.0


def compare_with_pytorch():
    """All cases, with and without a sum, clean tensors in either precision."""
    torch.manual_seed(0)
    for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 4e-3)):
        for size in CASES:
            delta, weight, image = drawn(size, dtype)
            shape = functional.conv2d(delta, weight).shape
            base, addend = torch.randn(2, *shape[1:]), torch.randn(shape).to(dtype)
            for given in ((base, None), (base, addend), (base.bfloat16(), addend)):
                found = pointwise.one_pass(delta, weight, image, *given)
                off = error(found, exact(delta, weight, image, *given))
                assert off <= limit, (size, dtype, off)
                assert found.dtype == dtype
                assert found.is_contiguous(memory_format=torch.channels_last)


def keep_nan():
    """A NaN of the delta and one of the clean tensor stay; others do not become one."""
    delta = torch.tensor([float("nan"), 1.0, 0.0, 2.0]).reshape(1, 1, 2, 2)
    base = torch.tensor([0.5, float("nan"), -3.0, 700.0]).reshape(1, 1, 2, 2)
    image = torch.zeros(1, dtype=torch.int32)
    found = pointwise.one_pass(delta, torch.ones(1, 1, 1, 1), image, base).flatten()
    assert found[:2].isnan().all()
    assert found[2:].tolist() == [0.0, 2.0]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", ON_A_GPU)
def test_kernel_in_half_precision_on_a_gpu(size, dtype):
    if not torch.cuda.is_available() or not pointwise.offered(torch.device("cuda")):
        pytest.skip("no CUDA device, or no Triton")
    torch.manual_seed(0)
    delta, weight, image = drawn(size, dtype, "cuda")
    shape = functional.conv2d(delta, weight).shape
    rest = torch.randn(2, *shape[1:], device="cuda"), torch.randn(shape).to(delta)

    def off(way, image):
        return error(way(delta, weight, image, *rest), exact(delta, weight, image, *rest))

    alone = off(pointwise.stepwise, image.clamp(0, 1))
    assert off(pointwise.one_pass, image) <= 2 * alone + 0.01


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_product_of_matrices_is_the_convolution(layout):
    delta, weight, _ = drawn((3, 20, 24, 5, 7), torch.float32)
    found = pointwise.product(delta.contiguous(memory_format=layout), weight)
    torch.testing.assert_close(found, functional.conv2d(delta, weight))
    assert found.is_contiguous(memory_format=torch.channels_last)


class Bottlenecks(nn.Module):
    """Blocks as a ResNet-50 has them; the first with a convolution in its shortcut."""

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


def take_for_a_gpu(monkeypatch, one_pass):
    """Let this function stand for the kernel, fast at all sizes; return if it was given sums."""
    done = set()

    def noted(delta, weight, image, base, addend=None):
        done.add(addend is not None)
        return one_pass(delta, weight, image, base, addend)

    monkeypatch.setattr(pointwise, "offered", lambda device: True)
    monkeypatch.setattr(pointwise, "_worthwhile", lambda device: frozenset(pointwise.MEASURED))
    monkeypatch.setattr(pointwise, "one_pass", noted)
    return done


def run(model, name, layers, images=12, side=9):
    torch.manual_seed(1)
    data = torch.randn(images, 1, side, side), torch.arange(images) % 5
    model.eval().known_as = name
    check(model, data, layers, precision="bf16")


@pytest.mark.parametrize("first", [True, False])
def test_predictions_are_the_same_in_one_pass(monkeypatch, first):
    """With two steps in the place of the kernel, which needs a GPU."""
    done = take_for_a_gpu(monkeypatch, pointwise.stepwise)
    run(Bottlenecks(first), f"bottlenecks {first}", ["relu", "blocks.1.1"])
    assert done == {True, False}


def go_through_the_kernel():
    """A network's deltas, in float32 within the kernel."""
    real = pointwise.one_pass

    def one_pass(delta, weight, *rest):
        return real(delta.float(), weight.float(), *rest).to(delta.dtype)

    with pytest.MonkeyPatch.context() as monkeypatch:
        done = take_for_a_gpu(monkeypatch, one_pass)
        run(Bottlenecks(), "bottlenecks", ["relu"], images=5, side=7)
    assert done == {True, False}


def interpret(*work):
    """Call functions of this file in Triton's interpreter, which is chosen before the import."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton")
    settings = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    script = f"import {__name__} as tests\nfor name in {[f.__name__ for f in work]}:\n"
    script += "    getattr(tests, name)()\n    print(name)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [f.__name__ for f in work], done.stderr
    assert done.returncode == 0, done.stderr


def test_kernel_is_convolution_sum_and_relu():
    """Not in bfloat16, whose matrices the interpreter multiplies wrongly."""
    interpret(compare_with_pytorch, keep_nan, go_through_the_kernel)


class Plain(nn.Module):
    """A unit's convolution, two behind it, and something behind the last ReLU."""

    def __init__(self, behind, features):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.relu = nn.Conv2d(1, 8, 3), nn.ReLU()
        self.second, self.third = nn.Conv2d(8, 6, 3), nn.Conv2d(6, 8, 1)
        self.behind, self.head = behind, nn.Linear(features, 5)

    def forward(self, x):
        x = self.third(self.second(self.relu(self.stem(x))).relu()).relu()
        return self.head(self.behind(x).flatten(1))


@pytest.mark.parametrize(
    ("behind", "features", "used"),
    [
        (nn.Identity(), 200, True),
        (nn.AvgPool2d(2), 32, True),
        (nn.MaxPool2d(2), 32, False),
        (nn.AdaptiveAvgPool2d(1), 8, False),
    ],
    ids=str,
)
def test_a_pooling_that_activates_too_is_left_to_it(monkeypatch, behind, features, used):
    done = take_for_a_gpu(monkeypatch, pointwise.stepwise)
    run(Plain(behind, features), str(behind), ["relu"])
    assert done == ({False} if used else set())


def test_it_is_not_offered_on_a_processor():
    assert not pointwise.offered(torch.device("cpu"))
    assert pointwise.worthwhile(torch.device("cpu")) == frozenset()


def test_times_decide_and_what_cannot_be_compiled_is_not_chosen(monkeypatch):
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
        sizes = pointwise.MEASURED
        assert pointwise._worthwhile("cpu") == {sizes[0], sizes[2]}
    finally:
        pointwise._worthwhile.cache_clear()


@pytest.mark.parametrize("size", pointwise.MEASURED)
def test_both_ways_are_timed_at_the_size_that_is_meant(monkeypatch, size):
    done = []

    def best(work, device):
        done.append(work().shape[1:])
        return 1.0

    monkeypatch.setattr(pointwise, "NUMBERS", 1)
    monkeypatch.setattr(microbenchmarks, "best", best)
    monkeypatch.setattr(pointwise, "one_pass", pointwise.stepwise)
    assert pointwise.gain("cpu", size) == 1.0
    assert done == [(size[1], size[2], size[2])] * 2


@pytest.mark.parametrize(
    ("inputs", "outputs", "nearest"),
    [(60, 70, (64, 64, 56)), (64, 300, (64, 256, 56)), (1024, 256, (512, 128, 28))],
)
def test_a_convolution_is_done_like_the_nearest_one_that_was_timed(inputs, outputs, nearest):
    assert pointwise.nearest(inputs, outputs) == nearest
