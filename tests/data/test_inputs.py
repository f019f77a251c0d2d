"""Models of several inputs, and of integers: as dicts and tuples, of text and of tables."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from support.by_hand import check_by_hand
from support.oracle import check
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pyablate as pa
from pyablate.data.dataset import Data, gathered
from pyablate.data.inputs import Inputs

COUNT, WORDS = 18, 40


class Text(nn.Module):
    """Word embeddings, attention under a mask, and a classifier, as of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(WORDS, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.norm = nn.LayerNorm(12)
        self.fc1, self.act, self.fc2 = nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12)
        self.head = nn.Linear(12, 3, bias=False)
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        h = self.embedding(input_ids)
        a, _ = self.attention(h, h, h, key_padding_mask=attention_mask == 0, need_weights=False)
        h = self.norm(h + a)
        h = h + self.fc2(self.act(self.fc1(h)))
        weight = attention_mask.unsqueeze(-1).to(h.dtype)
        return {"logits": self.head((h * weight).sum(1) / weight.sum(1))}


class Bag(nn.Module):
    """One input, of integers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.act = nn.Embedding(WORDS, 12), nn.Tanh()
        self.head = nn.Linear(12, 3, bias=False)
        self.eval()

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.act(self.embedding(words).mean(1)))


class Table(nn.Module):
    """Numbers and categories, each category with an embedding of its own size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.categories = nn.ModuleList([nn.Embedding(n, 4) for n in (3, 9)])
        self.fc1, self.act = nn.Linear(13, 16), nn.ReLU()
        self.fc2, self.act2, self.head = nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 3, bias=False)
        self.eval()

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        embedded = [one(categories[:, i]) for i, one in enumerate(self.categories)]
        x = self.act(self.fc1(torch.cat([numbers, *embedded], dim=1)))
        return self.head(self.act2(self.fc2(x - x.mean(1, keepdim=True))))


