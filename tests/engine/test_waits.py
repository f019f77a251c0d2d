"""How often the host waits for the device, on a device that is not there (elsewhere.py).

On a GPU each wait lets it run dry. A block is one job on one batch of images: one wait for the
pairs that are live, one per tier that decides some, none from slice to slice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
from support import elsewhere, networks
from support.elsewhere import DEVICE, Wait, moved, on_device, there
from support.runs import same

from pyablate import interventions
from pyablate.engine import cuda_graph, logit_change, precision_cascade
from pyablate.engine.float64 import Exact
from pyablate.engine.job import Members
from pyablate.interventions import Intervention
from pyablate.ops import Activation, _classify, difference, dispatch, elementwise, units
from pyablate.runs import setup as prepare
from pyablate.runs.executor import BlockSweep
from pyablate.runtime.host_to_device import sent

pytestmark = pytest.mark.usefixtures("exports_kept")

IMAGES = 24
LIVE = Wait("_to_copy", "Sweep.live_pairs")
DECIDED = Wait("_to_copy", "PrecisionCascade.classify")
MEASURED = Wait("_local_scalar_dense", "PrecisionCascade._measure_tier")
MEASURING = {
    *("largest_share", "Exact.logits"),
    *(f"PrecisionCascade.{name}" for name in ("_measure", "_measure_tier")),
}
EXACT = {Wait("_to_copy", "Exact.logits"), Wait("_to_copy", "Replay.logits")}
SMALL = 1 << 16
"""Bytes of memory with which a block has several slices."""


def set_up(name, device=None, *, spec="zero", layers=None, groups=None, low=(torch.bfloat16,)):
    model, images, labels = networks.network(name, IMAGES)
    options = prepare.SetupOptions(
        layers,
        groups,
        interventions.parse(spec),
        device=device,
        batch_size=IMAGES,
        memory=SMALL,
        precision="fp32",
    )
    setup = prepare.prepare(model, (images, labels), options)
    return dataclasses.replace(setup, low=low)


def move(setup):
    """Put everything that a run reads on the device that is not there."""
    setup.data.device = DEVICE
    statistics = {
        key: dataclasses.replace(
            known, **{name: there(getattr(known, name)) for name in ("mean", "std", "class_mean")}
        )
        for key, known in setup.statistics.items()
    }
    model = moved(setup.replay.model)
    replay = dataclasses.replace(setup.replay, model=model, statistics=statistics)

    def graph(of):
        return dataclasses.replace(of, constants=there(of.constants))

    exact = Exact(graph(setup.exact.graph), replay) if isinstance(setup.exact, Exact) else replay
    return dataclasses.replace(
        setup,
        graph=graph(setup.graph),
        model=moved(setup.model),
        statistics=statistics,
        replay=replay,
        exact=exact,
    )


def sweep_one(setup, batch, told=lambda _: None, sweep=None):
    """Sweep one batch; ``told`` hears when each job begins."""
    sweep = sweep or BlockSweep(setup, np.zeros((0, 2), dtype=np.int64), ())
    advance = lambda done, job: None if done else told(job.name)  # noqa: E731
    return sweep.block(batch, 0, keep=lambda _: None, advance=advance), sweep


def swept(setup, notes):
    """Sweep a batch on the device; return what is found and what happened the last time."""
    batch = next(setup.data.batches(IMAGES))
    found, sweep = sweep_one(setup, batch)
    for cascade in sweep.cascades.values():
        # As after some batches: the tiers' errors are known, and none is a surprise.
        cascade.measured = precision_cascade.SAMPLE
        cascade.error_bounds = {tier: 1.5 * e for tier, e in cascade.error_bounds.items()}
    start = len(notes.events)
    note = lambda name: notes.events.append(f"job {name}")  # noqa: E731
    again, _ = sweep_one(setup, batch, note, sweep)
    check_same(again, found)
    return again, notes.events[start:], sweep


def check_same(found, expected):
    assert len(expected.flips.image) > 0
    assert same(found, expected)


def by_job(events):
    """Events of each job, and of the batch before them."""
    found = {"batch": []}
    current = "batch"
    for event in events:
        if isinstance(event, str) and event.startswith("job "):
            current = event
            found[current] = []
        found[current].append(event)
    return found


def waits_of(events):
    return [event for event in events if isinstance(event, Wait)]


GROUPS = [
    ["body.2:0"],
    ["body.2:1", "body.2:2", "body.2:5"],
    ["body.2:0", "body.3:1"],
    ["body.2:1", "body.3:2", "body.3:3"],
]
CASES = {
    "zero": {"layers": ["body.2", "body.3"]},
    "groups, noise": {"groups": GROUPS, "spec": "noise"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_block_waits_for_its_live_pairs_and_once_per_tier(case, monkeypatch):
    setup = set_up("residual", **CASES[case])
    expected, _ = sweep_one(setup, next(setup.data.batches(IMAGES)))
    with on_device(monkeypatch) as notes:
        found, events, _ = swept(move(setup), notes)
    check_same(found, expected)
    jobs = by_job(events)
    # Images that are watched, their logits twice; logits that are usable, and close; labels;
    # predictions.
    assert len(waits_of(jobs.pop("batch"))) == 6
    assert len(jobs) == len(setup.jobs)
    for name, own in jobs.items():
        waits = waits_of(own)
        start = len(waits) - 1 - waits[::-1].index(MEASURED)
        measuring = [wait for wait in waits[: start + 1] if wait != LIVE]
        assert {wait.place for wait in measuring} <= MEASURING
        assert len(measuring) == 5  # full precision, one low tier, what these pairs are
        waits = [wait for wait in waits if wait == LIVE] + waits[start + 1 :]
        decided = [wait for wait in waits if wait == DECIDED]
        exact = [wait for wait in waits if wait in EXACT]
        live = [] if "+" in name else [LIVE]  # of groups across layers all pairs are live
        assert waits == live + decided + exact
        assert 1 <= len(decided) <= 2
        assert len(exact) <= 1
        first = own.index(DECIDED)
        assert own[:first].count("classify") > 2  # slices, without a wait between them


def test_the_closed_form_waits_twice(monkeypatch):
    setup = set_up("mlp", layers=["7"])
    expected, _ = sweep_one(setup, next(setup.data.batches(IMAGES)))
    with on_device(monkeypatch) as notes:
        found, events, _ = swept(move(setup), notes)
    check_same(found, expected)
    waits = waits_of(by_job(events)["job " + setup.jobs[0].name])
    assert [wait.place for wait in waits] == ["Sweep.closed_form"] * 2


def test_recorded_slices_find_the_same(monkeypatch):
    monkeypatch.setattr(precision_cascade, "USELESS", 1.0)  # of so small a network much is doubtful
    setup = set_up("residual", layers=["body.2", "body.3.relu1"])
    expected, _ = sweep_one(setup, next(setup.data.batches(IMAGES)))
    with on_device(monkeypatch) as notes:
        recorder = elsewhere.Recorder(notes)
        monkeypatch.setattr(cuda_graph, "recorder", lambda _: recorder)
        found, events, sweep = swept(move(setup), notes)
    check_same(found, expected)
    assert recorder.works
    for cascade in sweep.cascades.values():  # nothing that a recording made and dropped is read
        # All of the first block and what is doubtful of the second went to float32.
        assert cascade.classified[torch.bfloat16] > 0.2 * sum(cascade.classified.values())
    assert recorder.recordings >= 2 * len(setup.jobs)  # in each block
    for name, own in by_job(events).items():
        slices = own.count("classify")
        if name != "batch":
            assert own.count("replay") >= slices - 2 * cuda_graph.FIRST > 2


def test_what_cannot_be_recorded_is_launched(caplog):
    """Once, with a warning; and what was recorded serves as many pairs or fewer."""
    weights = torch.arange(12.0).reshape(4, 3)

    def change(row, image, dtype):
        return weights[row] * (1 + image.unsqueeze(1))

    class Fails:
        works = True

        def record(self, run, few):
            raise RuntimeError("operation not permitted when stream is capturing")

    row, image = torch.tensor([3, 1, 2]), torch.tensor([0, 4, 2])
    recorder = Fails()
    repeated = cuda_graph.Repeated(change, recorder)
    for _ in range(5):
        assert torch.equal(repeated(row, image, torch.float32), change(row, image, None))
    assert not recorder.works
    assert [r.message for r in caplog.records if "cannot be recorded" in r.message] == [
        "the operations of a slice cannot be recorded as a CUDA graph (operation not permitted "
        "when stream is capturing): each is launched by itself"
    ]


def test_a_lack_of_memory_while_recording_is_no_reason_to_stop_recording():
    def change(row, image, dtype):
        return logit_change.Changed((10 * row + image).unsqueeze(1).float())

    class Small:
        def __init__(self):
            self.works, self.pairs = True, []

        def record(self, run, few):
            assert len(few().logits) == 1
            made = run()
            self.pairs.append(len(made.logits))
            if len(made.logits) > 2:
                raise RuntimeError("CUDA error: out of memory")
            return lambda: made.logits.copy_(run().logits), made

    recorder = Small()
    repeated = cuda_graph.Repeated(change, recorder)
    cascade = precision_cascade.PrecisionCascade([torch.float32])
    row = torch.arange(20)
    live = types.SimpleNamespace(change=repeated)
    found = cascade._slices(live, row, row, torch.float32, 4)
    parts = [part.logits.clone() for _, part in found]
    assert torch.equal(torch.cat(parts), change(row, row, None).logits)
    assert recorder.works
    assert recorder.pairs == [4, 2]
    assert cascade.most == 2


def test_few_pairs_are_not_done_as_a_whole_recording():
    def change(row, image, dtype):
        return logit_change.Changed((10 * row + image).unsqueeze(1).float())

    class Records:
        works, replays = True, 0

        def record(self, run, few):
            made = run()

            def replay():
                self.replays += 1
                made.logits.copy_(run().logits)

            return replay, made

    recorder = Records()
    repeated = cuda_graph.Repeated(change, recorder)
    replays = []
    for pairs in (8, 8, 8, 8, 5, 4, 1, 4, 4, 8):
        row = torch.arange(pairs)
        found = repeated(row, row, torch.float32)
        assert torch.equal(found.logits, change(row, row, None).logits)
        replays.append(recorder.replays)
    assert replays == [0, 0, 1, 2, 3, 3, 3, 3, 3, 4]


ALIVE: weakref.WeakSet = weakref.WeakSet()


class Graph:
    """Stands in for ``torch.cuda.CUDAGraph``, with a pool of its own or a given one."""

    def __init__(self):
        ALIVE.add(self)
        self.replay = lambda: None

    def capture_begin(self, *, pool, capture_error_mode):
        self.own = object() if pool is None else pool

    def capture_end(self):
        pass

    def pool(self):
        return self.own


def test_the_memory_of_recordings_is_one_slice_and_goes_with_the_recorder(monkeypatch):
    stream = types.SimpleNamespace(device=None, wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    recorder, ran = cuda_graph.CudaRecorder(stream), []
    for _ in range(3):
        recorder.record(lambda: ran.append("all"), lambda: ran.append("few"))
    assert ran == ["few", "all"] * 3  # what runs beforehand is a single pair
    assert len(ALIVE) == 1  # each took the pool of the last
    del recorder
    gc.collect()
    assert not ALIVE


def test_each_run_has_its_own_recorder(monkeypatch):
    setup, made = set_up("mlp", layers=["7"]), []
    monkeypatch.setattr(cuda_graph, "recorder", lambda device: made.append(device))
    for _ in range(2):
        BlockSweep(setup, np.zeros((0, 2), dtype=np.int64), ())
    assert made == [torch.device("cpu")] * 2


def test_fewer_pairs_than_were_recorded():
    calls = []

    class Calls:
        works = True

        def record(self, run, few):
            made = run()
            return lambda: (calls.append(1), made.logits.copy_(run().logits)), made

    def change(row, image, dtype):
        return logit_change.Changed((10 * row + image).unsqueeze(1).float())

    def same(row, image):
        found, expected = repeated(row, image, torch.float32), change(row, image, None)
        return torch.equal(found.logits, expected.logits)

    repeated = cuda_graph.Repeated(change, Calls())
    for start in range(0, 33, 5):  # the last has three pairs
        row = torch.arange(start, min(33, start + 5))
        assert same(row, row + 1)
    assert len(calls) == 7 - cuda_graph.FIRST
    more = torch.arange(6)  # than were recorded
    assert same(more, more)
    assert len(calls) == 7 - cuda_graph.FIRST


def test_members_without_counting_them(monkeypatch):
    """On a device rows are filled up with a member of their own."""
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
    row = torch.tensor([2, 0, 1, 1])
    pair, member = Members(mask, mask.device).of(row)
    exact = set(zip(pair.tolist(), member.tolist(), strict=True))
    assert len(exact) == len(pair) == 4 + 3 + 1 + 1
    with on_device(monkeypatch) as notes:
        pair, member = elsewhere.here(Members(mask, DEVICE).of(there(row)))
    assert notes.waits == []
    assert set(zip(pair.tolist(), member.tolist(), strict=True)) == exact
    assert len(pair) == 4 * 4


def test_directions_are_sent_once(monkeypatch):
    matrix = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    setup = set_up(
        "residual", layers=["body.2"], spec=Intervention("direction", directions={"body.2": matrix})
    )
    expected, _ = sweep_one(setup, next(setup.data.batches(IMAGES)))
    with on_device(monkeypatch) as notes:
        found, events, _ = swept(move(setup), notes)
    check_same(found, expected)
    waits = waits_of(by_job(events)["job body.2"])
    known = {DECIDED.place, *(wait.place for wait in EXACT)}
    assert {wait.place for wait in waits} <= known | MEASURING


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 1], 1),
        (lambda x: x.masked_select(x > 1), 1),
        (lambda x: x.unique(), 1),
        (lambda x: float(x.sum()), 1),
        (lambda x: bool(x.any()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.to("cpu", non_blocking=True), 1),
        (lambda x: torch.tensor([1.0], device=x.device), 1),
        (lambda x: x.new_tensor([1.0]), 1),
        (lambda x: torch.zeros(3).to(x.device), 1),
        (lambda x: torch.zeros(3).to(x.device, non_blocking=True), 1),  # not pinned
        (lambda x: x[torch.tensor([0, 1])], 1),
        (lambda x: x.repeat_interleave(x.long()), 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: sent(torch.zeros(3), x.device), 0),
        (lambda x: x.repeat_interleave(x.long(), output_size=6), 0),
        (lambda x: x[x.long().clamp(max=2)], 0),
        (lambda x: torch.where(x > 1, x, torch.zeros_like(x)).cumsum(0).sort(), 0),
        (lambda x: x.new_full((2,), 3.0) + torch.arange(2, device=x.device), 0),
        (lambda x: x + torch.tensor(2.0), 0),
    ],
)
def test_waits_are_seen(work, waits, monkeypatch):
    x = there(torch.arange(4.0))
    with on_device(monkeypatch) as notes:
        work(x)
    assert len(notes.waits) == waits


def test_two_devices_do_not_mix(monkeypatch):
    with on_device(monkeypatch), pytest.raises(RuntimeError, match="two devices"):
        there(torch.zeros(3)) + torch.zeros(3)


def test_slices_and_memory_of_a_device(monkeypatch):
    setup = set_up("mlp", layers=["7"])
    big = dataclasses.replace(setup, memory=1 << 40)
    assert big.slice_bytes == prepare.SLICE
    monkeypatch.setattr(setup.data, "device", DEVICE)
    assert big.slice_bytes == prepare.DEVICE_SLICE
    assert setup.slice_bytes == SMALL // 16
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (12_345, 99_999))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 500)
    assert prepare._free(torch.device("cuda")) == 12_345 + 200


class NoKernels:
    """A module whose operations are launched and do nothing: sizes are all that matters here."""

    def __getattr__(self, name):
        return lambda *_, **__: None


def test_native_operations_do_not_wait(monkeypatch):
    """The functions round the kernels, which the tests above take for one launch."""
    for module in (dispatch, _classify, units):
        monkeypatch.setattr(module, "backend", lambda _: NoKernels())
    for module in (elementwise, difference, _classify, units):
        monkeypatch.setattr(module, "context", lambda _: {"threads": 1, "stream": 0})
    maps, numbers = there(torch.zeros(5, 4, 6, 6)), there(torch.zeros(5))
    pair = there(torch.zeros(5, dtype=torch.int32))
    relu = Activation("relu")
    filters, channel = there(torch.zeros(4, 3, 3, 4)), there(torch.zeros(4, dtype=torch.int32))
    logits = there(torch.zeros(5, 3))
    pooled = {"kernel": 2, "stride": 2, "out_size": (3, 3)}
    with on_device(monkeypatch) as notes:
        elementwise.delta_activation(maps, maps, pair, relu, scale=numbers, addend=maps)
        elementwise.delta_mean(maps, maps, pair, relu, addend=maps)
        difference.delta_product(maps, maps, maps, maps, pair)
        difference.perturbed(maps, maps.to(torch.bfloat16), pair)
        difference.subtracted(maps, maps, pair, dtype=torch.bfloat16)
        elementwise.delta_max_pool(maps, maps, pair, activation=relu, **pooled)
        elementwise.delta_max_pool(maps, maps, pair, activation=Activation("gelu"), **pooled)
        _classify.classify(logits, logits, pair, numbers, relative=0.1)
        _classify.head_flips(logits, logits, there(torch.zeros(3, 3)), pair, numbers)
        units.masked_copies(maps, pair, pair, numbers)
        fused = {"activation": relu, "base": maps, "padding": 1}
        units.unit_delta(maps, filters, channel, pair, pair, **fused)
        units.unit_delta(maps.to(torch.bfloat16), filters, channel, pair, pair)
    assert notes.waits == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnCuda:
    """The same on a GPU, by what CUDA itself reports."""

    def test_waits(self):
        setup = set_up("residual", "cuda", layers=["body.2", "body.3"])
        batch = next(setup.data.batches(IMAGES))
        _, sweep = sweep_one(setup, batch)
        for cascade in sweep.cascades.values():
            cascade.measured = precision_cascade.SAMPLE
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                sweep_one(setup, batch, sweep=sweep)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert 0 < len(seen) <= 7 + 8 * len(setup.jobs), [str(w.message) for w in seen]

    def test_recorded_slices_find_the_same(self, monkeypatch):
        setup = set_up("residual", "cuda", layers=["body.2", "body.3.relu1"])
        batch = next(setup.data.batches(IMAGES))
        replays = []
        of = cuda_graph.Recorded.of
        monkeypatch.setattr(
            cuda_graph.Recorded, "of", lambda *args: (replays.append(1), of(*args))[1]
        )
        for _ in range(3):  # recordings come and go
            found, sweep = sweep_one(setup, batch)
        assert sweep.recorder.works
        assert len(replays) > 10
        monkeypatch.setattr(cuda_graph, "recorder", lambda _: None)
        launched, _ = sweep_one(setup, batch)
        check_same(found, launched)
