"""NaN and infinity: each backend gives what PyTorch's own layers give; decisions are left open.

Pooling has one exception: a window whose largest base is plus infinity is NaN in every backend,
also behind a bounded function, where PyTorch's difference would be finite.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from support.ops_cases import (
    ACTIVATIONS,
    DTYPES,
    ROUGH,
    TWINS,
    index,
    on_device,
    on_reference,
    random_index,
    random_maps,
    using_backend,
    without_native,
)
from torch.nn import functional

from pyablate import ops
from pyablate.ops import Activation
from pyablate.ops.moments import MapMoments, class_moments, class_ranks, map_moments
from pyablate.ops.quantized import Quantized
from pyablate.ops.reference import compute_dtype

NAN, INF = float("nan"), float("inf")
VALUES = [NAN, INF, -INF, -100.0, -3.0, -1.0, 0.0, 0.5, 1.0, 6.0, 7.0, 100.0]
REAL = [torch.float32, torch.float64]
ALL = [pytest.param("reference", id="reference"), *TWINS]
MORE = [
    *ACTIVATIONS,
    Activation("leaky_relu", 0.0),
    Activation("hardtanh", 0.0, INF),
    Activation("hardtanh", -INF, 1.0),
]
LAYERS = {
    "identity": lambda z, a: z,
    "relu": lambda z, a: z.relu(),
    "hardtanh": lambda z, a: functional.hardtanh(z, a.a, a.b),
    "leaky_relu": lambda z, a: functional.leaky_relu(z, a.a),
    "elu": lambda z, a: functional.elu(z),
    "gelu": lambda z, a: functional.gelu(z),
    "gelu_tanh": lambda z, a: functional.gelu(z, approximate="tanh"),
    "silu": lambda z, a: functional.silu(z),
    "hardswish": lambda z, a: functional.hardswish(z),
    "hardsigmoid": lambda z, a: functional.hardsigmoid(z),
    "sigmoid": lambda z, a: z.sigmoid(),
    "tanh": lambda z, a: z.tanh(),
}


@contextmanager
def using(backend):
    if backend != "reference":
        with using_backend(backend) as device:
            yield device
        return
    with without_native():
        yield torch.device("cpu")


def run(backend, op, *arguments, **options):
    with using(backend) as device:
        return on_device(op, device, *arguments, **options)


def assert_same(result, expected, tolerance=1e-5):
    torch.testing.assert_close(
        result.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def every_pair(repeat=1):
    """Each value as a base beside each as a change: rows [repeat, all of them]."""
    base = torch.tensor(VALUES).repeat_interleave(len(VALUES)).repeat(repeat, 1)
    return base, torch.tensor(VALUES).repeat(len(VALUES)).repeat(repeat, 1)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("activation", MORE, ids=str)
def test_activations(backend, dtypes, activation):
    base, delta = (x.to(dtype) for x, dtype in zip(every_pair(), dtypes[::-1], strict=True))
    wide = base.double()
    layer = LAYERS[activation.name]
    expected = layer(wide + delta, activation) - layer(wide, activation)
    if activation.name == "identity":
        expected = delta  # linear: the base is not read
    if activation.name == "elu":
        activation = Activation("elu", 1.0)
    result = run(backend, ops.delta_activation, base, delta, index([0]), activation)
    assert_same(result, expected, ROUGH.get(dtypes[0], 1e-4))
    for size in (1, 5):  # the ends of rows, which are no whole vector
        part = run(
            backend, ops.delta_activation, base[:, :size], delta[:, :size], index([0]), activation
        )
        assert torch.equal(part.nan_to_num(77.0), result[:, :size].nan_to_num(77.0))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_ends_of_a_difference(backend, dtypes):
    """What was infinite and still is has not changed; all else is as PyTorch has it."""
    base, other = every_pair()
    base, wide = base.to(dtypes[1]), compute_dtype(dtypes[0])
    for size in (1, 5, len(VALUES) ** 2):
        clean, given = base[:, :size], other[:, :size]
        joined = run(backend, ops.perturbed, clean, given.to(dtypes[0]), index([0]))
        assert joined.dtype == wide
        assert_same(joined, clean.to(wide) + given.to(dtypes[0]).to(wide), 0)
        for after in (given.to(wide), joined):
            change = run(backend, ops.subtracted, after, clean, index([0]), dtype=dtypes[0])
            same = after == clean
            assert (change[same] == 0).all()
            assert change.dtype == dtypes[0]
            assert_same(change[~same], (after - clean.to(wide))[~same].to(dtypes[0]), 0)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_means(backend, layout, bad):
    torch.manual_seed(0)
    for shape in [(3, 5, 7), (33, 2, 1)]:
        base, delta, addend = (torch.randn(n, *shape) for n in (2, 4, 4))
        base[1, 2, 1, 0], delta[1, 0, 0, 0], addend[2, 1, 1, 0] = bad, bad, bad
        image, scale = index([0, 0, 0, 1]), torch.tensor([1.0, 1.0, 1.0, 0.5])
        for name in ("relu", "gelu", "hardtanh"):
            activation = Activation(name, -1.0, 1.0)
            z, layer = base[image.long()].double(), LAYERS[name]
            change = delta.double() * scale.reshape(-1, 1, 1, 1) + addend.double()
            expected = (layer(z + change, activation) - layer(z, activation)).mean((2, 3))
            result = run(
                backend,
                ops.delta_mean,
                base,
                delta.contiguous(memory_format=layout),
                image,
                activation,
                scale=scale,
                addend=addend,
            )
            assert_same(result, expected)


def pooled(base, delta, activation, **window):
    """Return the difference of PyTorch's own pooling, in float64."""
    layer = LAYERS[activation.name]
    after, before = (
        functional.max_pool2d(layer(z.double(), activation), **window)
        for z in (base.double() + delta.double(), base)
    )
    nothing = (after == -INF) & (before == -INF)
    infinite = functional.max_pool2d((base == INF).float(), **window) > 0
    return torch.where(nothing, 0.0, after - before).masked_fill(infinite, NAN)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["base", "delta"])
