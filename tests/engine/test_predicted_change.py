"""What gradients predict, where it must be right: behind linear operators to the last digit."""

from collections.abc import Sequence

import pytest
import torch
from support.screened import layers_case
from torch import Tensor, nn

from pyablate.data.dataset import Batch
from pyablate.engine import clean_run
from pyablate.engine.clean import Clean
from pyablate.engine.narrow_places import passed_by_all
from pyablate.engine.pair_slice import logit_change
from pyablate.engine.rounding import Rounding
from pyablate.engine.score import COMPETITORS, DirectionCount, Directions, Prediction
from pyablate.engine.suffix import Suffix, needed
from pyablate.engine.sweep import Sweep
from pyablate.interventions import parse
from pyablate.runs.screening_sample import predictor
from pyablate.runs.setup import Setup, SetupOptions, prepare

CHANNELS = 6


class Linear(nn.Module):
    """A bent layer with units, twice called if asked, then linear operators on two paths."""

    def __init__(self, classes: int, *, calls: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, CHANNELS, 3, padding=1)
        self.act = nn.Tanh()
        self.depthwise = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
        self.mixed = nn.Conv2d(CHANNELS, 5, 3, stride=2)
        self.side = nn.Conv2d(CHANNELS, 5, 1, stride=2)
        self.head = nn.Linear(5, classes)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        h = x = self.act(self.first(x))
        for _ in range(self.calls - 1):
            h = self.act(self.depthwise(h))
        out = self.mixed(self.depthwise(h)) + self.side(x)[..., :-1, :-1]
        return self.head(out.mean(dim=(2, 3)))


def ready(classes: int, intervention: str, **options: object) -> Setup:
    torch.manual_seed(0)
    images = torch.randn(7, 2, 12, 12)
    labels = torch.arange(7) % classes
    groups = options.pop("groups", None)
    network = Linear(classes, **options)
    wanted = SetupOptions(None if groups else ["act"], groups, parse(intervention))
    return prepare(network, (images, labels), wanted)


def prediction(
    setup: Setup, choices: Sequence[DirectionCount] = (), *, places: int = 0
) -> tuple[Prediction, Suffix, Batch, Clean]:
    job = setup.jobs[0]
    suffix = Suffix.of(setup.graph, job)
    batch = next(iter(setup.data.batches(7)))
    clean = clean_run.run_graph(
        setup.graph, needed([suffix]), setup.exact, batch, rounding=Rounding()
    )
    some = passed_by_all(suffix)[-1 - places : -1]  # right before the logits
    guess = predictor(setup, {job: suffix}, some, choices or [DirectionCount.most(setup.classes)])
    return guess.predict(batch, clean), suffix, batch, clean


def predicted_and_actual(setup: Setup) -> tuple[Tensor, Tensor, Tensor, Directions]:
    """Scores ``lowest`` and ``size`` predicted ``[N, row]``, logit changes ``[N, row, K]``."""
    found, suffix, batch, clean = prediction(setup)
    job = suffix.job
    sweep = Sweep(suffix, clean, setup.own.replacements(batch, job))
    image = torch.arange(7).repeat_interleave(len(job.rows))
    row = torch.arange(len(job.rows)).repeat(7)
    with torch.no_grad():
        if job.channelwise:
            sweep.advance()
        change = logit_change(sweep, row, image, torch.float32).logits
    shape = 7, len(job.rows), -1
    [scores] = found.scores[job]
    return scores.lowest, scores.size, change.reshape(shape), found.directions


def test_the_norm_is_that_of_the_change_where_the_gradient_is_taken() -> None:
    """Here at the units: one of the two paths mixes their channels at once."""
    setup = ready(4, "zero")
    found, suffix, batch, _ = prediction(setup)
    network = Linear(4)
    network.load_state_dict(setup.model.state_dict())
    with torch.no_grad():
        expected = network.act(network.first(batch.images)).flatten(2).norm(dim=2)
    [score] = found.scores[suffix.job]
    torch.testing.assert_close(score.norm, expected, rtol=1e-4, atol=1e-5)
    groups, grouped, *_ = prediction(ready(4, "zero", groups=GROUPS))
    together = [expected[:, group].norm(dim=1) for group in ([0, 3], [1], [2, 4, 5])]
    [score] = groups.scores[grouped.job]
    torch.testing.assert_close(score.norm, torch.stack(together, dim=1))


GROUPS = [["act:0", "act:3"], ["act:1"], ["act:2", "act:4", "act:5"]]


@pytest.mark.parametrize(
    "intervention", ["zero", "mean", "class-mean", "constant:0.7", "resample", "noise", "direction"]
)
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["units", "groups"])
def test_linear_operators_are_predicted_exactly(intervention: str, groups: object) -> None:
    if groups and intervention == "direction":
        pytest.skip("directions are not grouped")
    lowest, size, change, directions = predicted_and_actual(ready(4, intervention, groups=groups))
    margins = directions.margins[:, None] + directions_of(change, directions)
    torch.testing.assert_close(lowest, margins.amin(dim=2), rtol=1e-4, atol=1e-5)
    spread = change.amax(dim=2) - change.amin(dim=2)
    torch.testing.assert_close(size, spread, rtol=1e-4, atol=1e-5)
    assert spread.amin() > 1e-4


