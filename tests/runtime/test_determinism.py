"""What a run sets for itself, and that it comes back; which errors say that memory ran out."""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch
from support import networks
from support.runs import same
from torch import nn

import pyablate as pa
from pyablate.runtime import determinism
from pyablate.runtime.out_of_memory import is_shortage

NAMES = ["", *determinism._PRECISIONS]
new_settings = pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has no such settings"
)


def precisions():
    owners = (attrgetter(name)(torch.backends) if name else torch.backends for name in NAMES)
    return dict(zip(NAMES, (owner.fp32_precision for owner in owners), strict=True))


@pytest.fixture
def as_before():
    """Put the settings back whatever happens; which ones inherit is found from the general one."""
    before = precisions()
    yield
    for name in reversed(NAMES):
        owner = attrgetter(name)(torch.backends) if name else torch.backends
        owner.fp32_precision = before[name]


@new_settings
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_every_precision_is_full_inside_and_comes_back(as_before, name, precision):
    owner = attrgetter(name)(torch.backends) if name else torch.backends
    owner.fp32_precision = precision
    before = precisions()
    with determinism.undisturbed():
        assert set(precisions().values()) == {"ieee"}
        assert not torch.backends.cudnn.allow_tf32  # torch.export reads it
    assert precisions() == before


@new_settings
def test_what_inherits_still_inherits_afterwards(as_before):
    for name in reversed(NAMES):
        owner = attrgetter(name)(torch.backends) if name else torch.backends
        owner.fp32_precision = "none"
    model, images, _ = networks.network("mlp")
    with determinism.undisturbed():
        torch.export.export(model, (images,))  # which sets what the libraries have inherited
    torch.backends.fp32_precision = "tf32"
    assert set(precisions().values()) == {"tf32"}
    with determinism.float32_as("tf32"):
        assert set(precisions().values()) == {"tf32"}


@new_settings
def test_a_run_under_the_new_settings(as_before):
    model, images, labels = networks.network("residual")
    expected = pa.ablate(model, (images, labels), ["body.2"], progress=False)
    torch.backends.fp32_precision = "ieee"
    torch.backends.mkldnn.fp32_precision = "bf16"
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # with which the older getter raises
    before = precisions()
    found = pa.ablate(model, (images, labels), ["body.2"], progress=False)
    assert same(found, expected)
    assert found.strategy == expected.strategy
    assert len(pa.plan(model, (images, labels), layers=["body.2"]).table) > 0
    assert precisions() == before


def test_older_settings_come_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with determinism._float32_by_flags(allowed=False):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_algorithms_are_fixed_inside(monkeypatch):
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    try:
        cudnn.benchmark, cudnn.deterministic = True, False
        with determinism.undisturbed():
            assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
        assert (cudnn.benchmark, cudnn.deterministic) == (True, False)
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def test_generators_of_the_gpus_that_are_named(monkeypatch):
    model = nn.Linear(2, 2)
    assert determinism.gpus((model, "cpu", None, "cuda:1")) == []  # there is none
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert determinism.gpus((model, None)) == []
    assert determinism.gpus((model, "cuda:1", torch.device("cuda"), "no such device", 7.5)) == [
        1,
        2,
    ]


MADE = set()


class Shifted(nn.Module):
    """Makes a tensor without naming a device, as code does under a default device."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        MADE.add(torch.zeros(1).device.type)
        return self.inner(x)


SPECS = [{}, {"strategy": "replay"}, {"intervention": "noise"}, {"measures": ["loss"]}]


@pytest.mark.parametrize("options", [*SPECS, {"intervention": "mean"}, {"guarantee": "screened"}])
def test_a_default_device_of_the_caller(options):
    """Meta stands for a GPU: whatever of ours landed there would have no values."""
    model, images, labels = networks.network("residual")
    model = Shifted(model).eval()
    layers = ["inner.body.2"]
    MADE.clear()
    expected = pa.ablate(model, (images, labels), layers, progress=False, **options)
    assert {"cpu"} == MADE
    MADE.clear()
    try:
        torch.set_default_device("meta")
        found = pa.ablate(model, (images, labels), layers, progress=False, **options)
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)
    assert {"meta"} == MADE
    assert same(found, expected)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("delta_mean: csrc/cuda/x.cu:33: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_shortage_of_memory_is_told_from_other_errors(error, expected):
    assert is_shortage(error) == expected


def test_the_older_flag_of_products_can_be_read_inside() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with determinism.float32_as("ieee"):
            assert torch.backends.cuda.matmul.allow_tf32 is False
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32 is True
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_in_half_precision_are_added_up_in_float32():
    matmul = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    try:
        for value in (True, False):
            for name in names:
                setattr(matmul, name, value)
            with determinism.undisturbed():
                assert not any(getattr(matmul, name) for name in names)
            assert [getattr(matmul, name) for name in names] == [value, value]
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)
