"""Build of the native module: setuptools asks, CMake compiles.

Environment variables:

``PYABLATE_CUDA``
    ``AUTO`` (default: compile the CUDA backends if nvcc works), ``ON`` or ``OFF``.
``PYABLATE_EXTENSION``
    ``OFF`` leaves the native module out; everything then runs on the PyTorch reference.
``PYABLATE_WERROR``
    ``ON``: warnings of the compilers are errors, as in CI.
``CMAKE_ARGS``
    More options of CMake, for example ``-DCMAKE_CUDA_ARCHITECTURES=86``; of CMake's own variables,
    ``CXX``, ``CXXFLAGS``, ``CUDACXX`` and ``CUDAARCHS`` are read too.
``PYABLATE_SANITIZE``
    For example ``address,undefined``: instrument the native module (see tests/sanitize.sh).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NO_COMPILER = """
pyablate: the native module could not be built: {reason}.
It needs a C++20 compiler (GCC >= 10 or Clang >= 12; Debian: apt install g++), CMake >= 3.24 and
Ninja; the last two come from PyPI by themselves unless build isolation is off.
To install without it, set PYABLATE_EXTENSION=OFF: everything runs, slower, on PyTorch alone.
"""


def enabled() -> bool:
    """Whether the native module is to be built."""
    return os.environ.get("PYABLATE_EXTENSION", "ON").upper() not in {"OFF", "0", "NO"}


class CMakeBuild(build_ext):
    """Build every extension by one run of CMake."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build ``ext``; the module lands where setuptools expects it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "native"
        build.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit(NO_COMPILER.format(reason="cmake was not found"))
        self._run([cmake, *self._options(target)], build, "CMake could not configure it")
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        self._run([cmake, "--build", ".", "--parallel", jobs], build, "the compiler failed")

    def _options(self, target: Path) -> list[str]:
        import pybind11

        options = [
            str(ROOT),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPYABLATE_OUTPUT_DIRECTORY={target.parent}",
            f"-DPYABLATE_OUTPUT_NAME={target.name}",
            f"-DPYABLATE_VERSION={self.distribution.get_version()}",
            f"-DPYABLATE_CUDA={os.environ.get('PYABLATE_CUDA', 'AUTO').upper()}",
            f"-DPYABLATE_SANITIZE={os.environ.get('PYABLATE_SANITIZE', '')}",
            f"-DPYABLATE_WERROR={os.environ.get('PYABLATE_WERROR', 'OFF')}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        if shutil.which("ninja") is not None:
            options += ["-G", "Ninja"]
        return options + shlex.split(os.environ.get("CMAKE_ARGS", ""))

    @staticmethod
    def _run(command: list[str], cwd: Path, reason: str) -> None:
        # A build folder made with another generator or Python is no use: start it afresh once.
        result = subprocess.run(command, cwd=cwd, check=False)
        if result.returncode and "--build" not in command and (cwd / "CMakeCache.txt").exists():
            shutil.rmtree(cwd)
            cwd.mkdir()
            result = subprocess.run(command, cwd=cwd, check=False)
        if result.returncode:
            raise SystemExit(NO_COMPILER.format(reason=f"{reason} (see the messages above)"))


setup(
    ext_modules=[Extension("pyablate._core", sources=[])] if enabled() else [],
    cmdclass={"build_ext": CMakeBuild},
)
