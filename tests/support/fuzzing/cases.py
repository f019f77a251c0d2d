"""Random networks with random ways to ablate them, and the check that each must pass."""

from __future__ import annotations

import copy
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

import pyablate as pa
from pyablate import reference
from pyablate.engine import int8_conv
from pyablate.interventions import Intervention
from pyablate.network import near_tie
from support import awkward, networks
from support.fuzzing.parts import (
    Act,
    Arithmetic,
    AsTokens,
    Attention,
    Awkward,
    Branches,
    Conv,
    Depthwise,
    Gate,
    Linear,
    Network,
    Norm,
    Outlier,
    Pad,
    Part,
    Pool,
    Repeat,
    Residual,
    Shuffle,
    Transposed,
)

MOST_ROWS = 24
"""Units of a case in the tests, so that the hook loop of the oracle stays short."""

LOW = ("bf16", "int8") if int8_conv.available() else ("bf16",)
PRECISIONS = ("auto", *LOW, *LOW, "fp32", "fp64")
LAYOUTS = ("plain", "channels_last", "strided", "expanded", "batches", "numpy", "half")
INTERVENTIONS = (
    *("zero", "mean", "class_mean", "constant:0.7371", "constant:-1.3193"),
    *("resample:3", "noise:5", "direction:2", "given"),
)


