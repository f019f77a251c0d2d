"""Kinds of network and image on which small errors do not survive, against the float64 hook loop.

Every row names what it guards. Where chance would take millions of pairs to meet a jump, thresholds
are put where pairs of the test lie, nearer than float32 can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support import awkward, networks
from support.fuzzing.cases import Case
from support.fuzzing.cases import check as check_case
from support.fuzzing.parts import Act, Awkward, Network
from support.oracle import check
from torch import Tensor, nn

from pyablate.engine import int8_conv

IMAGES = 300
CLASSES = 8
WIDTH = 48

LOW = "int8" if int8_conv.available() else "bf16"


@dataclass(frozen=True)
class Kind:
    """A network, its images, and what they guard."""

    guards: str
    build: Callable[[], nn.Module]
    images: Callable[[Tensor], Tensor] = lambda x: x
    precision: str = "auto"
    intervention: str = "zero"
    close: float = 0.0


def _same(x: Tensor) -> Tensor:
    return x


class Classifier(nn.Module):
    """Two convolutions with something between them, a head with something behind it."""

    def __init__(
        self,
        between: awkward.Function | None = None,
        behind: awkward.Function | None = None,
        vectors: nn.Module | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.conv1, self.norm, self.relu1 = nn.Conv2d(1, 6, 3), norm or nn.Identity(), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(6, 8, 3, stride=2), nn.ReLU()
        self.hidden = nn.Linear(8, WIDTH)
        self.vectors = vectors or nn.ReLU()
        self.head = nn.Linear(WIDTH, CLASSES)
        self.between, self.behind = between or _same, behind or _same

    def features(self, x: Tensor) -> Tensor:
        x = self.relu1(self.norm(self.conv1(x)))
        return self.hidden(self.relu2(self.between(self.conv2(x))).mean(dim=(2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.head(self.vectors(self.features(x))))


class Rounded(nn.Module):
    """A jump in front of what is ablated: all pairs are decided in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return (4.0 * x).round() / 4.0


class Threshold(nn.Module):
    """Decisions whose thresholds can be put anywhere."""

    def __init__(self, decide: awkward.Function, inputs: int = WIDTH) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.zeros(inputs))
        self.decide = decide

    def forward(self, x: Tensor) -> Tensor:
        return self.decide(x - self.at)

    def place(self, vectors: Tensor) -> None:
        """Put the threshold of each feature where one of the vectors ``[F, F]`` is."""
        self.at.copy_(vectors.diagonal())


