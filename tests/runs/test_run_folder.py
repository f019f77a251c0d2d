"""Runs with a folder: killed, interrupted, refused, on full disks; the same bytes in the end."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import runs
from support.runs import SOME, Killed, network, stopping
from support.shelled import TESTS, program
from support.stores import contents
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyablate as pa
from pyablate.engine.precision_cascade import PrecisionCascade
from pyablate.runs import blocks, fingerprint, run_folder
from pyablate.runs.run_folder import StoreMismatch
from pyablate.runs.state import pack_cascade, restore_cascades


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Tensor, Tensor]:
    model, images, labels = network()
    return model, images[:SOME], labels[:SOME]


Run = Callable[..., pa.AblationResult]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def ablate(name: str | None = "run.zarr", **options: Any) -> pa.AblationResult:
        return runs.run(None if name is None else tmp_path / name, **options)

    return ablate


def test_the_folder_is_what_save_writes(run, tmp_path):
    result = run(strategy="auto")
    alone = run(None, strategy="auto")
    assert "hash" not in alone.provenance["data"]  # there is nothing to go on with
    alone.provenance["data"]["hash"] = result.provenance["data"]["hash"]
    alone.save(tmp_path / "saved.zarr")
    assert contents(tmp_path / "run.zarr") == contents(tmp_path / "saved.zarr")
    again = pa.load(tmp_path / "run.zarr")
    np.testing.assert_array_equal(again.predictions(), result.predictions())
    assert again.provenance == result.provenance
    assert again.provenance["data"]["images"] == 23
    assert again.audit == result.audit == pa.Audit(20, 0)


@pytest.mark.parametrize(
    ("intervention", "strategy"), [("zero", "auto"), ("mean", "auto"), ("resample", "replay")]
)
def test_a_run_that_ends_anywhere_goes_on(run, tmp_path, monkeypatch, intervention, strategy):
    monkeypatch.setattr(run_folder, "SECONDS", 0.0)
    options: dict[str, Any] = {
        "intervention": intervention,
        "measures": ["loss"],
        "strategy": strategy,
    }
    run("whole.zarr", **options)
    for at in (0, 2, 3, 6):
        with pytest.raises(Killed):
            run(progress=stopping(at), **options)
        with pytest.raises(OSError, match="an unfinished run"):
            pa.load(tmp_path / "run.zarr")
    result = run(**options)
    assert contents(tmp_path / "run.zarr") == contents(tmp_path / "whole.zarr")
    assert result.audit == pa.Audit(20, 0)


def test_each_block_is_computed_once(run, tmp_path):
    with pytest.raises(Killed):
        run(progress=stopping(9))
    done = len(list((tmp_path / "run.zarr/blocks").glob("?????????.npz")))
    assert done == 2  # one report before them all, then two for each layer of a block
    seen: list[tuple[int, int, str]] = []
    run(progress=lambda *step: seen.append(step))
    assert seen[0] == (2 * 5 * 16, 23 * 16, "1")
    assert seen[-1] == (23 * 16, 23 * 16, "3")


@pytest.mark.parametrize("step", ["replace", "rename", "unlink", "rmdir"])
def test_ends_between_any_two_steps_on_the_disk(run, tmp_path, monkeypatch, step):
    """Where a signal seldom hits: before and after the steps that put things in their place."""
    run("whole.zarr")
    real = getattr(os, step)
    for number in range(40):
        left = [number]

        def fail(*arguments: Any, left: list[int] = left, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                raise Killed
            outcome = real(*arguments, **options)
            if left[0] == -2:
                raise Killed
            return outcome

        monkeypatch.setattr(os, step, fail)
        try:
            run()
            finished = True
        except Killed:
            finished = False
        monkeypatch.undo()
        run()
        assert contents(tmp_path / "run.zarr") == contents(tmp_path / "whole.zarr"), number
        if finished:
            break
        shutil.rmtree(tmp_path / "run.zarr")
    assert number > 1


@pytest.mark.parametrize("gone", ["statistics.npz", "manifest.json"])
def test_ends_while_tidying_up(run, tmp_path, monkeypatch, gone):
    """The result is there, and of its blocks some files are not."""
    run("whole.zarr", intervention="mean")

    real = os.unlink

    def remove(path: Path, **options: Any) -> None:
        real(path, **options)
        if Path(path).name == gone:
            raise Killed

    monkeypatch.setattr(os, "unlink", remove)
    with pytest.raises(Killed):
        run(intervention="mean")
    monkeypatch.undo()
    assert (tmp_path / "run.zarr/blocks").exists()
    assert not (tmp_path / "run.zarr/blocks" / gone).exists()
    pa.load(tmp_path / "run.zarr")
    run(intervention="mean")
    assert contents(tmp_path / "run.zarr") == contents(tmp_path / "whole.zarr")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thirty_random_kills(tmp_path):
    said = program(TESTS / "support" / "killed.py", tmp_path, 30, 1, timeout=880)
    assert int(re.match(r"30 killed, (\d+) of them had resumed", said)[1]) > 5  # type: ignore[index]


_OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"model": "weights"}, "the model's weights"),
    "structure": ({"model": "structure"}, "the model's structure"),
    "image": ({"data": "image"}, "images 5 to 9 or their labels"),
    "label": ({"data": "label"}, "images 0 to 4 or their labels"),
    "number": ({"data": "number"}, r"the number of images \(23, now 22\)"),
    "layers": ({"layers": "1"}, "the units to ablate"),
    "intervention": ({"intervention": "mean"}, r"intervention \(zero, now mean\)"),
    "seed": ({"seed": 3}, r"options.seed \(0, now 3\)"),
    "audit": ({"audit": 21}, r"options.audit \(20, now 21\)"),
    "strategy": ({"strategy": "auto"}, r"options.strategy \(replay, now auto\)"),
    "measures": ({"measures": ["loss"]}, r"options.measures"),
    "names": ({"class_names": list("abcd")}, "the class names"),
    "shard": ({"shard": (1, 2)}, r"the number of images of the shard \(23, now 11\)"),
}


def _other(what: dict[str, Any], model: nn.Module, images: Tensor, labels: Tensor) -> Any:
    """Options with a changed model or data in place of the word for it."""
    changed = nn.Sequential(*[*model, nn.Identity()])
    if what.get("model") == "structure":
        changed = nn.Sequential(*[*list(model)[:-1], nn.ReLU(), list(model)[-1]])
    if what.get("model") == "weights":
        changed = network()[0]
        with torch.no_grad():
            next(iter(changed.parameters()))[0, 0] += 1e-6
    images, labels = images.clone(), labels.clone()
    if what.get("data") == "image":
        images[7, 2] += 1e-6
    if what.get("data") == "label":
        labels[3] = (labels[3] + 1) % 4
    if what.get("data") == "number":
        images, labels = images[:-1], labels[:-1]
    swapped = {"model": changed} if "model" in what else {}
    if "data" in what:
        swapped["data"] = (images, labels)
    return {**what, **swapped}


@pytest.mark.parametrize("name", _OTHERS)
def test_another_run_is_refused_and_named(case, run, tmp_path, name):
    what, named = _OTHERS[name]
    options = _other(what, *case)
    with pytest.raises(Killed):
        run(progress=stopping(14))
    before = contents(tmp_path / "run.zarr")
    with pytest.raises(StoreMismatch, match=named):
        run(**options)
    assert contents(tmp_path / "run.zarr") == before
    run()
    before = contents(tmp_path / "run.zarr")
    finished = "other images or labels" if name in ("image", "label") else named
    with pytest.raises(StoreMismatch, match=finished):
        run(**options)
    assert contents(tmp_path / "run.zarr") == before


def test_other_versions_are_refused(run, monkeypatch):
    run()
    real = fingerprint.metadata.version
    monkeypatch.setattr(
        fingerprint.metadata, "version", lambda name: "2.0.0" if name == "torch" else real(name)
    )
    with pytest.raises(StoreMismatch, match=r"versions.torch \(.*, now 2.0.0\)"):
        run()


def test_what_does_not_matter_is_not_refused(case, run, tmp_path):
    _, images, labels = case
    run("whole.zarr", strategy="auto")
    with pytest.raises(Killed):
        run(progress=stopping(14), strategy="auto")
    loader = DataLoader(TensorDataset(images.double(), labels), batch_size=4)
    # Blocks stay as they were when the run began, whatever is worked on at a time now.
    run(
        data=loader,
        layers=["3", "1"],
        precision="fp32",
        batch_size=3,
        memory=1 << 20,
        strategy="auto",
    )
    assert contents(tmp_path / "run.zarr") == contents(tmp_path / "whole.zarr")


def test_fresh_starts_over(run, tmp_path):
    run("whole.zarr")
    run(intervention="mean", measures=["loss"])
    run(fresh=True)
    assert contents(tmp_path / "run.zarr") == contents(tmp_path / "whole.zarr")
    with pytest.raises(Killed):
        run(fresh=True, intervention="mean", progress=stopping(14))
    run(fresh=True)
    assert contents(tmp_path / "run.zarr") == contents(tmp_path / "whole.zarr")


def test_a_finished_run_is_read(run, tmp_path):
    first = run()
    before = contents(tmp_path / "run.zarr")
    calls: list[Any] = []
    second = run(progress=lambda *step: calls.append(step))
    assert not calls
    assert contents(tmp_path / "run.zarr") == before
    np.testing.assert_array_equal(first.predictions(), second.predictions())


def cut_short(content: bytes) -> bytes:
    return content[:-130]


def flipped(content: bytes) -> bytes:
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 0xFF]) + content[half + 1 :]


def before_its_beginning(content: bytes) -> bytes:
    """The archive's directory is larger than the file: [Errno 22] without a name, read from it."""
    return content[:-10] + (0x7FFFFFFF).to_bytes(4, "little") + content[-6:]


