"""Prove the answers: millions of (unit, image) pairs against the float64 hook loop.

The networks are drawn at random from the parts of ``tests/fuzz``: masked logits, NaN inside, jumps,
outliers and images that change their kind are among them. One in fifteen is a layer of a shipped
network. Wrong predictions are printed with the code that makes their network again; there must be
none. Near ties (``pyablate/network/near_tie.py``) are counted apart, and so are pairs that have no
one answer: where engine and oracle differ, and the oracle differs from itself once images and
weights are changed by float64's rounding::

    python benchmarks/exactness.py                                 # some minutes
    python benchmarks/exactness.py --pairs 10_000_000 --seed 1     # half an hour on two cores
    python benchmarks/exactness.py --shipped --precision fp32      # every unit of the shipped ones

Each finished network is noted in ``--output`` with the suffix ``.jsonl``; a second start goes on
behind the last one, unless the program has changed. The summary is ``--output`` itself.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import platform
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pyablate as pa
from pyablate.reference import compare

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

from support.fuzzing.cases import MANY_PAIRS, Case, Checked, compared  # noqa: E402

INTERVENTIONS = ("zero", "mean", "class_mean", "constant:0.5", "resample", "noise", "direction")
CHUNK = 50
"""Random networks that Hypothesis draws from one seed."""

EVERY = 15
"""One in so many networks is a shipped one."""

COUNTED = ("pairs", "near_ties", "wrong", "undefined")

UNITS, IMAGES = 16, 60
"""Of a shipped network's layer, beside random networks; all units where they are all there is."""


@dataclass(frozen=True)
class Shipped:
    """A layer of a shipped network, or units of it."""

    network: str
    intervention: str
    layer: str
    precision: str
    images: int = IMAGES
    first: int | None = None

    def kinds(self) -> list[str]:
        return [f"shipped: {self.network}"]


Task = Case | Shipped


