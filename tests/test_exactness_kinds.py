"""Kinds of network and of images that once gave wrong predictions, against the float64 hook loop.

Every row names what it guards. Where chance would take millions of pairs to meet a jump, thresholds
are put where pairs of the test lie, nearer than float32 can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import awkward
import networks
import pytest
import torch
from oracle import check
from torch import Tensor, nn

from pyablate.engine import eight_bit

IMAGES = 300
CLASSES = 8
WIDTH = 48

LOW = "int8" if eight_bit.available() else "bf16"


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


def _normalised() -> nn.Module:
    return Classifier(norm=nn.InstanceNorm2d(6))


def _later(regime: str) -> Callable[[Tensor], Tensor]:
    return lambda x: awkward.mixed(x, regime, "later")


KINDS: dict[str, Kind] = {
    **{f"logits {n}": Kind("1: the scale of logits", _behind(n)) for n in awkward.ENDS},
    **{
        f"close logits {name}": Kind("1, 5: the scale of logits", _behind(name), close=1e-4)
        for name in ("offset 1e4", "offset by image", "softmax", "log_softmax", "masked -inf, softmax")
    },
    **{
        f"{name}, {intervention}": Kind(
            "2: NaN and infinity that are swallowed", _between(function), intervention=intervention
        )
        for name, function in awkward.SWALLOWED.items()
        for intervention in ("zero", "mean")
    },
    **{
        f"{name}": Kind("3: comparisons", _between(function))
        for name, function in awkward.COMPARISONS.items()
    },
    **{
        f"vectors: {name}": Kind("3: comparisons", _decided(awkward.COMPARISONS[name]))
        for name in ("largest by kth", "above kth", "all but the largest", "where equal")
    },
    **{f"jumps: {n}": Kind("4: jumps", _between(f)) for n, f in awkward.JUMPS.items()},
    **{f"steep: {n}": Kind("4: jumps", _between(f)) for n, f in awkward.STEEP.items()},
    "jumps at pairs: step": Kind("4: jumps", _decided(awkward.JUMPS["step"])),
    "jumps at pairs: sign": Kind("4: jumps", _decided(torch.sign)),
    "jumps at pairs: rounding": Kind("4: jumps", _decided(lambda x: (x + 0.5).round())),
    "jumps at pairs: gate": Kind("4: jumps", _decided(lambda x: torch.sigmoid(1000.0 * x))),
    "jumps at pairs: gate low": Kind("4: jumps", _decided(lambda x: torch.sigmoid(1000.0 * x)), precision=LOW),
    "jumps at pairs: winners": Kind("4: jumps", lambda: Classifier(vectors=Couples())),
    "jumps at pairs: codes": Kind("4: jumps", lambda: Classifier(vectors=Nearest())),
    "jumps at pairs: low": Kind("4: jumps", _decided(awkward.JUMPS["step"]), precision=LOW),
    "regime: low contrast": Kind("5: regimes", _normalised, _later("low contrast"), LOW),
    "regime: offset": Kind("5: regimes", _normalised, _later("offset")),
    "regime: offset low": Kind("5: regimes", _normalised, _later("offset"), LOW),
    **{
        f"{name} {precision}": Kind("7: not in bfloat16", _between(f), precision=precision)
        for name, f in awkward.RARE.items()
        for precision in ("bf16", LOW)
    },
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_that_were_wrong_agree_with_the_oracle(name: str) -> None:
    kind = KINDS[name]
    model, images, labels = subject(kind)
    options = {"precision": kind.precision, "intervention": kind.intervention}
    check(model, (images, labels), ["relu1", "relu2"], audit=20, **options)
