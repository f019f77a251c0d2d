"""Interventions: their names, and the definition of everything random."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pyablate.interventions import (
    KINDS,
    Intervention,
    donors,
    gaussian,
    parse,
    random_rotation,
)


def draws(seed: int, layer: str, images: int, units: int, positions: int) -> torch.Tensor:
    image, unit = torch.arange(images)[:, None], torch.arange(units)[None]
    return gaussian(seed, layer, image, unit, positions)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zero", Intervention("zero")),
        (" zero ", Intervention("zero")),
        ("mean", Intervention("mean")),
        ("class_mean", Intervention("class_mean")),
        ("class-mean", Intervention("class_mean")),
        ("constant", Intervention("constant", value=0.0)),
        ("constant:0.5", Intervention("constant", value=0.5)),
        ("constant:-1e-3", Intervention("constant", value=-0.001)),
        ("resample", Intervention("resample", seed=0)),
        ("resample:7", Intervention("resample", seed=7)),
        ("noise:12", Intervention("noise", seed=12)),
        ("direction:3", Intervention("direction", seed=3)),
    ],
)
def test_parsing(text, expected):
    assert parse(text) == expected
    assert parse(expected) is expected
    assert parse(str(expected)) == expected


def test_a_seed_in_the_text_wins():
    assert parse("noise", seed=5).seed == 5
    assert parse("noise:7", seed=5).seed == 7
    assert parse("noise:0", seed=5).seed == 0


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("zeor", ValueError, r"expected one of zero, .*, got 'zeor'; nearest: zero"),
        ("medain", ValueError, r"nearest: mean"),
        ("", ValueError, r"got ''"),
        ("constant:much", ValueError, r"'much' in 'constant:much' is not a number"),
        ("constant:", ValueError, r"is not a number"),
        ("constant:nan", ValueError, r"must be finite, got nan"),
        ("constant:inf", ValueError, r"must be finite, got inf"),
        ("noise:1.5", ValueError, r"'1\.5' in 'noise:1\.5' is not a number"),
        ("resample:-1", ValueError, r"seed: expected at least 0, got -1"),
        ("zero:1", ValueError, r"zero takes no value"),
        ("mean:2", ValueError, r"mean takes no value"),
        (3, TypeError, r"expected a string or an Intervention, got int"),
        (None, TypeError, r"got NoneType"),
    ],
)
def test_bad_names(spec, error, message):
    with pytest.raises(error, match=message):
        parse(spec)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 1.5, "3", None])
def test_bad_seeds(seed):
    with pytest.raises(ValueError, match=r"seed: expected .*at least 0, got"):
        parse("noise", seed=seed)  # type: ignore[arg-type]


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_constants_keep_their_value_through_text(value):
    assert parse(str(Intervention("constant", value=value))).value == value


def test_needs_statistics():
    needs = {kind for kind in KINDS if Intervention(kind).needs_statistics}  # type: ignore[arg-type]
    assert needs == {"mean", "class_mean", "noise"}


# Draws


def test_draws_are_standard_normal():
    x = draws(1, "features.3", 40, 25, 49).flatten().numpy()
    n = len(x)
    # Each statistic is itself about normal; five standard errors.
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(stats.skew(x)) < 5 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(x)) < 5 * math.sqrt(24 / n)
    assert stats.kstest(x, "norm").pvalue > 1e-4
    assert len(np.unique(x)) == n


def test_draws_are_independent_along_every_axis():
    x = draws(1, "features.3", 50, 20, 60).numpy()
    for axis in range(3):
        moved = np.moveaxis(x, axis, 0)
        for lag in (1, 2, 7):
            product = (moved[lag:] * moved[:-lag]).flatten()
            assert abs(product.mean()) < 5 / math.sqrt(len(product)), (axis, lag)


def test_seeds_layers_units_and_images_have_their_own_draws():
    x = draws(1, "a", 20, 20, 30).numpy()
    for other in (draws(2, "a", 20, 20, 30), draws(1, "b", 20, 20, 30)):
        assert abs(np.corrcoef(x.flatten(), other.numpy().flatten())[0, 1]) < 5 / math.sqrt(x.size)
    assert len(np.unique(x)) == x.size


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 4095)), min_size=1, max_size=20))
def test_draws_do_not_depend_on_company(pairs):
    """Bit for bit: alone, in any batch, in any order."""
    image, unit = (torch.tensor(column) for column in zip(*pairs, strict=True))
    together = gaussian(3, "x", image, unit, 9)
    assert together.dtype == torch.float64
    assert together.shape == (len(pairs), 9)
    assert torch.isfinite(together).all()
    assert torch.equal(gaussian(3, "x", image.flip(0), unit.flip(0), 9).flip(0), together)
    for row, (i, u) in zip(together, pairs, strict=True):
        alone = gaussian(3, "x", torch.tensor([i]), torch.tensor([u]), 9)
        assert torch.equal(alone[0], row)


def test_draws_are_pinned():
    """A change of the definition would change every stored result: it must be deliberate."""
    values = gaussian(0, "features.3", torch.tensor(2), torch.tensor(5), 3)
    torch.testing.assert_close(values, plain_draws(0, "features.3", 2, 5, 3), rtol=0, atol=1e-13)


def plain_draws(seed: int, layer: str, image: int, unit: int, positions: int) -> torch.Tensor:
    """The same definition in Python integers, which cannot overflow."""
    word = (1 << 64) - 1
    key = ((seed & 0x3FFFFFFF) << 32) ^ zlib.crc32(layer.encode())

    def mixed(x: int) -> int:
        x &= word
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return x ^ (x >> 31)

    values = []
    for position in range(positions):
        counter = (image * 1_000_003 + unit) * positions + position
        first, second = mixed(2 * counter + key), mixed(2 * counter + 1 + key)
        radius = math.sqrt(-2 * math.log(((first >> 11) + 1) / 2**53))
        values.append(radius * math.cos(2 * math.pi * (second >> 11) / 2**53))
    return torch.tensor(values, dtype=torch.float64)


@given(
    st.integers(0, 2**30 - 1),
    st.text(max_size=8),
    st.integers(0, 10**6),
    st.integers(0, 10**5),
    st.integers(1, 5),
)
def test_draws_follow_their_definition(seed, layer, image, unit, positions):
    values = gaussian(seed, layer, torch.tensor(image), torch.tensor(unit), positions)
    expected = plain_draws(seed, layer, image, unit, positions)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)


# Donors


@given(st.integers(0, 2**32), st.integers(2, 300))
def test_donors_are_one_cycle(seed, images):
    donor = donors(seed, images)
    assert donor.dtype == np.int64
    np.testing.assert_array_equal(np.sort(donor), np.arange(images))
    at, steps = 0, 0
    while steps == 0 or at:
        at, steps = donor[at], steps + 1
    assert steps == images  # so nobody is their own donor
    np.testing.assert_array_equal(donor, donors(seed, images))


def test_donors_are_uniform_over_cycles():
    """Each of the 3! = 6 cycles of four images is equally likely."""
    seen = [tuple(donors(seed, 4)) for seed in range(1200)]
    kinds, counts = np.unique(seen, axis=0, return_counts=True)
    assert len(kinds) == 6
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("images", [0, 1])
def test_donors_need_two_images(images):
    with pytest.raises(ValueError, match=f"resample needs at least 2 images, got {images}"):
        donors(0, images)


# Directions


@pytest.mark.parametrize("channels", [1, 2, 17, 64])
def test_rotations_are_orthogonal(channels):
    q = random_rotation(channels, seed=4)
    assert q.shape == (channels, channels)
    assert q.dtype == torch.float64
    identity = torch.eye(channels, dtype=torch.float64)
    torch.testing.assert_close(q.T @ q, identity, rtol=0, atol=1e-13)
    assert torch.equal(q, random_rotation(channels, seed=4))
    assert not torch.equal(q, random_rotation(channels, seed=5)) or channels == 1


def test_rotations_are_uniform():
    """Both determinants occur, and the first entry is uniform on [-1, 1] in three dimensions."""
    drawn = torch.stack([random_rotation(3, seed=seed) for seed in range(600)])
    signs = torch.linalg.det(drawn).round()
    assert stats.binomtest(int((signs > 0).sum()), 600).pvalue > 1e-4
    for row, column in ((0, 0), (2, 1)):  # Archimedes: a coordinate of a point on a sphere
        entries = drawn[:, row, column].numpy()
        assert stats.kstest(entries, stats.uniform(-1, 2).cdf).pvalue > 1e-4


def test_every_layer_and_seed_has_its_own_directions():
    first = Intervention("direction", seed=1).matrix("a", 8)
    assert torch.equal(first, Intervention("direction", seed=1).matrix("a", 8))
    assert not torch.equal(first, Intervention("direction", seed=1).matrix("b", 8))
    assert not torch.equal(first, Intervention("direction", seed=2).matrix("a", 8))


def test_given_directions_say_so():
    assert str(Intervention("direction", directions=torch.eye(2))) == "direction:given"


def test_given_directions_get_length_one():
    given = torch.tensor([[3.0, 0.0], [4.0, -2.0]])
    q = Intervention("direction", directions=given).matrix("any", 2)
    assert q.dtype == torch.float64
    torch.testing.assert_close(q, torch.tensor([[0.6, 0.0], [0.8, -1.0]], dtype=torch.float64))
    by_layer = Intervention("direction", directions={"a": given})
    assert torch.equal(by_layer.matrix("a", 2), q)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (torch.ones(3, 2), r"layer 'a' needs a matrix \[4, directions\], got \[3, 2\]"),
        (torch.ones(4), r"got \[4\]"),
        (torch.ones(4, 0), r"got \[4, 0\]"),
        (torch.tensor([[0.0, 1.0]] * 4), r"a column for layer 'a' is zero or not finite"),
        (torch.full((4, 1), float("nan")), r"zero or not finite"),
        ({"b": torch.ones(4, 1)}, r"none given for layer 'a'; has \['b'\]"),
    ],
)
def test_bad_directions(directions, message):
    with pytest.raises(ValueError, match=message):
        Intervention("direction", directions=directions).matrix("a", 4)  # type: ignore[arg-type]


def test_given_values_say_so_and_are_one_for_each_unit():
    by_layer = Intervention("constant", values={"a": torch.tensor([1.0, -2.0])})
    assert str(by_layer) == "constant:given"
    assert by_layer.constants("a", 2).tolist() == [1, -2]
    assert Intervention("constant", value=3).constants("a", 2).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(3), r"layer 'a' needs 4 numbers, one for each unit, got shape \[3\]"),
        (torch.ones(4, 1), r"got shape \[4, 1\]"),
        (torch.full((4,), float("inf")), r"one for layer 'a' is not finite"),
        ({"b": torch.ones(4)}, r"values: none given for layer 'a'; has \['b'\]"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        Intervention("constant", values=values).constants("a", 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"kind": "mean"}, {"kind": "constant", "value": 2.0}])
def test_values_are_for_constants_without_a_value(options):
    with pytest.raises(ValueError, match="values: expected for 'constant' and without a value"):
        Intervention(**options, values=torch.ones(2))
