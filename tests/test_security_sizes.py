"""Small files that would take all the memory, and things that are no files, are refused at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pyablate import image_folder
from pyablate.inputs import load_data

# --- images ---------------------------------------------------------------------------------------


def photos(folder: Path, size: tuple[int, int]) -> Path:
    (folder / "photos" / "cat").mkdir(parents=True)
    Image.new("L", size, 255).save(folder / "photos" / "cat" / "a.png")
    return folder / "photos"


@pytest.mark.parametrize("size", [(1, 1_000_000), (1_000_000, 1)])
def test_a_strip_that_scaling_would_blow_up(tmp_path: Path, size: tuple[int, int]) -> None:
    folder = photos(tmp_path, size)
    assert (folder / "cat" / "a.png").stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"data: '.*a.png' is too large: .* after scaling"):
        list(load_data(folder, size=224).batches)


def test_a_strip_within_the_limit_is_scaled(tmp_path: Path) -> None:
    images, _ = next(iter(load_data(photos(tmp_path, (2, 3000)), size=16).batches))
    assert images.shape == (1, 1, 16, 16)
    assert bool((images == 1).all())


SHORTAGES: list[tuple[str, Callable[[], Exception]]] = [
    ("_cut_out", MemoryError),
    ("_decode", MemoryError),
    ("_decode", lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory")),
    ("_open", MemoryError),
]


@pytest.mark.parametrize(("step", "error"), SHORTAGES)
def test_no_memory_for_an_image_names_the_file(
    step: str, error: Callable[[], Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_data(photos(tmp_path, (8, 8)), size=8)

    def fail(*_: Any) -> None:
        raise error()

    monkeypatch.setattr(image_folder.ImageFolder, step, fail)
    with pytest.raises(ValueError, match=r"data: not enough memory to read '.*a.png'"):
        list(data.batches)


def test_scaling_answers_as_torchvision_does(tmp_path: Path) -> None:
    """The check of sizes comes before the work and changes none of it."""
    folder = photos(tmp_path, (37, 23))
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (23, 37), generator=draw, dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(folder / "cat" / "a.png")
    scaled = Image.fromarray(pixels).resize((16 * 37 // 23, 16), Image.Resampling.BILINEAR)
    images, _ = next(iter(load_data(folder, size=(16, 14), channels=1).batches))
    left = round((scaled.width - 14) / 2)
    expected = scaled.crop((left, 1, left + 14, 15))
    wanted = torch.tensor(list(expected.tobytes())).reshape(14, 14) / 255
    assert torch.equal(images[0, 0], wanted)
