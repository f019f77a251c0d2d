"""Compiles the CUDA backend as C++ for the CPU, under sanitizers, with the headers in cuda_shim/.

Its sources are compiled as they are but for what is no C++: launches and shared memory become calls
of the shim. Line numbers stay, and reports name the ``.cu`` file.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "tests" / "cuda_shim"
COMPILER = os.environ.get("CXX", "g++")
SANITIZERS = "address,undefined"
FLAGS = [
    *["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer"],
    "-ffp-contract=off",  # no fused sums, as with --fmad=false
    *[f"-I{SHIM}", f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{ROOT / 'csrc' / 'include'}"],
]
SANITIZE = [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"]

_REWRITES = [
    # kernel<T><<<grid, block, shared, stream>>>(p)  ->  shim::launch(kernel<T>, grid, ...)(p)
    (re.compile(r"(\w+(?:<[^<>]*>)?)(\s*)<<<(.*?)>>>", re.S), r"::shim::launch(\1,\2\3)"),
    # extern __shared__ T name[];
    (
        re.compile(r"extern\s+__shared__\s+([\w: ]+?)\s+(\w+)\[\];"),
        r"\1* const \2 = ::shim::dynamic_shared<\1>();",
    ),
    # __shared__ T name;  __shared__ T name[m][n];
    (
        re.compile(r"__shared__\s+([\w:<> ]+?)\s+(\w+)((?:\[[^\]]*\])*);"),
        r'auto& \2 = ::shim::static_shared<\1\3>("\2", __LINE__);',
    ),
]


def to_cpp(source: str, name: str) -> str:
    """Return CUDA source as C++ for the shim; ``name`` is the file that reports shall name."""
    for pattern, replacement in _REWRITES:
        source = pattern.sub(replacement, source)
    return f'#line 1 "{name}"\n{source}'


def missing() -> str | None:
    """Say what this machine lacks for building and running the backends on the CPU, if anything."""
    if not sys.platform.startswith("linux"):
        return "the sanitizer's runtime is loaded beforehand as Linux does it"
    if shutil.which(COMPILER) is None:
        return f"no compiler {COMPILER}"
    if not all(Path(path).is_absolute() for path in runtime()):
        return f"{COMPILER} has no AddressSanitizer that can be loaded into Python"
    return None


def runtime() -> list[str]:
    """Return the libraries that a Python needs beforehand to load the sanitized module."""
    found = [
        _run([COMPILER, f"-print-file-name={name}"]).strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return [str(Path(path).resolve()) if os.sep in path else path for path in found]


def build_module(folder: Path) -> Path:
    """Compile the extension with the CUDA backends on the CPU; return its path."""
    import pybind11

    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    python += ['-DPYABLATE_COMPILER="shim"', '-DPYABLATE_CUDA_ARCHITECTURES="CPU"']
    python += ['-DPYABLATE_CUDA_TOOLKIT="shim"', f'-DPYABLATE_SANITIZERS="{SANITIZERS}"']
    csrc = ROOT / "csrc"
    # Only the kernels are instrumented: the bindings compile faster without, the threads run so.
    jobs = {path: SANITIZE for path in sorted(csrc.glob("cuda/*.cu"))}
    shimmed = {csrc / "bindings" / "torch_view.cpp"}  # in twins.cpp
    bindings = set(csrc.glob("bindings/*.cpp")) - shimmed
    for path in (*sorted(bindings), SHIM / "twins.cpp", csrc / "cpu/dispatch.cpp"):
        jobs[path] = [*python, "-O0", "-g0"]
    jobs[SHIM / "threads.cpp"] = ["-O2"]
    return _build(jobs, folder / "_core.so", ["-shared"])


def build_faulty(folder: Path) -> Path:
    """Compile the kernels that the shim itself is tested with; return the program's path."""
    jobs = {SHIM / "faulty.cu": SANITIZE, SHIM / "threads.cpp": ["-O2"]}
    return _build(jobs, folder / "faulty", [])


def _build(jobs: dict[Path, list[str]], target: Path, link: list[str]) -> Path:
    objects = [target.parent / f"{target.stem}-{path.stem}.o" for path in jobs]

    def compile_one(path: Path, output: Path) -> None:
        if path.suffix == ".cu":
            source = output.with_suffix(".cpp")
            source.write_text(to_cpp(path.read_text(), str(path.relative_to(ROOT))))
        else:
            source = path
        _run([COMPILER, *FLAGS, *jobs[path], "-c", str(source), "-o", str(output)])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_one, jobs, objects))
    _run([COMPILER, *SANITIZE, *link, *map(str, objects), "-o", str(target)])
    return target


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout
