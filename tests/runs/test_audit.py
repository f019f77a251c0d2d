"""Faults of the engine, injected: the audit finds them, and the layers are computed again."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import networks
from support.faults import audited, break_relu, counted, suspected, unmeasured
from support.runs import Killed, network, stopping
from support.shelled import TESTS, program
from support.stores import contents
from torch import Tensor, nn

import pyablate as pa
from pyablate import reference
from pyablate.engine import clean_run
from pyablate.engine.care import Care
from pyablate.engine.precision_cascade import FLOOR, PrecisionCascade
from pyablate.engine.replay import Replay
from pyablate.results.audit import Audit
from pyablate.runs import run_folder
from pyablate.runs.state import care_of

pytestmark = pytest.mark.usefixtures("exports_kept")

IMAGES, BATCH, LATE = 18, 4, 14

Case = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(scope="module")
def case() -> Case:
    """Layer 1, behind which lies a ReLU; layer 3, of closed form."""
    model, images, labels = network()
    return model, images[:IMAGES], labels[:IMAGES]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Audit every unit, but only the last images: what comes before looks sound at first."""
    monkeypatch.setattr("pyablate.runs._ablate._audited_pairs", audited(LATE))


def ablate(case: Case, **options: Any) -> pa.AblationResult:
    model, images, labels = case
    plain = {"audit": 10**9, "precision": "fp32", "progress": False, "batch_size": BATCH}
    return pa.ablate(model, (images, labels), "*", **{**plain, **options})


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrecisionCascade, "_measure_full", unmeasured)


def mismatches(result: pa.AblationResult, case: Case) -> int:
    model, images, labels = case
    return reference.compare(result, model, (images, labels), "*").mismatches


@pytest.mark.parametrize(
    ("precisions", "strategy"),
    [
        ([torch.float32], "delta (float64)"),
        ([torch.float32, torch.float64], "replay (float64)"),
    ],
)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.usefixtures("late")
def test_a_fault_seen_late_is_mended_everywhere(
    case, monkeypatch, caplog, tmp_path, precisions, strategy, kept
):
    sound = ablate(case, measures=["loss"], precision="fp64")
    assert sound.strategy == {"1": "delta", "3": "closed form"}
    assert sound.audit == Audit(16 * (IMAGES - LATE), 0)
    break_relu(monkeypatch.setitem, *precisions)
    place = tmp_path / "run.zarr" if kept else None
    result = ablate(case, measures=["loss"], output=place)
    assert mismatches(result, case) == 0
    assert result.strategy == {"1": strategy, "3": "closed form"}
    assert result.audit.mismatches == 0
    assert result.audit.pairs == sound.audit.pairs
    assert result.audit.mended > 0
    assert "differed at first and were mended" in str(result.audit)
    assert f"computed again by: {strategy}" in caplog.text
    assert "audit: layer 1: " in caplog.text
    assert "3 finished blocks are computed again" in caplog.text
    # No block is counted twice, in the sums of measures either.
    found, expected = result.measures["loss"], sound.measures["loss"]
    np.testing.assert_allclose(found.change, expected.change, rtol=1e-4, atol=1e-4)
    assert found.accuracy.pairs == expected.accuracy.pairs
    assert len(result.labels) == IMAGES
    if place is not None:
        assert pa.load(place).audit == result.audit


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("kept", [False, True])
def test_only_the_layer_found_wrong_is_computed_again(case, monkeypatch, tmp_path, times, kept):
    sound = ablate(case, audit=0)
    suspected(monkeypatch, IMAGES - 1, {"1": times})
    done = counted(monkeypatch)
    options: dict[str, Any] = {"output": tmp_path / "run.zarr"} if kept else {}
    result = ablate(case, audit=20, **options)
    strategy = {1: "delta (float64)", 2: "replay (float64)"}[times]
    assert result.strategy == {"1": strategy, "3": "closed form"}
    assert result.audit == Audit(20, 0, 1)
    assert {name for (name, _), count in done.items() if count > 1} == {"1"}
    for name in ("start", "image", "prediction"):
        np.testing.assert_array_equal(getattr(result.flips, name), getattr(sound.flips, name))


