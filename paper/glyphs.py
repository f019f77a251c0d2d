"""Rendered characters: grey images of 120 classes, drawn from 16 faces of open fonts.

    python -m paper.glyphs glyphs.npz --per-class 100

The fonts are those that matplotlib ships: DejaVu Sans, Sans Mono and Serif (Bitstream Vera licence
and public domain) and STIX (SIL Open Font Licence 1.1). No font and no image is copied into this
project. The same seed, fonts, Pillow and torch give the same bytes; another version of FreeType may
move a pixel by a grey level.
"""

from __future__ import annotations

import argparse
import functools
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GLYPHS = (
    "0123456789"
    "ABCDEFGHJKLMNPQRSTUVWXYZ"  # no O, I: they are 0 and 1 in some faces
    "abdefghijmnqrt"  # only letters whose small form is not the large one made smaller
    "ΓΔΘΛΞΠΣΦΨΩβγδεζηθλμξπσφψω"
    "БДЖИЙЦЧШЩЪЫЭЮЯф"
    "ßÆæøçñåðþ"
    "&@#%$?£¥€§¶†‡÷«¬®∂±*{}¿"
)
FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
SIZE = 28  # pixels of an image
TEST_SEED = 1_000_000  # far from the seeds of training

_CANVAS, _POINTS = 64, 44  # master images, pixels; font size


@functools.cache
def masters() -> Tensor:
    """Return every glyph in every face, centred: float32 ``[120, 16, 64, 64]`` in ``[0, 1]``."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(get_data_path()) / "fonts" / "ttf"
    drawn = np.zeros((len(GLYPHS), len(FACES), _CANVAS, _CANVAS), dtype=np.uint8)
    for column, face in enumerate(FACES):
        font = ImageFont.truetype(
            folder / f"{face}.ttf", _POINTS, layout_engine=ImageFont.Layout.BASIC
        )
        for row, glyph in enumerate(GLYPHS):
            left, top, right, bottom = font.getbbox(glyph)
            canvas = Image.new("L", (_CANVAS, _CANVAS))
            middle = ((_CANVAS - left - right) / 2, (_CANVAS - top - bottom) / 2)
            ImageDraw.Draw(canvas).text(middle, glyph, fill=255, font=font)
            drawn[row, column] = np.asarray(canvas)
    return torch.from_numpy(drawn).float() / 255


def draw(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one image for each label: a random face, turned, sheared, scaled, moved, lit and noisy.

    Parameters
    ----------
    labels : Tensor
        int64 ``[N]``, indices into `GLYPHS`.
    generator : torch.Generator
        Source of everything random.

    Returns
    -------
    Tensor
        uint8 ``[N, 28, 28]``.
    """
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    faces = torch.randint(len(FACES), (count,), generator=generator)
    angle, shear = uniform(-15, 15) * (math.pi / 180), uniform(-0.25, 0.25)
    scale, aspect = uniform(0.85, 1.3), uniform(-0.15, 0.15).exp()
    turn = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()], 1), torch.stack([angle.sin(), angle.cos()], 1)], 1
    )
    slant = torch.eye(2).repeat(count, 1, 1)
    slant[:, 0, 1] = shear
    # From places in the image to places in the master: a small image of the glyph looks far.
    linear = turn @ slant / torch.stack([scale * aspect, scale / aspect], 1)[:, None, :]
    shift = uniform(-0.18, 0.18, 2, 1)
    # Sampled at twice the size and averaged, because single samples of a master would alias.
    grid = nn.functional.affine_grid(
        torch.cat([linear, shift], 2), [count, 1, 2 * SIZE, 2 * SIZE], align_corners=False
    )
    ink = nn.functional.grid_sample(
        masters()[labels, faces].unsqueeze(1), grid, align_corners=False
    )
    ink = nn.functional.avg_pool2d(ink, 2).squeeze(1)
    slope = torch.linspace(-1, 1, SIZE)
    ground = uniform(0, 0.3, 1, 1) + (
        uniform(-0.15, 0.15, 1, 1) * slope[:, None] + uniform(-0.15, 0.15, 1, 1) * slope
    )
    noise = torch.randn(ink.shape, generator=generator) * uniform(0.02, 0.3, 1, 1)
    lit = ground + ink * uniform(0.3, 0.9, 1, 1) + noise
    return (lit.clamp(0, 1) * 255).round().to(torch.uint8)


def images(per_class: int, *, seed: int = TEST_SEED) -> tuple[Tensor, Tensor]:
    """Draw a balanced set of images; by default, the first of the test images.

    Parameters
    ----------
    per_class : int
        Images of each class.
    seed : int
        Another seed gives other images. A smaller set is the beginning of a larger one.

    Returns
    -------
    images : Tensor
        float32 ``[120 * per_class, 1, 28, 28]`` in ``[0, 1]``, as networks take them.
    labels : Tensor
        int64 ``[120 * per_class]``, all classes in turn.

    Raises
    ------
    ValueError
        `per_class` is below 1.
    """
    if per_class < 1:
        raise ValueError(f"per_class: expected at least 1, got {per_class!r}")
    labels = torch.arange(len(GLYPHS))
    rounds = [draw(labels, torch.Generator().manual_seed(seed + i)) for i in range(per_class)]
    return torch.cat(rounds).unsqueeze(1).float() / 255, labels.repeat(per_class)


def main() -> None:
    """Write images and labels to an .npz file, as ``pyablate run --data`` reads it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help=".npz file to write")
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--seed", type=int, default=TEST_SEED)
    options = parser.parse_args()
    pixels, labels = images(options.per_class, seed=options.seed)
    np.savez_compressed(options.output, images=pixels.numpy(), labels=labels.numpy())
    print(f"wrote {len(labels)} images of {len(GLYPHS)} classes to {options.output}")


if __name__ == "__main__":
    main()
