"""A run shared: by processes of one job, or by machines that only bring their parts together."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from support import runs
from support.networks import Counting
from support.runs import network
from support.shelled import ENVIRONMENT, TESTS, program
from support.stores import OLD, as_of_then, contents, unseal
from torch.utils.data import DataLoader, TensorDataset

import pyablate as pa
from pyablate.cli.data_specs import load_data
from pyablate.data.dataset import Data
from pyablate.runs import fingerprint
from pyablate.runs.run_folder import StoreMismatch
from pyablate.runtime.distributed import Ranks, own_device

pytestmark = pytest.mark.usefixtures("exports_kept")


Part = Callable[..., Path]


@pytest.fixture
def part(tmp_path: Path) -> Part:
    """Run one shard of a small network, and say where it is."""

    def run(number: int, count: int, name: str = "", **options: Any) -> Path:
        model, images, labels = network()
        place = tmp_path / f"{name or number}.zarr"
        plain = {"intervention": "zero", "audit": 30, "progress": False, "strategy": "replay"}
        options = {**plain, **options}
        data = options.pop("data", (images[:20], labels[:20]))
        pa.ablate(model, data, "*", output=place, shard=(number, count), batch_size=4, **options)
        return place

    return run


@pytest.mark.parametrize("measures", [(), ("loss",)])
def test_merged_shards_are_the_whole(part, tmp_path, measures):
    # Sums of measures are floating point: only what is cut alike adds up alike.
    shards = [part(number, 3, measures=measures) for number in (1, 2, 3)]
    whole = pa.load(part(1, 1, "whole", measures=measures))
    merged = pa.merge(shards[::-1], tmp_path / "merged.zarr")
    np.testing.assert_array_equal(merged.predictions(), whole.predictions())
    assert merged.audit == whole.audit == pa.Audit(30, 0)
    assert merged.provenance == whole.provenance
    if measures:
        change = merged.measures["loss"].change
        np.testing.assert_allclose(change, whole.measures["loss"].change, rtol=0.05, atol=1e-3)
    else:
        assert contents(tmp_path / "merged.zarr") == contents(tmp_path / "whole.zarr")
    assert pa.load(shards[1]).provenance["data"]["first"] == 6


def test_shards_that_do_not_fit_are_named(part):
    first, second, third = (part(number, 3) for number in (1, 2, 3))
    with pytest.raises(ValueError, match=r"images 6 to 12 are missing, before .*3\.zarr"):
        pa.merge([first, third])
    with pytest.raises(ValueError, match=r"images 13 to 19 are missing, after .*2\.zarr"):
        pa.merge([first, second])
    with pytest.raises(ValueError, match=r"both have image 6"):
        pa.merge([first, second, second, third])
    half = part(1, 2, "half")
    with pytest.raises(ValueError, match=r"3\.zarr|2\.zarr and .*half\.zarr both have image 6"):
        pa.merge([half, second, third])
    with pytest.raises(ValueError, match="at least one"):
        pa.merge([])


def test_shards_of_other_runs_are_named(part, tmp_path):
    first = part(1, 2)
    with pytest.raises(StoreMismatch, match=r"odd\.zarr is of another run .*intervention"):
        pa.merge([first, part(2, 2, "odd", intervention="constant:1")])
    _, images, labels = network()
    first = part(1, 2, "mean1", intervention="mean")
    images = images[:20].clone()
    images[12, 0] += 1
    second = part(2, 2, "mean2", intervention="mean", data=(images, labels[:20]))
    with pytest.raises(StoreMismatch, match="images or labels"):
        pa.merge([first, second])


def _changed(what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The data of all shards with something changed in the first half."""
    _, images, labels = network()
    images, labels = images[:20].clone(), labels[:20].clone()
    if what == "image":
        images[3, 0] += 1e-3
    if what == "label":
        labels[3] = (labels[3] + 1) % 4
    if what == "order":
        images[[3, 4]] = images[[4, 3]]
    return images, labels


