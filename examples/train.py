"""Train one of the shipped networks on the 60,000 Fashion-MNIST training images.

    python examples/train.py vgg_bn --seed 0 --epochs 12 --output vgg_bn.safetensors

The images come from Debian's package ``dataset-fashion-mnist`` or from ``--data FOLDER``. The same
arguments, torch version, thread count and kind of processor give the same bytes. The test images
are looked at once, after the last epoch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pyablate.demo import NETWORKS, build
from pyablate.io.idx import read_idx

SHIFT = 2  # pixels, in each direction, by default
# Peak learning rate: batch norm bears steps that throw a plain network off.
PEAK_RATE = {
    "alexnet": 0.04,
    "alexnet_dropout": 0.04,
    "alexnet_bn": 0.2,
    "vgg_bn": 0.2,
    "resnet": 0.3,
    "vit": 0.002,
    "convnext": 0.004,
}
ADAMW = ("vit", "convnext")  # layer norm and attention: plain SGD learns them slowly


def read_images(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return uint8 images [N, 28, 28] and int64 labels [N] of "train" or "t10k"."""
    images = torch.from_numpy(read_idx(folder / f"{part}-images-idx3-ubyte.gz"))
    labels = torch.from_numpy(read_idx(folder / f"{part}-labels-idx1-ubyte.gz"))
    return images, labels.long()


def augmented_batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    generator: torch.Generator,
    *,
    shift: int = SHIFT,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches, each image mirrored or not and moved by up to `shift` pixels."""
    count, height, width = images.shape
    padded = nn.functional.pad(images, (shift, shift, shift, shift))
    order = torch.randperm(count, generator=generator)
    # An incomplete last batch would give batch norm noisier statistics: it is left out.
    for chosen in order.split(batch_size)[: max(1, count // batch_size)]:
        size = len(chosen)
        top, left = torch.randint(0, 2 * shift + 1, (2, size, 1), generator=generator)
        mirrored = torch.rand(size, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, torch.arange(width - 1, -1, -1), torch.arange(width))
        rows = top + torch.arange(height)
        pixels = padded[chosen[:, None, None], rows[:, :, None], (left + columns)[:, None, :]]
        yield pixels.unsqueeze(1) / 255, labels[chosen]


def train(
    model: nn.Module,
    batches: Callable[[torch.Generator], Iterable[tuple[Tensor, Tensor]]],
    *,
    epochs: int,
    steps: int,
    peak_rate: float,
    seed: int,
    bfloat16: bool = True,
    adamw: bool = False,
) -> None:
    """Train `model` in place: SGD with momentum or AdamW, one cycle of the learning rate.

    `batches` gives the batches of one epoch, `steps` in number.
    """
    generator = torch.Generator().manual_seed(seed)
    model.train().to(memory_format=torch.channels_last)
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=peak_rate, weight_decay=0.05)
        if adamw
        else torch.optim.SGD(
            model.parameters(), lr=peak_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
    )
    total_steps = epochs * steps
    if total_steps < 5:
        raise ValueError(f"epochs, steps: expected at least 5 steps of training, got {total_steps}")
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_rate, total_steps=total_steps, pct_start=0.25
    )
    for epoch in range(epochs):
        start, total, seen = time.monotonic(), 0.0, 0
        for x, y in batches(generator):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                logits = model(x.contiguous(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits.float(), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            total, seen = total + loss.item() * len(y), seen + len(y)
        seconds = time.monotonic() - start
        print(f"epoch {epoch + 1}/{epochs}: loss {total / seen:.4f}, {seconds:.0f} s", flush=True)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images classified correctly, in float32."""
    model.eval()
    correct = 0
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        correct += int((model(x.unsqueeze(1) / 255).argmax(1) == y).sum())
    return correct / len(labels)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=NETWORKS)
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--peak-rate", type=float, help="default: by network")
    parser.add_argument(
        "--shift", type=int, default=SHIFT, help="pixels to move images by, at most"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, help="use the first LIMIT images only, to try it out")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--half", action="store_true", help="round the weights to float16")
    return parser.parse_args()


def main() -> None:
    """Train, measure on the test images and write the weights."""
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    images, labels = (part[: options.limit] for part in read_images(options.data, "train"))
    model = build(options.name)
    peak_rate = options.peak_rate or PEAK_RATE[options.name]
    train(
        model,
        partial(augmented_batches, images, labels, options.batch_size, shift=options.shift),
        epochs=options.epochs,
        steps=max(1, len(images) // options.batch_size),
        peak_rate=peak_rate,
        seed=options.seed,
        bfloat16=not options.float32,
        adamw=options.name in ADAMW,
    )
    test_images, test_labels = (part[: options.limit] for part in read_images(options.data, "t10k"))
    if options.half:
        model.half().float()
    measured = accuracy(model, test_images, test_labels)
    training = {
        "name": options.name,
        "seed": options.seed,
        "epochs": options.epochs,
        "accuracy": measured,
        "torch": str(torch.__version__),
        "batch_size": options.batch_size,
        "peak_rate": peak_rate,
        "shift": options.shift,
        "optimizer": "AdamW" if options.name in ADAMW else "SGD",
        "bfloat16": not options.float32,
        "threads": options.threads,
    }
    write(model, options.output, training, half=options.half)
    print(f"{options.name}: test accuracy {measured:.4f}, wrote {options.output}")


def write(model: nn.Module, output: Path, training: dict[str, object], *, half: bool) -> None:
    """Write the weights, in float16 if `half`, and how they came about, as safetensors."""
    # One entry, because safetensors writes several in an order that changes from run to run.
    metadata = {"training": json.dumps(training)}
    tensors = {
        key: (value.half() if half and value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output, metadata=metadata)


if __name__ == "__main__":
    main()
