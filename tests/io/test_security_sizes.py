"""Small files that would take all the memory, and things that are no files, are refused at once."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import zarr
from PIL import Image
from support.shelled import invoke
from support.simulated import simulate

import pyablate as pa
from pyablate.analysis.unit_table import read_table
from pyablate.cli.data_specs import load_data
from pyablate.io import image_folder
from pyablate.io.zarr_check import MAX_RATIO, check_folder
from pyablate.runs.run_folder import check_place

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


# --- stores ---------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    simulate(np.full((3, 2), 0.5), 0.5, 4, draw, ["x"] * 3).save(tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


def claim(path: Path, **changes: Any) -> None:
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps(metadata | changes))


CHUNK = {"name": "regular", "configuration": {"chunk_shape": [1 << 31]}}
STRETCHED = {"name": "fixed_length_utf32", "configuration": {"length_bytes": 1 << 30}}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("label", {"shape": [1 << 31]}, r"label: \d+ of its \d+ chunks are missing"),
        ("label", {"shape": [1 << 31], "chunk_grid": CHUNK}, "claim 17179\\d+ bytes, what is"),
        ("label", {"chunk_grid": CHUNK}, "claim 17179\\d+ bytes, what is stored can hold at most"),
        ("label", {"data_type": STRETCHED}, "what is stored can hold at most"),
        ("label", {"data_type": "r8000000000"}, "what is stored can hold at most"),
        ("label", {"shape": [1 << 40]}, "larger than the limit"),
        ("label", {"chunk_grid": None}, "expected chunks for the shape"),
    ],
)
def test_a_claim_that_nothing_stored_could_bear_out(
    store: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    claim(store / name / "zarr.json", **changes)
    with pytest.raises(OSError, match=said):
        pa.load(store)


def test_many_claims_count_together(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "table.zarr", mode="w")
    for number in range(20):
        group.create_array(f"a{number}", shape=1 << 20, dtype="f8")
    with pytest.raises(OSError, match=f"claim {20 << 23} bytes"):
        check_folder(tmp_path / "table.zarr")


def test_arrays_that_would_not_fit_into_memory(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    store = store.with_name("large.zarr")
    group = zarr.open_group(store, mode="w")
    group.create_array("x", data=draw.integers(0, 9, 10_000_000, dtype=np.int8))
    check_folder(store, whole=True)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=70 << 20))
    with pytest.raises(OSError, match=f"its arrays take 80000000 bytes, {70 << 20} are free"):
        check_folder(store)


@pytest.mark.parametrize("name", ["label", "unit_layer", "flip_start", "flip_image"])
def test_a_lost_chunk_is_no_chunk_of_zeros(store: Path, name: str) -> None:
    (store / name / "c" / "0").unlink()
    with pytest.raises(OSError, match=f"{name}: 1 of its 1 chunks are missing"):
        pa.load(store)


def test_results_of_nothing_but_zeros_come_back(tmp_path: Path) -> None:
    """Their chunks are written all the same: one layer, one class, no flips."""
    draw = np.random.default_rng(0)
    made = simulate(np.zeros((3, 2)), 1.0, 4, draw, ["x"] * 3)
    made = dataclasses.replace(made, labels=made.labels * 0, baseline=made.baseline * 0)
    made.save(tmp_path / "run.zarr")
    assert (pa.load(tmp_path / "run.zarr").labels == 0).all()


def test_nothing_that_our_codec_can_pack_is_refused(tmp_path: Path) -> None:
    """Constant numbers are what Zstandard packs best."""
    for number in (0, 7):
        path = tmp_path / f"{number}.zarr"
        group = zarr.open_group(path, mode="w")
        values = np.full(1 << 24, number, np.int64)
        group.create_array("x", data=values, config={"write_empty_chunks": True})
        check_folder(path, whole=True)
        stored = sum(file.stat().st_size for file in (path / "x" / "c").rglob("*"))
        assert values.nbytes < MAX_RATIO * stored


# --- neither files nor folders --------------------------------------------------------------------


@pytest.fixture
def soon() -> Iterator[None]:
    """Nothing may wait for somebody to write into a named pipe."""

    def stop(*_: Any) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("name", ["zarr.json", "label/zarr.json", "label/c/0", "extra", ".zattrs"])
@pytest.mark.parametrize("read", [pa.load, read_table, check_place, pa.AblationResult.save])
def test_a_pipe_in_a_store(store: Path, name: str, read: Callable[..., object]) -> None:
    loaded = pa.load(store)
    (store / name).unlink(missing_ok=True)
    os.mkfifo(store / name)
    if read is pa.AblationResult.save:
        if name in ("zarr.json", ".zattrs"):
            with pytest.raises(OSError, match=f"{name} is neither a file nor a folder"):
                loaded.save(store)
        return
    with pytest.raises(OSError, match=f"{name} is neither a file nor a folder"):
        read(store)


@pytest.mark.usefixtures("soon", "empty_folder")
@pytest.mark.parametrize(
    "words",
    [
        "run demo:vgg_bn --data pipe",
        "run demo:vgg_bn --data pipe.npz",
        "run demo:vgg_bn --data plain.npz --labels pipe",
        "run demo:vgg_bn --data plain.npz --labels pipe.npy",
        "run demo:vgg_bn --data demo --weights pipe",
        "run demo:vgg_bn --data demo --weights pipe.safetensors",
        "run pipe.pt2 --data demo",
        "run demo:vgg_bn --data demo --output pipe",
        "run demo:vgg_bn --data demo --output pipe.zarr",
        "report pipe",
        "report pipe.zarr",
        "plot pipe",
        "plot pipe --kind cumulative",
        "significance pipe",
        "merge pipe pipe.zarr",
        "correlate run.zarr pipe",
        "correlate pipe pipe",
        "prune demo:vgg_bn --data demo --limit 8 --by pipe",
        "cumulative demo:vgg_bn --data demo --limit 8 --order pipe.csv",
        "sensitivity demo:vgg_bn --data demo --limit 8 --csv pipe.csv",
    ],
)
def test_a_pipe_where_a_file_is_expected(store: Path, words: str) -> None:
    np.savez("plain.npz", images=np.zeros((1, 28, 28), np.float32), labels=np.zeros(1, int))
    for suffix in ("", ".npz", ".npy", ".safetensors", ".pt2", ".zarr", ".csv"):
        os.mkfifo(f"pipe{suffix}")
    code, said = invoke(*words.split())
    assert code == 2, said
    assert "pyablate: " in said
