"""Collect, where there is a network, the wheels that a GPU machine without network lacks.

    python benchmarks/gpu_wheels.py have.txt [--folder .whl]

`have.txt` lists what Python there has, one `name==version` or bare name a line (`pip list
--format=freeze` there): versions are kept to when the others are chosen, bare names count as
present. `gpu.sh` takes the wheels from that folder, and the extension if `--build` put it there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]
EXTRAS = "test,bench,attributions,compression"


def main() -> None:
    """Fetch what is missing, and what that needs in turn; what is there is never fetched."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("have", type=Path)
    parser.add_argument("--folder", type=Path, default=ROOT / ".whl")
    parser.add_argument("--python", default="3.12", help="version there")
    parser.add_argument("--extras", default=EXTRAS, help="of pyproject.toml")
    parser.add_argument("--build", action="store_true", help="compile with CUDA here (nvcc)")
    parser.add_argument("--list", action="store_true", help="only tell what is missing")
    arguments = parser.parse_args()
    lines = present(arguments.have.read_text().splitlines())
    names = {canonicalize_name(Requirement(line).name) for line in lines}
    queue = missing(names, arguments.extras.split(","), arguments.python)
    print("missing:", ", ".join(map(str, queue)) or "nothing")
    if arguments.list:
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for old in arguments.folder.glob("*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch, "constraints.txt")
        constraints.write_text("\n".join(line for line in lines if "==" in line) + "\n")
        while queue:
            wanted = queue.pop(0)
            name = canonicalize_name(wanted.name)
            if name not in names:
                names.add(name)
                wheel = fetched(wanted, arguments.folder, constraints, arguments.python)
                print(" ", wheel.name)
                queue += needs(wheel, arguments.python)
    if arguments.build:
        build(arguments.folder)


def build(folder: Path) -> None:
    """Compile with this Python, of the version there, and note from which sources."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYABLATE_CUDA": "ON"}, check=True)
    for made in (ROOT / "pyablate").glob("_core*.so"):
        shutil.copy(made, folder)
    script = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--sources"]
    done = subprocess.run(script, stdout=subprocess.PIPE, text=True, check=True)
    (folder / "sources").write_text(done.stdout)


def present(lines: Iterable[str]) -> list[str]:
    """Read what is there; local versions (2.11.0+cu130) and links are cut."""
    bare = (line.split("#")[0].split("@")[0].split("+")[0].strip() for line in lines)
    return [line for line in bare if line and not line.startswith("-")]


def missing(names: set[str], extras: Iterable[str], python: str) -> list[Requirement]:
    """Find what the package and some extras ask for and is not there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"]]
    for extra in extras:
        asked += project["optional-dependencies"][extra]
    return [one for one in applying(asked, python) if canonicalize_name(one.name) not in names]


def applying(asked: Iterable[str], python: str) -> list[Requirement]:
    """Read requirements that hold on that machine, of other packages than this one."""
    there = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    found = [Requirement(one) for one in asked]
    return [
        one
        for one in found
        if one.name != "pyablate" and (one.marker is None or one.marker.evaluate(there))
    ]


def fetched(wanted: Requirement, folder: Path, constraints: Path, python: str) -> Path:
    """Let pip fetch one wheel without what it needs."""
    before = set(folder.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    asked = re.sub(r";.*", "", str(wanted))
    subprocess.run([*command, "-c", str(constraints), asked], check=True)
    (wheel,) = set(folder.glob("*.whl")) - before
    return wheel


def needs(wheel: Path, python: str) -> list[Requirement]:
    """Read what a wheel asks for."""
    with zipfile.ZipFile(wheel) as opened:
        name = next(n for n in opened.namelist() if n.endswith(".dist-info/METADATA"))
        text = opened.read(name).decode()
    head = text.split("\n\n")[0].splitlines()
    key = "Requires-Dist: "
    return applying((line.removeprefix(key) for line in head if line.startswith(key)), python)


if __name__ == "__main__":
    main()
