"""Data on the shell: damaged and removed images, class lists, channels."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from support.shelled import invoke_apart, write_photos

import pyablate as pa
from pyablate.cli.data_specs import load_data
from pyablate.io.image_files import image_batches
from pyablate.io.image_folder import ImageFolder

_NETWORK = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    )
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a network in ``net_of_data.py`` and 12 photos of three classes."""
    (tmp_path / "net_of_data.py").write_text(_NETWORK)
    write_photos(tmp_path / "photos", each=4, side=6)
    (tmp_path / "classes.txt").write_text("dog\ncat\nbee\nant\n")
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("net_of_data", None)
    return tmp_path


_RUN = ("run", "net_of_data:make", "--data", "photos", "--channels", "1")
_CLASSES = ("--classes", "classes.txt")


def test_damaged_images_are_an_error_or_left_out(here: Path) -> None:
    (here / "photos/bee/1.png").write_bytes(b"no image")
    code, _, err = invoke_apart(*_RUN, *_CLASSES)
    assert (code, "cannot decode 'photos/bee/1.png'" in err) == (2, True)
    code, _, err = invoke_apart(*_RUN, *_CLASSES, "--on-bad-image", "skip", "--fresh")
    assert code == 0, err
    assert "'photos/bee/1.png' is left out" in err
    assert pa.load("run.zarr").labels.tolist() == [1] * 4 + [2] * 3 + [3] * 4
    code, _, err = invoke_apart(*_RUN, "--on-bad-image", "drop")
    assert (code, "on_bad: expected one of error, skip, got 'drop'" in err) == (2, True)


def test_folders_are_looked_up_among_the_classes(here: Path) -> None:
    code, _, err = invoke_apart(*_RUN, *_CLASSES)
    assert code == 0, err
    result = pa.load("run.zarr")
    assert result.class_names == ("dog", "cat", "bee", "ant")
    assert result.labels.tolist() == [1] * 4 + [2] * 4 + [3] * 4
    (here / "photos/bee").rename(here / "photos/beee")
    code, _, err = invoke_apart(*_RUN, *_CLASSES)
    assert (code, "1 of 3 folders are none of the 4 classes: 'beee'; nearest: bee" in err) == (
        2,
        True,
    )


@pytest.mark.parametrize("command", ["layers", "plan", "attributes", "compare"])
def test_every_command_with_data_takes_the_options(here: Path, command: str) -> None:
    (here / "photos/ant/1.png").write_bytes(b"no image")
    second = ("net_of_data:make",) if command == "compare" else ()
    first, *rest = _RUN[1:]
    options = (*rest, *_CLASSES, "--on-bad-image", "skip")
    code, _, err = invoke_apart(command, first, *second, *options)
    assert code == 0, err


def test_options_without_data_are_refused(here: Path) -> None:
    code, _, err = invoke_apart("layers", "net_of_data:make", "--on-bad-image", "skip")
    assert (code, "--on-bad-image needs --data" in err) == (2, True)


def test_a_file_removed_since_the_listing_does_not_lose_the_run(
    here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="pyablate")
    sys.path.insert(0, str(here))
    from net_of_data import make  # type: ignore[import-not-found]

    sys.path.remove(str(here))

    def run(output: str, removed: Path | None = None) -> pa.AblationResult:
        batches = image_batches(ImageFolder(here / "photos", channels=1), batch_size=2)
        content = removed.read_bytes() if removed else b""
        if removed:
            removed.unlink()
        try:
            return pa.ablate(make(), batches, output=output, batch_size=4, audit=20)
        finally:
            if removed:
                removed.write_bytes(content)

    gone = here / "photos/cat/3.png"
    with pytest.raises(ValueError, match=r"cat/3\.png' has been removed since .* put it back"):
        run("run.zarr", gone)
    again = run("run.zarr")
    assert any("2 of 3 blocks are there already" in message for message in caplog.messages)
    assert np.array_equal(again.predictions(), run("whole.zarr").predictions())


def test_images_without_labels(here: Path) -> None:
    for name in ("ant", "bee", "cat"):
        for path in (here / "photos" / name).iterdir():
            path.rename(here / "photos" / f"{name}{path.name}")
        (here / "photos" / name).rmdir()
    code, _, err = invoke_apart(*_RUN)
    assert (code, "found 0; images without classes go by --unlabelled" in err) == (2, True)
    code, out, err = invoke_apart(*_RUN, "--unlabelled", *_CLASSES)
    assert code == 0, err
    assert "No labels: agreement with the intact network's predictions on 12 images" in out
    assert "No prediction changes without any one unit of" in out
    assert "ccuracy" not in out
    result = pa.load("run.zarr")
    assert (result.labelled, len(result.labels)) == (False, 12)
    assert result.class_names == ("dog", "cat", "bee", "ant")
    rest = (*_RUN[2:], "--unlabelled")
    code, out, err = invoke_apart("compare", "net_of_data:make", "net_of_data:make", *rest)
    assert code == 0, err
    assert "worst class agreement, %" in out
    assert "ccurac" not in out
    code, _, err = invoke_apart("attributes", "net_of_data:make", *rest)
    assert (code, "expected (images, labels), got images without labels" in err) == (2, True)


@pytest.mark.parametrize("kind", ["npz", "idx", "demo"])
def test_files_without_labels(here: Path, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 6, 6), dtype=np.uint8)
    np.savez("data.npz", images=pixels)
    header = np.array([0x803, *pixels.shape], dtype=">u4").tobytes()
    Path("digits").write_bytes(header + pixels.tobytes())
    spec = {"npz": "data.npz", "idx": "digits", "demo": "demo"}[kind]
    batches = load_data(spec, unlabelled=True, limit=5).batches
    assert isinstance(batches, tuple)
    assert (len(batches[0]), batches[1]) == (5, None)
    with pytest.raises(ValueError, match="labels: expected none with unlabelled, got 'y"):
        load_data(spec, unlabelled=True, labels="y.npy")
    if kind == "npz":
        with pytest.raises(ValueError, match="found images; images alone go by --unlabelled"):
            load_data(spec)
