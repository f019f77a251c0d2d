"""Image folders as people have them: system folders, numbers as names, EXIF, 16 bits, damage."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyablate.io.image_folder import ImageFolder

DEEP = (np.arange(16).reshape(4, 4) * 4369).astype(np.uint16)  # 0 to 65535: 17 times 0 to 15 of 8


def saved(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def grey(value: int = 7) -> np.ndarray:
    return np.full((4, 6, 3), value, dtype=np.uint8)


@pytest.mark.parametrize(
    "stray",
    [
        ".ipynb_checkpoints/a.png",
        "__MACOSX/a/0.png",
        "@eaDir/0.png",
        "a/.ipynb_checkpoints/0-checkpoint.png",
        "a/__MACOSX/0.png",
        "a/._0.png",
        "a/Thumbs.db",
    ],
)
def test_hidden_and_system_files_never_count(stray: str, tmp_path: Path) -> None:
    for name in ("a/0.png", "a/deeper/1.png", "b/0.png"):
        saved(tmp_path / name, grey())
    path = tmp_path / stray
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no image")
    images = ImageFolder(tmp_path)
    assert images.classes == ("a", "b")
    assert [str(path.relative_to(tmp_path)) for path, _ in images.files] == [
        "a/0.png",
        "a/deeper/1.png",
        "b/0.png",
    ]


@pytest.mark.parametrize(
    ("names", "expected", "told"),
    [
        (["10", "2", "0"], ["0", "2", "10"], True),
        (["00", "01", "10"], ["00", "01", "10"], False),
        (["1", "2", "3"], ["1", "2", "3"], False),
        (["10", "2", "cat"], ["10", "2", "cat"], False),
    ],
)
def test_names_that_are_numbers_are_sorted_as_numbers(
    names: list[str],
    expected: list[str],
    told: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in names:
        saved(tmp_path / name / "0.png", grey())
    images = ImageFolder(tmp_path)
    assert list(images.classes) == expected
    assert [images.files[n][0].parent.name for n in range(len(names))] == expected
    assert any("sorted as numbers (0, 2, 10)" in message for message in caplog.messages) == told


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(orientation: int, tmp_path: Path) -> None:
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    upright = [
        *(pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1]),
        *(pixels.transpose(1, 0, 2), np.rot90(pixels, -1)),
        *(pixels[::-1, ::-1].transpose(1, 0, 2), np.rot90(pixels)),
    ]
    exif = Image.Exif()
    exif[0x0112] = orientation
    saved(tmp_path / "a" / "0.png", pixels, exif=exif)
    image, _ = ImageFolder(tmp_path)[0]
    expected = torch.from_numpy(upright[orientation - 1].copy()).permute(2, 0, 1) / 255
    assert torch.equal(image, expected)
    assert ImageFolder(tmp_path, size=4)[0][0].shape == (3, 4, 4)


def test_damaged_exif_says_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "a" / "0.jpg", grey(), exif=b"Exif\x00\x00no such header")
    image, _ = ImageFolder(tmp_path)[0]
    assert image.shape == (3, 4, 6)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_images_of_16_bits_are_scaled_to_8(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="pyablate")
    for number in range(3):
        saved(tmp_path / "a" / f"{number}.{suffix}", DEEP)
    images = ImageFolder(tmp_path)
    assert images.channels == 1
    for image, _ in images:
        assert (image * 255).round().tolist() == [(DEEP // 257).tolist()]
    assert sum("16 bits are scaled to 8" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4), 0.5, dtype=np.float32), "found floats"),
        (np.full((4, 4), 1 << 20, dtype=np.int32), "found 32"),
        (np.full((4, 4), 200, dtype=np.int32), "found 32"),
    ],
)
def test_deeper_images_are_refused(array: np.ndarray, message: str, tmp_path: Path) -> None:
    saved(tmp_path / "a" / "0.tif", array)
    with pytest.raises(ValueError, match=f"expected 8 or 16 bits a channel, {message}"):
        ImageFolder(tmp_path)[0]


def test_what_cannot_be_decoded_is_left_out_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "a" / "0.png", grey())
    whole = saved(tmp_path / "a" / "1.png", grey()).read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.jpg").write_bytes(b"no image")
    images = ImageFolder(tmp_path, on_bad="skip")
    assert [path.name for path, _ in images.files] == ["0.png"]
    assert [path.name for path in images.skipped] == ["1.png", "2.jpg"]
    assert sum("is left out: cannot decode" in message for message in caplog.messages) == 2
    with pytest.raises(ValueError, match=r"cannot decode .*1\.png"):
        ImageFolder(tmp_path)[1]
    (tmp_path / "a" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the images below .* can be decoded"):
        ImageFolder(tmp_path, on_bad="skip")
    with pytest.raises(ValueError, match="on_bad: expected one of error, skip, got 'warn'"):
        ImageFolder(tmp_path, on_bad="warn")
