"""The cascade of precisions: what it doubts, what it reports, and what it does without memory."""

import functools
import logging

import numpy as np
import pytest
import torch
from support import networks
from support.clean import Clean
from support.fuzzing.cases import Case
from support.fuzzing.cases import check as check_case
from support.fuzzing.parts import Act, Network
from support.oracle import check
from support.runs import same
from torch import nn

import pyablate as pa
from pyablate.engine import microbenchmarks
from pyablate.engine.logit_change import Changed
from pyablate.engine.precision_cascade import PrecisionCascade, sample
from pyablate.engine.suffix import usual
from pyablate.runs import executor, setup

pytestmark = pytest.mark.usefixtures("exports_kept")


def pairs(count):
    return torch.arange(count), torch.arange(count) % 3


def true_change(row, image, dtype):
    return Changed(true_logits(row, dtype))


def true_logits(row, dtype=torch.float32):
    """A change of its own for every row; rough in bfloat16."""
    change = torch.stack([torch.zeros(len(row)), 0.21 * torch.sin(row.float())], dim=1)
    if dtype == torch.bfloat16:
        change[:, 1] *= 1 + 0.02 * torch.cos(37.0 * row.float())
    return change


def test_doubtful_pairs_are_decided_again_in_the_next_tier():
    row, image = pairs(3000)
    cascade = PrecisionCascade([torch.bfloat16, torch.float32])
    found = cascade.classify(true_change, row, image, Clean(), lambda _: 128)
    expected = (Clean.logits[image] + true_logits(row)).argmax(1)
    assert torch.equal(found.long(), expected)
    assert cascade.error_bounds[torch.bfloat16] == pytest.approx(4 * 0.02, rel=0.05)
    assert 0 < cascade.classified[torch.float32] < 500
    assert cascade.classified[torch.bfloat16] + cascade.classified[torch.float32] == 3000


def test_few_measured_pairs_are_trusted_less():
    row, image = pairs(12_000)
    cascade = PrecisionCascade([torch.bfloat16, torch.float32])
    cascade.classify(true_change, row[:300], image[:300], Clean(), lambda _: 128)
    assert cascade.measured == 64
    assert cascade.error_bound(torch.bfloat16) == 2 * cascade.error_bounds[torch.bfloat16]
    before = cascade.error_bounds[torch.bfloat16]
    for start in range(300, 12_000, 2_925):
        some = slice(start, start + 2_925)
        cascade.classify(true_change, row[some], image[some], Clean(), lambda _: 128)
    assert cascade.measured == 256
    assert cascade.error_bound(torch.bfloat16) == cascade.error_bounds[torch.bfloat16] >= before
    assert cascade.error_bound(torch.float32) < 1e-3


@pytest.mark.parametrize(("factor", "kept"), [(0.79, False), (0.87, True)])
def test_a_tier_is_not_left_out_on_the_word_of_a_few(factor, kept):
    """The first 64 pairs double the doubt; 256 decide."""
    row, image = pairs(3000)

    def change(row, image, dtype):
        return Changed(true_logits(row) * (1 if dtype == torch.float32 else factor))

    cascade = PrecisionCascade([torch.bfloat16, torch.float32])
    cascade.classify(change, row, image, Clean(), lambda _: 512)
    assert cascade.error_bound(torch.bfloat16) == pytest.approx(4 * (1 / factor - 1), rel=0.01)
    assert cascade.error_bound(torch.bfloat16) > 0.5
    assert cascade.measured == 256
    assert (torch.bfloat16 in cascade.tiers) == kept


@pytest.mark.parametrize(("whole", "measured"), [(255, 0), (256, 64), (2048, 256)])
def test_of_few_pairs_few_are_measured(whole, measured):
    """Of a tier of no use: nothing in a small run, and a second look in none but a large one."""
    row, image = pairs(whole)

    def change(row, image, dtype):
        return Changed(true_logits(row) * (1 if dtype == torch.float32 else 0.5))

    cascade = PrecisionCascade([torch.bfloat16, torch.float32], whole)
    found = cascade.classify(change, row, image, Clean(), lambda _: 512)
    assert torch.equal(found.long(), (Clean.logits[image] + true_logits(row)).argmax(1))
    assert cascade.measured == measured
    assert cascade.tiers == [torch.float32]
    assert cascade.classified == {torch.float32: whole}


