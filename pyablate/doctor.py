"""What is installed, what was built, and how to get what is missing."""

from __future__ import annotations

import platform
import shutil
from importlib import metadata
from typing import Any

import torch

from pyablate._native import build_info

_PACKAGES = ("torch", "numpy", "scipy", "pandas", "xarray", "zarr", "safetensors")
_OPTIONAL = ("torchvision", "timm")


def facts() -> dict[str, Any]:
    """Collect what a bug report should say about an installation.

    Returns
    -------
    dict
        Plain values by name: versions (None where not installed), what the extension was built
        with, the CPU and the GPUs.
    """
    built = build_info()
    return {
        "pyablate": built["version"],
        "Python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{name: _installed(name) for name in (*_PACKAGES, *_OPTIONAL)},
        "native module": built["native"],
        "native module missing because": built["why_not"],
        "compiler": built["compiler"],
        "instruction set in use": built["cpu_isa"],
        "CPU capability of torch": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "CUDA compiled in": built["cuda"],
        "CUDA architectures": built["cuda_architectures"],
        "CUDA toolkit": built["cuda_toolkit"],
        "CUDA of torch": torch.version.cuda,
        "GPUs": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def advice(known: dict[str, Any]) -> list[str]:
    """Say what is missing and how to get it; a single line if nothing is.

    Parameters
    ----------
    known : dict
        What `facts` returned.
    """
    lines = []
    if not known["native module"]:
        switched_off = "PYABLATE_NATIVE" in str(known["native module missing because"])
        way = (
            "Unset PYABLATE_NATIVE to use it."
            if switched_off
            else "Reinstall from source where a C++ compiler is found: "
            "pip install --force-reinstall --no-deps ."
        )
        lines.append(
            "The native module is not in use, so everything runs on plain PyTorch, slower. " + way
        )
    if known["native module"] and not known["CUDA compiled in"]:
        found = "found" if shutil.which("nvcc") else "not found"
        lines.append(
            f"Built without CUDA kernels (nvcc is {found} on the path now). With the CUDA toolkit: "
            "PYABLATE_CUDA=ON pip install --force-reinstall --no-deps ."
        )
    if known["CUDA compiled in"] and not known["GPUs"]:
        reason = "torch sees no GPU" if known["CUDA of torch"] else "this torch has no CUDA"
        lines.append(f"CUDA kernels are built but idle: {reason}.")
    for name in _OPTIONAL:
        if known[name] is None:
            lines.append(f"{name}:NAME models need {name}: pip install {name}")
    return lines or ["Nothing is missing."]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
