"""Small files that would take all the memory are refused at once."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import GifImagePlugin, Image

from pyablate.cli.data_specs import load_data
from pyablate.cli.model_specs import load_model
from pyablate.io import image_files

# --- images ---------------------------------------------------------------------------------------


def photos(folder: Path, content: bytes | tuple[int, int], name: str = "a.png") -> Path:
    """A folder with one image: of some bytes, or white and of some size."""
    (folder / "photos" / "cat").mkdir(parents=True)
    place = folder / "photos" / "cat" / name
    if isinstance(content, bytes):
        place.write_bytes(content)
    else:
        Image.new("L", content, 255).save(place)
    return folder / "photos"


@pytest.mark.parametrize("size", [(1, 1_000_000), (1_000_000, 1)])
def test_a_strip_that_scaling_would_blow_up(tmp_path, size):
    folder = photos(tmp_path, size)
    assert (folder / "cat" / "a.png").stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"data: '.*a.png' is too large: .* after scaling"):
        list(load_data(folder, size=224).batches)


def test_a_strip_within_the_limit_is_scaled(tmp_path):
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
def test_no_memory_for_an_image_names_the_file(step, error, tmp_path, monkeypatch):
    data = load_data(photos(tmp_path, (8, 8)), size=8)

    def fail(*_: Any) -> None:
        raise error()

    monkeypatch.setattr(image_files.ImageFiles, step, fail)
    with pytest.raises(ValueError, match=r"data: not enough memory to read '.*a.png'"):
        list(data.batches)


def test_scaling_answers_as_torchvision_does(tmp_path):
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


def png_header(width: int, height: int) -> bytes:
    """Return a PNG file that claims a size in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(9_500, 9_500), (100_000, 100_000), (1, 2_000_000_000)])
def test_an_image_that_claims_too_much(tmp_path, size):
    with pytest.raises(ValueError, match=r"data: '.*a.png' is too large"):
        list(load_data(photos(tmp_path, png_header(*size))).batches)


def test_a_long_animation_is_its_first_frame(tmp_path, monkeypatch):
    frames = [Image.new("L", (8, 8), 255 * (n > 0)) for n in range(200)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=10)
    seeks: list[int] = []
    monkeypatch.setattr(
        GifImagePlugin.GifImageFile, "seek", lambda _self, frame: seeks.append(frame)
    )
    data = load_data(photos(tmp_path, buffer.getvalue(), "a.gif"))
    images, _ = next(iter(data.batches))
    assert images.shape == (1, 3, 8, 8)
    assert float(images.max()) == 0
    assert seeks == []


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif", "ppm", "gif"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.9])
def test_truncated_images(tmp_path, suffix, keep):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    kinds = {"jpg": "JPEG", "tif": "TIFF"}
    Image.fromarray(pixels).save(buffer, kinds.get(suffix, suffix.upper()))
    whole = buffer.getvalue()
    folder = photos(tmp_path, whole[: int(keep * len(whole))], f"a.{suffix}")
    with pytest.raises(ValueError, match=r"data: cannot decode '.*a\.\w+'"):
        list(load_data(folder).batches)


def test_the_limit_of_pixels_is_pillows_own():
    assert Image.MAX_IMAGE_PIXELS == image_files.MAX_PIXELS


# --- arrays and checkpoints ---------------------------------------------------------------------


def npy_header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


@pytest.mark.parametrize("shape", [(1 << 60,), (1 << 34, 28, 28), (1 << 62, 1 << 62)])
def test_arrays_that_claim_too_much(tmp_path, shape):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", npy_header(shape))
        archive.writestr("labels.npy", npy_header((3,), "<i8") + bytes(24))
    with pytest.raises(ValueError, match=r"data: .*a.npz'"):
        load_data(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", images=np.zeros((1, 3, 3), np.float32))
    (tmp_path / "labels.npy").write_bytes(npy_header(shape, "<i8"))
    with pytest.raises(ValueError, match=r"labels: cannot read '.*labels.npy'"):
        load_data(tmp_path / "b.npz", labels=tmp_path / "labels.npy")


def test_a_checkpoint_that_unpacks_to_too_much(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("a/data/0", bytes(1 << 20))
    monkeypatch.setattr("pyablate.io.weights.MAX_BYTES", 1 << 19)
    with pytest.raises(ValueError, match=r"weights: '.*a.pth' unpacks to \d+ bytes, the limit is"):
        load_model("demo:vgg_bn", tmp_path / "a.pth")
