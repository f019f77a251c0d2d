"""Every public function that takes a model: one that returns a dict and takes a dict of inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pyablate as pa
from pyablate import attribution, comparison, compression, directions, reference
from pyablate.data.inputs import chosen
from pyablate.reference.timing import hook_loop_seconds
from pyablate.report import write_report

pytest.importorskip("torch_pruning")
pytest.importorskip("captum")

COUNT = 16
LABELS = torch.arange(COUNT) % 4


class Vision(nn.Module):
    """As of transformers: takes ``pixel_values``, returns logits and hidden states."""

    def __init__(self, returns: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.returns = returns
        self.conv, self.norm, self.act = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        self.conv2, self.act2, self.head = nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Linear(5, 4)
        nn.init.normal_(self.head.weight)
        self.eval()

    def forward(self, pixel_values: Tensor) -> Any:
        h = self.act2(self.conv2(self.act(self.norm(self.conv(pixel_values)))))
        return self.returns(self.head(h.mean((2, 3))))


class Text(nn.Module):
    """Two inputs, of integers."""

    def __init__(self, returns: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.returns = returns
        self.embedding = nn.Embedding(40, 12)
        self.fc, self.act, self.mix = nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        weight = attention_mask.unsqueeze(-1).to(self.fc.weight.dtype)
        h = self.act(self.fc(self.embedding(input_ids)))
        return self.returns(self.head(self.mix((h * weight).sum(1) / weight.sum(1))))


def as_dict(logits: Tensor) -> dict[str, Tensor]:
    return {"hidden": logits[:, :2], "logits": logits}


def as_heads(logits: Tensor) -> dict[str, Tensor]:
    return {"fine": logits, "coarse": logits[:, :2]}


def as_tensor(logits: Tensor) -> Tensor:
    return logits


def draw() -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (COUNT, 7), generator=generator)
    lengths = torch.randint(3, 8, (COUNT, 1), generator=generator)
    words = {"input_ids": ids, "attention_mask": (torch.arange(7) < lengths).long()}
    return torch.randn(COUNT, 1, 9, 9, generator=generator), words


PIXELS, WORDS = draw()


Q: dict[str, Any] = {"progress": False, "audit": 0}
PLAIN: dict[type, Any] = {}


class Case:
    """A model, what it is given, and what needs a network of plain tensors to be made."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs = model, inputs
        first = torch.arange(2)
        self.data: Any = (inputs, LABELS)
        self.sample = self.images = chosen(inputs, first)
        if isinstance(inputs, dict):
            self.data = {**inputs, "labels": LABELS}
            self.images = self.sample.get("pixel_values", self.sample)
        if type(model) not in PLAIN:
            plain = type(model)(as_tensor)
            result = pa.ablate(plain, self.data, "act", **Q)
            scores = {unit: float(place) for place, unit in enumerate(result.units["label"])}
            ranking = pa.rank(plain, self.sample, scores, layers="act")
            found = pa.select(pa.sites(plain, self.sample), "act")
            PLAIN[type(model)] = result, found, ranking
        self.result, self.sites, self.ranking = PLAIN[type(model)]