FORMS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "pair": lambda images, labels: (images, labels),
    "loader": lambda images, labels: DataLoader(TensorDataset(images, labels), 6),
    "shuffled": lambda images, labels: DataLoader(
        TensorDataset(images, labels), 6, sampler=list(range(20))
    ),
    "generator": lambda images, labels: zip(images.split(7), labels.split(7), strict=True),
}


@pytest.mark.parametrize("what", ["image", "label", "order"])
@pytest.mark.parametrize("form", FORMS)
def test_shards_of_another_data_set_are_refused(part, form, what):
    """Their own images are the same: the others are not, of which neither tells."""
    _, images, labels = network()
    first = part(1, 2, data=FORMS[form](images[:20], labels[:20]))
    second = part(2, 2, data=FORMS[form](images[:20], labels[:20]))
    other = part(2, 2, "other", data=FORMS[form](*_changed(what)))
    np.testing.assert_array_equal(pa.load(second).predictions(), pa.load(other).predictions())
    pa.merge([first, second])
    with pytest.raises(StoreMismatch, match="images or labels"):
        pa.merge([first, other])


@pytest.mark.parametrize("forms", [("pair", "loader"), ("loader", "generator")])
def test_shards_may_come_in_different_forms(part, forms):
    _, images, labels = network()
    first, second = (
        part(number, 2, data=FORMS[form](images[:20], labels[:20]))
        for number, form in enumerate(forms, 1)
    )
    whole = part(1, 1, "whole")
    np.testing.assert_array_equal(
        pa.merge([first, second]).predictions(), pa.load(whole).predictions()
    )
    other = part(2, 2, "other", data=FORMS["pair"](*_changed("image")))
    with pytest.raises(StoreMismatch, match="images or labels"):
        pa.merge([first, other])


def test_a_shard_reads_few_images_of_the_others(part, monkeypatch):
    _, images, labels = network()
    monkeypatch.setattr(fingerprint, "SAMPLE", 5)
    counting = Counting(images[:60], labels[:60])
    part(1, 6, data=DataLoader(counting, 10))
    assert len([index for index in set(counting.asked) if index >= 10]) in (4, 5)
    index: list[int] = []
    monkeypatch.setattr(Data, "some", lambda self, given: index.extend(given) or [])
    part(1, 6, "again", data=DataLoader(counting, 10))
    assert [place // 12 for place in index] == [0, 1, 2, 3, 4]


def _folder(place: Path, shade: int = 0) -> Path:
    for number in range(12):
        path = place / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((3, 2), 20 * number, np.uint8)
        pixels[0, 0] += shade if number == 1 else 0
        Image.fromarray(pixels).save(path)
    return place


@pytest.mark.parametrize("what", ["name", "size", "image"])
def test_shards_of_another_folder_are_refused(part, tmp_path, monkeypatch, what):
    # One image is read, which is not the one that differs.
    monkeypatch.setattr(fingerprint, "SAMPLE", 12 if what == "image" else 1)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)
    )

    def shard(number: int, name: str, place: Path) -> Path:
        out = tmp_path / f"{name}.zarr"
        data = load_data(place, channels=1).batches
        pa.ablate(model, data, "*", output=out, shard=(number, 2), audit=5, progress=False)
        return out

    shutil.copytree(_folder(tmp_path / "photos"), tmp_path / "elsewhere")
    first = shard(1, "first", tmp_path / "photos")
    second = shard(2, "second", tmp_path / "elsewhere")
    assert len(pa.merge([first, second]).labels) == 12
    other = _folder(tmp_path / "other", shade=9 if what == "image" else 0)
    if what == "name":
        (other / "a" / "2.png").rename(other / "a" / "20.png")
    if what == "size":
        with open(other / "a" / "2.png", "ab") as file:
            file.write(b"more")
    named = "images or labels" if what == "image" else "names or sizes of the image files"
    with pytest.raises(StoreMismatch, match=named):
        pa.merge([first, shard(2, "third", other)])


