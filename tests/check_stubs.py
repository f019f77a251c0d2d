"""Compare pyablate/_core.pyi with what the compiled module says of itself; --write renews it."""

from __future__ import annotations

import argparse
import difflib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

STUB = Path(__file__).resolve().parent.parent / "pyablate" / "_core.pyi"
HEADER = "# Generated from the compiled module: python tests/check_stubs.py --write\n"


def generate() -> str:
    """Return the stub of the module that ``import pyablate._core`` finds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pybind11_stubgen", "pyablate._core", "-o", folder]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise SystemExit(f"pybind11-stubgen failed:\n{run.stderr}")
        stub = (Path(folder) / "pyablate" / "_core.pyi").read_text(encoding="utf-8")
    # What is accepted besides plain numbers is of no use to callers; what was built is no part of
    # the interface.
    stub = stub.replace("typing.SupportsInt | typing.SupportsIndex", "int")
    stub = stub.replace("typing.SupportsFloat | typing.SupportsIndex", "float")
    stub = re.sub(
        r'typing\.Annotated\[(collections\.abc\.Sequence\[int\]), "FixedSize\(2\)"\]', r"\1", stub
    )
    stub = re.sub(r"^(has_cuda: bool) = .*$", r"\1", stub, flags=re.MULTILINE)
    return HEADER + stub


def main() -> int:
    """Compare, or write; the exit status is 1 if the stub is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew the stub")
    fresh = generate()
    if parser.parse_args().write:
        STUB.write_text(fresh, encoding="utf-8")
        return 0
    kept = STUB.read_text(encoding="utf-8") if STUB.exists() else ""
    difference = difflib.unified_diff(
        kept.splitlines(), fresh.splitlines(), str(STUB.name), "compiled module", lineterm=""
    )
    text = "\n".join(difference)
    if text:
        sys.stderr.write(f"{text}\nrun: python tests/check_stubs.py --write\n")
    return int(bool(text))


if __name__ == "__main__":
    sys.exit(main())