RUNS: dict[str, Callable[[Case], Any]] = {
    "ablate": lambda c: pa.ablate(c.model, c.data, "act", **Q).predictions(),
    "plan": lambda c: pa.plan(c.model, c.data, "act").table["units"],
    "sites": lambda c: [site.channels for site in pa.sites(c.model, c.sample)],
    "classifier": lambda c: pa.classifier(c.model).state_dict()["head.weight"],
    "attributes": lambda c: pa.attributes(
        c.model, c.data, "act", ["l1_norm", "auc", "taylor"], progress=False
    ).to_array(),
    "cumulative": lambda c: pa.cumulative(
        c.model, c.data, "act", order="random", steps=2, repeats=1, **Q
    ).result.predictions(),
    "pairs": lambda c: pa.pairs(c.model, c.data, "act", units=[0, 1], **Q).result.predictions(),
    "minimal_sets": lambda c: len(pa.minimal_sets(c.model, c.data, "act", classes=[0], **Q).table),
    "activation_patterns": lambda c: patterns(c),
    "spectral_profile": lambda c: pa.spectral_profile(c.model, c.data, weighted(c))["contribution"],
    "influence_graph": lambda c: pa.influence_graph(
        c.model, c.data, ("fc", "mix") if isinstance(c.model, Text) else ("conv", "conv2")
    )["influence"],
    "class_features": lambda c: pa.class_features(c.model, c.data).mask,
    "representative": lambda c: pa.representative(c.model, c.data, 3, "act").map,
    "unit_sets": lambda c: pa.unit_sets(c.model, c.data, "act", sizes=[1], **Q)["kept"],
    "optimal_constants": lambda c: pa.optimal_constants(
        c.model, c.data, "act", rounds=1, **Q
    ).table["optimal_chosen"],
    "shapley": lambda c: pa.shapley(c.model, c.data, "act", permutations=2, **Q).data["value"],
    "rotation_control": lambda c: pa.rotation_control(
        c.model, c.data, "act", rotations=1, **Q
    ).rotated.predictions(),
    "rotations": lambda c: directions.rotations(c.model, c.data, "act")["act"],
    "principal_components": lambda c: directions.principal_components(c.model, c.data, "act")[
        "act"
    ].abs(),
    "next_weights": lambda c: directions.next_weights(c.model, c.data, "act")["act"].abs(),
    "relevant": lambda c: directions.relevant(c.model, c.data, "act")["act"].abs(),
    "couplings": lambda c: [len(one.units) for one in pa.couplings(c.model, c.sample)],
    "rank": lambda c: pa.rank(c.model, c.sample, "random").scores,
    "remove": lambda c: pa.remove(c.model, ["act:1"], c.sample).model,
    "finetune": lambda c: pa.finetune(c.model, c.data, epochs=1, progress=False).model,
    "prune_curve": lambda c: pa.prune_curve(
        c.model, c.data, c.ranking, fractions=[0.3], seeds=1, progress=False
    )[["accuracy", "loss", "parameters", "flops"]],
    "sensitivity": lambda c: pa.sensitivity(c.model, c.data, c.ranking, fractions=[0.5], **Q)[
        "accuracy"
    ],
    "compare": lambda c: pa.compare(c.model, c.model, c.data).after.confidence,
    "attributions_preserved": lambda c: compression.attributions_preserved(
        c.model, c.model, c.data, methods="lrp"
    ).maps["cosine"],
    "attribution_maps": lambda c: [
        attribution.attribution_maps(c.model, c.images, LABELS[:2], method)
        for method in ("grad_cam", "integrated_gradients", "lrp", "clrp")
    ],
    "conditional_maps": lambda c: attribution.conditional_maps(
        c.model, c.images, LABELS[:2], ["act:1"]
    ),
    "relmax": lambda c: attribution.relmax(c.model, c.data, "act", count=3).to_array(),
    "latency": lambda c: len(compression.latency({"a": c.model}, c.sample, repeats=1)),
    "size": lambda c: compression.size(c.model, c.sample).flops,
    "masked": lambda c: compression.masked(c.model, c.ranking, 0.3, c.sample),
    "importance": lambda c: callable(compression.importance(c.model, c.ranking, c.sample)),
    "filter_ranking": lambda c: (
        compression.filter_ranking(c.model, c.sample, "taylor", data=c.data).scores
    ),
    "prune_filters": lambda c: compression.prune_filters(c.model, c.sample, 0.3).model,
    "soft_filter_pruning": lambda c: (
        compression.soft_filter_pruning(
            c.model, c.sample, c.data, 0.3, epochs=1, progress=False
        ).model
    ),
    "rls_pruning": lambda c: (
        compression.rls_pruning(
            c.model, c.sample, c.data, 0.3, rounds=1, epochs=1, progress=False
        ).model
    ),
    "learn_connections": lambda c: (
        compression.learn_connections(c.model, c.data, epochs=1, progress=False).model
    ),
    "truncated_svd": lambda c: compression.truncated_svd(c.model, 0.4, rectify=True).model,
    "prune_and_decompose": lambda c: (
        compression.prune_and_decompose(c.model, c.sample, 0.3, 0.4).model
    ),
    "collaborative_compression": lambda c: (
        compression.collaborative_compression(
            c.model, c.sample, c.data, 0.5, step=0.3, progress=False
        ).model
    ),
    "low_rank_training": lambda c: (
        compression.low_rank_training(c.model, c.data, 0.3, epochs=1, progress=False).model
    ),
    "unify_weights": lambda c: (
        compression.unify_weights(c.model, data=c.data, epochs=1, progress=False).model
    ),
    "int8_weights": lambda c: compression.int8_weights(c.model).model,
    "kernel_codebook": lambda c: compression.kernel_codebook(c.model, 2).model,
    "magnitude_masks": lambda c: compression.magnitude_masks(c.model, 0.3).model,
    "block_masks": lambda c: compression.block_masks(c.model, 2).model,
    "save_network": lambda c: saved(c),
    "save_weights": lambda c: saved_weights(c),
    "reference.ablate": lambda c: reference.ablate(c.model, c.data, "act").predictions(),
    "reference.logits": lambda c: next(reference.logits(c.model, c.data, "act"))[1],
    "reference.compare": lambda c: reference.compare(c.result, c.model, c.data, "act").mismatches,
    "hook_loop_seconds": lambda c: (
        hook_loop_seconds(c.model, c.data, c.sites, units=2, result=c.result).disagreements
    ),
    "write_report": lambda c: write_report(c.result, "r.html", model=c.model, data=c.data) or 0,
}

