"""Check what is in a wheel: every file of the package, and nothing that does not belong there.

``python tools/check_wheel.py WHEEL LIST``, LIST being a file with one path of the sources on
each line (``git ls-files pyablate``). Run by ``make test-wheel``.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path


def faults(names: set[str], sources: set[str]) -> list[str]:
    """Say what a wheel lacks and what it has too much.

    Parameters
    ----------
    names : set of str
        Paths in the wheel.
    sources : set of str
        Paths of the package's files in the repository.
    """
    # auditwheel writes entries for folders too.
    installed = {name for name in names if ".dist-info/" not in name and not name.endswith("/")}
    native = {name for name in installed if name.startswith("pyablate/_core.")} - sources
    licences = [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    return [
        *(f"missing: {name}" for name in sorted(sources - installed)),
        *(f"not of the package: {name}" for name in sorted(installed - sources - native)),
        *([] if len(native) == 1 else [f"expected one native module, got {sorted(native)}"]),
        *([] if len(licences) == 1 else [f"expected one licence, got {licences}"]),
    ]


def main() -> None:
    """Check the wheel named on the command line; the exit status is 1 if something is wrong."""
    wheel, listing = sys.argv[1:]
    with zipfile.ZipFile(wheel) as archive:
        found = faults(set(archive.namelist()), set(Path(listing).read_text().split("\n")) - {""})
    sys.exit("\n".join(found) if found else None)


if __name__ == "__main__":
    main()