class Nearest(awkward.Codebook):
    """Codes in couples that are equally far from a vector."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 2 * WIDTH)

    def place(self, vectors: Tensor) -> None:
        aside = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(5))
        aside *= 0.3 * vectors.std() / aside.std()
        self.codes.copy_(torch.cat([vectors + aside, vectors - aside]))


class Couples(Threshold):
    """The larger of a feature and 0 wins, by ``topk``."""

    def __init__(self) -> None:
        super().__init__(self._winner)

    @staticmethod
    def _winner(x: Tensor) -> Tensor:
        rivals = torch.stack([x, torch.zeros_like(x)], dim=2)
        return rivals.topk(1, dim=2).indices[:, :, 0].to(x.dtype)


def subject(kind: Kind) -> tuple[nn.Module, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(7)
    images = torch.randn(IMAGES, 1, 12, 12, generator=draw)
    images += torch.randn(IMAGES, 1, 1, 1, generator=draw)
    labels = torch.randint(CLASSES, (IMAGES,), generator=draw)
    model = kind.build().eval()
    behind, model.behind = model.behind, _same
    networks.randomise(model, seed=1)
    images = kind.images(images)
    if hasattr(model.vectors, "place"):
        with torch.no_grad():
            model.vectors.place(some_vectors(model, images))
    networks.spread_logits(model, images)
    if kind.close:  # classes in couples that hardly differ
        with torch.no_grad():
            model.head.weight[1::2] = model.head.weight[::2]
            model.head.weight[1::2] += kind.close * torch.randn(CLASSES // 2, WIDTH, generator=draw)
            model.head.bias[1::2] = model.head.bias[::2]
    model.behind = behind
    return model, images, labels


def some_vectors(model: nn.Module, images: Tensor) -> Tensor:
    """Float64 features of as many pairs as there are features: ``[F, F]``, rounded to float32."""
    draw = torch.Generator().manual_seed(11)
    found = []
    double = model.double()
    for number in range(WIDTH):
        image = images[torch.randint(len(images), (1,), generator=draw)].double()

        def ablate(_m: nn.Module, _i: object, output: Tensor, unit: int = number % 6) -> Tensor:
            output[:, unit] = 0.0
            return output

        handle = double.relu1.register_forward_hook(ablate)
        found.append(double.features(image.repeat(2, 1, 1, 1))[0])
        handle.remove()
    model.float()
    return torch.stack(found).float()


def _behind(name: str) -> Callable[[], nn.Module]:
    return lambda: Classifier(behind=awkward.ENDS[name])


def _between(function: awkward.Function) -> Callable[[], nn.Module]:
    return lambda: Classifier(between=function)


def _decided(decide: awkward.Function) -> Callable[[], nn.Module]:
    return lambda: Classifier(vectors=Threshold(decide))


def _gate(x: Tensor) -> Tensor:
    return torch.sigmoid(1000.0 * x)


def _share_of_a_softmax(x: Tensor) -> Tensor:
    return awkward.SWALLOWED["share of two"]((50.0 * x).softmax(dim=1))


def _normalised() -> nn.Module:
    return Classifier(norm=nn.InstanceNorm2d(6))


def _later(regime: str) -> Callable[[Tensor], Tensor]:
    return lambda x: awkward.mixed(x, regime, "later")


SCALE, SWALLOWED, COMPARISON, JUMP, REGIME, LACKING, CANCELLED = (
    "tolerances come from the logits that compete",
    "NaN and infinity inside the network have no difference",
    "equal values compare as in a plain pass",
    "calibration sees no jump",
    "what was measured on some images does not hold for others",
    "a precision that lacks an operator",
    "values that are tiny, and matter, are lost from base + (after - before)",
)

KINDS: dict[str, Kind] = {
    **{
        f"{most} {value}": Kind(SCALE, _behind(f"{most} {value}"))
        for most in ("masked", "mostly masked")
        for value in ("-1e9", "-1e38", "finfo.min", "-inf")
    },
    "masked -1e4": Kind(SCALE, _behind("masked -1e4")),
    "additive mask": Kind(SCALE, _behind("additive mask")),
    "masked, log_softmax": Kind(SCALE, _behind("masked, log_softmax")),
    "offset 1e6": Kind(SCALE, _behind("offset 1e6")),
    "offset by image": Kind(SCALE, _behind("offset by image"), close=1e-4),
    "softmax": Kind(REGIME, _behind("softmax"), close=1e-4),
    **{
        name: Kind(SWALLOWED, _between(awkward.SWALLOWED[name]), intervention=intervention)
        for name, intervention in {
            "nanmean": "mean",
            "masked mean": "zero",
            "share of two": "mean",
            "logarithm of nothing": "zero",
            "softmax of nothing": "mean",
        }.items()
    },
    "share of two, behind a jump": Kind(
        SWALLOWED,
        lambda: Classifier(awkward.SWALLOWED["share of two"], norm=Rounded()),
        intervention="mean",
    ),
    **{
        name: Kind(COMPARISON, _between(awkward.COMPARISONS[name]))
        for name in ("peaks", "largest by kth", "all but the largest", "where equal", "sorted")
    },
    "vectors above kth": Kind(COMPARISON, _decided(awkward.COMPARISONS["above kth"])),
    "step": Kind(JUMP, _decided(awkward.JUMPS["step"])),
    "step, low": Kind(JUMP, _decided(awkward.JUMPS["step"]), precision=LOW),
    "sign": Kind(JUMP, _decided(torch.sign)),
    "rounding": Kind(JUMP, _decided(lambda x: (x + 0.5).round())),
    "gate": Kind(JUMP, _decided(_gate)),
    "gate, low": Kind(JUMP, _decided(_gate), precision=LOW),
    "winners": Kind(JUMP, lambda: Classifier(vectors=Couples())),
    "codes": Kind(JUMP, lambda: Classifier(vectors=Nearest())),
    "low contrast, low": Kind(REGIME, _normalised, _later("low contrast"), LOW),
    "offset images": Kind(REGIME, _normalised, _later("offset")),
    "offset images, low": Kind(REGIME, _normalised, _later("offset"), LOW),
    "AvgPool3d, low": Kind(LACKING, _between(awkward.RARE["AvgPool3d"]), precision=LOW),
    "LPPool3d, low": Kind(LACKING, _between(awkward.RARE["LPPool3d"]), precision=LOW),
    "share of a hard softmax": Kind(CANCELLED, _between(_share_of_a_softmax)),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_agree_with_the_oracle(name):
    kind = KINDS[name]
    model, images, labels = subject(kind)
    options = {"precision": kind.precision, "intervention": kind.intervention}
    check(model, (images, labels), ["relu1", "relu2"], audit=20, **options)


def test_what_is_tiny_behind_a_hard_softmax_counts():
    """Base + (after - before) is 0 where after is 1e-20, and the next operator divides by it."""
    parts = (
        Act("LeakyReLU"),
        Awkward("steep", "hard softmax"),
        Awkward("swallowed", "share of two"),
    )
    check_case(Case(Network(parts, (3, 7, 7), seed=3977), images=128))
