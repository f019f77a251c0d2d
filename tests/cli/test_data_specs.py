"""Data named by a word: what is read, and what is said of bad input."""

from __future__ import annotations

import gzip
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyablate import demo
from pyablate.cli import data_specs
from pyablate.cli.data_specs import Pixels, load_data
from pyablate.io import image_files
from pyablate.io.idx import read_idx

# --- idx files ------------------------------------------------------------------------------------


def _idx(array: np.ndarray) -> bytes:
    code = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}[array.dtype.str[1:]]
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "f4", "f8"])
@pytest.mark.parametrize("shape", [(0,), (5,), (2, 3), (2, 1, 4, 3)])
def test_idx_round_trip(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(-100, 100, shape).astype(dtype)
    (tmp_path / "a.idx").write_bytes(_idx(array))
    (tmp_path / "b.idx.gz").write_bytes(gzip.compress(_idx(array)))
    for name in ("a.idx", "b.idx.gz"):
        read = read_idx(tmp_path / name)
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)


GREY = np.random.default_rng(2).integers(0, 256, (6, 5, 4), dtype=np.uint8)
LABELS = np.array([0, 2, 1, 1, 0, 2], dtype=np.uint8)


@pytest.mark.parametrize(
    ("images_name", "labels_name"),
    [
        ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
        ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"),
        ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
        ("my-images-idx3-ubyte", "my-labels-idx1-ubyte.gz"),
    ],
)
def test_idx_labels_lie_beside_the_images(
    tmp_path: Path, images_name: str, labels_name: str
) -> None:
    for name, array in ((images_name, GREY), (labels_name, LABELS)):
        content = _idx(array)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    data = load_data(tmp_path / images_name)
    images, labels = data.batches
    assert data.class_names is None
    assert torch.equal(images, torch.from_numpy(GREY)[:, None] / 255)
    assert labels.dtype == torch.int64
    assert labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("suffix", [".npy", "-idx1"])
def test_labels_given_by_name(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "digits").write_bytes(_idx(GREY))
    path = tmp_path / f"labels{suffix}"
    if suffix == ".npy":
        np.save(path, LABELS)
    else:
        path.write_bytes(_idx(LABELS))
    _, labels = load_data(tmp_path / "digits", labels=path, limit=4).batches
    assert labels.tolist() == LABELS[:4].tolist()


# --- npz ------------------------------------------------------------------------------------------

RNG = np.random.default_rng(3)
COLOUR = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
FLOATS = RNG.standard_normal((6, 2, 4, 3))
LAYOUTS: dict[str, tuple[np.ndarray, np.ndarray]] = {
    "channels last": (COLOUR, COLOUR.transpose(0, 3, 1, 2).astype(np.float32) / 255),
    "channels first": (
        COLOUR.transpose(0, 3, 1, 2),
        COLOUR.transpose(0, 3, 1, 2).astype(np.float32) / 255,
    ),
    "grey": (GREY, GREY[:, None].astype(np.float32) / 255),
    "float stays": (FLOATS[:, :1] * 300, (FLOATS[:, :1] * 300).astype(np.float32)),
    "features": (FLOATS[:, 0, 0], FLOATS[:, 0, 0].astype(np.float32)),
}


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_npz_layouts(tmp_path: Path, layout: str, keys: tuple[str, str]) -> None:
    stored, expected = LAYOUTS[layout]
    np.savez_compressed(tmp_path / "data.npz", **{keys[0]: stored, keys[1]: LABELS})
    images, labels = load_data(tmp_path / "data.npz", limit=5).batches
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    np.testing.assert_array_equal(images.numpy(), expected[:5])
    assert labels.tolist() == LABELS[:5].tolist()


def test_npz_names_its_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=GREY, y=LABELS, class_names=np.array(["a", "bb", "c"]))
    assert load_data(tmp_path / "data.npz").class_names == ("a", "bb", "c")


def test_class_names_that_are_no_text(tmp_path: Path) -> None:
    names = np.array(["a", "b", "c"])
    names.view(np.uint32)[1] = 0x7FFFFFFF
    np.savez(tmp_path / "data.npz", x=GREY, y=LABELS, class_names=names)
    with pytest.raises(ValueError, match=r"class_names in .* are no text"):
        load_data(tmp_path / "data.npz")


