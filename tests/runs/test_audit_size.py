"""How many pairs an audit recomputes, and in what precision."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support.runs import network, run
from support.stores import contents
from torch import Tensor

import pyablate as pa
from pyablate.engine.replay import Replay
from pyablate.engine.suffix import Suffix
from pyablate.interventions import parse
from pyablate.results.audit import Audit
from pyablate.runs.audit import FIRST, LATER, LEAST, MOST, SHARE, usual_pairs
from pyablate.runs.setup import Setup, SetupOptions, prepare

pytestmark = pytest.mark.usefixtures("exports_kept")

Recomputed = Counter[torch.dtype]


def ready(images: int, **options: Any) -> Setup:
    model, x, labels = network()
    where = torch.arange(images) % len(x)
    chosen = SetupOptions("*", None, parse("zero"), **options)
    return prepare(model, (x[where], labels[where]), chosen)


def test_a_long_run_audits_a_share_and_a_short_one_thirty_pairs():
    assert usual_pairs(ready(1, strategy="replay")) == 16  # there are no more
    assert usual_pairs(ready(40, strategy="replay")) == LEAST
    assert usual_pairs(ready(3000, strategy="replay")) == MOST
    # Each of 16 x 160 pairs and 160 images is a forward pass, and an audited pair three.
    assert usual_pairs(ready(160, strategy="replay")) == int(SHARE * 17 * 160 / 3)


def test_arithmetic_is_counted_behind_the_first_map_that_mixes_units():
    setup = ready(40)
    assert [Suffix.of(setup.graph, job).mixed_work for job in setup.jobs] == [2 * 8 * 4, 0]
    assert usual_pairs(setup) == LEAST


def test_the_default_is_the_same_in_portions_parts_and_after_an_end(tmp_path):
    whole = run(tmp_path / "whole.zarr", audit=None)
    assert whole.audit == Audit(LEAST, 0)
    assert run(None, audit=None, batch_size=2).audit == whole.audit
    parts = [tmp_path / f"{number}.zarr" for number in (1, 2)]
    found = [run(part, audit=None, shard=(n, 2)) for n, part in enumerate(parts, start=1)]
    assert sum(part.audit.pairs for part in found) == LEAST
    pa.merge(parts, tmp_path / "merged.zarr")
    assert contents(tmp_path / "merged.zarr") == contents(tmp_path / "whole.zarr")
    assert run(tmp_path / "whole.zarr", audit=LEAST).audit == whole.audit  # the same run


@pytest.mark.parametrize("asked", [0, 1, 35])
def test_what_is_asked_for_is_done(asked):
    assert run(None, audit=asked).audit == Audit(asked, 0)


@pytest.mark.parametrize("asked", [-1, 2.5, "all"])
def test_bad_counts_are_named(asked):
    with pytest.raises(ValueError, match=r"audit: expected .*at least 0, got"):
        run(None, audit=asked)


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> Recomputed:
    """Audited pairs by precision."""
    return watching(monkeypatch)


def watching(monkeypatch: pytest.MonkeyPatch, change: Any = None) -> Recomputed:
    """Count what a sweep by deltas leaves to replay: the audit; ``change`` its float32."""
    found: Recomputed = Counter()
    real = Replay.logits

    def logits(self: Replay, batch: Any, job: Any, row: Tensor, image: Tensor) -> Tensor:
        given = real(self, batch, job, row, image)
        found[self.dtype] += len(row) if job is not None else 0
        return given if change is None or self.dtype == torch.float64 else change(given)

    monkeypatch.setattr(Replay, "logits", logits)
    return found


def audited(**options: Any) -> Audit:
    model, images, labels = network()
    plain = {"audit": 200, "precision": "fp32", "progress": False, "batch_size": 20}
    return pa.ablate(model, (images, labels), "*", **{**plain, **options}).audit


def test_float32_settles_most_pairs(recomputed):
    assert audited() == Audit(200, 0)
    assert recomputed[torch.float32] == 200
    assert 200 // LATER <= recomputed[torch.float64] < 200 // LATER + FIRST + 20


@pytest.mark.parametrize(
    ("change", "least"),
    [
        (lambda logits: logits.roll(1, dims=1), 200),  # another class each time
        (lambda logits: logits * torch.nan, 200),
        (lambda logits: logits + 0.1 * torch.eye(4)[0], 50),  # far off, as is measured
    ],
)
def test_float64_decides_where_float32_is_off(monkeypatch, change, least):
    recomputed = watching(monkeypatch, change)
    assert audited() == Audit(200, 0)
    assert recomputed[torch.float64] >= least


@pytest.mark.parametrize("options", [{"measures": ["loss"]}, {"precision": "fp64"}])
def test_all_is_float64_where_logits_are_asked_for_or_the_run_is(recomputed, options):
    assert audited(**options) == Audit(200, 0)
    assert recomputed[torch.float32] == 0
    assert recomputed[torch.float64] == 200


def test_what_a_run_took_beside_its_layers_is_told():
    found = run(None).effort.other_seconds
    assert set(found) == {"preparation", "clean runs", "audit"}
    assert all(seconds > 0 for seconds in found.values())
