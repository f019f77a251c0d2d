"""Prove the answers: every unit of every shipped network, every intervention, against the oracle.

For each network and intervention the engine's predictions are compared with a float64 hook loop,
pair by pair, layer by layer. The number of mismatches is printed at the end; the exit status says
whether there were any. Pairs whose float64 top-2 margin is under 1e-5 of the largest logit are near
ties and counted apart. All of it takes some four hours on two cores; each finished layer is noted
in ``--output``, and a second start goes on behind the last one, unless the program has changed::

    python benchmarks/exactness.py
    python benchmarks/exactness.py --network vgg_bn --intervention zero --layers 'features.1*'
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import pyablate as pa
from pyablate.reference import Agreement, compare

INTERVENTIONS = ("zero", "mean", "class_mean", "constant:0.5", "resample", "noise", "direction")


def main() -> int:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    done = read(options.output)
    for name in options.network:
        for intervention in options.intervention:
            for record in missing(name, intervention, options, done):
                with options.output.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                done.append(record)
    asked = [record for record in done if wanted(record, options)]
    return summary(asked)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--network", nargs="+", choices=pa.demo.NETWORKS, default=list(pa.demo.NETWORKS))
    add("--intervention", nargs="+", default=list(INTERVENTIONS))
    add("--layers", nargs="+", default=["*"], help='names or globs (default: "*")')
    add("--images", type=int, default=300)
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    add("--threads", type=int, help="of PyTorch; by default as many as it likes")
    add("--output", type=Path, default=Path(".benchmarks/exactness.jsonl"))
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.program = program()
    return options


def program() -> str:
    """Digest of the installed package, weights and compiled module included."""
    digest = hashlib.sha256()
    folder = Path(pa.__file__).parent
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".so", ".safetensors", ".gz"):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    """Tell which comparison a finished layer was: the same question, the same program."""
    names = ("network", "intervention", "layer", "images", "precision", "program", "torch")
    return tuple(record[name] for name in names)


def wanted(record: dict[str, Any], options: argparse.Namespace) -> bool:
    return (
        record["network"] in options.network
        and record["intervention"] in options.intervention
        and record["images"] == options.images
        and record["precision"] == options.precision
        and record["program"] == options.program
        and record["torch"] == torch.__version__
    )


def missing(
    name: str, intervention: str, options: argparse.Namespace, done: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Compare the layers that are not in ``done`` yet, one at a time."""
    model, images, labels = pa.demo.load(name, limit=options.images)
    found = pa.select(pa.sites(model, images[:1]), options.layers)
    finished = {key(record) for record in done}
    for number, site in enumerate(found, 1):
        record = {
            "network": name,
            "intervention": intervention,
            "layer": site.name,
            "images": len(images),
            "precision": options.precision,
            "program": options.program,
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        if key(record) in finished:
            continue
        begin = time.perf_counter()
        result = pa.ablate(
            model,
            (images, labels),
            [site.name],
            intervention=intervention,
            precision=options.precision,
            progress=False,
        )
        middle = time.perf_counter()
        agreement = compare(result, model, (images, labels), [site.name], intervention=intervention)
        seconds = middle - begin, time.perf_counter() - middle
        print(
            f"{name} {intervention} {site.name} ({number}/{len(found)}): "
            f"{len(result.units)} units, {agreement.pairs:,} pairs, "
            f"{agreement.near_ties} near ties, {agreement.mismatches} mismatches; "
            f"{seconds[0]:.1f} s, oracle {seconds[1]:.1f} s",
            *agreement.examples,
            sep="\n    ",
            flush=True,
        )
        yield record | {
            "units": len(result.units),
            "pairs": agreement.pairs,
            "near_ties": agreement.near_ties,
            "mismatches": agreement.mismatches + result.audit.mismatches + result.audit.mended,
            "flips": len(result.flips.image),
            "seconds": round(seconds[0], 2),
            "oracle_seconds": round(seconds[1], 2),
        }


def summary(records: list[dict[str, Any]]) -> int:
    total = Agreement(0, 0, 0)
    for record in records:
        total += Agreement(record["pairs"], record["near_ties"], record["mismatches"])
    networks = sorted({record["network"] for record in records})
    interventions = sorted({record["intervention"] for record in records})
    print(
        f"\n{len(networks)} networks ({', '.join(networks)}), {len(interventions)} interventions, "
        f"{len(records)} layers in all: {total.pairs:,} pairs compared with the float64 hook loop, "
        f"{total.near_ties} near ties, {total.mismatches} mismatches"
    )
    return int(total.mismatches > 0)


if __name__ == "__main__":
    sys.exit(main())