@pytest.mark.parametrize("kept", [False, True])
def test_what_stays_wrong_in_one_layer_is_counted_once_if_another_is_computed_again(
    case, monkeypatch, tmp_path, kept
):
    suspected(monkeypatch, IMAGES - 1, {"1": 10**9, "3": 1})
    options: dict[str, Any] = {"output": tmp_path / "run.zarr"} if kept else {}
    result = ablate(case, audit=20, on_mismatch="warn", **options)
    assert result.strategy == {"1": "replay (float64)", "3": "delta (float64)"}
    assert result.audit == Audit(20, 1, 1)


def test_the_faults_are_seen_by_nobody_without_an_audit(case, monkeypatch):
    break_relu(monkeypatch.setitem, torch.float32)
    result = ablate(case, audit=0)
    assert mismatches(result, case) > 0
    assert result.strategy["1"] == "delta"


def test_a_fault_of_low_precision_ends_in_full_precision(monkeypatch):
    """One that its calibration misses."""

    def learn(cascade: PrecisionCascade, tier: torch.dtype, *_: object) -> None:
        cascade.error_bounds[tier] = FLOOR[tier]

    monkeypatch.setattr(PrecisionCascade, "_learn", learn)
    break_relu(monkeypatch.setitem, torch.bfloat16)
    whole = network()
    assert mismatches(ablate(whole, precision="bf16", batch_size=30, audit=0), whole) > 0
    result = ablate(whole, precision="bf16", batch_size=30)
    assert mismatches(result, whole) == 0
    assert result.strategy["1"] == "delta (full precision)"
    assert result.audit.mismatches == 0
    assert result.audit.mended > 0


@pytest.mark.usefixtures("late")
def test_killed_again_and_again_it_ends_with_the_same_bytes(case, monkeypatch, tmp_path):
    monkeypatch.setattr(run_folder, "SECONDS", 0.0)  # unfinished blocks are written down too
    break_relu(monkeypatch.setitem, torch.float32)
    ablate(case, output=tmp_path / "whole.zarr")
    place, kills, ended = tmp_path / "killed.zarr", 0, False
    while not ended:
        try:
            ablate(case, output=place, progress=stopping(6))
            ended = True
        except Killed:
            kills += 1
    assert kills >= 4  # of 5 blocks and then 3 again, one or two before each end
    assert contents(place) == contents(tmp_path / "whole.zarr")


@pytest.mark.usefixtures("late")
def test_what_was_begun_with_less_care_is_begun_anew(case, monkeypatch, tmp_path):
    """As where one process was in the midst of a block when another one found the fault."""
    monkeypatch.setattr(run_folder, "SECONDS", 0.0)
    break_relu(monkeypatch.setitem, torch.float32)
    for name, calls in ("slow", 7), ("fast", 21):  # a first call, and then four for each block
        with pytest.raises(Killed):
            ablate(case, output=tmp_path / name, progress=stopping(calls))
    slow, fast = (tmp_path / name / "blocks" for name in ("slow", "fast"))
    assert len(list(fast.glob("?????????.npz"))) == 5
    (fast / "000000001.npz").unlink()
    (slow / "000000001.begun.npz").rename(fast / "000000001.begun.npz")
    result = ablate(case, output=tmp_path / "fast")
    assert mismatches(result, case) == 0
    assert result.strategy["1"] == "delta (float64)"


@pytest.mark.usefixtures("late")
def test_a_block_done_in_parts_is_done_with_one_care(case, monkeypatch, tmp_path):
    break_relu(monkeypatch.setitem, torch.float32)
    place = tmp_path / "run.zarr"
    with pytest.raises(Killed):
        ablate(case, output=place, batch_size=6, progress=stopping(0))
    result = ablate(case, output=place, batch_size=2)  # images 12 to 17 are a block
    assert mismatches(result, case) == 0
    assert result.strategy["1"] == "delta (float64)"
    assert result.audit.pairs == 16 * (IMAGES - LATE)


def one_pair(row: int, image: int) -> Callable[..., np.ndarray]:
    return lambda *_: np.array([[row, image]])