@pytest.mark.parametrize(
    ("count", "precision", "low"), [(3, "auto", False), (3, "bf16", True), (16, "auto", True)]
)
def test_low_precision_where_pairs_are_many_or_it_is_asked_for(monkeypatch, count, precision, low):
    monkeypatch.setattr(setup, "_low_precisions", lambda *_: (torch.bfloat16,))
    model, images, labels = pa.demo.load("vgg_bn", limit=count)
    found = pa.ablate(model, (images, labels), "features.9", precision=precision, progress=False)
    assert ("bfloat16" in found.effort.pairs_by_precision) == low


def test_measured_pairs_are_not_computed_again():
    row, image = pairs(3000)
    asked = {torch.bfloat16: [], torch.float32: []}

    def change(row, image, dtype):
        asked[dtype].append(row)
        return true_change(row, image, dtype)

    told = []
    cascade = PrecisionCascade([torch.bfloat16, torch.float32], 3000)
    cascade.classify(change, row, image, Clean(), lambda _: 128, advance=told.append)
    found = torch.cat(asked[torch.float32])
    assert len(found) == len(found.unique()) == cascade.classified[torch.float32]
    first = torch.cat(asked[torch.bfloat16][:2])
    assert len(first) == len(first.unique()) == 64
    later = torch.cat(asked[torch.bfloat16][2:])
    assert len(later) == 3000 - 64
    assert not torch.isin(first, later).any()
    assert sum(told) == pytest.approx(3000, rel=0.05)


@pytest.mark.parametrize("count", [65, 100, 300, 447, 2501])
def test_every_pair_is_counted_once(count):
    row, image = pairs(count)
    assert len(sample(row, 64, image == 0).unique()) == 64
    factor = 0.79  # too coarse by 64 pairs, so that large jobs take a second look at 256

    def change(row, image, dtype):
        return Changed(true_logits(row) * (1 if dtype == torch.float32 else factor))

    cascade = PrecisionCascade([torch.bfloat16, torch.float32])
    found = cascade.classify(change, row, image, Clean(), lambda _: 128)
    assert sum(cascade.classified.values()) == count
    assert torch.equal(found.long(), (Clean.logits[image] + true_logits(row)).argmax(1))


@pytest.mark.parametrize(("whole", "measured"), [(1000, 64 + 3 * 16), (2048, 4 * 64)])
def test_later_batches_of_small_jobs_are_measured_on_few_pairs(whole, measured):
    row, image = pairs(1000)
    cascade = PrecisionCascade([torch.bfloat16, torch.float32], whole)
    for start in range(0, 1000, 250):
        some = slice(start, start + 250)
        cascade.classify(true_change, row[some], image[some], Clean(), lambda _: 128)
    assert cascade.measured == measured
    assert cascade.tiers == [torch.bfloat16, torch.float32]


def test_a_hopeless_tier_is_left_after_a_first_look():
    row, image = pairs(1000)
    asked = []

    def change(row, image, dtype):
        if dtype == torch.bfloat16:
            asked.append(len(row))
            return Changed(-3 * true_logits(row))
        return true_change(row, image, dtype)

    cascade = PrecisionCascade([torch.bfloat16, torch.float32], 1000)
    found = cascade.classify(change, row, image, Clean(), lambda _: 128)
    assert asked == [16]
    assert cascade.tiers == [torch.float32]
    assert torch.equal(found.long(), (Clean.logits[image] + true_logits(row)).argmax(1))


