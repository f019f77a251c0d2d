"""How errors of predictions grow with the changes: planted powers are found."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pyablate.engine.score import FLOOR, DirectionCount, Scale, Score
from pyablate.runs.screening_sample import Sample
from pyablate.runs.thresholds import _scale, _stage


def drawn(pairs: int, size_power: float, norm_power: float) -> Sample:
    """Pairs whose errors follow powers of their changes, but for a factor with heavy tails."""
    draw = np.random.default_rng(0)
    size, norm = np.exp(draw.normal(size=(2, pairs)))
    error = 0.05 * size**size_power * norm**norm_power * draw.standard_t(5, size=pairs)
    lead = draw.exponential(5.0, size=pairs)
    score = Score(*torch.from_numpy(np.stack([lead + error, size, norm])).float())
    low = score.lowest < score.lowest.quantile(0.1)
    return Sample(
        SimpleNamespace(),
        DirectionCount(9, 0),
        [],
        wanted=pairs,
        pairs=pairs,
        live=[score],
        lowest=[low],
        drawn=[torch.ones(pairs, dtype=torch.bool)],
        scored={None: [score]},
        actual=[torch.from_numpy(lead).float()],
    )


@pytest.mark.parametrize("powers", [(1.0, 0.0), (0.5, 1.5), (0.0, 2.0)])
def test_powers_of_the_changes_are_found(powers: tuple[float, float]) -> None:
    sample = drawn(4000, *powers)
    scale = _scale(sample, None, 1e-5)
    assert (scale.size_power, scale.norm_power) == pytest.approx(powers, abs=0.5)
    known = sample.scores(None, scale) > _stage(sample, None, scale, 1e-5).threshold
    plain = sample.scale(None)
    before = sample.scores(None, plain) > _stage(sample, None, plain, 1e-5).threshold
    assert known.mean() >= before.mean()
    if powers[1]:
        assert known.mean() > before.mean() + 0.1


def test_small_changes_count_as_a_share_of_the_typical_one() -> None:
    scale = Scale(2.0, 5.0, 1.0, 2.0)
    score = Score(torch.ones(3), torch.tensor([0.0, 2.0, 6.0]), torch.tensor([0.0, 5.0, 10.0]))
    expected = [
        2 * ((size / 2) ** 2 + FLOOR**2) ** 0.5 * ((norm / 5) ** 2 + FLOOR**2)
        for size, norm in [(0, 0), (2, 5), (6, 10)]
    ]
    assert scale.of(score).tolist() == pytest.approx(expected, rel=1e-5)
    assert score.relative(scale).tolist() == pytest.approx([1 / e for e in expected], rel=1e-5)