@pytest.mark.parametrize("form", ["pair", "loader"])
def test_a_resumed_shard_ends_with_the_same_bytes(part, tmp_path, form):
    _, images, labels = network()
    data = images[:20], labels[:20]
    whole = part(2, 2, "unbroken", data=FORMS["pair"](*data))

    def stop(done: int, total: int, layer: str) -> None:
        if done > total / 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        part(2, 2, "broken", data=FORMS["pair"](*data), progress=stop)
    assert list(tmp_path.glob("broken.zarr/blocks/*.npz"))
    # The form of the data may change; what was told first stays.
    broken = part(2, 2, "broken", data=FORMS[form](*data))
    assert contents(broken) == contents(whole)


def test_older_shards_are_merged_with_a_note(tmp_path, caplog):
    merged = pa.merge([OLD / "part2.zarr", OLD / "part1.zarr"], tmp_path / "run.zarr")
    assert len(merged.labels) == 23
    assert caplog.text.count("does not tell from which data set") == 2
    assert pa.load(tmp_path / "run.zarr").audit == merged.audit


def test_an_older_shard_goes_on(tmp_path, monkeypatch, caplog):
    place = as_of_then("unfinished_part2.zarr", tmp_path, monkeypatch)
    runs.run(place, shard=(2, 2), batch_size=None)
    assert "damaged" not in caplog.text
    unseal(place)
    assert contents(place) == contents(OLD / "part2.zarr")


@pytest.mark.parametrize("shard", [(0, 2), (3, 2), (1, 0)])
def test_there_is_no_such_shard(part, shard):
    with pytest.raises(ValueError, match="shard: expected i/n"):
        part(*shard)


def test_a_shard_without_images_is_refused(part):
    with pytest.raises(ValueError, match="1/50 of 20 images is empty"):
        part(1, 50)


def test_distributed_needs_a_folder_and_somebody_who_started_it(tmp_path, monkeypatch):
    model, images, labels = network()
    with pytest.raises(ValueError, match="needs output"):
        pa.ablate(model, (images, labels), distributed=True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RuntimeError, match="torchrun"):
        pa.ablate(model, (images, labels), distributed=True, output=tmp_path / "run.zarr")


def test_parts_cover_everything_once():
    for count in (1, 2, 3, 7):
        parts = [list(Ranks(rank, count).part(range(5))) for rank in range(count)]
        assert [item for part in parts for item in part] == list(range(5))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device(True, "cuda") == "cuda:3"
    assert own_device(True, "cuda:1") == "cuda:1"
    assert own_device(True, None) is None
    assert own_device(False, "cuda") == "cuda"


@pytest.mark.timeout(600)
def test_processes_of_one_job_are_one_run(tmp_path):
    said = program(TESTS / "support" / "ranked.py", tmp_path, timeout=580)
    assert said.startswith("equal; ")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_starts_again_what_was_killed(tmp_path):
    """The command itself, by torchrun: one process is killed, torchrun restarts both."""
    _, images, labels = network()
    np.savez(
        tmp_path / "images.npz",
        images=np.tile(images, (10, 1))[:, None, None],
        labels=np.tile(labels, 10),
    )
    (tmp_path / "small.py").write_text(
        "from support import runs\n\ndef make():\n    import torch\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), *runs.network()[0])\n"
    )
    command = ["pyablate", "run", "small:make", "--data", "images.npz", "--batch-size", "2"]
    program("-m", *command, "-o", "one.zarr", cwd=tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    job = subprocess.Popen(
        [*torchrun, "--nproc-per-node=2", "--max-restarts=2", "-m", *command, "-o", "two.zarr"],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    place = tmp_path / "two.zarr"
    while len(list(place.glob("blocks/?????????.npz"))) < 20:
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    workers = psutil.Process(job.pid).children()
    victim = next(child for child in workers if child.environ().get("RANK") == "1")
    victim.send_signal(signal.SIGKILL)
    out, err = job.communicate(timeout=600)
    assert job.returncode == 0, err
    assert "blocks are there already: going on" in err
    assert out.count("Baseline accuracy") == 1  # the first process speaks for all
    ours, theirs = contents(place), contents(tmp_path / "one.zarr")
    assert ours.pop("command.json") != theirs.pop("command.json")  # names the folder
    assert ours == theirs
