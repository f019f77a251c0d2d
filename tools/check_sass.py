"""Reads the machine code of the CUDA kernels: bytes an access, calls, spills. No GPU is needed.

    python tools/check_sass.py             compile csrc/cuda/*.cu for sm_90, print a table, check it
    python tools/check_sass.py --write     put the table into docs/development/cuda.md too

Needs nvcc, and nvdisasm beside it, on PATH or of the wheel nvidia-cuda-nvdisasm. The loops that
are looked at are those that read or write memory and hold no other such loop. Exits with 1 where a
kernel does what it must not: spill registers, divide integers of 64 bits by a call, choose an
activation or call a function in such a loop, unless it computes in double (a division of doubles is
a call), or, being for aligned data, leave out 16-byte access.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "development" / "cuda.md"
BEGIN, END = "<!-- sass: begin -->\n", "<!-- sass: end -->\n"
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Werror=all-warnings"]
FLAGS += ["-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v", "-cubin"]

_CODE = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(.*?);")
_LABEL = re.compile(r"^(\.L_x?_?\d+):")
_FUNCTION = re.compile(r"^\.text\.(\S+):")


@dataclass
class Kernel:
    """What one kernel compiles to.

    Attributes
    ----------
    name : str
        With its template arguments.
    registers, spills : int
        Registers of a thread, bytes of them that lie in memory.
    lines : list of str
        Instructions, with the labels between them.
    """

    name: str
    registers: int = 0
    spills: int = 0
    lines: list[str] = field(default_factory=list)

    @property
    def instructions(self) -> list[str]:
        """All of them, without the labels."""
        return [line for line in self.lines if not line.startswith(".L")]

    @property
    def double(self) -> bool:
        """Whether it computes in double, of data or sums."""
        return "double" in self.name or any("DADD" in line for line in self.lines)

    @property
    def packed(self) -> bool:
        """Whether it is the kernel for aligned data: its numbers at a time are more than one."""
        sizes = [int(n) for n in re.findall(r"[<,] ?(\d+)", self.name)]
        return any(n > 1 for n in sizes)

    def loops(self) -> list[list[str]]:
        """Innermost loops that reach global memory: from a label to a branch back to it."""
        where = {line[:-1]: i for i, line in enumerate(self.lines) if line.startswith(".L")}
        spans = []
        for i, line in enumerate(self.lines):
            target = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)
            if target and where.get(target[1], i) < i:
                spans.append((where[target[1]], i))
        reach = [s for s in spans if any(_global(line) for line in self.lines[s[0] : s[1]])]
        inner = [s for s in reach if not any(_within(o, s) for o in reach if o != s)]
        return [self.lines[a : b + 1] for a, b in inner]

    def widest(self, access: str) -> int:
        """Bytes of the widest access to global memory, LDG or STG; 0 without any."""
        found = [line for line in self.instructions if re.search(rf"\b{access}\b", line)]
        return max(map(_bytes, found), default=0)

    def calls(self) -> list[str]:
        """Functions that it calls anywhere."""
        return [
            re.sub(r".*\$(__\w+).*", r"\1", line) for line in self.instructions if "CALL" in line
        ]

    def faults(self) -> list[str]:
        """List what it does that it must not."""
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes spilt")
        if any("div_s64" in name or "div_u64" in name or "rem_" in name for name in self.calls()):
            found.append("64-bit division")
        for loop in self.loops():
            if any("BRX" in line for line in loop):
                found.append("chooses a function in a loop")
            if any("CALL" in line for line in loop) and not self.double:
                found.append("calls in a loop")
        # All functions but a few in one kernel: four numbers of bfloat16 or float16 at a time.
        least = 8 if self.name.endswith("AnyActivation>") else 16
        if self.packed and max(self.widest("LDG"), self.widest("STG")) < least:
            found.append(f"no {least}-byte access")
        return sorted(set(found))


def _global(line: str) -> bool:
    return re.search(r"\b(LDG|STG)\b", line) is not None


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _bytes(line: str) -> int:
    """Bytes of one access: LDG.E.128, STG.E.U16, and 4 where nothing is said."""
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    suffixes = re.search(r"\b(?:LDG|STG)((?:\.\w+)*)", line)
    parts = suffixes[1].split(".") if suffixes else []
    return next((sizes[part] for part in parts if part in sizes), 4)


def parse(disassembly: str, log: str) -> list[Kernel]:
    """Read what nvdisasm -c and ptxas -v print of one file."""
    kernels: dict[str, Kernel] = {}
    current: Kernel | None = None
    for line in disassembly.splitlines():
        if (start := _FUNCTION.match(line)) is not None:
            current = kernels.setdefault(start[1], Kernel(start[1]))
        elif current is not None and (code := _CODE.match(line)) is not None:
            current.lines.append(code[2].strip())
        elif current is not None and (label := _LABEL.match(line)) is not None:
            current.lines.append(label[1] + ":")
    name = None
    for line in log.splitlines():
        if (start := re.search(r"Function properties for (\S+)", line)) is not None:
            name = start[1]
        if name in kernels and (spilt := re.search(r"(\d+) bytes spill stores", line)):
            kernels[name].spills = int(spilt[1])
        if name in kernels and (used := re.search(r"Used (\d+) registers", line)):
            kernels[name].registers = int(used[1])
    return list(kernels.values())


def compiled(source: Path, architecture: str, folder: Path) -> list[Kernel]:
    """Compile one file, warnings being errors, and read it."""
    cubin = folder / f"{source.stem}.cubin"
    includes = [f"-I{ROOT / 'csrc' / 'include'}", f"-I{source.parent}"]
    command = ["nvcc", *FLAGS, f"-arch={architecture}", *includes, "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    text = subprocess.run([str(disassembler()), "-c", cubin], capture_output=True, check=True)
    kernels = parse(text.stdout.decode(), done.stdout + done.stderr)
    names = subprocess.run(
        ["c++filt"], input="\n".join(k.name for k in kernels), text=True, capture_output=True
    )
    for kernel, name in zip(kernels, names.stdout.splitlines(), strict=True):
        kernel.name = re.sub(r"^void |pyablate::|cuda::|\(anonymous namespace\)::", "", name)
        kernel.name = re.sub(r"\(\w*Params.*\)$", "", kernel.name)
    return kernels


def disassembler() -> Path | None:
    """Where nvdisasm lies: on PATH, beside nvcc, or in its wheel."""
    found = shutil.which("nvdisasm")
    if found is not None:
        return Path(found)
    spec = importlib.util.find_spec("nvidia")
    places = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    return next((path for place in places for path in place.glob("*/bin/nvdisasm")), None)


def missing() -> str | None:
    """Say what this machine lacks, if anything."""
    if shutil.which("nvcc") is None:
        return "no nvcc"
    return None if disassembler() is not None else "no nvdisasm (wheel nvidia-cuda-nvdisasm)"


def table(kernels: dict[str, list[Kernel]]) -> str:
    """Write a Markdown table with a row for each operation."""
    rows = [
        "| operation | kernels | 16-byte reads | 16-byte writes | registers | spills | calls |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in kernels.items():
        packed = [k for k in found if k.packed]
        reads = sum(k.widest("LDG") == 16 for k in packed)
        writes = sum(k.widest("STG") == 16 for k in packed)
        calling = [k for k in found if k.calls()]
        calls = "none" if not calling else f"{len(calling)} kernels, in double"
        if any(not k.double for k in calling):
            calls = f"{len(calling)} kernels"
        of = f" of {len(packed)}"
        spills = sum(k.spills for k in found)
        registers = [k.registers for k in found]
        rows.append(
            f"| `{name}` | {len(found)}, {len(packed)} of them for aligned data "
            f"| {str(reads) + of if packed else '-'} | {str(writes) + of if packed else '-'} "
            f"| {min(registers)} to {max(registers)} | {spills or 'none'} | {calls} |"
        )
    return "\n".join(rows) + "\n"


def main() -> int:
    """Compile, print, check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("operations", nargs="*", help="all of csrc/cuda if none is named")
    parser.add_argument("--architecture", default="sm_90")
    parser.add_argument("--write", action="store_true", help="the table into the page")
    parser.add_argument("--each", action="store_true", help="print every kernel")
    arguments = parser.parse_args()
    if (why := missing()) is not None:
        raise SystemExit(f"the machine code cannot be read: {why}")
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if arguments.operations:
        sources = [path for path in sources if path.stem in arguments.operations]
    found: dict[str, list[Kernel]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for path in sources:
            found[path.stem] = compiled(path, arguments.architecture, Path(folder))
    bad = 0
    for kernels in found.values():
        for kernel in kernels:
            faults = kernel.faults()
            bad += bool(faults)
            if faults or arguments.each:
                print(kernel.name, len(kernel.instructions), kernel.registers, "; ".join(faults))
    text = table(found)
    print(text, end="")
    if arguments.write and not bad:
        page = PAGE.read_text()
        head, tail = page.index(BEGIN) + len(BEGIN), page.index(END)
        PAGE.write_text(page[:head] + text + page[tail:])
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