def test_damaged_blocks_are_computed_again(run, tmp_path, caplog):
    run("whole.zarr")
    with pytest.raises(Killed):
        run(progress=stopping(20))
    found = sorted((tmp_path / "run.zarr/blocks").glob("?????????.npz"))
    damages = (cut_short, flipped, before_its_beginning)
    for block, damage in zip(found, damages, strict=False):
        block.write_bytes(damage(block.read_bytes()))
    run()
    assert [f"block {number} is damaged" in caplog.text for number in range(3)] == [True] * 3
    assert contents(tmp_path / "run.zarr") == contents(tmp_path / "whole.zarr")


def test_a_damaged_manifest_is_refused(run, tmp_path):
    with pytest.raises(Killed):
        run(progress=stopping(14))
    (tmp_path / "run.zarr/blocks/manifest.json").write_text("{")
    with pytest.raises(StoreMismatch, match=r"manifest.json is damaged"):
        run()
    run(fresh=True)


def test_interrupts_keep_what_is_done(run, tmp_path, caplog):
    def interrupt(done: int, total: int, layer: str) -> None:
        if done >= 10 * 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=interrupt)
    assert "1 of 5 blocks are kept in" in caplog.text
    assert "goes on from there" in caplog.text
    run("whole.zarr")
    run()
    assert contents(tmp_path / "run.zarr") == contents(tmp_path / "whole.zarr")