NEED_NO_LOGITS = {
    "classifier",
    "sites",
    "couplings",
    "rank",
    "masked",
    "importance",
    "size",
    "latency",
    "truncated_svd",
    "int8_weights",
    "kernel_codebook",
    "magnitude_masks",
    "block_masks",
    "save_network",
    "save_weights",
}

NEED_IMAGES = {
    "attribution_maps": "images: expected a tensor",
    "attributions_preserved": "images: expected a tensor",
    "conditional_maps": "images: expected a tensor",
    "relevant": "model: relevance has no rule for this network",
    "relmax": "model: relevance has no rule for this network",
    "write_report": r"data: expected images \[N, C, H, W\] to draw",
}


def saved(case: Case) -> Any:
    compression.save_network(case.model, case.sample, "n.pt2")
    network = torch.export.load("n.pt2").module()
    given = case.inputs
    found = network(**given) if isinstance(given, dict) else network(given)
    return (found if isinstance(found, Tensor) else list(found.values())[-1]).detach()


def saved_weights(case: Case) -> Any:
    compression.save_weights(case.model, case.model, "module:make", "n.safetensors")
    return torch.cat([each.double().flatten() for each in load_file("n.safetensors").values()])


def weighted(case: Case) -> str:
    return "fc" if isinstance(case.model, Text) else "conv2"


def patterns(case: Case) -> Any:
    pytest.importorskip("sklearn")
    return pa.activation_patterns(case.model, case.data, "act", smallest=2)["pattern"]


def weights_of(found: Any) -> Any:
    return list(found.state_dict().values()) if isinstance(found, nn.Module) else [found]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_table_is_complete() -> None:
    modules = (pa, compression, comparison, attribution, directions)
    found = {
        name: getattr(module, name)
        for module in modules
        for name in module.__all__
        if inspect.isfunction(getattr(module, name))
    } | {f"reference.{name}": getattr(reference, name) for name in reference.__all__}
    taking = {
        name
        for name, function in found.items()
        if inspect.isfunction(function)
        and {"model", "networks"} & set(inspect.signature(function).parameters)
    }
    assert taking <= set(RUNS), "how does it take models of dicts?"
    assert set(RUNS) - taking == {"hook_loop_seconds", "write_report"}


@pytest.mark.parametrize("name", RUNS)
def test_a_dict_of_one_input_and_a_dict_of_outputs(name: str) -> None:
    """What comes out is what comes of the same network from tensor to tensor."""
    given = {"pixel_values": PIXELS}
    found = weights_of(RUNS[name](Case(Vision(as_dict), given)))
    expected = weights_of(RUNS[name](Case(Vision(as_tensor), PIXELS)))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_several_inputs(name: str) -> None:
    case = Case(Text(as_dict), WORDS)
    if name in NEED_IMAGES:
        with pytest.raises((TypeError, ValueError), match=NEED_IMAGES[name]):
            RUNS[name](case)
        return
    found = weights_of(RUNS[name](case))
    expected = weights_of(RUNS[name](Case(Text(as_tensor), WORDS)))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in RUNS if name not in NEED_NO_LOGITS])
def test_logits_that_have_to_be_picked(name: str) -> None:
    with pytest.raises(TypeError, match=r"dict of 'fine' .*; logits= of ablate or classifier"):
        RUNS[name](Case(Vision(as_heads), PIXELS))