def test_pooling_with_one_bad_tap(backend, layout, dtypes, where):
    """One bad number at each tap of a window of three by three, in maps of any width."""
    torch.manual_seed(1)
    for channels in (1, 5, 21):
        for bad in (NAN, INF, -INF):
            base = torch.randn(1, channels, 3, 21).to(dtypes[1])
            delta = torch.randn(9, channels, 3, 21).to(dtypes[0])
            base = base.repeat(9, 1, 1, 1)
            for tap in range(9):
                {"base": base, "delta": delta}[where][tap, :, tap // 3, tap % 3 :: 3] = bad
            window = {"kernel_size": 3, "stride": 3}
            for activation in (Activation("identity"), Activation("relu"), Activation("sigmoid")):
                result = run(
                    backend,
                    ops.delta_max_pool,
                    base,
                    delta.contiguous(memory_format=layout),
                    index(range(9)),
                    kernel=3,
                    stride=3,
                    out_size=(1, 7),
                    activation=activation,
                )
                expected = pooled(base, delta, activation, **window)
                assert_same(result, expected, 3 * ROUGH.get(dtypes[0], 3e-6))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_pooling_of_bad_numbers_everywhere(backend, layout, dtype):
    torch.manual_seed(2)
    windows = [(2, 2, 0, 1), (3, 2, 1, 1), (3, 1, 1, 1), (2, 1, 0, 2)]
    bad = torch.tensor([NAN, INF, -INF, -INF])
    for kernel, stride, padding, dilation in windows:
        base, delta = (random_maps(6, 19, 12, 11, dtype=dtype) for _ in range(2))
        for maps in (base, delta):
            spots = torch.rand(maps.shape) < 0.05
            maps[spots] = bad[torch.randint(0, 4, (int(spots.sum()),))].to(dtype)
        base[0, :, :5, :5] = -INF  # as padded with minus infinity
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        for activation in (
            Activation("identity"),
            Activation("leaky_relu", 0.1),
            Activation("gelu"),
        ):
            expected = pooled(base, delta, activation, kernel_size=kernel, **options)
            result = run(
                backend,
                ops.delta_max_pool,
                base,
                delta.contiguous(memory_format=layout),
                index(range(6)),
                kernel=kernel,
                out_size=expected.shape[2:],
                activation=activation,
                **options,
            )
            assert 0.1 < float(expected.isnan().double().mean()) < 0.9
            assert_same(result, expected)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("kernel", [3, 6])  # 6: a single output position
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_the_first_convolution(backend, kernel, bad):
    torch.manual_seed(3)
    delta = random_maps(2, 3, 6, 6, zeros=0.5)
    delta[0, 1, 2, 3], delta[1, 2, 0, 0] = bad, bad
    weight, channel = torch.randn(3, kernel, kernel, 21), index([2, 0, 1])
    image, column = index([0, 0, 0, 1, 1, 1]), index([0, 1, 2, 0, 1, 2])
    size = 7 - kernel
    base = torch.randn(2, 21, size, size)
    base[0, 3, 0, 0] = bad
    maps = delta[image.long(), column.long()].unsqueeze(1).double()
    filters = weight[channel.long()][column.long()].permute(0, 3, 1, 2).double()
    plain = torch.stack(
        [functional.conv2d(m, f.unsqueeze(1)) for m, f in zip(maps, filters, strict=True)]
    )
    assert_same(run(backend, ops.unit_delta, delta, weight, channel, image, column), plain, 1e-4)
    rows = base[image.long()].double()
    result = run(
        backend,
        ops.unit_delta,
        delta,
        weight,
        channel,
        image,
        column,
        activation=Activation("hardtanh", -1.0, 1.0),
        base=base,
    )
    assert_same(result, functional.hardtanh(rows + plain) - functional.hardtanh(rows), 1e-4)


@pytest.mark.parametrize("backend", ALL[:-1])  # CUDA has no quantized values
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF])
def test_codes_of_a_spoiled_pair_are_all_alike(backend, dtype, bad):
    torch.manual_seed(4)
    relu, image = Activation("leaky_relu", 0.5), index(range(4))
    for size in (1, 17, 5000):
        delta, base = torch.randn(4, size, 2, 1).to(dtype), torch.randn(4, size, 2, 1)
        delta[1, size // 2], delta[2] = bad, 0.0
        quantized = Quantized.empty(delta.shape, torch.contiguous_format, "cpu")
        result = run(backend, ops.delta_activation, base, delta, image, relu, quantized=quantized)
        assert result.isfinite().flatten(1).all(1).tolist() == [True, False, True, True]
        assert quantized.scale.isnan().tolist() == [False, True, False, False]
        assert (quantized.values[1:3] == 128).all()
        assert (quantized.values[[0, 3]] != 128).any()
        window = {"kernel": (1, 1), "stride": 1, "out_size": (2, 1), "quantized": quantized}
        run(backend, ops.delta_max_pool, base, delta, image, **window)
        assert quantized.scale.isnan().tolist() == [False, True, False, False]
        assert (quantized.values[1:3] == 128).all()


@pytest.mark.parametrize("backend", ALL)
def test_copies_move_any_number(backend):
    x = torch.tensor(VALUES[:4]).repeat(2, 3, 1)
    result = run(
        backend, ops.masked_copies, x, index([0, 1, 1]), index([0, -1, 2]), torch.tensor(NAN)
    )
    expected = x[[0, 1, 1]].clone()
    expected[0, 0], expected[2, 2] = NAN, NAN
    assert torch.equal(result.view(torch.int32), expected.view(torch.int32))


# --- decisions ------------------------------------------------------------------------------------

LOWEST = float(torch.finfo(torch.float32).min)
MASKS = [-INF, -1e4, -1e9, -1e30, -1e38, LOWEST]


def masked_problem(mask, dtype, classes):
    torch.manual_seed(classes)
    logits, weight = torch.randn(9, classes).to(dtype), torch.randn(classes, 300).to(dtype)
    masked = torch.rand(9, classes) < 0.6
    masked[:, 0] = False
    masked[0, 1:] = True  # one class is left
    delta = (torch.randn(9, 300) / 2).to(dtype)
    return logits, masked, weight, delta, torch.rand(9).to(dtype) / 4


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 10, 16, 17, 18, 33, 200])
def test_masked_classes_never_win_and_never_count(backend, dtype, classes):
    """However low they are, the answer is that for the other classes alone."""
    logits, masked, weight, pooled, tolerance = masked_problem(-INF, dtype, classes)
    expected = torch.full((9, 300), -1, dtype=torch.int32)
    for n in range(9):
        kept = (~masked[n]).nonzero().squeeze(1)
        found = on_reference(
            ops.head_flips,
            logits[n : n + 1, kept],
            pooled[n : n + 1],
            weight[kept],
            index([0]),
            tolerance[n : n + 1],
        )[0]
        expected[n] = torch.where(found < 0, -1, kept[found.long()].int())
    assert (expected[0] == 0).all()
    image = index(range(9)).repeat_interleave(300)
    for mask in MASKS:
        low = logits.masked_fill(masked, mask)
        baseline = low.argmax(1).int()
        baseline[3] = int(masked[3].int().argmax())  # not the winner, masked if any is
        result = run(backend, ops.head_flips, low, pooled, weight, baseline, tolerance)
        assert torch.equal(result, expected), mask
        change = (pooled.unsqueeze(2) * weight.t()).flatten(0, 1)
        for changed in (change, change.masked_fill(masked.repeat_interleave(300, 0), 0.0)):
            result = run(backend, ops.classify, low, changed, image, tolerance)
            assert torch.equal(result, expected.flatten()), mask


