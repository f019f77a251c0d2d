"""The packages of pyablate and the arrows between them, read from the imports.

    python tools/architecture.py docs/images/architecture.png

``make pictures`` draws docs/development/architecture.md's picture with it, and
tests/test_architecture.py holds the imports to the order given here.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ORDER = tuple(
    """_version _native _validation runtime io ops data interventions network results analysis plots
    report result engine runs reference attribution comparison unit_attributes experiments
    compression demo FORMER __init__ cli __main__""".split()
)
"""Packages, and modules of the package root, each of which imports only from those before it."""

FORMER = frozenset(
    "directions measures planning progress run_store statistics store targets".split()
)
"""Modules of the package root that only repeat what was documented under their names in 0.1."""

Imports = dict[str, dict[str, list[int]]]
"""Module -> the modules that it imports -> the lines on which it does."""


def imports(package: Path) -> Imports:
    """Read every import, those in functions and for type checkers only too.

    The stub of a package that loads its names lazily counts as its imports.
    """
    files = [*sorted(package.rglob("*.py")), *sorted(package.rglob("__init__.pyi"))]
    modules = {_module(path, package): path for path in files}
    found: Imports = {name: {} for name in modules}
    for path in files:
        name = _module(path, package)
        for target, line in _imported(path, package, modules):
            if target != name:
                found[name].setdefault(target, []).append(line)
    return found


def _module(path: Path, package: Path) -> str:
    return ".".join(path.relative_to(package.parent).with_suffix("").parts)


def _imported(path: Path, package: Path, modules: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    own = path.relative_to(package.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*own[: len(own) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == package.name:
                yield _home(name, modules), node.lineno


def _home(name: str, modules: Mapping[str, Path]) -> str:
    """Find the module of a dotted name: itself, or the nearest one around it."""
    while True:
        for known in (name, f"{name}.__init__"):
            if known in modules:
                return known
        name = name.rpartition(".")[0]
        if not name:
            raise ValueError("an import of this package that leads nowhere")


def room(module: str) -> str:
    """Package of a module, or the module itself where it is in the package root."""
    name = module.split(".")[1]
    return "FORMER" if name in FORMER else name


def upward(found: Imports) -> list[str]:
    """List imports against the order, one line each: ``module -> module (line)``."""
    return [
        f"{module} -> {target} ({', '.join(map(str, lines))})"
        for module, targets in found.items()
        for target, lines in targets.items()
        if _height(target) > _height(module)
    ]


def _height(module: str) -> int:
    name = room(module)
    return ORDER.index(name) if name in ORDER else -1


def circles(found: Imports) -> list[list[str]]:
    """List the modules that import one another, directly or by way of others."""
    reached = {module: _reached(module, found) for module in found}
    together = {
        tuple(sorted(m for m in reached[module] if module in reached[m])) for module in found
    }
    return [list(circle) for circle in sorted(together) if circle]


def _reached(module: str, found: Imports) -> set[str]:
    seen: set[str] = set()
    waiting = list(found[module])
    while waiting:
        target = waiting.pop()
        if target not in seen:
            seen.add(target)
            waiting += found[target]
    return seen


# --- the picture ---------------------------------------------------------------------------------

_SHOWN = [name for name in ORDER if not name.startswith("_") and name != "FORMER"]
_WIDTH = 4.0  # of a box, in inches
_LINE = 0.17  # of small text


def _arrows(found: Imports) -> dict[str, set[str]]:
    arrows: dict[str, set[str]] = {name: set() for name in _SHOWN}
    for module, targets in found.items():
        for target in targets:
            pair = room(module), room(target)
            if pair[0] != pair[1] and set(pair) <= arrows.keys():
                arrows[pair[0]].add(pair[1])
    return arrows


def _direct(arrows: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Leave out arrows that follow from others, and those against the order."""
    down = {
        name: {t for t in targets if _SHOWN.index(t) < _SHOWN.index(name)}
        for name, targets in arrows.items()
    }
    below: dict[str, set[str]] = {}
    for name in _SHOWN:
        below[name] = down[name] | {far for near in down[name] for far in below[near]}
    return {
        name: {t for t in targets if not any(t in below[other] for other in targets)}
        for name, targets in down.items()
    }


def _rows(direct: Mapping[str, set[str]]) -> list[list[str]]:
    """Boxes by height: each above all that it points to; neighbours stand over what they use."""
    height: dict[str, int] = {}
    for name in _SHOWN:
        height[name] = 1 + max((height[target] for target in direct[name]), default=-1)
    rows: list[list[str]] = [[] for _ in range(max(height.values()) + 1)]
    for name in _SHOWN:
        rows[height[name]].append(name)
    place: dict[str, float] = {}
    for row in rows:
        middle = {
            name: sum(place[t] for t in direct[name]) / max(1, len(direct[name])) for name in row
        }
        row.sort(key=lambda name: (middle[name], name))
        for index, name in enumerate(row):
            place[name] = index - (len(row) - 1) / 2
    return rows


def draw(package: Path, target: Path) -> None:
    """Draw packages with their modules, and an arrow to what each stands on directly."""
    import textwrap

    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    found = imports(package)
    direct = _direct(_arrows(found))
    rows = _rows(direct)
    texts = {name: textwrap.wrap(_contents(name, found), 46) for name in _SHOWN}
    corners: dict[str, tuple[float, float, float]] = {}
    top = 0.0
    for row in rows:
        tall = max(0.45 + _LINE * len(texts[name]) for name in row)
        for index, name in enumerate(row):
            left = (index - len(row) / 2) * (_WIDTH + 0.5)
            corners[name] = left, top, 0.45 + _LINE * len(texts[name])
        top += tall + 0.55
    widest = max(map(len, rows)) * (_WIDTH + 0.5)
    figure, ax = plt.subplots(figsize=(widest, top), dpi=80)
    ax.set(xlim=(-widest / 2, widest / 2), ylim=(-0.3, top), aspect="equal")
    ax.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    for name, targets in direct.items():
        left, bottom, _ = corners[name]
        for other in sorted(targets):
            far_left, far_bottom, far_height = corners[other]
            ax.annotate(
                "",
                (far_left + _WIDTH / 2, far_bottom + far_height),
                (left + _WIDTH / 2, bottom),
                arrowprops={"arrowstyle": "-|>", "color": "0.45", "shrinkA": 0, "shrinkB": 0},
                zorder=0,
            )
    for name, (left, bottom, height) in corners.items():
        ax.add_patch(
            plt.Rectangle((left, bottom), _WIDTH, height, facecolor="#eef4fa", edgecolor="#0072b2")
        )
        ax.text(left + 0.12, bottom + height - 0.27, _title(name), weight="bold", fontsize=12)
        for number, line in enumerate(texts[name]):
            ax.text(left + 0.12, bottom + height - 0.5 - _LINE * number, line, fontsize=9)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Software": None})


def _title(name: str) -> str:
    return "pyablate" if name == "__init__" else name


def _contents(name: str, found: Imports) -> str:
    inside = [module.split(".") for module in found if room(module) == name]
    names = {parts[2] for parts in inside if len(parts) > 2 and parts[2] != "__init__"}
    return ", ".join(sorted(names, key=lambda n: n.lstrip("_")))


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    package = Path(__file__).resolve().parent.parent / "pyablate"
    draw(package, parser.parse_args(arguments).picture)


if __name__ == "__main__":
    main()
