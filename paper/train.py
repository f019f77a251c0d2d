"""Train the networks of the study whose weights are missing, and list them all.

    python -m paper.train            # two trainings at a time, one thread each

Weights go into paper/networks, with a README that says what each file is. Nothing that is there is
trained again; a training that was broken off starts anew. Then `make paper`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from paper.networks import FOLDER, known

ROOT = Path(__file__).parent.parent
# Fewer epochs than the seed 0 that ships with the package, to be done in minutes.
EPOCHS = {
    "alexnet": 8,
    "alexnet_dropout": 12,
    "alexnet_bn": 8,
    "vgg_bn": 6,
    "resnet": 6,
    "glyphs": 5,
}
SEEDS = (0, 1, 2)

README = """\
# Further networks for `make paper`

Weights of the networks that [the paper again](../../docs/results/paper.md) looks at beside those in
`pyablate/demo/networks`, whose seed is 0. Not part of the package. Licence: Apache-2.0, like the
rest of the project. Written by `python -m paper.train`, which trains what is missing.

| weights | trained on | epochs | test accuracy |
|---|---|---|---|
{rows}

Stored in float16 and measured so, once, after the last epoch: on the 10,000 Fashion-MNIST test
images, or on 100 images of each of the 120 characters of `paper/glyphs.py`. Each by its own
command, from the root of a clone with the development extras installed:

```sh
{commands}
```

An epoch of the glyphs is 32,000 characters, each drawn anew. The faces are those that matplotlib
ships: DejaVu Sans, Sans Mono and Serif (Bitstream Vera licence, changes in the public domain) and
STIX (SIL Open Font Licence 1.1). Neither fonts nor images are copied here. What was trained on
Fashion-MNIST had fewer epochs than seed 0 and is a little less accurate.

Trained with torch 2.13.0 on one core of an x86-64 processor with AVX-512; another processor, thread
count or version gives other bits and about the same accuracy. Each file says under the metadata key
`training`, as JSON, how it was made.
"""


def command(family: str, seed: int, epochs: object) -> list[str]:
    """Return what trains one network, after ``python``."""
    script = ["-m", "paper.glyph_network"]
    if family != "glyphs":
        script = ["examples/train.py", family, "--half"]
    output = f"paper/networks/{family}-{seed}.safetensors"
    options = {"seed": seed, "epochs": epochs, "threads": 1, "output": output}
    return script + [word for name, value in options.items() for word in (f"--{name}", str(value))]


def readme() -> str:
    """Return the list of the weights in the folder, from what the files say of themselves."""
    networks = [network for network in known() if network.weights.parent == FOLDER]
    rows, commands = [], []
    for network in networks:
        training = network.training()
        data = "glyphs" if network.family.reads_glyphs else "Fashion-MNIST"
        epochs, accuracy = training["epochs"], training["accuracy"]
        rows.append(f"| `{network.name}` | {data} | {epochs} | {accuracy:.4f} |")
        commands.append(" ".join(["python", *command(network.family.name, network.seed, epochs)]))
    return README.format(rows="\n".join(rows), commands="\n".join(commands))


def missing() -> list[tuple[str, int]]:
    """Return family and seed of the networks that are to be there and are not."""
    there = {network.name for network in known()}
    return [
        (family, seed) for seed in SEEDS for family in EPOCHS if f"{family}-{seed}" not in there
    ]


def main() -> None:
    """Train what is missing and write the list."""
    parser = argparse.ArgumentParser(
        prog="python -m paper.train", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--at-once", type=int, default=2, help="trainings at a time")
    options = parser.parse_args()

    def run(network: tuple[str, int]) -> None:
        family, seed = network
        print(f"training {family}-{seed}", flush=True)
        words = [sys.executable, *command(family, seed, EPOCHS[family])]
        subprocess.run(words, cwd=ROOT, check=True)

    with ThreadPoolExecutor(options.at_once) as threads:
        list(threads.map(run, missing()))
    (FOLDER / "README.md").write_text(readme(), encoding="utf-8")


if __name__ == "__main__":
    main()
