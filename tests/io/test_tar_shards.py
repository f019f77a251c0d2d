"""Images in tar archives: what is read, in which order, and what is refused."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyablate.cli.data_specs import load_data
from pyablate.data.dataset import Data
from pyablate.runs.fingerprint import glance


def png(value: int, kind: str = "png") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(out, kind)
    return out.getvalue()


def shard(path: Path, files: Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def found(spec: Path, **options: Any) -> tuple[list[int], list[int]]:
    """Grey values and labels."""
    images, labels = zip(*load_data(spec, **options).batches, strict=True)
    return (torch.cat(images)[:, 0, 0, 0] * 255).round().int().tolist(), torch.cat(labels).tolist()


FIRST = [
    ("b/000.png", png(10)),
    ("b/000.cls", b"2\n"),
    ("b/001.cls", b"0"),
    ("b/001.json", b"{}"),
    ("b/001.PNG", png(20)),
    ("__MACOSX/b/000.png", b"no image"),
    ("b/._000.png", b"no image"),
]
SECOND = [("x.seg.png", png(30)), ("x.cls", b"1")]


def test_shards_in_a_folder_come_by_name(tmp_path: Path) -> None:
    shard(tmp_path / "s-1.tar", SECOND)
    shard(tmp_path / "s-0.tar", FIRST)
    assert found(tmp_path) == ([10, 20, 30], [2, 0, 1])
    assert found(tmp_path / "s-1.tar") == ([30], [1])
    assert found(tmp_path, limit=2) == ([10, 20], [2, 0])
    assert load_data(tmp_path).class_names is None
    data = Data(load_data(tmp_path).batches, dtype=torch.float32, device=torch.device("cpu"))
    told = glance(data, torch.float32)
    assert told is not None
    assert set(told) == {"sample", "files"}


def test_an_archive_beside_class_folders_is_none_of_the_images(tmp_path: Path) -> None:
    shard(tmp_path / "all.tar", FIRST)
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "0.png").write_bytes(png(7))
    assert found(tmp_path) == ([7], [0])


def test_classes_by_name_and_no_labels(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [("0.png", png(1)), ("0.cls", b"goldfish"), ("1.png", png(2))])
    data = load_data(path, limit=1, classes=["tench", "goldfish"])
    assert [label.tolist() for _, label in data.batches] == [[1]]
    assert data.class_names == ("tench", "goldfish")
    alone = list(load_data(path, unlabelled=True).batches)
    assert [images.shape for images in alone] == [(2, 3, 4, 6)]


def test_options_are_those_of_folders(tmp_path: Path) -> None:
    files = [("0.png", png(100)), ("0.cls", b"0"), ("1.png", b"no image"), ("1.cls", b"1")]
    path = shard(tmp_path / "a.tar", files)
    with pytest.raises(ValueError, match=r"cannot decode '.*a.tar:1.png'"):
        found(path)
    assert found(path, on_bad="skip") == ([100], [0])
    options: dict[str, Any] = {"size": 4, "channels": 1, "mean": [0.2], "std": [0.5]}
    ((images, _),) = load_data(path, on_bad="skip", **options).batches
    torch.testing.assert_close(images, torch.full((1, 1, 4, 4), (100 / 255 - 0.2) / 0.5))


@pytest.mark.parametrize(
    ("files", "mode", "message"),
    [
        ([("0.png", png(1))], "w", "class of '.*a.tar:0.png' as a number .* found none"),
        ([("0.png", png(1)), ("0.cls", b"cat")], "w", "as a number .* found 'cat'"),
        ([("0.png", png(1)), ("0.cls", b"-1")], "w", "as a number .* found '-1'"),
        ([("0.png", png(1)), ("0.b.png", png(1))], "w", "one image, found '0.png' and '0.b.png'"),
        ([("0.cls", b"1")], "w", "expected images .* found none"),
        (FIRST, "w:gz", "cannot read '.*a.tar' .* expected a tar archive that is not compressed"),
    ],
)
def test_what_is_refused(
    files: list[tuple[str, bytes]], mode: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(shard(tmp_path / "a.tar", files, mode))


def test_damaged_archives(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", FIRST)
    whole = path.read_bytes()
    for content in (b"no archive", b"", whole[:700], whole[:1300]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="data: "):
            list(load_data(path).batches)
