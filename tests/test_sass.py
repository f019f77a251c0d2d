"""The machine code of the CUDA kernels, read without a GPU: tools/check_sass.py."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def check_sass():
    spec = importlib.util.spec_from_file_location("check_sass", ROOT / "tools" / "check_sass.py")
    module = sys.modules["check_sass"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["check_sass"]


def listing(*lines):
    """Write instructions as nvdisasm does; labels as they are."""
    code = [
        line if line.startswith(".L") else f"        /*{16 * i:04x}*/   {line} ;"
        for i, line in enumerate(lines)
    ]
    return "\n".join([".text.kernel:", *code])


def faults(check_sass, *lines, name="copy<float, 4>", log=""):
    (kernel,) = check_sass.parse(listing(*lines), log)
    kernel.name = name
    return kernel.faults()


LOOP = (".L_x_1:", "LDG.E.128 R4, [R2.64]", "FADD R4, R4, R5", "STG.E.128 [R2.64], R4")
BACK = "@!P0 BRA `(.L_x_1)"


def test_a_good_kernel_has_no_fault(check_sass):
    assert faults(check_sass, *LOOP, BACK, "CALL.REL.NOINC `($__cuda_sm20_div_f32)", "EXIT") == []


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ((*LOOP, "CALL.REL.NOINC `($__internal_0_$__cuda_rcp_f32)", BACK), "calls in a loop"),
        ((*LOOP, "BRX R2 -0x900", BACK), "chooses a function in a loop"),
        ((".L_x_1:", "LDG.E R4, [R2.64]", "STG.E.64 [R2.64], R4", BACK), "no 16-byte access"),
        (("CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)", *LOOP, BACK), "64-bit division"),
    ],
)
def test_a_fault_is_found(check_sass, lines, fault):
    assert faults(check_sass, *lines) == [fault]


def test_spilt_registers_are_found(check_sass):
    log = (
        "ptxas info : Function properties for kernel\n    8 bytes stack frame, 8 bytes spill stores"
    )
    assert faults(check_sass, *LOOP, BACK, log=log) == ["8 bytes spilt"]


def test_only_innermost_loops_with_access_to_memory_count(check_sass):
    inner = ("@P1 BRX R2 -0x900", ".L_x_2:", "LDG.E.128 R4, [R2.64]", "@P0 BRA `(.L_x_2)")
    assert faults(check_sass, ".L_x_1:", *inner, BACK) == []
    assert faults(check_sass, ".L_x_3:", "BRX R2", "@P0 BRA `(.L_x_3)", *LOOP, BACK) == []


def test_doubles_may_be_divided_by_a_call(check_sass):
    lines = (*LOOP, "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_rn_f64_full)", BACK)
    assert faults(check_sass, *lines, name="copy<double, 2>") == []


@pytest.mark.slow
def test_kernels_compile_without_warnings_and_to_good_code(check_sass, tmp_path):
    if (why := check_sass.missing()) is not None:
        pytest.skip(f"the machine code cannot be read: {why}")
    for name in ("classify", "masked_copies", "confusion_counts", "class_moments", "map_moments"):
        source = ROOT / "csrc" / "cuda" / f"{name}.cu"
        kernels = check_sass.compiled(source, "sm_90", tmp_path)
        assert any(kernel.packed for kernel in kernels)
        assert {kernel.name: kernel.faults() for kernel in kernels if kernel.faults()} == {}