def test_a_full_disk_keeps_what_is_done(run, tmp_path, monkeypatch):
    run("whole.zarr")
    real = os.fsync
    calls = iter(range(10**9))

    def full(handle: int) -> None:
        if next(calls) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"no room for .*: the same call or command goes on") as full_:
        run()
    assert full_.value.errno == errno.ENOSPC
    monkeypatch.undo()
    names = [path.name for path in (tmp_path / "run.zarr/blocks").iterdir()]
    assert not [name for name in names if name.endswith(".new")]
    run()
    assert contents(tmp_path / "run.zarr") == contents(tmp_path / "whole.zarr")


def test_a_limit_of_the_system_is_a_full_disk(run, tmp_path):
    """Files cannot grow: first not even a block's, then not the result's largest array."""
    run("whole.zarr")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (400, 1500):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                with pytest.raises(OSError, match=r"cannot write|no room") as error:
                    run()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert error.value.errno == errno.EFBIG
    finally:
        signal.signal(signal.SIGXFSZ, ignored)
    run()
    assert contents(tmp_path / "run.zarr") == contents(tmp_path / "whole.zarr")


def test_one_process_at_a_time(run, tmp_path):
    with (
        run_folder.locked(tmp_path / "run.zarr"),
        pytest.raises(OSError, match="another process is at work"),
    ):
        run()
    run()