@pytest.mark.parametrize(("whole", "tried"), [(1000, False), (200_000, True)])
def test_a_second_low_tier_is_tried_where_the_first_leaves_enough(whole, tried):
    """An error of half a per cent leaves next to none of a thousand pairs open."""
    row, image = pairs(1000)
    asked = set()

    def change(row, image, dtype):
        asked.add(dtype)
        factor = 1.005 if dtype == torch.int8 else 1.0
        return Changed(factor * true_logits(row))

    tiers = [torch.int8, torch.bfloat16, torch.float32]
    cascade = PrecisionCascade(list(tiers), whole)
    found = cascade.classify(change, row, image, Clean(), lambda _: 128)
    assert (torch.bfloat16 in asked) == tried
    assert cascade.tiers == (tiers if tried else [torch.int8, torch.float32])
    assert torch.equal(found.long(), (Clean.logits[image] + true_logits(row)).argmax(1))


def test_full_precision_is_measured_on_fewer_pairs_of_small_jobs():
    """What these say is doubted more, by the root of how many are missing."""
    row, image = pairs(600)

    def truth(row, image):
        return (Clean.logits[image] + true_logits(row)).double()

    def change(row, image, dtype):
        return Changed(true_logits(row) * (1 + 1e-3))

    bounds = []
    for whole in (256, 600, 100_000):
        asked = []
        cascade = PrecisionCascade([torch.float32], whole)
        cascade.classify(
            change,
            row,
            image,
            Clean(),
            lambda _: 1000,
            truth=lambda row, image, asked=asked: (asked.append(len(row)), truth(row, image))[1],
        )
        bounds.append(cascade.error_bounds[torch.float32])
        assert asked[0] == {256: 2, 600: 4}.get(whole, 8)
    assert bounds == pytest.approx([1.6e-2, 8e-3 * 2**0.5, 8e-3], rel=0.01)


def test_where_few_pairs_fit_as_many_are_measured():
    """Of large maps a slice has a few pairs: these alone would cost a tier its place."""
    row, image = pairs(3000)

    def change(row, image, dtype):
        assert len(row) <= 4
        return true_change(row, image, dtype)

    cascade = PrecisionCascade([torch.bfloat16, torch.float32])
    cascade.classify(change, row, image, Clean(), lambda _: 4)
    plenty = PrecisionCascade([torch.bfloat16, torch.float32])
    plenty.classify(true_change, row, image, Clean(), lambda _: 512)
    assert cascade.measured == plenty.measured == 64
    assert cascade.error_bounds == plenty.error_bounds
    assert cascade.classified == plenty.classified


def test_a_first_block_of_few_pairs_costs_no_tier():
    row, image = pairs(3000)
    cascade = PrecisionCascade([torch.bfloat16, torch.float32])
    cascade.classify(true_change, row[9:10], image[9:10], Clean(), lambda _: 128)
    assert cascade.error_bound(torch.bfloat16) > 1  # 16 times that of 256 pairs
    cascade.classify(true_change, row, image, Clean(), lambda _: 128)
    assert cascade.classified[torch.bfloat16] > 2000


def test_few_open_pairs_skip_the_tier_between(monkeypatch):
    monkeypatch.setattr(PrecisionCascade, "_calibrate", lambda *_: None)
    row, image = pairs(6000)
    asked = []

    def change(row, image, dtype):
        asked.append((dtype, len(row)))
        return true_change(row, image, torch.bfloat16 if dtype == torch.int8 else dtype)

    tiers = [torch.int8, torch.bfloat16, torch.float32]
    cascade = PrecisionCascade(list(tiers))
    cascade.error_bounds, cascade.measured = {torch.int8: 0.03, torch.bfloat16: 0.02}, 256
    found = cascade.classify(change, row, image, Clean(), lambda _: 10_000)
    open_ = [size for dtype, size in asked if dtype == torch.float32]
    assert [dtype for dtype, _ in asked] == [torch.int8, torch.float32]
    assert 0 < open_[0] < 64
    cascade.error_bounds = {torch.int8: 0.2, torch.bfloat16: 0.02}
    asked.clear()
    found = cascade.classify(change, row, image, Clean(), lambda _: 10_000)
    assert [dtype for dtype, _ in asked][:2] == [torch.int8, torch.bfloat16]
    assert asked[1][1] >= 64
    expected = (Clean.logits[image] + true_logits(row)).argmax(1)
    assert torch.equal(found.long(), expected)


