"""The network that reads the characters of `paper.glyphs`, and its training.

    python -m paper.glyph_network --seed 0 --epochs 5 --output paper/networks/glyphs-0.safetensors

The same arguments, versions, thread count and kind of processor give the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.train import accuracy, train, write
from paper import glyphs
from pyablate.demo import BasicBlock, Normalize

PEAK_RATE, BATCH_SIZE, STEPS = 0.2, 128, 250  # 32,000 fresh images make an epoch
TEST_PER_CLASS = 100


class GlyphNet(nn.Module):
    """Stem of 24 channels, halved, then three stages of two basic blocks: 32, 64, 128 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize((0.23,), (0.22,))
        self.stem = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()
        )
        self.shrink = nn.MaxPool2d(2)
        self.stage1 = nn.Sequential(BasicBlock(24, 32), BasicBlock(32, 32))
        self.stage2 = nn.Sequential(BasicBlock(32, 64, stride=2), BasicBlock(64, 64))
        self.stage3 = nn.Sequential(BasicBlock(64, 128, stride=2), BasicBlock(128, 128))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(128, len(glyphs.GLYPHS))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, ``[N, 120]``."""
        x = self.shrink(self.stem(self.normalize(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(self.flatten(self.pool(x)))  # type: ignore[no-any-return]


def batches(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of one epoch, every image drawn anew."""
    for _ in range(STEPS):
        labels = torch.randint(len(glyphs.GLYPHS), (BATCH_SIZE,), generator=generator)
        yield glyphs.draw(labels, generator).unsqueeze(1) / 255, labels


def main() -> None:
    """Train, measure on the test images and write the weights in float16."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    model = GlyphNet()
    train(
        model,
        batches,
        epochs=options.epochs,
        steps=STEPS,
        peak_rate=PEAK_RATE,
        seed=options.seed,
    )
    model.half().float()  # what is measured is what is written
    pixels, labels = glyphs.images(TEST_PER_CLASS)
    measured = accuracy(model, (pixels.squeeze(1) * 255).round().to(torch.uint8), labels)
    training = {
        "name": "glyphs",
        "seed": options.seed,
        "epochs": options.epochs,
        "accuracy": measured,
        "torch": str(torch.__version__),
        "batch_size": BATCH_SIZE,
        "peak_rate": PEAK_RATE,
        "threads": options.threads,
    }
    write(model, options.output, training, half=True)
    print(f"glyphs: test accuracy {measured:.4f}, wrote {options.output}")


if __name__ == "__main__":
    main()