@pytest.mark.parametrize("backend", ALL)
def test_only_the_spread_of_the_change_widens_the_tolerance(backend):
    logits = torch.tensor([[2.0, 0.0, -INF], [2.0, 0.0, LOWEST], [2.0, 0.0, -1e9]])
    delta = torch.tensor([[-0.5, 0.0, 0.0]] * 3)
    image, tolerance = index([0, 1, 2]), torch.full((3,), 0.1)
    for relative, expected in [(0.0, 0), (2.7, 0), (2.9, -1)]:  # margin 1.5, spread 0.5
        result = run(backend, ops.classify, logits, delta, image, tolerance, relative=relative)
        assert result.tolist() == [expected] * 3


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("classes", [1, 3, 17, 40])
def test_what_is_not_finite_decides_nothing(backend, dtype, classes):
    """A change that is not finite, at a class that is masked or not; logits that are not finite."""
    torch.manual_seed(5)
    logits = torch.randn(1, classes).to(dtype) + torch.arange(classes)
    image, tolerance = index([0]), torch.zeros(1).to(dtype)
    none = torch.zeros(1, classes).to(dtype)
    for k in {0, classes // 2, classes - 1}:
        for base in (float(logits[0, k]), -INF):
            row = logits.clone()
            row[0, k] = base
            alone = classes == 1 and base == -INF
            left = -1 if alone else int(row.argmax())
            assert run(backend, ops.classify, row, none, image, tolerance).tolist() == [left]
            for bad in (NAN, INF, -INF):
                change = none.clone()
                change[0, k] = bad
                for relative in (0.0, 0.1):
                    result = run(
                        backend, ops.classify, row, change, image, tolerance, relative=relative
                    )
                    assert result.tolist() == [-1], (k, base, bad)
        for bad in (NAN, INF):
            row = logits.clone()
            row[0, k] = bad
            assert run(backend, ops.classify, row, none, image, tolerance).tolist() == [-1]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("classes", [1, 3, 17, 40])
def test_heads_decide_nothing_by_what_is_not_finite(backend, dtype, classes):
    torch.manual_seed(6)
    logits = (torch.randn(5, classes) + 9 * torch.arange(classes)).to(dtype)
    logits[1, 0], logits[2, classes // 2] = NAN, INF
    logits[3] = -INF
    delta, weight = torch.zeros(5, 6).to(dtype), torch.rand(classes, 6).to(dtype)
    delta[:, 1], delta[:, 2], delta[:, 3] = NAN, INF, -INF
    weight[classes // 2, 4], weight[classes - 1, 5] = NAN, -INF
    best = classes - 1
    baseline, tolerance = index([best] * 5), torch.zeros(5).to(dtype)
    result = run(backend, ops.head_flips, logits, delta, weight, baseline, tolerance)
    expected = torch.full((5, 6), -1, dtype=torch.int32)
    expected[[0, 4], 0] = best
    assert torch.equal(result, expected)
    tolerance[:] = NAN
    result = run(backend, ops.head_flips, logits, delta, weight, baseline, tolerance)
    assert (result == -1).all()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("size", [3.4e38, 1e37, 1e30])
def test_sums_that_overflow(backend, size):
    torch.manual_seed(7)
    logits = torch.randn(40, 20).clamp(-1, 1) * size
    delta, weight = torch.randn(40, 50) * 1e19, torch.randn(20, 50) * 1e19
    delta[:, 0], tolerance = 0.0, torch.zeros(40)
    arguments = logits, delta, weight, logits.argmax(1).int(), tolerance
    expected = on_reference(ops.head_flips, *arguments)
    assert torch.equal(run(backend, ops.head_flips, *arguments), expected)
    assert {-1} < set(expected.flatten().tolist())
    change = torch.randn(40, 20).clamp(-1, 1) * 3e38
    image = index(range(40))
    for relative in (0.0, 1e-3):
        expected = on_reference(ops.classify, logits, change, image, tolerance, relative=relative)
        result = run(backend, ops.classify, logits, change, image, tolerance, relative=relative)
        assert torch.equal(result, expected)


# --- statistics -----------------------------------------------------------------------------------


def reduced(backend, x, axis=1):
    with using(backend) as device:
        into = MapMoments.empty(x.shape[axis], len(x), x.dtype, device)
        for start in range(0, len(x), 2):  # two readings
            part = x[start : start + 2].to(device)
            map_moments(part, into.part(start, len(part)), axis=axis)
        return [t.cpu() for t in (into.pooled, into.active, into.least, into.positive)]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_maps(backend, dtype, channels_last):
    torch.manual_seed(8)
    x = torch.randn(4, 40, 5, 7).to(dtype)
    x[0, 3, 2, 2], x[1, 5, 0, 0], x[3, 6, 4, 6], x[2, 7, 1, 1] = NAN, -NAN, NAN, -INF
    x[2, 8, 1, 1], x[2, 8, 3, 3], x[2, 9, 4, 4] = INF, -INF, INF
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    mean, active, least, positive = reduced(backend, x)
    maps = x.flatten(2)
    assert_same(mean, maps.double().mean(2).t())
    assert torch.equal(active.bool(), (maps > 0).any(2).t())
    assert_same(least, maps.amin((0, 2)), 0)
    assert least.isnan().nonzero().flatten().tolist() == [3, 5, 6]
    assert torch.equal(positive, (maps > 0).sum((0, 2)))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_moments_by_class(backend, dtype):
    pooled = torch.tensor([[1.0, NAN, 3.0, 2.0, -INF, 5.0], [INF, 1.0, -INF, 0.0, 1.0, 2.0]])
    pooled, label = pooled.to(dtype), index([0, 0, 1, 1, 2, 2])
    with using(backend) as device:
        active = (pooled > 0).to(torch.uint8)
        found = class_moments(pooled.to(device), active.to(device), label.to(device), 4)
    total = [[NAN, 5, -INF, 0], [INF, -INF, 3, 0]]
    square = [[NAN, 13, INF, 0], [INF, INF, 5, 0]]
    maximum = [[NAN, 3, 5, -INF], [INF, 0, 2, -INF]]
    for got, expected in [(found.total, total), (found.square, square), (found.maximum, maximum)]:
        np.testing.assert_array_equal(got.cpu().numpy(), expected)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_ranks(backend, dtype):
    """NaN of either sign is one value, above all others."""
    torch.manual_seed(9)
    x = torch.randint(-3, 4, (5, 70)).to(dtype)
    numbers = torch.tensor([NAN, -NAN, INF, -INF]).to(dtype)
    spots = torch.rand(4, 70) < 0.2
    x[1:][spots] = numbers[torch.randint(0, 4, (int(spots.sum()),))]
    x[4, ::3] = NAN
    label = random_index(70, 3)
    with using(backend) as device:
        found = class_ranks(x.to(device), label.to(device), 3, bins=7, top=11).cpu()
    for u in range(5):
        key = torch.where(x[u].isnan(), 1e9, x[u].double()).nan_to_num(posinf=1e8, neginf=-1e8)
        greater = (key > key[:, None]).sum(1)
        at_least = (key >= key[:, None]).sum(1)
        order = sorted(range(70), key=lambda n, key=key: (-float(key[n]), n))
        for k in range(3):
            mine = label == k
            assert found.rank_sum[u, k] == (greater + at_least)[mine].sum()
            assert found.first[u, k] == int(mine[order[:11]].sum())
            bins = ((70 - at_least) * 7 // 70)[mine]
            assert torch.equal(found.quantiles[u, :, k], bins.bincount(minlength=7).int())
        if not x[u].isfinite().all():  # then nothing has a place between the least and the greatest
            assert found.widths[u].tolist() == [70, 0, 0, 0, 0, 0, 0]