@pytest.mark.parametrize("pairs", [0, 1, 7, 8, 9, 10, 63, 64, 65, 334, 1000, 1337])
@pytest.mark.parametrize(("device", "step"), [("cpu", 4), ("cuda", 1)])
def test_numbers_of_pairs_are_few(pairs, device, step):
    of = functools.partial(usual, device=torch.device(device))
    down, up = of(pairs), of(pairs, up=True)
    assert down <= pairs <= up <= (1 + 1 / step) * pairs
    assert of(down) == of(down, up=True) == down
    assert of(up) == up
    assert up - down <= max(1, pairs // step)


def test_a_change_that_is_not_a_number_hides_no_error():
    """One NaN among the measured pairs, and a rough tier that is wrong on all others."""
    row = torch.arange(120)

    def change(row, image, dtype):
        exact = torch.zeros(len(row), 2)
        exact[:, 1] = -0.5
        if dtype == torch.bfloat16:
            exact[:, 1] += 3.0
            exact[row == 0] = torch.nan
        return Changed(exact)

    cascade = PrecisionCascade([torch.bfloat16, torch.float32])
    found = cascade.classify(change, row, row % 3, Clean(), lambda _: 1000)
    assert cascade.tiers == [torch.float32]
    expected = (Clean.logits[row % 3] + change(row, row, torch.float32).logits).argmax(1)
    assert torch.equal(found.long(), expected)


def test_few_pairs_are_decided_in_full_precision_until_enough_are_measured():
    cascade = PrecisionCascade([torch.bfloat16, torch.float32])

    def change(row, image, dtype):
        return Changed(torch.stack([torch.zeros(len(row)), 0.3 * torch.sin(row.float())], dim=1))

    for start in range(0, 100, 10):  # each of these is measured
        row = torch.arange(start, start + 10)
        cascade.classify(change, row, row % 3, Clean(), lambda _: 1000)
    assert cascade.measured == 100
    assert cascade.classified == {torch.float32: 100}
    row = torch.arange(300)
    cascade.classify(change, row, row % 3, Clean(), lambda _: 1000)
    assert cascade.measured == 164
    assert cascade.classified[torch.bfloat16] > 100


def test_a_useless_tier_is_left_out():
    row, image = pairs(300)

    def change(row, image, dtype):
        exact = true_logits(row)
        return Changed(exact if dtype == torch.float32 else torch.zeros_like(exact))

    cascade = PrecisionCascade([torch.bfloat16, torch.float32])
    found = cascade.classify(change, row, image, Clean(), lambda _: 64)
    assert cascade.tiers == [torch.float32]
    expected = (Clean.logits[image] + change(row, image, torch.float32).logits).argmax(1)
    assert torch.equal(found.long(), expected)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("you can't allocate memory, sorry")])
@pytest.mark.parametrize(
    ("tiers", "count", "first"),
    [
        ([torch.float32], 1000, [512, 256, 128, 64]),
        ([torch.bfloat16, torch.float32], 16_000, [125, 62]),  # while it measures the first tier
    ],
)
def test_without_memory_it_goes_on_with_fewer_pairs(error, tiers, count, first, caplog):
    row, image = pairs(count)
    asked = []

    def change(row, image, dtype):
        asked.append(len(row))
        if len(row) > 100:
            raise error
        return true_change(row, image, dtype)

    cascade = PrecisionCascade(list(tiers))
    with caplog.at_level(logging.WARNING, "pyablate"):
        found = cascade.classify(change, row, image, Clean(), lambda _: 512)
    assert asked[: len(first)] == first
    assert max(asked[len(first) :]) == first[-1]
    assert "out of memory" in caplog.text
    plenty = PrecisionCascade(list(tiers))
    assert torch.equal(found, plenty.classify(true_change, row, image, Clean(), lambda _: 1000))


