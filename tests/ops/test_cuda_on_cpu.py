"""The CUDA backends on the CPU, under AddressSanitizer, and the shim that lets them run there.

The tests of the native operations, those marked ``cuda``, run in a process of their own, whose
extension has the CUDA backends behind CPU tensors. This finds wrong indexing, missing barriers and
access out of bounds. It does not replace a GPU: see docs/development/cuda.md.
"""

import os
import re
import subprocess
import sys

import pytest
from support import cuda_on_cpu

_WHY_NOT = cuda_on_cpu.missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_WHY_NOT is not None, reason=f"no CUDA on the CPU: {_WHY_NOT}"),
]

SANITIZER_OPTIONS = {
    # Leaks would be Python's and PyTorch's. Returned-from frames cannot be told from those of a
    # fibre that waits.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:exitcode=99",
    "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=98",
}


@pytest.fixture(scope="session")
def faulty(tmp_path_factory):
    program = cuda_on_cpu.build_faulty(tmp_path_factory.mktemp("faulty"))

    def run(case, seed=0):
        environment = {**os.environ, **SANITIZER_OPTIONS, "PYABLATE_SHIM_SEED": str(seed)}
        done = subprocess.run(
            [program, case], env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr

    return run


@pytest.mark.parametrize("case", ["barriers", "loop", "grid", "warps", "launches"])
@pytest.mark.parametrize("seed", range(3))
def test_right_kernels_pass(faulty, case, seed):
    assert faulty(case, seed) == (0, "")


@pytest.mark.parametrize("case", ["no-barrier", "no-barrier-in-loop", "not-zeroed"])
@pytest.mark.parametrize("seed", range(3))
def test_missing_barriers_and_zeros_show_as_wrong_results(faulty, case, seed):
    assert faulty(case, seed) == (1, "")


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("past-the-end", "out[i] = static_cast<float>(i);"),
        ("past-dynamic-shared", "out[threadIdx.x] = values[threadIdx.x + 1];"),
        ("past-static-shared", "out[threadIdx.x] = values[threadIdx.x + 1];"),
    ],
)
def test_access_out_of_bounds_is_reported_with_its_line(faulty, case, line):
    code, report = faulty(case)
    assert code in {98, 99}
    assert "heap-buffer-overflow" in report or "out of bounds" in report
    source = (cuda_on_cpu.SHIM / "faulty.cu").read_text().splitlines()
    numbers = [int(n) for n in re.findall(r"faulty\.cu:(\d+)", report)]
    assert line in source[numbers[0] - 1]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("two-places", "waits in __syncthreads .* waits in __syncthreads"),
        ("ended", "waits in __syncthreads .* has ended"),
        ("some-lanes", "waits in __shfl_xor_sync .* waits in __syncwarp"),
        ("no-such-lane", "reads a lane that does not take part"),
    ],
)
def test_divergence_is_reported(faulty, case, message):
    code, report = faulty(case)
    assert code == 2
    assert re.search(message, report)


def test_sources_are_rewritten_where_they_are_no_cpp_and_nowhere_else():
    source = """extern __shared__ std::int32_t counts[];
__shared__ float tile[a][b + 1];
kernel<D, B>
    <<<grid, 256, 0, on>>>(p);
const bool less = a < b;
"""
    expected = """#line 1 "x.cu"
std::int32_t* const counts = ::shim::dynamic_shared<std::int32_t>();
auto& tile = ::shim::static_shared<float[a][b + 1]>("tile", __LINE__);
::shim::launch(kernel<D, B>,
    grid, 256, 0, on)(p);
const bool less = a < b;
"""
    assert cuda_on_cpu.to_cpp(source, "x.cu") == expected


@pytest.mark.timeout(3000)  # some ten minutes of one idle core, under AddressSanitizer
def test_backends_equal_the_reference(tmp_path):
    pytest.importorskip("pybind11")
    module = cuda_on_cpu.build_module(tmp_path)
    environment = {
        **os.environ,
        **SANITIZER_OPTIONS,
        "LD_PRELOAD": " ".join(cuda_on_cpu.runtime()),
        "PYABLATE_CUDA_ON_CPU": str(module),
        "PYABLATE_NATIVE": "0",  # the other extension is not wanted
        "OMP_NUM_THREADS": "1",
    }
    tests = sorted(str(path) for path in cuda_on_cpu.ROOT.glob("tests/ops/test_ops_*.py"))
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "--capture=sys"]
    done = subprocess.run(
        [*pytest_, "-p", "no:cacheprovider", *tests],
        env=environment,
        cwd=cuda_on_cpu.ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=2400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 400
    assert "skipped" not in done.stdout
