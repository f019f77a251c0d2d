"""The compiled module itself: how it is found, what it reads, and that threads change nothing."""

import logging
import os
import subprocess
import sys
from typing import get_args

import pytest
import torch
from support.ops_cases import CORE, index, random_index, random_maps, using_backend
from torch._subclasses.fake_tensor import FakeTensorMode

from pyablate import _native, ops
from pyablate.ops import Activation
from pyablate.ops.activations import ActivationName

needs_core = pytest.mark.skipif(CORE is None, reason=f"no native module: {_native._why_not}")


def test_build_info_names_what_is_there():
    info = _native.build_info()
    assert set(info) == {
        "version",
        "native",
        "why_not",
        "compiler",
        "cuda",
        "cuda_architectures",
        "cuda_toolkit",
        "cpu_isa",
        "sanitizers",
    }
    assert info["native"] == (CORE is not None)
    assert (info["why_not"] is None) == info["native"]
    if info["native"]:
        assert info["cpu_isa"] in {"baseline", "avx2", "avx512"}
        assert bool(info["cuda_architectures"]) == info["cuda"] == CORE.has_cuda


def test_runs_on_the_reference_where_the_module_is_switched_off():
    program = """
import logging, torch
logging.basicConfig(level="INFO")
from pyablate import _native, ops
assert _native.core is None and not _native.build_info()["native"]
one = torch.tensor([0], dtype=torch.int32)
print(ops.classify(torch.eye(3), torch.zeros(1, 3), one, torch.zeros(3)).tolist())
"""
    environment = {**os.environ, "PYABLATE_NATIVE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[0]"
    assert run.stderr.count("PyTorch reference") == 1


def test_one_line_is_logged_where_the_module_is_missing(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pyablate._core", None)  # makes the import fail
    monkeypatch.delenv("PYABLATE_NATIVE", raising=False)
    with caplog.at_level(logging.INFO, logger="pyablate"):
        core, why_not = _native._load()
    assert core is None
    assert "import failed" in why_not
    assert len(caplog.records) == 1
    assert "reinstall" in caplog.text


@needs_core
def test_import_needs_no_torch():
    program = """
import sys, importlib.util
spec = importlib.util.spec_from_file_location("_core", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
print(module.grid_size(10, 4))
"""
    run = subprocess.run(
        [sys.executable, "-c", program, CORE.__file__], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "3"


@needs_core
@pytest.mark.parametrize(
    ("elements", "per_block", "expected"),
    [
        (0, 256, 0),
        (1, 256, 1),
        (256, 256, 1),
        (257, 256, 2),
        (2**31 * 256, 256, 2**31 - 1),  # cut off: the kernels step by the whole grid
        (2**62, 1, 2**31 - 1),
        (2**63 - 1, 256, 2**31 - 1),
        ((2**31 - 2) * 32, 32, 2**31 - 2),
    ],
)
def test_grid_sizes_do_not_overflow(elements, per_block, expected):
    assert CORE.grid_size(elements, per_block) == expected


@needs_core
@pytest.mark.parametrize("use_table", [True, False])
def test_tensors_are_read_alike_by_table_and_by_attributes(use_table):
    torch.manual_seed(0)
    memory = random_maps(4, 6, 8, 9)
    delta = memory[1:, 1::2, :, 2:]  # strided, with an offset
    arguments = (
        delta,
        torch.nn.Parameter(torch.randn(5, 3, 3, 16)),
        index([4, 0, 2]),
        index([0, 2, 1]),
        index([2, 0, 1]),
    )
    expected = ops.unit_delta(*[a.detach().clone() for a in arguments], padding=1)
    try:
        access = CORE.tensor_access(use_table)
        assert access == "attributes" or use_table
        result = ops.unit_delta(*arguments, padding=1)
    finally:
        CORE.tensor_access(True)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def call_core(logits, **changes):
    arguments = {
        "logits": logits,
        "delta": torch.zeros(2, 3),
        "image": index([0, 1]),
        "tolerance": torch.zeros(2),
        "out": torch.zeros(2, dtype=torch.int32),
        "relative": 0.0,
        "threads": 1,
        "stream": 0,
    }
    return CORE.classify(**{**arguments, **changes})


class Subclass(torch.Tensor):
    pass


@needs_core
def test_only_plain_tensors_are_read():
    with FakeTensorMode():
        fake = torch.zeros(2, 3)
    for wrong in (fake, torch.zeros(2, 3).as_subclass(Subclass), [[0.0] * 3] * 2, None):
        with pytest.raises(TypeError, match=r"plain torch\.Tensor"):
            call_core(wrong)
    with pytest.raises(TypeError, match="strided"):
        call_core(torch.zeros(2, 3).to_sparse())
    call_core(torch.zeros(2, 3))


@needs_core
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": torch.zeros(2, 4)}, "delta: expected size 3 along axis 1, got 4"),
        ({"delta": torch.zeros(3, 2).t()}, "delta: expected a contiguous tensor"),
        ({"delta": torch.zeros(2, 3).double()}, "delta: expected float32, got float64"),
        ({"delta": torch.zeros(2, 3, device="meta")}, "CPU or CUDA device|without storage"),
        ({"image": index([0, 2])}, "image: expected indices from 0 to 1, got 2"),
        ({"out": torch.zeros(2)}, "out: expected int32"),
        ({"logits": torch.zeros(2, 3).half()}, "logits: expected float32 or float64"),
    ],
)
def test_the_module_checks_for_itself(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call_core(**{"logits": torch.zeros(2, 3), **changes})


def change_on_core(kind, dtype=torch.float32):
    CORE.delta_activation(
        *(torch.zeros(2, 3), torch.zeros(2, 3, dtype=dtype), index([0, 1])),
        **dict.fromkeys(("scale", "addend", "addend_scale")),
        out=torch.zeros(2, 3, dtype=dtype),
        codes=(None, None),
        activation=(kind, 0.0, 0.0),
        threads=1,
        stream=0,
    )


@needs_core
def test_the_module_knows_the_functions_of_ops_and_no_others():
    known = len(get_args(ActivationName))
    for kind in range(known):
        change_on_core(kind)
    for kind in (-1, known):
        with pytest.raises(ValueError, match=f"no function has the number {kind}"):
            change_on_core(kind)


@needs_core
@pytest.mark.parametrize("use_table", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.uint8], ids=str)
def test_the_module_refuses_deltas_that_a_processor_has_no_kernel_for(dtype, use_table):
    try:
        CORE.tensor_access(use_table)
        with pytest.raises(ValueError, match=f"on a GPU alone, float16, got {str(dtype)[6:]}"):
            change_on_core(1, dtype)
    finally:
        CORE.tensor_access(True)


def every_operation():
    """Run each operation on work enough for many threads; return the results."""
    torch.manual_seed(1)
    pairs, images, units, classes = 700, 6, 9, 64
    image, column = random_index(pairs, images), random_index(pairs, units).sort().values
    maps = random_maps(images, units, 10, 10, zeros=0.5)
    weight, relu = torch.randn(12, 3, 3, 20), Activation("relu")
    base = torch.randn(images, 20, 10, 10)
    first = ops.unit_delta(
        maps, weight, index(range(units)), image, column, padding=1, activation=relu, base=base
    )
    logits, delta = torch.randn(images, classes), torch.randn(pairs, classes)
    tolerance = torch.full((images,), 0.2)
    label = random_index(3000, classes)
    return [
        first,
        ops.delta_activation(base, first, image, Activation("gelu")),
        ops.perturbed(base, first, image),
        ops.delta_product(base, first, base, first, image),
        ops.subtracted(first, base, image, dtype=torch.bfloat16),
        ops.delta_max_pool(base, first, image, kernel=2, stride=2, out_size=(5, 5)),
        ops.delta_max_pool(base, first.contiguous(), image, kernel=2, stride=2, out_size=(5, 5)),
        ops.classify(logits, delta, image, tolerance, relative=0.01),
        ops.head_flips(
            logits, torch.randn(images, 5000), torch.randn(classes, 5000), index([0] * 6), tolerance
        ),
        ops.confusion_counts(
            torch.randint(0, classes, (80, 3000), dtype=torch.int32), label, classes
        ),
        ops.masked_copies(base, image, random_index(pairs, 20), 0.5),
    ]


@needs_core
def test_threads_change_no_bit():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(every_operation())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_core
def test_relu_hardswish_and_decisions_are_the_same_on_every_processor():
    results = {}
    before = CORE.build_info()["cpu_isa"]
    for name in ("baseline", "avx2", "avx512"):
        if not CORE.use_isa(name):
            continue
        CORE.use_isa(before)
        with using_backend(name):
            torch.manual_seed(2)
            base, delta = torch.randn(3, 4, 9, 9), torch.randn(8, 4, 9, 9)
            image = random_index(8, 3)
            results[name] = [
                ops.delta_activation(base, delta, image, Activation("relu")),
                ops.delta_activation(base, delta, image, Activation("hardswish")),
                ops.delta_max_pool(base, delta, image, kernel=3, stride=2, out_size=(4, 4)),
                ops.classify(base[:, 0, 0], delta[:, 0, 0], image, torch.zeros(3)),
            ]
    first, *others = results.values()
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