def test_every_unit_has_its_turn_in_the_sample():
    """Pairs come image by image: evenly spaced ones would show the same units each time."""
    image, row = (
        part.flatten() for part in torch.meshgrid(*[torch.arange(128)] * 2, indexing="ij")
    )
    chosen = sample(row, 128)
    assert len(row[chosen].unique()) == 128
    assert len(image[chosen].unique()) > 64
    assert torch.equal(chosen, sample(row, 128))
    assert len(sample(row[:5], 5).unique()) == 5


class Opposite(nn.Module):
    """Two logits z and -z, what is left of numbers a thousand times as large."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 64)
        self.head = nn.Linear(64, 2, bias=False)
        common, own = 1e4 * torch.rand(1, 32), 0.1 * torch.randn(32, 32)
        part = torch.randn(1, 32)
        with torch.no_grad():
            self.second.weight.copy_(torch.cat([own + common, common.expand(32, 32)]))
            self.second.bias.zero_()
            self.head.weight.copy_(torch.cat([torch.cat([part, -part], 1)] * 2))
            self.head.weight[1].neg_()

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu())


def exact_predictions(model, images, layer, **options):
    labels = torch.zeros(len(images), dtype=torch.int64)
    options = {"audit": 0, "progress": False, **options}
    found = pa.ablate(model, (images, labels), layer, precision="fp32", **options)
    exact = pa.ablate(model, (images, labels), layer, precision="fp64", **options)
    assert np.array_equal(found.baseline, exact.baseline)
    assert np.array_equal(found.predictions(), exact.predictions())
    return found


def test_logits_that_cancel_are_rounded_no_better_than_others():
    """A margin of 2 |z| is large beside the largest logit |z|, whatever its rounding."""
    torch.manual_seed(0)
    found = exact_predictions(Opposite().eval(), torch.randn(2000, 16), "first")
    assert 0 < found.effort.pairs_by_precision["float64"] < 0.5 * 32 * 2000


def test_large_numbers_that_cancel_behind_an_ablation():
    """What full precision is worth there is measured: the clean run does not show it."""
    torch.manual_seed(0)
    common = 1e5 * torch.rand(1, 64)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    ).eval()
    with torch.no_grad():
        model[2].weight.add_(common)
        model[4].weight.sub_(model[4].weight.mean(dim=1, keepdim=True))
    found = exact_predictions(model, torch.randn(256, 16), "1", intervention="constant:100000")
    assert found.effort.error_bounds["1"]["float32"] > 1e-3


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def change(row, image, dtype):
        raise RuntimeError("shapes do not fit")

    row, image = pairs(100)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        PrecisionCascade([torch.float32]).classify(change, row, image, Clean(), lambda _: 10)


def test_a_clean_run_without_memory_goes_on_with_half_the_images(monkeypatch, caplog):
    model, images, labels = networks.network("residual", 24)
    expected = pa.ablate(model, (images, labels), progress=False)
    real, seen = executor.clean_run.run_graph, []

    def run_graph(graph, keep, exact, batch, **options):
        seen.append(len(batch))
        if len(batch) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(graph, keep, exact, batch, **options)

    monkeypatch.setattr(executor.clean_run, "run_graph", run_graph)
    with caplog.at_level(logging.WARNING, "pyablate"):
        result = pa.ablate(model, (images, labels), progress=False)
    assert seen[:3] == [24, 12, 6]
    assert "going on with 6 images" in caplog.text
    assert same(result, expected)


def test_a_layer_without_memory_goes_on_with_half_the_images(monkeypatch, caplog):
    """Also after some of its predictions were given; what it measures is not counted twice."""
    model, images, labels = networks.network("residual", 24)
    # In low precision more or fewer pairs would be measured more exactly.
    options = {"progress": False, "measures": ["loss"], "audit": 100, "precision": "fp32"}
    expected = pa.ablate(model, (images, labels), **options)
    real = executor.BlockSweep._by_deltas

    def by_deltas(self, job, batch, *arguments):
        found = real(self, job, batch, *arguments)
        if len(batch) > 7:
            raise MemoryError
        return found

    monkeypatch.setattr(executor.BlockSweep, "_by_deltas", by_deltas)
    with caplog.at_level(logging.WARNING, "pyablate"):
        result = pa.ablate(model, (images, labels), **options)
    assert "going on with 6 images" in caplog.text
    assert same(result, expected)
    assert result.audit == expected.audit
    assert result.loss_change == pytest.approx(expected.loss_change, rel=1e-4, abs=1e-6)


def test_the_run_says_what_it_took():
    model, images, labels = networks.demo("vgg_bn", 64)
    result = pa.ablate(model, (images, labels), "features.9", precision="bf16", progress=False)
    effort = result.effort
    assert list(effort.layer_seconds) == ["features.9"]
    assert 0 < effort.layer_seconds["features.9"] < result.seconds
    assert effort.error_bounds["features.9"]["bfloat16"] >= 0.02
    assert sum(effort.pairs_by_precision.values()) <= 64 * 64
    assert effort.pairs_by_precision["bfloat16"] > 0.9 * 64 * 64


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"float32": 100, "bfloat16": 200, "int8": 400}, (torch.int8, torch.bfloat16)),
        ({"float32": 100, "bfloat16": 50, "int8": 400}, (torch.int8,)),
        ({"float32": 100, "bfloat16": 200, "int8": 210}, (torch.bfloat16,)),
        ({"float32": 100, "bfloat16": 0, "int8": 0}, ()),
    ],
)
def test_auto_takes_what_is_fast_here(monkeypatch, rates, expected):
    def rate(device, dtype, *, alone):
        assert alone  # threads that wait for each other make all arithmetic look alike
        return float(rates[str(dtype).removeprefix("torch.")])

    monkeypatch.setattr(setup, "convolution_rate", rate)
    found = setup._low_precisions("auto", torch.float32, torch.device("cpu"))
    assert found == expected


def test_peaks_are_plausible():
    threads = torch.get_num_threads()
    assert 1e7 < microbenchmarks.convolution_rate("cpu", torch.float32, alone=True) < 1e14
    assert torch.get_num_threads() == threads
    for rate in (microbenchmarks.unit_rate("cpu"), microbenchmarks.change_rate("cpu")):
        assert 1e7 < rate < 1e14


class Padded(nn.Module):
    """Paddings of every kind in front of convolutions and pools, as networks from elsewhere do."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        self.first = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.last = nn.Conv2d(8, 16, 3, stride=2)
        self.head = nn.Linear(16, 5)

    def pad(self, x, margins):
        value = 1.5 if self.mode == "number" else None
        mode = "constant" if self.mode == "number" else self.mode
        return nn.functional.pad(x, margins, mode, value)

    def forward(self, x):
        x = self.first(self.pad(x, (1, 1, 1, 1))).relu()
        x = self.depthwise(self.pad(x, (0, 1, 0, 1))).relu()  # as TensorFlow pads
        x = self.last(self.pad(x, (1, 2, 2, 1))).relu()
        return self.head(nn.functional.max_pool2d(self.pad(x, (1, 0, 0, 1)), 2).mean((2, 3)))


@pytest.mark.parametrize("mode", ["constant", "number", "reflect", "replicate", "circular"])
def test_padding_apart_from_its_convolution(mode):
    torch.manual_seed(0)
    model, images = Padded(mode).eval(), torch.randn(6, 3, 12, 12)
    check(model, (images, torch.arange(6) % 5))


def test_pairs_that_are_all_of_watched_images():
    """The share of the sample that is of other images was empty."""
    network = Network((Act(),), (1, 2), 2, seed=11)
    check_case(Case(network, images=48, precision="bf16", batch_size=3))
