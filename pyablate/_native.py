"""The only importer of the compiled module ``pyablate._core``.

Importing never fails: where the module is missing, :data:`core` is ``None`` and everything runs on
:mod:`pyablate.ops.reference`. ``PYABLATE_NATIVE=0`` in the environment forces that.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

from pyablate._version import __version__

__all__ = ["build_info", "core"]

logger = logging.getLogger("pyablate")


def _load() -> tuple[Any, str | None]:
    """Return the compiled module and None, or None and the reason why it is not used."""
    if os.environ.get("PYABLATE_NATIVE", "1").lower() in {"0", "off", "false", "no"}:
        logger.info("PYABLATE_NATIVE=0: running on the PyTorch reference operations")
        return None, "switched off by the environment variable PYABLATE_NATIVE"
    try:
        return importlib.import_module("pyablate._core"), None
    except ImportError as error:
        logger.warning(
            "the native module is not available (%s): running, slower, on the PyTorch reference; "
            "reinstall pyablate where a C++ compiler is found to have it",
            error,
        )
        return None, f"import failed: {error}"


core: Any
core, _why_not = _load()


def build_info() -> dict[str, Any]:
    """Tell what was built and what of it is in use on this machine.

    Returns
    -------
    dict
        ``version`` (of the package), ``native`` (bool: is the compiled module loaded), ``why_not``
        (str or None), ``compiler`` (str or None), ``cuda`` (bool: were the CUDA backends compiled),
        ``cuda_architectures`` (str or None), ``cuda_toolkit`` (str or None), ``cpu_isa`` (the
        instruction set in use: ``"baseline"``, ``"avx2"`` or ``"avx512"``; None without the module)
        and ``sanitizers`` (str or None).

    Examples
    --------
    >>> pa.build_info()["version"].startswith(pa.__version__)
    True
    """
    info: dict[str, Any] = {
        "version": __version__,
        "native": core is not None,
        "why_not": _why_not,
        "compiler": None,
        "cuda": False,
        "cuda_architectures": None,
        "cuda_toolkit": None,
        "cpu_isa": None,
        "sanitizers": None,
    }
    if core is not None:
        info.update(core.build_info())
    return info