def test_nothing_of_others_is_touched(run, tmp_path):
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "thesis.tex").write_text("mine")
    with pytest.raises(OSError, match="exists and is not a pyablate result"):
        run(".", fresh=True)
    assert (tmp_path / "blocks" / "thesis.tex").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/run.zarr"):
        with pytest.raises(OSError, match="file"):
            run(name, fresh=True)


def test_links_do_not_lead_out_of_the_folder(run, tmp_path):
    with pytest.raises(Killed):
        run(progress=stopping(14))
    outside = tmp_path / "outside"
    os.rename(tmp_path / "run.zarr/blocks", outside)
    (tmp_path / "run.zarr/blocks").symlink_to(outside)
    before = contents(outside)
    for fresh in (False, True):
        with pytest.raises(OSError, match="symbolic link"):
            run(fresh=fresh)
    assert contents(outside) == before


def test_nothing_is_pickled(run, tmp_path):
    with pytest.raises(Killed):
        run(progress=stopping(14), intervention="mean")
    packed = list((tmp_path / "run.zarr/blocks").glob("*.npz"))
    assert len(packed) >= 3
    for path in packed:
        with np.load(path, allow_pickle=False) as held:
            assert all(held[name].dtype.kind in "iuf" for name in held)


def test_calibrations_go_on_where_they_were():
    def cascade() -> PrecisionCascade:
        return PrecisionCascade([torch.bfloat16, torch.float32])

    old = cascade()
    old.error_bounds, old.measured = {torch.bfloat16: 0.25}, 256
    state = json.loads(json.dumps([pack_cascade(old)]))
    new = cascade()
    restore_cascades([new], state, any_tier=True)
    assert (new.tiers, new.error_bounds, new.measured) == (old.tiers, old.error_bounds, 256)
    exact = PrecisionCascade([torch.float32])
    restore_cascades([exact], state, any_tier=False)
    assert exact.tiers == [torch.float32]  # fp32 was asked for
    double = PrecisionCascade([torch.float64])
    restore_cascades([double], state, any_tier=True)
    assert double.tiers == [torch.float64]  # calibrated against another precision


def test_hashes_of_images_add_up(case):
    _, images, labels = case
    from pyablate.data.dataset import Data

    def total(size: int, data: Any) -> int:
        source = Data(data, dtype=torch.float32, device=torch.device("cpu"))
        sums = (fingerprint.hash_images(batch, torch.float32) for batch in source.batches(size))
        return sum(sums) % fingerprint.MODULUS

    whole = total(23, (images, labels))
    assert total(4, (images, labels)) == whole
    assert total(4, (images.double(), labels.int())) == whole
    assert total(23, (images.flip(0), labels.flip(0))) != whole


def test_joining_is_the_same_in_any_grouping(monkeypatch):
    draw = np.random.default_rng(0)
    parts = []
    for _ in range(7):
        pieces = [(draw.integers(6, size=9), draw.permutation(20)[:9], draw.integers(3, size=9))]
        labels = draw.integers(3, size=20)
        metadata = blocks.BlockMetadata(int(draw.integers(1 << 60)), {"layer": pa.Audit(2, 1)})
        parts.append(blocks.Block(labels, labels, pa.Flips.gather(6, pieces), metadata))
    expected = pa.Flips.gather(
        6,
        [
            (part.flips.row, part.flips.image + 20 * place, part.flips.prediction)
            for place, part in enumerate(parts)
        ],
    )
    for together in (1000, 3, 1):
        monkeypatch.setattr(blocks, "_TOGETHER", together)
        joined = blocks.Joining()
        for part in parts:
            joined.add(part)
        found = joined.block()
        np.testing.assert_array_equal(found.flips.start, expected.start)
        np.testing.assert_array_equal(found.flips.image, expected.image)
        np.testing.assert_array_equal(found.flips.prediction, expected.prediction)
        assert found.metadata.audit == pa.Audit(14, 7)
        assert found.metadata.hash == sum(part.metadata.hash for part in parts)