@dataclass(frozen=True)
class Case:
    """One network and one way to ablate it; its ``repr`` is the code that makes it again."""

    network: Network
    images: int = 5
    layers: tuple[int, ...] | None = None  # numbers of sites, modulo how many there are
    groups: tuple[tuple[int, ...], ...] = ()  # numbers of units, likewise
    intervention: str = "zero"
    precision: str = "auto"
    layout: str = "plain"
    batch_size: int | None = None
    memory: int | None = None
    double: bool = False
    strategy: str = "auto"
    regime: tuple[str, str] = ()  # kind of image and where, for :func:`awkward.mixed`
    rows: int = MOST_ROWS

    def kinds(self) -> list[str]:
        """What is unusual about it: kinds of operators, ends, images and weights."""
        parts = self.network.parts_within()
        found = {f"operator: {part.kind}" for part in parts if isinstance(part, Awkward)}
        found |= {"outliers"} if any(isinstance(part, Outlier) for part in parts) else set()
        found |= {"outliers"} if self.network.outlier_weights else set()
        found |= {f"logits: {self.network.behind}"} if self.network.behind else set()
        found |= {f"images: {', '.join(self.regime)}"} if self.regime else set()
        return sorted(found) or ["plain"]

    def subject(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Return the network and its images and labels."""
        generator = torch.Generator().manual_seed(self.network.seed)
        images = torch.randn(self.images, *self.network.shape, generator=generator)
        images += torch.randn(self.images, *[1] * len(self.network.shape), generator=generator)
        labels = torch.randint(self.network.classes, (self.images,), generator=generator)
        images = awkward.mixed(images, *self.regime) if self.regime else images
        model = self.network.build()
        self.network.randomise(model)
        networks.spread_logits(model, arranged(images, self.layout).float().contiguous())
        self.network.finish(model)
        model = model.double() if self.double else model
        return model, arranged(images.double() if self.double else images, self.layout), labels

    def options(self, model: nn.Module, images: Tensor) -> dict[str, Any]:
        """Return what engine and oracle are both told."""
        sites = pa.sites(model, images[:1].to(model.head.weight.dtype))
        directed = self.intervention in ("given", "direction:2")
        chosen: list[str] = []
        rows = 0
        for number in range(len(sites)) if self.layers is None else self.layers if sites else ():
            site = sites[number % len(sites)]
            if site.name not in chosen and rows + site.channels <= self.rows:
                chosen.append(site.name)
                rows += site.channels
        units = [site.label(unit) for site in sites for unit in range(site.channels)]
        groups: list[list[str]] = []
        for numbers in self.groups if units and not directed else ():
            group = sorted({units[number % len(units)] for number in numbers})
            if group and group not in groups:
                groups.append(group)
        if not chosen and not groups:
            chosen = units[:1] if units else []
        intervention: Any = self.intervention
        if intervention == "given":
            generator = torch.Generator().manual_seed(1)
            intervention = Intervention(
                "direction",
                directions={
                    site.name: torch.randn(site.channels, 2, generator=generator) for site in sites
                },
            )
        return {
            "layers": chosen or None,
            "groups": groups or None,
            "intervention": intervention,
        }


def arranged(images: Tensor, layout: str) -> Tensor:
    """Keep the images in memory in another way."""
    if layout == "channels_last" and images.ndim == 4:
        return images.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        wide = images.new_zeros(*images.shape[:-1], 2 * images.shape[-1] + 1)
        wide[..., 1::2] = images
        return wide[..., 1::2]
    if layout == "expanded":
        return images[:, :1].expand(images.shape)
    if layout == "half":
        return images.bfloat16()
    return images


@dataclass(frozen=True)
class Checked:
    """What was compared, how many pairs each precision had settled, and by which strategies.

    ``undefined`` counts pairs that differ, but for which the oracle itself answers otherwise once
    its images and weights are changed by float64's own rounding: they have no one answer.
    """

    agreement: reference.Agreement
    settled: dict[str, int]
    strategies: tuple[str, ...] = ()
    audit: int = 0  # mismatches that the run found itself
    undefined: int = 0


NUDGE = 1e-14
"""Relative change of images and weights that tells whether a pair has one answer in float64."""

NUDGES = 16
"""How often they are changed: a choice between two equal numbers falls either way each time."""

NOTHING = Checked(reference.Agreement(0, 0, 0), {})


def has_usable_logits(model: nn.Module, images: Tensor) -> bool:
    """Whether a network that multiplies again and again stays within its numbers."""
    with torch.no_grad():
        own = images.to(model.head.weight.dtype).clone(memory_format=torch.contiguous_format)
        return bool(near_tie.usable(model(own)).all())


def check(case: Case) -> Checked:
    """Run engine and oracle; raise where they differ in anything but near ties."""
    checked = compared(case)
    assert checked.agreement.mismatches == 0, checked.agreement
    assert checked.audit == 0, checked
    return checked


def compared(case: Case) -> Checked:
    """Run engine and oracle, and count where they differ."""
    model, images, labels = case.subject()
    options = case.options(model, images)
    if options["layers"] is None and options["groups"] is None:
        return NOTHING  # a network without units
    data: Any = (images, labels)
    if case.layout == "batches":
        data = list(zip(images.split(2), labels.split(2), strict=True))
    if case.layout == "numpy":
        data = (images.numpy(), labels.numpy())
    layers = options.pop("layers")
    ablate = functools.partial(
        pa.ablate,
        model,
        data,
        layers,
        **options,
        precision=case.precision,
        batch_size=case.batch_size,
        memory=case.memory,
        strategy=case.strategy,
        audit=5,
        progress=False,
    )
    if not has_usable_logits(model, images):
        with pytest.raises(ValueError, match=r"the logits of image \d+ are NaN or infinite"):
            ablate()
        return NOTHING
    result = ablate()
    agreement = reference.compare(result, model, data, layers, **options)
    undefined = 0
    if agreement.mismatches:
        undefined = without_one_answer(result, model, (images, labels), layers, options)
        left = agreement.mismatches - undefined
        agreement = dataclasses.replace(agreement, mismatches=left)
    return Checked(
        agreement,
        result.effort.pairs_by_precision,
        tuple(result.strategy.values()),
        result.audit.mismatches + result.audit.mended,
        undefined,
    )


def without_one_answer(
    result: pa.AblationResult,
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    layers: list[str] | None,
    options: dict[str, Any],
) -> int:
    """Count pairs that differ from the oracle and whose oracle differs from itself.

    A network that picks the largest of numbers which are equal but for rounding picks by rounding.
    """
    subjects = [(model, data), *(nudged(model, data, seed) for seed in range(NUDGES))]
    loops = [reference.logits(one, its, layers, **options) for one, its in subjects]
    count = 0
    for (row, clean), *others in zip(*loops, strict=True):
        given = result.baseline if row < 0 else result.predictions([row])[0]
        expected = reference.predictions(clean)
        wrong = (given != expected) & ~reference.near_ties(clean)
        unsure = [reference.predictions(values) != expected for _, values in others]
        count += int((wrong & np.any(unsure, axis=0)).sum())
    return count


def nudged(
    model: nn.Module, data: tuple[Tensor, Tensor], seed: int
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Change images and weights by about float64's own rounding."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model).double()
    images = data[0].double()
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1 + NUDGE * torch.randn(weight.shape, generator=generator).double()
        return model, (
            images * (1 + NUDGE * torch.randn(images.shape, generator=generator)),
            data[1],
        )


# --- strategies ---------------------------------------------------------------------------------

SMALL = st.integers(0, 7)
ACTIVATIONS = (
    "ReLU ReLU6 LeakyReLU ELU SELU CELU GELU SiLU Mish Sigmoid Tanh Hardswish Hardsigmoid Hardtanh "
    "Softplus Softsign Softshrink Tanhshrink LogSigmoid PReLU relu sigmoid tanh softmax"
).split()


def _pairs(*values: int) -> SearchStrategy[tuple[int, int]]:
    return st.tuples(st.sampled_from(values), st.sampled_from(values))


CONVS = st.builds(
    Conv,
    out=st.integers(1, 8) | st.sampled_from([16, 20]),
    kernel=_pairs(3, 1, 2, 5),
    stride=_pairs(1, 2, 3),
    padding=_pairs(1, 0, 2) | st.just("same"),
    dilation=_pairs(1, 2),
    groups=SMALL,
    bias=st.booleans(),
    mode=st.sampled_from(["zeros", "zeros", "zeros", "circular", "reflect", "replicate"]),
)
ACTS = st.builds(Act, name=st.sampled_from(ACTIVATIONS), inplace=st.booleans())
NORMS = st.builds(
    Norm, kind=st.sampled_from("batch batch layer group instance local".split()), groups=SMALL
)
POOLS = st.builds(
    Pool,
    kind=st.sampled_from("max average adaptive_average adaptive_max lp".split()),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
    ceil=st.booleans(),
    dilation=st.integers(1, 2),
    count_pad=st.booleans(),
)
PADS = st.builds(
    Pad,
    margins=st.tuples(*[st.integers(0, 2)] * 4),
    mode=st.sampled_from(["constant", "reflect", "replicate", "circular"]),
    value=st.sampled_from([0.0, 0.0, 0.6]),
)
SHUFFLES = st.builds(
    Shuffle,
    kind=st.sampled_from(
        "channels flip roll transpose rows slice split upsample bilinear stack expand crop".split()
    ),
    groups=SMALL,
)
ARITHMETIC = st.builds(
    Arithmetic,
    kind=st.sampled_from(
        "scale square abs clamp power difference normalise negative maximum where mask logsumexp "
        "standard tensor_split inplace".split()
    ),
)
GATES = st.builds(
    Gate,
    kind=st.sampled_from("channel map scalar divide".split()),
    activation=st.sampled_from(["Sigmoid", "Hardsigmoid", "Tanh"]),
)
AWKWARD: SearchStrategy[Part] = st.one_of(
    *(
        st.builds(Awkward, kind=st.just(kind), name=st.sampled_from(sorted(operators)))
        for kind, operators in awkward.OPERATORS.items()
    ),
    st.just(Awkward("jump", "codebook")),
)
LINEARS = st.builds(Linear, out=st.integers(2, 8), bias=st.booleans())
ATTENTIONS = st.builds(Attention, heads=SMALL, library=st.booleans())
SIMPLE: SearchStrategy[Part] = st.one_of(
    *(CONVS, ACTS, CONVS, ACTS, NORMS, POOLS, PADS, SHUFFLES, ARITHMETIC, GATES, LINEARS),
    *(
        ATTENTIONS,
        st.builds(
            Depthwise, st.sampled_from([3, 1, 5]), st.integers(1, 2), SMALL.map(lambda n: 1 + n % 2)
        ),
        st.builds(Transposed, st.integers(1, 4), st.integers(1, 2)),
    ),
)


def _lists(parts: SearchStrategy[Part], most: int) -> SearchStrategy[tuple[Part, ...]]:
    return st.lists(parts, min_size=1, max_size=most).map(tuple)


def _nested(parts: SearchStrategy[Part]) -> SearchStrategy[Part]:
    return st.one_of(
        st.builds(Residual, _lists(parts, 4), st.sampled_from("add sub mul maximum".split())),
        st.builds(Branches, st.lists(_lists(parts, 3), min_size=2, max_size=3).map(tuple)),
        st.builds(Outlier, st.sampled_from([100.0, 1000.0]), st.booleans(), _lists(parts, 3)),
        st.builds(AsTokens, _lists(st.one_of(ATTENTIONS, LINEARS, ACTS, NORMS, parts), 4)),
        st.builds(Repeat, _lists(parts, 3), st.integers(2, 3)),
    )


PARTS = st.one_of(
    SIMPLE, SIMPLE, SIMPLE, AWKWARD, st.recursive(_nested(SIMPLE), _nested, max_leaves=6)
)
SHAPES = st.one_of(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 6), st.integers(2, 8)),
    st.tuples(st.integers(2, 9)),
)


def networks_on(shapes: SearchStrategy[tuple[int, ...]]) -> SearchStrategy[Network]:
    """Random networks for images of these shapes."""
    return st.builds(
        Network,
        parts=_lists(PARTS, 7),
        shape=shapes,
        classes=st.integers(2, 5) | st.sampled_from([8, 10]),
        head=st.sampled_from(
            "average maximum flatten both sum first flatten_module pool_module".split()
        ),
        hidden=st.sampled_from([0, 0, 4]),
        shared_activations=st.booleans(),
        behind=st.sampled_from([""] * 2 * len(awkward.ENDS) + sorted(awkward.ENDS)),
        outlier_weights=st.sampled_from([False] * 5 + [True]),
        seed=st.integers(0, 1_000_000),
    )


REGIMES = st.sampled_from(
    [()] * 30 + [(k, order) for k in awkward.REGIMES for order in ("all", "later", "rare")]
)
CASES = st.builds(
    Case,
    network=networks_on(
        SHAPES | st.tuples(st.integers(1, 3), st.integers(4, 12), st.integers(4, 12))
    ),
    # Low precision is not trusted before it has been measured on many pairs.
    images=st.sampled_from([96, 192] * 6 + [2, 3, 5, 9]),
    layers=st.none() | st.lists(st.integers(0, 30), min_size=1, max_size=3).map(tuple),
    groups=st.just(())
    | st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4).map(tuple), max_size=3).map(
        tuple
    ),
    intervention=st.sampled_from(INTERVENTIONS),
    precision=st.sampled_from(PRECISIONS),
    layout=st.sampled_from(LAYOUTS),
    batch_size=st.sampled_from([None] * 5 + [1, 2, 3, 100]),
    memory=st.sampled_from([None] * 7 + [1, 5_000, 1 << 20]),
    double=st.sampled_from([False] * 5 + [True]),
    strategy=st.sampled_from(["auto"] * 9 + ["replay"]),
    regime=REGIMES,
)
MANY_PAIRS = st.builds(
    Case,
    network=networks_on(st.tuples(st.integers(1, 3), st.integers(12, 16), st.integers(12, 16))),
    images=st.sampled_from([768, 1024, 1536]),
    layers=st.none() | st.lists(st.integers(0, 30), min_size=2, max_size=4).map(tuple),
    intervention=st.sampled_from(["zero", *INTERVENTIONS]),
    precision=st.sampled_from(["auto", "auto", *PRECISIONS]),
    layout=st.sampled_from(["plain", "plain", *LAYOUTS]),
    batch_size=st.sampled_from([None, None, 100]),
    double=st.sampled_from([False] * 9 + [True]),
    regime=REGIMES,
    rows=st.just(48),
)
"""Cases for ``benchmarks/exactness.py``: fewer options, as many pairs as a minute can check."""
