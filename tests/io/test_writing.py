"""Files that commands write: looked at before the work, whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.shelled import invoke
from support.simulated import simulate

import pyablate as pa
from pyablate.cli.common import NO_ROOM, error_line
from pyablate.io.atomic import check_file, whole, write_csv

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="devices and pipes of Unix")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a result, a pipe, and links to all kinds of things."""
    monkeypatch.chdir(tmp_path)
    simulate(np.full((3, 2), 0.2), 0.1, 20, np.random.default_rng(0)).save("run.zarr")
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("file").write_text("older")
    for target, link in [
        ("/dev/null", "to_device"),
        ("run.zarr/x.html", "to_store"),
        ("file", "to_file"),
        ("loop", "loop"),
        ("new", "to_nothing"),
    ]:
        os.symlink(target, link)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/full", "--what: expected a file to write to, /dev/full is a device"),
        ("pipe", "device or a pipe"),
        ("to_device", "device or a pipe"),
        ("folder", "folder is a folder"),
        ("run.zarr/report.html", "expected a place outside of stores"),
        ("run.zarr/label/zarr.json", "expected a place outside of stores"),
        ("other.zarr/units.csv", "expected a place outside of stores"),
        ("to_store", "expected a place outside of stores"),
        ("loop", "--what: loop cannot be written"),
        ("file/units.csv", "--what: file/units.csv cannot be written"),
    ],
)
def test_no_place_for_a_file(here, path, message):
    with pytest.raises(OSError, match="--what") as raised:
        check_file(Path(path), "--what")
    line, code = error_line(raised.value)
    assert code == 2
    assert message in str(line)
    with pytest.raises(OSError, match="--what"), whole(Path(path), "--what") as fresh:
        fresh.write_text("never")


def test_nothing_is_made_before_the_work(here):
    check_file(Path("new/folder/units.csv"))
    assert not Path("new").exists()


def test_a_file_is_replaced_once_it_is_whole(here):
    with whole(Path("file")) as fresh:
        fresh.write_text("newer")
        assert Path("file").read_text() == "older"
    assert Path("file").read_text() == "newer"
    with pytest.raises(KeyboardInterrupt), whole(Path("file")) as fresh:
        _interrupted(fresh)
    assert Path("file").read_text() == "newer"
    assert not list(here.glob(".pyablate*"))


def _interrupted(path: Path) -> None:
    path.write_text("half")
    raise KeyboardInterrupt


def test_a_link_stays_a_link(here):
    for link, target in (("to_file", "file"), ("to_nothing", "new")):
        with whole(Path(link)) as fresh:
            fresh.write_text("newer")
        assert os.readlink(link) == target
        assert Path(target).read_text() == "newer"


def test_a_full_disk_leaves_what_was_there(here, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(OSError, match="--pairs: cannot write file: No space left") as raised:
        write_csv(pd.DataFrame({"a": [1]}), Path("file"), "--pairs")
    assert error_line(raised.value)[1] == NO_ROOM
    assert Path("file").read_text() == "older"


@pytest.mark.parametrize("path", ["/dev/full", "pipe", "run.zarr/zarr.json", "to_store"])
def test_a_report_replaces_nothing_but_a_file(here, path):
    before = Path("run.zarr/zarr.json").read_bytes()
    code, out = invoke("report", "run.zarr", "-o", path)
    assert code == 2
    assert out.startswith("pyablate: --output: expected a")
    with pytest.raises(OSError, match="path: expected a"):
        pa.load("run.zarr").report(path)
    assert Path("run.zarr/zarr.json").read_bytes() == before
    assert not Path(path).is_file() or path == "run.zarr/zarr.json"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--limit 5", "--limit needs --data"),
        ("--labels nofile", "--labels needs --data"),
        ("--size 3", "--size needs --data"),
        ("--mean 0.5", "--mean needs --data"),
        ("--std 0.5", "--std needs --data"),
        ("--device cuda", "--device needs --model"),
        ("--model demo:resnet", "--model needs --data"),
    ],
)
def test_options_that_say_nothing_are_refused(here, words, message):
    code, out = invoke("report", "run.zarr", *words.split())
    assert code == 2
    assert message in out
    assert not Path("report.html").exists()


def test_no_folder_is_made_for_a_report_of_nothing(here):
    code, out = invoke("report", "gone.zarr", "-o", "deep/new/r.html")
    assert code == 2
    assert "gone.zarr" in out
    assert not Path("deep").exists()


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two halves of a run, and the images with names of classes that are not Unicode."""
    monkeypatch.chdir(tmp_path)
    for part in ("1", "2"):
        words = f"run demo:resnet --data demo --limit 8 --layers stem.2 --shard {part}/2"
        code, out = invoke(*words.split(), "-o", f"part{part}.zarr")
        assert code == 0, out
    return tmp_path


def test_merge_replaces_no_other_result_unless_told_and_never_a_part(shards):
    parts = ["part1.zarr", "part2.zarr"]
    assert invoke("merge", *parts, "-o", "both.zarr")[0] == 0
    shutil.copytree("part1.zarr", "other.zarr")
    before = Path("other.zarr/zarr.json").read_bytes()
    code, out = invoke("merge", *parts, "-o", "other.zarr")
    assert (code, out) == (2, "pyablate: --output: other.zarr exists; --fresh replaces a result\n")
    assert Path("other.zarr/zarr.json").read_bytes() == before
    os.symlink("part2.zarr", "link.zarr")
    for part in (*parts, "link.zarr", str(shards / "part1.zarr")):
        code, out = invoke("merge", *parts, "-o", part, "--fresh")
        assert (code, out) == (2, f"pyablate: --output: expected none of the parts, got {part!r}\n")
    assert len(pa.load("part1.zarr").labels) == 4
    assert invoke("merge", *parts, "-o", "other.zarr", "--fresh")[0] == 0
    assert len(pa.load("other.zarr").labels) == 8


def test_a_table_that_cannot_be_written_does_not_hide_the_result(tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.chdir(tmp_path)
    words = "run demo:resnet --data demo --limit 8 --layers stem.2 --csv".split()
    code, out = invoke(*words, "/dev/full")
    assert (code, Path("run.zarr").exists()) == (2, False)  # before the work
    assert "--csv: expected a file to write to, /dev/full" in out
    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    code, out = invoke(*words, "units.csv")
    assert code == NO_ROOM
    assert (
        "--csv: cannot write units.csv: No space left on device; the result is in run.zarr" in out
    )
    assert not Path("units.csv").exists()
    assert len(pa.load("run.zarr").labels) == 8


def test_a_folder_whose_name_is_not_unicode_is_a_class(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    for name in (b"bad\xff", b"good"):
        try:
            os.makedirs(os.path.join(b"photos", name))
        except OSError:
            pytest.skip("this file system takes no such names")
        with open(os.path.join(b"photos", name, b"1.png"), "wb") as file:
            image.new("L", (28, 28), 90).save(file, "png")
    words = "run photo_net:make --data photos --csv units.csv --layers 1".split()
    Path("photo_net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "        nn.Flatten(), nn.Linear(2, 2))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out = invoke(*words)
    assert code == 0, out
    assert "bad\\udcff" in Path("units.csv").read_text(encoding="utf-8")