def test_npz_with_labels_apart(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=GREY)
    np.save(tmp_path / "labels.npy", LABELS[::-1])
    _, labels = load_data(tmp_path / "data.npz", labels=tmp_path / "labels.npy").batches
    assert labels.tolist() == LABELS[::-1].tolist()


def test_mean_and_std_per_channel(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=COLOUR, labels=LABELS)
    images, _ = load_data(tmp_path / "data.npz", mean=[0.1, 0.2, 0.3], std=[1, 2, 4]).batches
    expected = (COLOUR / 255 - [0.1, 0.2, 0.3]) / [1, 2, 4]
    np.testing.assert_allclose(images.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_demo_data() -> None:
    data = load_data("demo", limit=20)
    images, labels = demo.images(20)
    assert torch.equal(data.batches[0], images)
    assert torch.equal(data.batches[1], labels)
    assert data.class_names == demo.CLASSES


# --- image folders --------------------------------------------------------------------------------


def _picture(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 5, 1 and 3 images of 12 x 8 pixels, the value tells the file."""
    root = tmp_path / "photos"
    for label, (name, count) in enumerate((("ant", 5), ("bee", 1), ("cat", 3))):
        for i in range(count):
            pixels = np.full((8, 12, 3), 10 * label + i, dtype=np.uint8)
            pixels[:, :, 1] = np.arange(12)
            _picture(root / name / f"{i:02}.png", pixels)
    (root / "cat" / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    return root


def _all(data: data_specs.Data) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*data.batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_image_folder(folder: Path) -> None:
    data = load_data(folder, batch_size=4)
    images, labels = _all(data)
    assert data.class_names == ("ant", "bee", "cat")
    assert labels.tolist() == [0] * 5 + [1] + [2] * 3
    assert images.shape == (9, 3, 8, 12)
    assert images.dtype == torch.float32
    assert (images[:, 0, 0, 0] * 255).tolist() == [0, 1, 2, 3, 4, 10, 20, 21, 22]
    assert (images[0, 1, 3] * 255).tolist() == list(range(12))
    assert len(list(data.batches)) == 3
    assert torch.equal(_all(data)[0], images)  # a second pass gives the same


@pytest.mark.parametrize(
    ("limit", "labels"),
    [(1, [0]), (3, [0, 1, 2]), (5, [0, 0, 1, 2, 2]), (99, [0] * 5 + [1] + [2] * 3)],
)
def test_limit_spreads_over_the_classes(folder: Path, limit: int, labels: list[int]) -> None:
    assert _all(load_data(folder, limit=limit))[1].tolist() == labels


def test_size_scales_and_crops_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, 4:12] = 255
    _picture(tmp_path / "a" / "0.png", pixels)
    tall = pixels.transpose(1, 0, 2)
    _picture(tmp_path / "a" / "1.png", np.ascontiguousarray(tall))
    images, _ = _all(load_data(tmp_path, size=8))
    assert images.shape == (2, 3, 8, 8)
    assert (images == 1).all()
    images, _ = _all(load_data(tmp_path, size=(4, 2)))
    assert images.shape == (2, 3, 2, 2)


def test_interpolation(tmp_path: Path) -> None:
    pixels = np.kron(np.eye(4, dtype=np.uint8) * 200, np.ones((2, 2), np.uint8))
    _picture(tmp_path / "a" / "0.png", pixels)
    for name in image_files.INTERPOLATIONS:
        method = Image.Resampling[name.upper()]
        expected = np.asarray(Image.fromarray(pixels).resize((5, 5), method))
        found, _ = _all(load_data(tmp_path, size=5, interpolation=name))
        np.testing.assert_array_equal((found[0, 0] * 255).round().numpy(), expected)


OWN = Pixels("timm:some_net", (8, 6), "nearest", (0.5,), (0.25,))


@pytest.mark.parametrize(
    ("given", "shape", "centre", "told"),
    [
        ({}, (1, 6, 6), 0.5, "size 8,6 of timm:some_net; interpolation nearest of timm:some_net"),
        ({"size": 4}, (1, 4, 4), 0.5, "size 4 as given; interpolation nearest of timm:some_net"),
        ({"mean": [0.0], "std": [1.0]}, (1, 6, 6), 0.0, "mean 0 as given; std 1 as given"),
        ({"std": [1.0]}, (1, 6, 6), 0.5, "mean 0.5 of timm:some_net; std 1 as given"),
    ],
)
def test_what_a_model_brings_and_what_is_given(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    given: dict[str, Any],
    shape: tuple[int, ...],
    centre: float,
    told: str,
) -> None:
    caplog.set_level("INFO", logger="pyablate")
    _picture(tmp_path / "a" / "0.png", np.full((16, 16), 102, dtype=np.uint8))
    images, _ = _all(load_data(tmp_path, own=OWN, **given))
    assert images.shape[1:] == shape
    deviation = 1.0 if "std" in given else 0.25
    torch.testing.assert_close(images, torch.full_like(images, (0.4 - centre) / deviation))
    assert told in caplog.text


@pytest.mark.parametrize(
    ("pixels", "expected"), [(GREY, (GREY / 255 - 0.5) / 0.25), (FLOATS[..., 0], FLOATS[..., 0])]
)
def test_a_model_prepares_files_of_whole_numbers_only(
    tmp_path: Path, pixels: np.ndarray, expected: np.ndarray
) -> None:
    np.savez(tmp_path / "data.npz", images=pixels[:, None], labels=LABELS)
    images, _ = load_data(tmp_path / "data.npz", own=OWN).batches
    np.testing.assert_allclose(images.numpy()[:, 0], expected, atol=1e-6)


def test_grey_images_and_channels(tmp_path: Path) -> None:
    _picture(tmp_path / "a" / "0.png", np.full((4, 4), 51, dtype=np.uint8))
    grey, _ = _all(load_data(tmp_path))
    assert grey.shape == (1, 1, 4, 4)
    assert grey[0, 0, 0, 0] == pytest.approx(0.2)
    assert _all(load_data(tmp_path, channels=3))[0].shape == (1, 3, 4, 4)
    colour, _ = _all(load_data(tmp_path, mean=[0.0, 0.1, 0.2], std=[1, 1, 0.5]))
    assert colour[0, :, 0, 0].tolist() == pytest.approx([0.2, 0.1, 0.0], abs=1e-6)


def test_one_figure_is_for_every_channel_of_colour_images(tmp_path: Path) -> None:
    pixels = np.full((4, 4, 3), (51, 102, 255), dtype=np.uint8)
    _picture(tmp_path / "a" / "0.png", pixels)
    images, _ = _all(load_data(tmp_path, mean=[0.2], std=[0.5]))
    assert images.shape == (1, 3, 4, 4)
    assert images[0, :, 0, 0].tolist() == pytest.approx([0.0, 0.4, 1.6], abs=1e-6)
    three, _ = _all(load_data(tmp_path, mean=[0.2] * 3, std=[0.5] * 3))
    assert torch.equal(images, three)
    assert _all(load_data(tmp_path, mean=[0.2], channels=1))[0].shape == (1, 1, 4, 4)
    # The model says by its own figures how many channels it takes.
    assert _all(load_data(tmp_path, mean=[0.2], own=OWN))[0].shape[1] == len(OWN.mean or ())


def test_one_figure_keeps_grey_images_grey(tmp_path: Path) -> None:
    _picture(tmp_path / "a" / "0.png", np.full((4, 4), 51, dtype=np.uint8))
    assert _all(load_data(tmp_path, mean=[0.2], std=[0.5]))[0].shape == (1, 1, 4, 4)
    assert _all(load_data(tmp_path, mean=[0.2], std=[0.5] * 3))[0].shape == (1, 3, 4, 4)


def test_image_folder_leaves_the_random_state_alone(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _all(load_data(folder))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python's, about fork and threads
def test_image_folder_with_a_decoding_process(folder: Path) -> None:
    assert torch.equal(_all(load_data(folder, workers=1))[0], _all(load_data(folder))[0])
    assert pickle.loads(pickle.dumps(load_data(folder).batches.dataset))[3][1] == 0


def test_class_without_images_keeps_its_index(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "ant-lion").mkdir()
    data = load_data(folder)
    assert data.class_names == ("ant", "ant-lion", "bee", "cat")
    assert _all(data)[1].tolist() == [0] * 5 + [2] + [3] * 3
    assert "1 of the classes have no image" in caplog.text


def test_image_folder_without_pillow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match="image folders need Pillow: pip install pillow"):
        load_data(folder)


# --- bad data -------------------------------------------------------------------------------------


def _files(**contents: bytes) -> Callable[[Path], None]:
    names = {"images": "t-images-idx3-ubyte", "labels": "t-labels-idx1-ubyte"}

    def write(folder: Path) -> None:
        for key, content in contents.items():
            (folder / names.get(key, key)).write_bytes(content)

    return write


def _npz(**arrays: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: np.savez(folder / "data.npz", **arrays)


def _short_gzip(folder: Path) -> None:
    (folder / "t-images-idx3-ubyte.gz").write_bytes(gzip.compress(_idx(GREY))[:-20])
    (folder / "t-labels-idx1-ubyte.gz").write_bytes(gzip.compress(_idx(LABELS)))


def _short_npz(folder: Path) -> None:
    np.savez(folder / "data.npz", images=GREY, labels=LABELS)
    (folder / "data.npz").write_bytes((folder / "data.npz").read_bytes()[:300])


def _truncated_png(folder: Path) -> None:
    _picture(folder / "a" / "0.png", RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    path = folder / "a" / "0.png"
    path.write_bytes(path.read_bytes()[:500])


def _two_sizes(folder: Path) -> None:
    _picture(folder / "a" / "0.png", np.zeros((4, 4, 3), dtype=np.uint8))
    _picture(folder / "a" / "1.png", np.zeros((4, 5, 3), dtype=np.uint8))


def _one_picture(folder: Path) -> None:
    _picture(folder / "a" / "0.png", np.zeros((4, 4, 3), dtype=np.uint8))


def _large_picture(folder: Path) -> None:
    _picture(folder / "a" / "0.png", np.zeros((101, 100, 3), dtype=np.uint8))


def _nothing(folder: Path) -> None:
    pass


IDX = "t-images-idx3-ubyte"
GOOD = _idx(LABELS)
# What to write, what to load, the message, the options.
BAD_DATA: dict[str, tuple[Any, ...]] = {
    "missing": (_nothing, "none.npz", "data: expected demo .* found no file or folder"),
    "misspelt": (_nothing, "demos", "found no file or folder 'demos'"),
    "unknown kind": (_files(words=b"x"), "words", "an idx file under another name needs"),
    "limit 0": (_nothing, "demo", "limit: expected at least 1, got 0", {"limit": 0}),
    "limit text": (_nothing, "demo", "limit: .* got '9'", {"limit": "9"}),
    "labels of demo": (_nothing, "demo", "labels: expected none with demo", {"labels": "y"}),
    "size of demo": (_nothing, "demo", "size: expected none with demo, got 8", {"size": 8}),
    "std 0": (_nothing, "demo", r"std: expected positive figures, got \[0\]", {"std": [0]}),
    "mean nan": (_nothing, "demo", "mean: expected finite figures", {"mean": [float("nan")]}),
    "mean of 3": (_nothing, "demo", "mean: expected 1 or 1 figures", {"mean": [1, 2, 3]}),
    "idx magic": (
        _files(images=b"\x89PNG", labels=GOOD),
        IDX,
        "expected the magic number.*89504e47",
    ),
    "idx empty": (_files(images=b"", labels=GOOD), IDX, "magic number .* found 0x.empty file"),
    "idx header": (_files(images=_idx(GREY)[:9], labels=GOOD), IDX, "inside the header"),
    "idx short": (
        _files(images=_idx(GREY)[:-1], labels=GOOD),
        IDX,
        r"header \(6, 5, 4\) asks for 120 bytes of data, found 119",
    ),
    "idx long": (_files(images=_idx(GREY) + b"x", labels=GOOD), IDX, "120 bytes .* found more"),
    "idx bomb": (
        _files(images=struct.pack(">I3I", 0x803, 1 << 31, 1 << 31, 4), labels=GOOD),
        IDX,
        "asks for 18446744073709551616 bytes, the limit is 5000",
    ),
    "idx gzip header": (
        _files(**{IDX + ".gz": b"hello", "labels": GOOD}),
        IDX + ".gz",
        "damaged gzip stream .Not a gzipped file",
    ),
    "idx gzip": (_short_gzip, IDX + ".gz", "t-images-idx3-ubyte.gz': damaged gzip stream"),
    "idx no gzip": (_files(**{"images.gz": b"hello"}), "images.gz", "labels: expected 'labels'"),
    "idx counts": (
        _files(images=_idx(GREY), labels=_idx(LABELS[:5])),
        IDX,
        "expected as many labels as images .* found 5 labels and 6 images",
    ),
    "idx no labels": (_files(images=_idx(GREY)), IDX, "labels: expected 't-labels-idx1-ubyte'"),
    "no such labels": (
        _files(images=_idx(GREY)),
        IDX,
        "labels: expected a file, found none at 'none'",
        {"labels": "none"},
    ),
    "npz keys": (_npz(a=GREY, labels=LABELS), "data.npz", "images and labels.* found a, labels"),
    "npz counts": (_npz(images=GREY, labels=LABELS[1:]), "data.npz", "5 labels and 6 images"),
    "npz objects": (
        _npz(images=np.array([{}], dtype=object), labels=LABELS[:1]),
        "data.npz",
        "data: cannot read .*allow_pickle",
    ),
    "npz int64": (_npz(images=GREY.astype(int), labels=LABELS), "data.npz", "found int64"),
    "npz float labels": (
        _npz(images=GREY, labels=LABELS * 0.5),
        "data.npz",
        r"labels: expected integers \[N\] .* found float64 \[6\]",
    ),
    "npz 2-d labels": (_npz(x=GREY, y=LABELS[:, None, None]), "data.npz", r"uint8 \[6, 1, 1\]"),
    "npz no images": (_npz(x=GREY[:0], y=LABELS[:0]), "data.npz", r"found shape \[0, 5, 4\]"),
    "npz bomb": (_npz(x=np.zeros(6000), y=LABELS), "data.npz", "unpacks to .* limit is 5000"),
    "npz short": (_short_npz, "data.npz", "is no .npz file or damaged"),
    "npz text": (_files(**{"data.npz": b"hello"}), "data.npz", "is no .npz file or damaged"),
    "npz class names": (
        _npz(x=GREY, y=LABELS, class_names=np.arange(3)),
        "data.npz",
        "expected class_names .* to be a list of strings, found int64",
    ),
    "folder empty": (_nothing, ".", "expected one sub-folder per class in '.', found 0"),
    "folder no images": (
        lambda folder: (folder / "a").mkdir(),
        ".",
        "data: expected images .* below '.', found none",
    ),
    "folder labels": (_one_picture, ".", "labels: expected none with an image", {"labels": "y"}),
    "folder size": (_one_picture, ".", "size: expected SIZE or .* got 0", {"size": 0}),
    "folder crop": (_one_picture, ".", "CROP <= SCALE, got .4, 5.", {"size": (4, 5)}),
    "folder interpolation": (
        _one_picture,
        ".",
        "interpolation: expected one of bilinear, .* got 'cubic'; nearest: bicubic",
        {"interpolation": "cubic"},
    ),
    "folder channels": (_one_picture, ".", "channels: expected 1 or 3, got 2", {"channels": 2}),
    "folder std": (_one_picture, ".", "std: expected 1 or 3 figures", {"std": [1, 2]}),
    "folder batch": (_one_picture, ".", "batch_size: .* at least 1, got 0", {"batch_size": 0}),
    "folder sizes": (_two_sizes, ".", r"one size \[3, 4, 4\], found \[3, 4, 5\] in 'a/1.png'"),
    "folder truncated": (_truncated_png, ".", "data: cannot decode 'a/0.png'"),
    "folder bomb": (_large_picture, ".", "'a/0.png' is too large: .* found 100 x 101"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    prepare, spec, message, *options = BAD_DATA[case]
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_specs, "MAX_BYTES", 5000)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 10_000)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        list(load_data(spec, **dict(*options)).batches)
    assert "\n" not in str(caught.value)


def test_pillow_itself_refuses_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _one_picture(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(ValueError, match=r"0.png' is too large"):
        load_data(tmp_path, channels=3).batches.dataset[0]