def main() -> int:
    options = parse_options()
    notes = options.output.with_suffix(".jsonl")
    done = {note["task"]: note for note in read(notes) if note["program"] == options.program}
    asked = every_layer(options) if options.shipped else drawn(options)
    found: list[dict[str, Any]] = []
    progress = Progress(None if options.shipped else options.pairs)
    with (
        ProcessPoolExecutor(
            options.processes, multiprocessing.get_context("spawn"), initializer=alone
        ) as pool,
        notes.open("a") as file,
    ):
        running = set()
        more = True
        while more or running:
            while more and len(running) < 2 * options.processes:
                task = next(asked, None)
                more = task is not None and not progress.enough
                if more and repr(task) in done:
                    progress.add(found, done[repr(task)])
                elif more:
                    running.add(pool.submit(checked, task))
            ready, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ready:
                note = future.result() | {"program": options.program}
                print(json.dumps(note), file=file, flush=True)
                progress.add(found, note)
    return summary(found, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--pairs", type=int, default=500_000, help="(row, image) pairs, at least")
    add("--seed", type=int, default=0)
    add("--processes", type=int, default=os.cpu_count(), help="each works in one thread")
    add("--shipped", action="store_true", help="all units of the shipped networks: hours")
    add("--network", nargs="+", choices=pa.demo.NETWORKS, default=list(pa.demo.NETWORKS))
    add("--intervention", nargs="+", default=list(INTERVENTIONS), help="of shipped networks")
    add("--precision", default="auto", help="of shipped networks")
    add("--output", type=Path, default=Path(".benchmarks/exactness.json"))
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.program = program()
    return options


def program() -> str:
    """Digest of the installed package, its weights and compiled module, and the parts in tests."""
    digest = hashlib.sha256(torch.__version__.encode())
    for folder in (Path(pa.__file__).parent, TESTS / "support"):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".so", ".safetensors", ".gz"):
                digest.update(path.relative_to(folder).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- what is compared ---------------------------------------------------------------------------


def drawn(options: argparse.Namespace) -> Iterator[Task]:
    """Random networks without end, and layers of shipped ones among them; the same by seed."""
    shipped = some_layers(options)
    seen: set[int] = set()
    for chunk in itertools.count():
        for case in random_cases(1000 * options.seed + chunk):
            if case.network.seed in seen:  # a variation of one before, which Hypothesis likes
                continue
            if len(seen) % EVERY == 0:
                yield next(shipped)
            seen.add(case.network.seed)
            yield case


def random_cases(seed: int) -> list[Case]:
    import hypothesis

    found: list[Case] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=CHUNK,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(MANY_PAIRS)
    def draw(case: Case) -> None:
        found.append(case)

    draw()
    return found


def some_layers(options: argparse.Namespace) -> Iterator[Shipped]:
    layers = list(every_layer(options, IMAGES))
    draw = torch.Generator().manual_seed(options.seed)
    while True:
        for number in torch.randperm(len(layers), generator=draw).tolist():
            first = int(torch.randint(1 << 20, (1,), generator=draw))
            yield Shipped(**{**vars(layers[number]), "first": first})


def every_layer(options: argparse.Namespace, images: int = 300) -> Iterator[Shipped]:
    for network in options.network:
        model, sample, _ = pa.demo.load(network, limit=2)
        for intervention in options.intervention:
            for site in pa.select(pa.sites(model, sample[:1]), ["*"]):
                yield Shipped(network, intervention, site.name, options.precision, images)


# --- in a process of its own --------------------------------------------------------------------


def alone() -> None:
    torch.set_num_threads(1)
    logging.getLogger("pyablate").setLevel(logging.ERROR)


def checked(task: Task) -> dict[str, Any]:
    """Compare one network, and tell what came out as plain values."""
    begin = time.perf_counter()
    note: dict[str, Any] = {"task": repr(task), "kinds": task.kinds(), "error": None}
    try:
        found = compared(task) if isinstance(task, Case) else compared_shipped(task)
    except Exception:  # a crash is noted and counted; the other networks go on
        return note | {"error": traceback.format_exc(limit=-4), "pairs": 0, "wrong": 0}
    return note | {
        "pairs": found.agreement.pairs,
        "near_ties": found.agreement.near_ties,
        "wrong": found.agreement.mismatches + found.audit,
        "undefined": found.undefined,
        "examples": found.agreement.examples,
        "settled": found.settled,
        "strategies": Counter(found.strategies),
        "seconds": round(time.perf_counter() - begin, 2),
    }


def compared_shipped(task: Shipped) -> Checked:
    model, images, labels = pa.demo.load(task.network, limit=task.images)
    layers = [task.layer]
    if task.first is not None:
        site = pa.select(pa.sites(model, images[:1]), layers)[0]
        last = max(1, site.channels - UNITS)
        units = range(task.first % last, min(site.channels, task.first % last + UNITS))
        layers = [site.label(unit) for unit in units]
    data, options = (images, labels), {"intervention": task.intervention}
    result = pa.ablate(model, data, layers, precision=task.precision, progress=False, **options)
    agreement = compare(result, model, data, layers, **options)
    strategies = tuple(result.strategy.values())
    return Checked(
        agreement,
        result.effort.pairs_by_precision,
        strategies,
        result.audit.mismatches + result.audit.mended,
    )


# --- what is said -------------------------------------------------------------------------------


class Progress:
    """A line now and then, and all about what went wrong."""

    def __init__(self, asked: int | None) -> None:
        self.asked, self.pairs, self.wrong, self.fresh = asked, 0, 0, 0
        self.begin = self.last = time.monotonic()

    @property
    def enough(self) -> bool:
        return self.asked is not None and self.pairs >= self.asked

    def add(self, found: list[dict[str, Any]], note: dict[str, Any]) -> None:
        found.append(note)
        self.pairs += note["pairs"]
        self.wrong += note["wrong"] + bool(note["error"])
        if note["error"] or note["wrong"]:
            what = note["error"] or f"{note['wrong']} of {note['pairs']:,} pairs wrong"
            print(f"\n{note['task']}\n    {what}", *note.get("examples", ()), sep="\n    ")
        now = time.monotonic()
        if now - self.last > 10 or self.enough:
            self.last = now
            goal = f" of {self.asked:,}" if self.asked else ""
            rate = self.pairs / (now - self.begin)
            print(
                f"{self.pairs:,}{goal} pairs, {len(found)} networks, {self.wrong} wrong, "
                f"{rate:,.0f} pairs a second",
                flush=True,
            )


def summary(found: list[dict[str, Any]], options: argparse.Namespace) -> int:
    """Write and print what was compared; 1 if anything was wrong."""
    kinds: dict[str, Counter[str]] = {}
    for note in found:
        for kind in note["kinds"]:
            counts = Counter({k: note.get(k, 0) for k in COUNTED})
            kinds.setdefault(kind, Counter()).update(counts + Counter(networks=1))
    total = {
        "networks": len(found),
        **{key: sum(note.get(key, 0) for note in found) for key in COUNTED},
        "errors": sum(note["error"] is not None for note in found),
        "settled": dict(sum((Counter(note.get("settled", {})) for note in found), Counter())),
        "strategies": dict(sum((Counter(note.get("strategies", {})) for note in found), Counter())),
        "kinds": {kind: dict(kinds[kind]) for kind in sorted(kinds)},
        "seed": options.seed,
        "program": options.program,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    options.output.write_text(json.dumps(total, indent=2) + "\n")
    for kind, counts in total["kinds"].items():
        print(f"{kind:40} " + ", ".join(f"{number:,} {what}" for what, number in counts.items()))
    print(
        f"\n{total['networks']} networks, {total['pairs']:,} pairs compared with the float64 hook "
        f"loop: {total['wrong']} wrong, {total['errors']} broken off, {total['near_ties']:,} near "
        f"ties, {total['undefined']:,} without one answer; by strategy "
        f"{total['strategies']}, by precision {total['settled']}"
    )
    return int(total["wrong"] + total["errors"] > 0)


if __name__ == "__main__":
    sys.exit(main())
