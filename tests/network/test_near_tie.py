"""Which logits compete, on what scale, and which predictions are near ties."""

import pytest
import torch

from pyablate.engine.replay import decision
from pyablate.network import near_tie

LOGITS = torch.tensor([[3.0, 2.0, 1.0, -1.0, 0.5, 0.0], [3.0, 3.0 - 1e-6, 1.0, -1.0, 0.5, 0.0]])
MASKS = [-1e4, -1e9, -1e38, torch.finfo(torch.float32).min, -torch.inf]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("masked", [1, 4])
def test_a_masked_class_sets_no_scale(mask, masked):
    logits = torch.cat([LOGITS, torch.full((2, masked), mask)], dim=1).double()
    assert near_tie.near_tie(logits).tolist() == [False, True]
    assert near_tie.usable(logits).all()
    assert (near_tie.largest(logits) == 3.0).all()
    assert (near_tie.spread(logits) <= 4.0).all()
    assert decision(logits).prediction.tolist() == [0, 0]


def test_an_offset_of_all_classes_is_off_the_scale():
    logits = LOGITS.double() + 1e6
    assert near_tie.near_tie(logits).tolist() == [False, True]
    close = torch.tensor([[1e6, 1e6 + 1e-3, 1e6 - 3.0, 1e6 - 4.0]], dtype=torch.float64)
    assert not near_tie.near_tie(close).any()
    assert decision(close).prediction.tolist() == [1]


def test_equal_but_for_float64s_rounding_is_a_tie_that_the_first_class_wins():
    logits = torch.tensor([[1.0, 1.0 + 2e-16], [0.0, 0.0]], dtype=torch.float64)
    assert decision(logits).prediction.tolist() == [0, 0]
    assert near_tie.near_tie(logits).all()


def test_unusable_logits():
    nan, inf = torch.nan, torch.inf
    rows = [[nan, 1.0], [inf, 1.0], [-inf, -inf], [-inf, 1.0], [2.0, 1.0]]
    assert near_tie.usable(torch.tensor(rows)).tolist() == [False, False, False, True, True]
    with pytest.raises(ValueError, match="image 7 are NaN or infinite"):
        near_tie.check(torch.tensor([True, False]), torch.tensor([6, 7]))


def test_difference_looks_at_competing_classes_only():
    expected = torch.tensor([[1.0, 2.0, -1e9], [torch.nan, 1.0, 2.0], [1.0, 2.0, -torch.inf]])
    found = expected + torch.tensor([[0.25, 0.0, 64.0], [0.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
    assert near_tie.difference(found, expected).tolist() == [0.25, 0.0, 0.5]
    assert near_tie.difference(torch.tensor([[torch.nan, 2.0]]), torch.ones(1, 2)) == torch.inf
    assert near_tie.disagreement(expected, expected) == 0.0