def directions_of(change: Tensor, directions: Directions) -> Tensor:
    """Changes of the margins, ``[N, row, M]``."""
    own = directions.prediction[:, None, None].expand(-1, change.shape[1], 1)
    others = directions.competitors[:, None].expand(-1, change.shape[1], -1)
    return change.gather(2, own) - change.gather(2, others)


def test_of_many_classes_the_nearest_are_predicted_and_the_size_is_estimated() -> None:
    lowest, size, change, directions = predicted_and_actual(ready(500, "zero"))
    assert directions.competitors.shape[1] == COMPETITORS
    margins = directions.margins[:, None] + directions_of(change, directions)
    expected = margins.amin(dim=2).minimum(directions.rest[:, None])
    torch.testing.assert_close(lowest, expected, rtol=1e-4, atol=1e-5)
    norm = (change - change.mean(dim=2, keepdim=True)).norm(dim=2)
    ratio = size / norm
    assert 0.75 < ratio.square().mean().sqrt() < 1.3  # of 16 signs, one set for all


def test_what_is_ablated_at_every_call_adds_up() -> None:
    """Two calls of a site: to first order each contributes; tanh between them bends a little."""
    lowest, _, change, directions = predicted_and_actual(ready(4, "mean", calls=2))
    margins = (directions.margins[:, None] + directions_of(change, directions)).amin(dim=2)
    apart = (lowest - margins).abs().mean()
    assert apart < 0.5 * (directions.margins[:, :1] - margins).abs().mean()


def test_the_nearest_other_class_is_a_competitor() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    directions = Directions.of(logits, logits.argmax(dim=1), DirectionCount.most(40))
    ranks = logits.sort(dim=1, descending=True)
    assert torch.equal(directions.competitors, ranks.indices[:, 1 : 1 + COMPETITORS])
    torch.testing.assert_close(
        directions.rest, ranks.values[:, 0] - ranks.values[:, COMPETITORS + 1]
    )
    few = Directions.of(logits[:, :6], logits[:, :6].argmax(dim=1), DirectionCount.most(6))
    assert few.competitors.shape[1] == 5
    assert torch.isinf(few.rest).all()


@pytest.mark.parametrize("classes", [2, 3, 32, 33, 500])
def test_directions_are_as_many_as_are_reckoned_with(classes: int) -> None:
    logits = torch.randn(4, classes, generator=torch.Generator().manual_seed(0))
    most = DirectionCount.most(classes)
    found = Directions.of(logits, logits.argmax(dim=1), most)
    assert found.count == most
    assert len(list(found.vectors())) == most.total


@pytest.mark.parametrize("classes", [2, 3, 5, 32, 33])
def test_fewer_directions_are_parts_of_the_most(classes: int) -> None:
    most, *fewer = DirectionCount.choices(classes)
    assert most == DirectionCount.most(classes)
    assert all(0 < one.nearest <= most.nearest and one.random <= most.random for one in fewer)
    totals = [one.total for one in (most, *fewer)]
    assert totals == sorted(set(totals), reverse=True)


@pytest.mark.parametrize("classes", [10, 500])
def test_fewer_directions_score_as_if_they_were_alone(classes: int) -> None:
    setup, choices = ready(classes, "zero"), DirectionCount.choices(classes)
    together, suffix, *_ = prediction(setup, choices, places=1)
    [(place, gradient)] = together.gradients.items()
    image = torch.tensor([0, 0, 3, 6])
    change = 3.0 * torch.randn(4, gradient.shape[2])
    there, ratios = together.at(place, image, change), []
    for number, count in enumerate(choices):
        alone, *_ = prediction(setup, [count], places=1)
        assert alone.gradients[place].shape[1] == count.total
        for ours, theirs in (
            (together.scores[suffix.job], alone.scores[suffix.job]),
            (there, alone.at(place, image, change)),
        ):
            for name in ("lowest", "size", "norm"):
                own, [other] = getattr(ours[number], name), (getattr(one, name) for one in theirs)
                torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
        ratios.append(there[number].lowest / there[number].size)
    assert all((one - ratios[0]).abs().max() > 1e-3 for one in ratios[1:])


@pytest.mark.parametrize("group", [["act:0"], ["act:0", "late:1"]])
def test_changes_of_a_group_are_looked_at_behind_its_last_site(group: list[str]) -> None:
    model, data = layers_case(8)
    setup = prepare(model, data, SetupOptions(None, [group], parse("zero")))
    suffix = Suffix.of(setup.graph, setup.jobs[0])
    markers = [node for node in suffix.nodes if node in setup.graph.markers]
    places = passed_by_all(suffix)
    last = suffix.nodes.index(markers[-1])
    assert min(map(suffix.nodes.index, places)) == last
    assert places[-1] is setup.graph.logits
    assert len(places) > 1