@pytest.fixture
def fickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay gives another answer where it recomputes one pair: the audited one."""
    real = Replay.logits

    def logits(self: Replay, batch: Any, job: Any, row: Tensor, image: Tensor) -> Tensor:
        found = real(self, batch, job, row, image)
        return found.roll(1, dims=1) if job is not None and len(row) == 1 else found

    monkeypatch.setattr(Replay, "logits", logits)
    monkeypatch.setattr("pyablate.runs._ablate._audited_pairs", one_pair(3, LATE))


@pytest.mark.parametrize("strategy", ["auto", "replay"])
@pytest.mark.usefixtures("fickle")
def test_what_stays_is_an_error_that_names_it(case, tmp_path, strategy):
    place = tmp_path / "run.zarr"
    with pytest.raises(pa.AuditError) as caught:
        ablate(case, strategy=strategy, output=place)
    for part in ("layer 1", "without unit 1:3", f"image {LATE} was found to be", "Please report"):
        assert part in str(caught.value)
    assert len(list((place / "blocks").glob("?????????.npz"))) == LATE // BATCH
    # The rest is to be had, from there on, and with the care that was of no use.
    result = ablate(case, strategy=strategy, output=place, on_mismatch="warn")
    assert result.audit == Audit(1, 1)
    assert result.strategy["1"] == "replay (float64)"
    assert mismatches(result, case) == 0


@pytest.mark.usefixtures("fickle")
def test_in_memory_too(case, caplog):
    with pytest.raises(pa.AuditError, match="unit 1:3"):
        ablate(case, strategy="replay")
    result = ablate(case, strategy="replay", on_mismatch="warn")
    assert result.audit == Audit(1, 1)
    assert any(record.levelno == logging.ERROR for record in caplog.records)


def test_a_fault_of_the_clean_run_is_no_layer_s(case, monkeypatch):
    real = clean_run._predict

    def predict(*arguments: Any) -> Tensor:
        return (real(*arguments) + 1) % 4

    monkeypatch.setattr(clean_run, "_predict", predict)
    with pytest.raises(pa.AuditError, match="with no unit ablated, image 0 was found to be"):
        ablate(case)


@pytest.mark.usefixtures("late")
def test_parts_that_were_computed_otherwise_say_so(case, monkeypatch, tmp_path, caplog):
    break_relu(monkeypatch.setitem, torch.float32)
    places = [tmp_path / f"{number}.zarr" for number in (1, 2)]
    parts = [ablate(case, output=p, shard=(n, 2)) for n, p in enumerate(places, start=1)]
    assert parts[0].audit == Audit(0, 0)
    merged = pa.merge(places)
    assert merged.strategy == {"1": "delta; delta (float64)", "3": "closed form"}
    assert merged.audit == parts[1].audit
    assert "found layer 1 to be wrong" in caplog.text


def test_processes_agree_on_the_care(tmp_path):
    program(TESTS / "support" / "faults.py", tmp_path, timeout=300)


def test_bad_choices_are_named(case):
    with pytest.raises(ValueError, match='on_mismatch: expected "error" or "warn", got \'no\''):
        ablate(case, on_mismatch="no")


def test_older_records_load():
    assert care_of([{"tiers": ["float32"]}, {"care": 2}]) == [Care.USUAL, Care.FLOAT64]
    assert Audit(**{"pairs": 3, "mismatches": 1}) == Audit(3, 1, 0)


@pytest.mark.parametrize("care", [Care.FULL, Care.FLOAT64, Care.REPLAY])
@pytest.mark.parametrize("intervention", ["zero", "resample", "noise", "direction"])
def test_every_care_gives_the_same(monkeypatch, care, intervention):
    """From the first image on, on maps, in groups over layers, a few images at a time."""
    monkeypatch.setattr(
        "pyablate.runs.executor.PrecisionCascade", functools.partial(PrecisionCascade, care=care)
    )
    model, images, labels = networks.network("residual", 17)
    layers, groups = ["body.3.relu1", "body.4.relu2"], None
    if intervention != "direction":
        groups = [["body.2:1", "body.4.relu1:3"], ["body.4.relu2:0", "body.4.relu2:5"]]
    options: dict[str, Any] = {"intervention": intervention, "groups": groups}
    result = pa.ablate(model, (images, labels), layers, memory=1 << 20, progress=False, **options)
    assert reference.compare(result, model, (images, labels), layers, **options).mismatches == 0
    usual = {care.describe(strategy) for strategy in ("delta", "closed form")}
    assert set(result.strategy.values()) <= usual
