"""What is installed, what was built, whether it works, and what to do where it does not.

Torch is imported with care only: that it cannot be imported is one of the things to be found out.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from pyablate._native import build_info
from pyablate._validation import first_line
from pyablate.runtime.processor import processor

Facts = dict[str, dict[str, Any]]
"""Section -> name -> a plain value."""

_MODELS = ("torchvision", "timm")
_REBUILD = "pip install --force-reinstall --no-deps --no-binary pyablate pyablate (or . in a clone)"


@dataclass(frozen=True)
class Finding:
    """Something to know about an installation, and what to do about it."""

    problem: bool  # whether something does not work; otherwise a remark
    what: str
    remedy: str

    def __str__(self) -> str:
        """One line for people."""
        return f"{'Problem' if self.problem else 'Note'}: {self.what}. {self.remedy}"


def facts() -> Facts:
    """Collect what a bug report should say about an installation; takes some seconds.

    A version is None where something is not installed. With a torch that can be imported, there
    are ``precisions`` too: measured rates of a convolution in billions of operations per second
    (0 where it cannot be done).
    """
    built = build_info()
    found: Facts = {
        "versions": {
            "pyablate": built.pop("version"),
            "Python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "C library": " ".join(platform.libc_ver()).strip() or None,
            **{name: _version(name) for name in _names(_requirements())},
        },
        "extras": {
            extra: {name: _version(name) for name in _names(_requirements(extra))}
            for extra in _extras()
        },
        "model libraries": {name: _version(name) for name in _MODELS},
        "installed but broken": _broken(),
        "native module": {
            "in use": built["native"],
            "not in use because": built["why_not"],
            "compiler": built["compiler"],
            "instruction set": built["cpu_isa"],
            "sanitizers": built["sanitizers"],
        },
        "CPU": {"model": processor(), "cores usable": _cores()},
        "CUDA": {
            "compiled in": built["cuda"],
            "architectures": built["cuda_architectures"],
            "toolkit": built["cuda_toolkit"],
            "driver": driver_version(),
        },
    }
    try:
        _look_at_torch(found)
    except Exception as error:  # whatever a broken installation raises
        found["self-test"] = {"error": f"{type(error).__name__}: {error}"}
    return found


def findings(known: Facts) -> list[Finding]:
    """Say what is wrong or missing in what `facts` returned, and what to do."""
    return [
        *_packages(known),
        *_native(known["native module"], known["CPU"]),
        *_arithmetic(known),
        *_cuda(known["CUDA"]),
        *_self_test(known.get("self-test", {})),
    ]


def as_json(known: Facts, found: list[Finding]) -> dict[str, Any]:
    """Return facts and findings as plain values; ``ok`` tells whether there is no problem."""
    return {
        "ok": not any(finding.problem for finding in found),
        "facts": known,
        "findings": [asdict(finding) for finding in found],
    }


# --- facts ---------------------------------------------------------------------------------------


def _broken() -> dict[str, str]:
    """Try to import the optional libraries that are installed; what those raise that cannot be."""
    found = {}
    extras = [name for extra in _extras() for name in _names(_requirements(extra))]
    modules = metadata.packages_distributions()
    for name in dict.fromkeys([*extras, *_MODELS]):
        brought = sorted(module for module, names in modules.items() if name in names)
        own = [module for module in brought if module == name.replace("-", "_")]
        for module in own or brought[:1]:
            try:
                importlib.import_module(module)
            except Exception as error:  # whatever a broken installation raises
                found[name] = f"{type(error).__name__}: {first_line(error)}"
    return found


def _look_at_torch(found: Facts) -> None:
    import torch

    from pyablate.engine.microbenchmarks import (
        change_rate,
        convolution_rate,
        difference_rate,
        matrix_rate,
        measure_again,
        unit_rate,
    )

    found["CPU"] |= {
        "threads of torch": torch.get_num_threads(),
        "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
    }
    tiers = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    measure_again()  # and keep it for plans and for the choice of precisions
    found["precisions"] = {
        name: round(convolution_rate("cpu", dtype) / 1e9, 1) for name, dtype in tiers.items()
    }
    for dtype in tiers.values():
        convolution_rate("cpu", dtype, alone=True)
    unit_rate("cpu")
    change_rate("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        matrix_rate("cpu", dtype)
        change_rate("cpu", dtype, "gelu")
        difference_rate("cpu", dtype)
    devices = range(torch.cuda.device_count())
    found["CUDA"] |= {
        "of torch": torch.version.cuda,
        "GPUs": [torch.cuda.get_device_name(index) for index in devices],
        "compute capabilities": [torch.cuda.get_device_capability(index) for index in devices],
    }
    found["self-test"] = _ablate_something()


def _ablate_something() -> dict[str, Any]:
    """Ablate all units of a tiny network and compare with the oracle."""
    import torch
    from torch import nn

    from pyablate.reference import compare
    from pyablate.runs._ablate import ablate

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
        ).eval()
        data = torch.randn(8, 1, 9, 9), torch.arange(8) % 3
    # Without an audit: what that finds wrong is mended, and is to be seen here.
    agreement = compare(ablate(model, data, ["*"], audit=0, progress=False), model, data)
    return {"pairs": agreement.pairs, "mismatches": agreement.mismatches}


def driver_version() -> str | None:
    """Return the newest CUDA version that the installed driver serves; None without a driver."""
    version = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else f"{version.value // 1000}.{version.value % 1000 // 10}"


def _requirements(extra: str = "") -> list[Requirement]:
    try:
        lines = metadata.requires("pyablate") or []
    except metadata.PackageNotFoundError:  # sources on the path, not installed
        return []
    all_of_them = map(Requirement, lines)
    return [
        each
        for each in all_of_them
        if (each.marker is None or each.marker.evaluate({"extra": extra}))
        and (each.marker is not None) == bool(extra)
    ]


def _extras() -> list[str]:
    """Extras that add abilities, without those for working on pyablate itself."""
    try:
        known = metadata.metadata("pyablate").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []
    return [extra for extra in known if extra not in ("bench", "browser", "dev", "docs", "test")]


def _names(requirements: list[Requirement]) -> list[str]:
    return [requirement.name for requirement in requirements]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- findings ------------------------------------------------------------------------------------


def _packages(known: Facts) -> list[Finding]:
    found = []
    for required in _requirements():
        version = known["versions"].get(required.name)
        if version is None:
            what = f"{required.name} is not installed"
        elif not required.specifier.contains(version, prereleases=True):
            what = f"{required.name} {version} is installed, {required.specifier} is needed"
        else:
            continue
        found.append(Finding(True, what, f"pip install '{required}'"))
    for extra, packages in known["extras"].items():
        missing = [name for name, version in packages.items() if version is None]
        if missing:
            what = f"the extra {extra} is not installed ({', '.join(missing)})"
            found.append(Finding(False, what, f"For it: pip install 'pyablate[{extra}]'"))
    found += [
        Finding(
            True,
            f"{name} is installed but cannot be imported ({error})",
            f"pip install --force-reinstall {name}",
        )
        for name, error in known["installed but broken"].items()
    ]
    found += [
        Finding(False, f"{name}:NAME models need {name}", f"For them: pip install {name}")
        for name, version in known["model libraries"].items()
        if version is None
    ]
    return found


def _native(native: dict[str, Any], cpu: dict[str, Any]) -> list[Finding]:
    slower = "so everything runs, slower, on plain PyTorch"
    if not native["in use"]:
        why = str(native["not in use because"])
        if "PYABLATE_NATIVE" in why:
            what = f"the native module is switched off by PYABLATE_NATIVE, {slower}"
            return [Finding(False, what, "Unset that variable to use it.")]
        what = f"the native module is not in use ({why}), {slower}"
        remedy = (
            f"Install a wheel for this Python and platform, or, with a C++ compiler: {_REBUILD}"
        )
        return [Finding(True, what, remedy)]
    found = []
    if native["instruction set"] == "baseline" and platform.machine() in ("x86_64", "AMD64"):
        what = "this CPU has no AVX2: native operations take their plain, slower form"
        found.append(Finding(False, what, "Use another machine where speed matters."))
    if native["sanitizers"]:
        what = f"the native module is instrumented ({native['sanitizers']}) and slow"
        found.append(Finding(False, what, f"Rebuild without PYABLATE_SANITIZE: {_REBUILD}"))
    if cpu.get("threads of torch", 2) == 1 and cpu["cores usable"] > 1:
        what = f"torch uses 1 of {cpu['cores usable']} cores"
        found.append(Finding(False, what, "Unset OMP_NUM_THREADS, or set it to their number."))
    return found


def _arithmetic(known: Facts) -> list[Finding]:
    rates = known.get("precisions")
    if rates is None or any(rates[name] > rates["fp32"] for name in ("bf16", "int8")):
        return []
    what = "neither bfloat16 nor 8-bit integers are faster than float32 here"
    return [Finding(False, what, "Runs stay in float32; CPUs with AVX-512 VNNI or AMX are faster.")]


def _cuda(cuda: dict[str, Any]) -> list[Finding]:
    gpus = cuda.get("GPUs", [])
    if not cuda["compiled in"]:
        if cuda["driver"] is None and not gpus:
            return []  # nothing here that could use them
        nvcc = "found" if shutil.which("nvcc") else "not found"
        what = f"built without CUDA kernels (nvcc is {nvcc} on the path)"
        remedy = f"With the CUDA toolkit: PYABLATE_CUDA=ON {_REBUILD}"
        return [Finding(bool(gpus), what, remedy)]
    if not gpus:
        what = "torch sees no GPU" if cuda.get("of torch") else "this torch has no CUDA"
        return [Finding(False, f"CUDA kernels are built but idle: {what}", "Nothing to do on CPU.")]
    found = []
    if cuda["driver"] and _major(cuda["driver"]) < _major(cuda["toolkit"]):
        what = f"the driver serves CUDA {cuda['driver']}, the kernels need {cuda['toolkit']}"
        found.append(Finding(True, what, "Update the driver, or build with an older toolkit."))
    for name, capability in zip(gpus, cuda["compute capabilities"], strict=True):
        if not has_code_for(cuda["architectures"], capability):
            what = f"{name} (compute capability {'.'.join(map(str, capability))}) has no kernels: "
            what += f"built for {cuda['architectures']}"
            found.append(Finding(True, what, "PYABLATE_NATIVE=0 runs it on plain PyTorch."))
    return found


def has_code_for(architectures: str, capability: tuple[int, int]) -> bool:
    """Tell whether a GPU can run what was compiled for ``"80-real 90-virtual"`` or the like.

    Machine code runs on the same major version from its minor version on, PTX on anything newer.
    """
    own = 10 * capability[0] + capability[1]
    for word in architectures.split():
        number, _, kind = word.partition("-")
        least = int(number.rstrip("af"))
        if own >= least and (kind != "real" or own // 10 == least // 10):
            return True
    return False


def _self_test(outcome: dict[str, Any]) -> list[Finding]:
    if "error" in outcome:
        what = f"an ablation of a tiny network failed: {outcome['error']}"
        remedy = "If it is torch that fails: pip install --force-reinstall torch"
        return [Finding(True, what, f"{remedy}; otherwise please report this.")]
    if outcome.get("mismatches"):
        what = (
            f"{outcome['mismatches']} of {outcome['pairs']} predictions of the self-test are wrong"
        )
        remedy = "Please report this with the output of pyablate doctor --json; until then set "
        return [Finding(True, what, remedy + "PYABLATE_NATIVE=0 and precision='fp32'.")]
    return []


def _major(version: str) -> int:
    return int(version.partition(".")[0])