class Pixels(nn.Module):
    """Images by keyword, behind another argument."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.act, self.head = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Linear(6, 3, bias=False)
        self.eval()

    def forward(self, other: None = None, pixel_values: Tensor | None = None) -> tuple[Tensor]:
        maps = self.act(self.conv(pixel_values))
        return (self.head(maps.mean((2, 3)) - maps.mean((1, 2, 3))[:, None]),)


def _draw() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, 8, (COUNT, 1), generator=draw)
    sizes = torch.tensor([3, 9])
    return {
        "ids": torch.randint(0, WORDS, (COUNT, 7), generator=draw),
        "mask": (torch.arange(7) < lengths).long(),
        "numbers": torch.randn(COUNT, 5, generator=draw),
        "categories": torch.randint(0, 90, (COUNT, 2), generator=draw) % sizes,
        "pixels": torch.randn(COUNT, 1, 8, 8, generator=draw),
    }


DRAWN = _draw()
LABELS = torch.arange(COUNT) % 3
WORDS_AND_MASK = {"input_ids": DRAWN["ids"], "attention_mask": DRAWN["mask"]}


def batches(inputs: Mapping[str, Tensor], size: int = 7) -> list[dict[str, Tensor]]:
    whole = {**inputs, "labels": LABELS}
    starts = range(0, COUNT, size)
    return [{name: part[i : i + size] for name, part in whole.items()} for i in starts]


def loader() -> DataLoader[Any]:
    rows = [
        {"input_ids": ids, "attention_mask": mask, "label": int(label)}
        for ids, mask, label in zip(DRAWN["ids"], DRAWN["mask"], LABELS, strict=True)
    ]
    return DataLoader(rows, batch_size=5)


def text(model: nn.Module) -> Tensor:
    return model(**WORDS_AND_MASK)["logits"]


def table(model: nn.Module) -> Tensor:
    return model(DRAWN["numbers"].double(), DRAWN["categories"])


def bag(model: nn.Module) -> Tensor:
    return model(DRAWN["ids"])


@dataclasses.dataclass(frozen=True)
class Situation:
    """A model, the data as somebody has them, a layer, and the logits as its owner gets them."""

    model: Callable[[], nn.Module]
    data: Callable[[], Any]
    layer: str
    logits: Callable[[nn.Module], Tensor]
    axis: int = 1


NUMBERS = {"numbers": DRAWN["numbers"], "categories": DRAWN["categories"]}
SITUATIONS = {
    "a dict and labels": Situation(Text, lambda: (WORDS_AND_MASK, LABELS), "act", text, 2),
    "a dict with labels": Situation(
        Text, lambda: {**WORDS_AND_MASK, "labels": LABELS}, "norm", text, 2
    ),
    "a tuple": Situation(
        Text, lambda: ((DRAWN["ids"], DRAWN["mask"]), LABELS), "embedding", text, 2
    ),
    "arrays": Situation(
        Text,
        lambda: ({k: v.numpy() for k, v in WORDS_AND_MASK.items()}, LABELS.numpy()),
        "fc2",
        text,
        2,
    ),
    "batches": Situation(Text, lambda: batches(WORDS_AND_MASK), "act", text, 2),
    "batches, once": Situation(Text, lambda: iter(batches(WORDS_AND_MASK)), "act", text, 2),
    "a loader": Situation(Text, loader, "act", text, 2),
    "integers": Situation(Bag, lambda: (DRAWN["ids"], LABELS), "act", bag),
    "integers by keyword": Situation(Bag, lambda: ({"words": DRAWN["ids"]}, LABELS), "act", bag),
    "small integers": Situation(Bag, lambda: (DRAWN["ids"].to(torch.int32), LABELS), "act", bag),
    "a table": Situation(Table, lambda: (tuple(NUMBERS.values()), LABELS), "act", table),
    "batches of a table": Situation(Table, lambda: batches(NUMBERS), "act2", table),
    "pixel_values": Situation(
        Pixels,
        lambda: batches({"pixel_values": DRAWN["pixels"]}),
        "act",
        lambda model: model(pixel_values=DRAWN["pixels"].double())[0],
    ),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_predictions_are_those_of_a_loop_by_hand(name: str) -> None:
    one = SITUATIONS[name]
    model = one.model()
    result = pa.ablate(model, one.data(), one.layer, progress=False)
    check_by_hand(result, model, one.layer, one.logits, axis=one.axis)
    assert set(result.strategy.values()) <= {"delta", "closed form"}, result.strategy
    assert result.labels.tolist() == LABELS.tolist()
    assert result.audit.mismatches == 0


@pytest.mark.parametrize("intervention", ["class_mean", "noise", "resample"])
def test_replacements_are_the_oracles(intervention: str) -> None:
    check(Text(), batches(WORDS_AND_MASK), ["act"], intervention=intervention)
    check(Table(), (tuple(NUMBERS.values()), LABELS), intervention=intervention)


def test_all_functions_take_them() -> None:
    model, data = Text(), batches(WORDS_AND_MASK)
    result = pa.ablate(model, data, "act", progress=False)
    replayed = pa.ablate(model, data, "act", strategy="replay", progress=False)
    assert (replayed.predictions() == result.predictions()).all()
    assert {"embedding", "norm"} <= {site.name for site in pa.sites(model, WORDS_AND_MASK)}
    unlabelled = pa.ablate(model, WORDS_AND_MASK, "act", progress=False)
    assert not unlabelled.labelled
    assert (unlabelled.predictions() == result.predictions()).all()
    assert pa.plan(model, data, "act").images == COUNT
    assert len(pa.compare(model, model, data).images()) == 0
    table = pa.attributes(model, data, "act", ["taylor", "auc"])
    assert np.isfinite(table["taylor"]).all()
    options = {"steps": 2, "repeats": 1, "progress": False}
    assert pa.cumulative(model, data, "act", order="random", **options).result.labels.size == COUNT
    assert pa.pairs(model, data, "act", units=[0, 1], progress=False).data.sizes["pair"] == 1
    assert pa.minimal_sets(model, data, "act", progress=False) is not None
    worth = pa.shapley(model, data, "act", permutations=2, progress=False)
    assert worth.data.attrs["images"] == COUNT
    tuned = pa.finetune(model, data, epochs=1, batch_size=9).model
    assert set(tuned(**WORDS_AND_MASK)) == {"logits"}


def test_a_run_goes_on_with_them(tmp_path: Any) -> None:
    model, options = Text(), {"output": tmp_path / "run.zarr", "progress": False}
    first = pa.ablate(model, batches(WORDS_AND_MASK), "act", **options)
    again = pa.ablate(model, loader(), "act", **options)  # the same in other batches
    assert (first.predictions() == again.predictions()).all()
    other = {**WORDS_AND_MASK, "attention_mask": torch.ones_like(DRAWN["mask"])}
    with pytest.raises(ValueError, match="other images or labels"):
        pa.ablate(model, batches(other), "act", **options)


LARGE = DRAWN["ids"] + 2**24

REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "labels alone": ({"labels": LABELS}, TypeError, "expected a mapping of inputs and 'labels'"),
    "text beside": (
        [{**batch, "text": ["so"] * len(batch["labels"])} for batch in batches(WORDS_AND_MASK)],
        TypeError,
        "data: batch 0: input 'text' is no tensor but list; leave out",
    ),
    "a number beside": (
        ({**WORDS_AND_MASK, "epoch": 3}, LABELS),
        TypeError,
        "input 'epoch' is one number",
    ),
    "more than the model takes": (
        ({**WORDS_AND_MASK, "idx": LABELS}, LABELS),
        ValueError,
        r"data: the model fails on input_ids \[7\], attention_mask \[7\], idx \[\]: .*idx",
    ),
    "fewer than the model takes": (
        ({"input_ids": DRAWN["ids"]}, LABELS),
        ValueError,
        r"data: the model fails on input_ids \[7\]: .*attention_mask",
    ),
    "lengths that differ": (
        [
            *batches(WORDS_AND_MASK)[:1],
            {k: v[:, :5] if v.ndim > 1 else v for k, v in batches(WORDS_AND_MASK)[1].items()},
        ],
        ValueError,
        r"data: batch 1: inputs input_ids \[5\], .* earlier ones are input_ids \[7\].*pad all",
    ),
    "rows that differ": (
        ({**WORDS_AND_MASK, "attention_mask": DRAWN["mask"][:3]}, LABELS),
        ValueError,
        r"as many images each, got {'input_ids': 18, 'attention_mask': 3}",
    ),
    "integers beyond float32": (
        ({**WORDS_AND_MASK, "input_ids": LARGE * 2 + 1}, LABELS),
        ValueError,
        r"data: batch 0: input_ids holds integers that torch.float32 cannot hold",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(name: str) -> None:
    data, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        pa.ablate(Text(), data, "act", progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packing_loses_nothing(dtype: torch.dtype) -> None:
    given = {
        "ids": torch.tensor([[0, 2**24], [5, -7]]),
        "mask": torch.tensor([[True], [False]]),
        "count": torch.tensor([3, 4], dtype=torch.int16),
        "maps": torch.randn(2, 2, 3, 1, dtype=dtype),
    }
    inputs = Inputs.of(given)
    packed = inputs.pack(given, dtype)
    assert packed.shape == (2, 2 + 1 + 1 + 6)
    back = inputs.as_given(packed)
    for name, part in given.items():
        assert back[name].dtype == part.dtype
        assert torch.equal(back[name], part)
    assert inputs.integers(packed).tolist() == [True] * 4 + [False] * 6


def test_all_images_come_back_as_they_were() -> None:
    images, labels = gathered(batches(WORDS_AND_MASK))
    assert torch.equal(images["input_ids"], DRAWN["ids"])
    assert images["attention_mask"].dtype == torch.int64
    assert labels.tolist() == LABELS.tolist()


def test_integers_of_images_stay_numbers() -> None:
    """As they were before a model could ask for indices."""
    pixels = torch.randint(0, 255, (9, 1, 8, 8))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    result = pa.ablate(model, (pixels, LABELS[:9]), "1", progress=False)
    expected = pa.ablate(model, (pixels.float(), LABELS[:9]), "1", progress=False)
    assert (result.predictions() == expected.predictions()).all()
    data = Data((pixels, LABELS[:9]), dtype=torch.float32, device=torch.device("cpu"))
    assert data.first(2).images.dtype == torch.float32


def test_indices_alone_are_taken_by_what_evaluates() -> None:
    data = DRAWN["ids"], LABELS
    assert pa.compare(Bag(), Bag(), data).summary()["accuracy_before"] == pytest.approx(
        (bag(Bag()).argmax(1) == LABELS).double().mean().item()
    )
    assert pa.finetune(Bag(), data, epochs=1, batch_size=9).model is not None


def test_indices_alone_are_refused_where_rounding_would_change_them() -> None:
    with pytest.raises(ValueError, match=r"data: batch 0: .* holds integers that torch.float32"):
        pa.ablate(Bag(), (LARGE * 2 + 1, LABELS), "act", progress=False)


def test_bytes_among_several_inputs_are_scaled_as_those_alone() -> None:
    given = torch.randint(0, 256, (4, 2, 3), dtype=torch.uint8)
    packed = Inputs.of({"pixels": given, "ids": LABELS[:4]}).pack(
        {"pixels": given, "ids": LABELS[:4]}, torch.float32
    )
    torch.testing.assert_close(packed[:, :6], given.flatten(1) / 255)
    assert packed[:, 6].tolist() == LABELS[:4].tolist()


def test_another_function_for_the_logits_is_another_run(tmp_path: Any) -> None:
    class Two(Bag):
        def forward(self, words: Tensor) -> dict[str, Tensor]:
            logits = super().forward(words)
            return {"one": logits, "other": -logits}

    model, options = Two(), {"output": tmp_path / "run.zarr", "strategy": "replay"}
    choices = [lambda o: o["one"], lambda o: o["other"]]
    pa.ablate(model, (DRAWN["ids"], LABELS), "act", logits=choices[0], **options)
    pa.ablate(model, (DRAWN["ids"], LABELS), "act", logits=lambda o: o["one"], **options)
    with pytest.raises(pa.runs.StoreMismatch):
        pa.ablate(model, (DRAWN["ids"], LABELS), "act", logits=choices[1], **options)


def test_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    layer = "bert.encoder.layer.1.intermediate.intermediate_act_fn"
    result = pa.ablate(model, batches(WORDS_AND_MASK), layer, progress=False)
    check_by_hand(result, model, layer, lambda one: one(**WORDS_AND_MASK).logits, axis=2)


def test_conductance_does_not_apply_to_integers(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("captum")
    options: dict[str, Any] = {"layers": "act", "sample": 4, "progress": False}
    for model, given in ((Text(), WORDS_AND_MASK), (Bag(), WORDS_AND_MASK["input_ids"])):
        data = (given, torch.arange(COUNT) % 3)
        for which in ("conductance", ["l1_norm", "conductance"]):
            with pytest.raises(ValueError, match=r"which: conductance follows .* got input"):
                pa.attributes(model, data, which=which, **options)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="pyablate"):
            found = pa.attributes(model, data, **options)
        assert "conductance" not in found
        assert "auc" in found
        assert "conductance is left out: which: conductance follows a path" in caplog.text
