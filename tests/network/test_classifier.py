"""Models that return more than logits, or one logit: what is taken, said and refused."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.by_hand import check_by_hand
from support.oracle import check
from torch import Tensor, nn

import pyablate as pa
from pyablate.network.sites import copied, surveyed

Pair = namedtuple("Pair", "auxiliary logits")


@dataclasses.dataclass
class Output:
    logits: Tensor
    auxiliary: Tensor


class ModelOutput(OrderedDict):
    """As of transformers: a mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class TwoHeads(nn.Module):
    """A convolution, and two heads whose logits are returned in some form."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.form = form
        self.conv, self.act = nn.Conv2d(1, 6, 3), nn.ReLU()
        self.conv2, self.act2 = nn.Conv2d(6, 5, 3), nn.Tanh()
        self.norm, self.centred = (nn.BatchNorm1d(n, affine=False, momentum=1) for n in (5, 6))
        self.head, self.auxiliary = nn.Linear(5, 4), nn.Linear(6, 4)
        with torch.no_grad():  # statistics, so that the classes vary
            self.both(images(32))
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.form(*self.both(x))

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.act(self.conv(x))
        pooled = self.norm(self.act2(self.conv2(h)).mean((2, 3)))
        return self.head(pooled), self.auxiliary(self.centred(h.mean((2, 3))))


def images(count: int = 16) -> Tensor:
    return 2 * torch.randn(count, 1, 9, 9, generator=torch.Generator().manual_seed(4))


def binary(found: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(found), found], dim=1)


@dataclasses.dataclass(frozen=True)
class Form:
    """What a model returns of its two heads, what is asked for, and the logits by hand."""

    form: Callable[[Tensor, Tensor], Any]
    logits: Any
    expected: Callable[[Any], Tensor]
    said: str = ""


FORMS = {
    "tensor": Form(lambda z, a: z, None, lambda out: out),
    "dict": Form(
        lambda z, a: {"auxiliary": a, "logits": z},
        None,
        lambda out: out["logits"],
        "dict of 'auxiliary' [2, 4], 'logits' [2, 4]; 'logits' is taken",
    ),
    "ModelOutput": Form(
        lambda z, a: ModelOutput(hidden=a, logits=z),
        None,
        lambda out: out.logits,
        "ModelOutput of 'hidden' [2, 4], 'logits' [2, 4]; 'logits' is taken",
    ),
    "dataclass": Form(Output, None, lambda out: out.logits, "Output of 'logits' [2, 4]"),
    "named tuple": Form(
        lambda z, a: Pair(a, z), None, lambda out: out[1], "Pair of [2, 4], [2, 4]; 'logits' is"
    ),
    "tuple": Form(lambda z, a: (z, a), None, lambda out: out[0], "[2, 4]; the first is taken"),
    "list": Form(lambda z, a: [z, [a]], None, lambda out: out[0], "list of [2, 4], list; the fi"),
    "key": Form(lambda z, a: {"fine": z, "coarse": a}, "coarse", lambda out: out["coarse"]),
    "attribute": Form(Output, "auxiliary", lambda out: out.auxiliary),
    "place": Form(lambda z, a: (z, a), 1, lambda out: out[1]),
    "place from the end": Form(lambda z, a: (z, a), -1, lambda out: out[1]),
    "place in a dict": Form(lambda z, a: {"z": z, "a": a}, 1, lambda out: out["a"]),
    "function": Form(lambda z, a: {"all": [z, a]}, lambda o: o["all"][1], lambda o: o["all"][1]),
    "one logit": Form(lambda z, a: z[:, 0], "binary", binary),
    "one column": Form(lambda z, a: z[:, :1], "binary", lambda out: binary(out[:, 0])),
    "one column in a dict": Form(
        lambda z, a: {"logits": a[:, 1:2]},
        "binary",
        lambda out: binary(out["logits"][:, 0]),
        "dict of 'logits' [2, 1]; 'logits' is taken",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_logits_are_taken(name: str, caplog: pytest.LogCaptureFixture) -> None:
    form, x = FORMS[name], images()
    model = TwoHeads(form.form)
    classes = 2 if form.logits == "binary" else 4
    with caplog.at_level(logging.INFO, logger="pyablate"):
        result = pa.ablate(
            model, (x, torch.arange(len(x)) % classes), "act", logits=form.logits, progress=False
        )
    check_by_hand(result, model, "act", lambda one: form.expected(one(x.double())))
    assert "replay" not in result.strategy.values()
    said = [record.message for record in caplog.records if "taken as the logits" in record.message]
    assert len(said) == (1 if form.said else 0)
    assert form.said in "".join(said)


@pytest.mark.parametrize("name", ["ModelOutput", "place", "one logit"])
def test_the_oracle_takes_the_same(name: str) -> None:
    form, x = FORMS[name], images(12)
    model = TwoHeads(form.form)
    check(model, (x, torch.arange(len(x)) % 2), logits=form.logits, intervention="mean")


REFUSED = {
    "no logits in a dict": (
        lambda z, a: {"fine": z, "coarse": a},
        None,
        TypeError,
        r"expected logits \[N, classes\], got dict of 'fine' \[\d, 4\], 'coarse' .*; logits= of",
    ),
    "no such key": (
        lambda z, a: {"fine": z, "coarse": a},
        "coarze",
        ValueError,
        r"logits: .* returns dict of 'fine' .*, got 'coarze'; nearest: coarse",
    ),
    "no such attribute": (Output, "aux", ValueError, "logits: .* Output of 'logits' .*got 'aux'"),
    "no such place": (lambda z, a: (z, a), 2, ValueError, r"logits: .* tuple of .*, got 2"),
    "a place in a tensor": (lambda z, a: z, 0, ValueError, r"logits: .* a tensor \[\d, 4\], got 0"),
    "nothing": (lambda z, a: None, None, TypeError, "got NoneType"),
    "an empty tuple": (lambda z, a: (), None, TypeError, "got tuple of nothing"),
    "maps first": (lambda z, a: (z[..., None], a), None, TypeError, r"got \[\d, 4, 1\]"),
    "one logit unasked": (
        lambda z, a: z[:, 0],
        None,
        ValueError,
        'at least 2 classes, got 1; .*logits="binary"',
    ),
    "one column unasked": (lambda z, a: z[:, :1], None, ValueError, 'logits="binary"'),
    "many logits as one": (lambda z, a: z, "binary", ValueError, r"one logit .*got .*\[\d, 4\]"),
    "a truth value": (lambda z, a: z, True, TypeError, "logits: expected a string, .*got True"),
    "a list": (lambda z, a: z, ["logits"], TypeError, "logits: expected a string"),
}


@pytest.mark.parametrize("run", [pa.ablate, pa.reference.ablate])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_logits_is_refused(run: Callable[..., Any], name: str) -> None:
    form, logits, error, message = REFUSED[name]
    data = images(4), torch.arange(4)
    with pytest.raises(error, match=message):
        run(TwoHeads(form), data, "act", logits=logits, progress=False)


def test_layers_keep_their_names_and_the_model_its_forward() -> None:
    model = TwoHeads(FORMS["dict"].form)
    plain = TwoHeads(FORMS["tensor"].form)
    given = dict(vars(model))
    assert pa.sites(model, images(2)) == pa.sites(plain, images(2))
    assert vars(model) == given
    assert isinstance(model(images(2)), dict)
    taken = pa.classifier(model)
    assert [name for name, _ in taken.named_modules()] == [n for n, _ in model.named_modules()]
    assert list(taken.state_dict()) == list(model.state_dict())
    for logits, other in (("logits", "auxiliary"), ("auxiliary", "head")):  # no units: classes
        names = {site.name for site in pa.sites(model, images(2), logits=logits)}
        assert names & {"head", "auxiliary"} == {other}


def test_a_classifier_is_taken_everywhere() -> None:
    model = TwoHeads(FORMS["key"].form)
    coarse = pa.classifier(model, logits="coarse")
    data = images(12), torch.arange(12) % 4
    for each in (coarse, copy.deepcopy(coarse), pa.classifier(coarse)):
        assert isinstance(each(data[0]), Tensor)
    assert torch.equal(coarse(data[0]), model(data[0])["coarse"])
    direct = pa.ablate(model, data, "act", logits="coarse", progress=False)
    again = pa.ablate(coarse, data, "act", progress=False)
    assert (direct.predictions() == again.predictions()).all()
    assert len(pa.compare(coarse, coarse, data).images()) == 0
    assert pa.attributes(coarse, data, "act", "gradients").sizes["unit"] == 6
    assert pa.attributes(model, data, "act", "l1_norm", logits="coarse").sizes["unit"] == 6
    assert pa.plan(model, data, "act", logits="coarse").table["units"].tolist() == [6]
    curve = pa.cumulative(model, data, "act", order="random", steps=2, repeats=1, logits="coarse")
    assert curve.result.baseline.tolist() == again.baseline.tolist()


def test_a_traced_network_keeps_its_choice_when_it_is_copied() -> None:
    traced = torch.fx.symbolic_trace(TwoHeads(FORMS["key"].form))
    taken = copied(pa.classifier(traced, logits="coarse"))
    assert torch.equal(taken(images(3)), traced(images(3))["coarse"])


def test_choices_follow_one_another() -> None:
    scored = TwoHeads(lambda z, a: {"score": a[:, :1]})
    two = pa.classifier(pa.classifier(scored, logits="score"), logits="binary")
    x = images(3)
    assert torch.equal(two(x), binary(scored(x)["score"][:, 0]))


def test_comparisons_and_maps_take_logits_by_themselves() -> None:
    model, plain = TwoHeads(FORMS["dict"].form), TwoHeads(FORMS["tensor"].form)
    data = images(12), torch.arange(12) % 4
    assert len(pa.compare(model, plain, data).images()) == 0
    with pytest.raises(TypeError, match="logits= of ablate or classifier picks one"):
        pa.compare(TwoHeads(FORMS["key"].form), plain, data)


def test_another_output_is_another_run(tmp_path: Any) -> None:
    """By replay, too, where the graph of operators does not tell."""
    model = TwoHeads(lambda z, a: (z, a))
    data = images(4), torch.arange(4)
    for strategy in ("auto", "replay"):
        options = {
            "strategy": strategy,
            "output": tmp_path / strategy,
            "audit": 0,
            "progress": False,
        }
        pa.ablate(model, data, "act", **options)
        pa.ablate(model, data, "act", **options)
        with pytest.raises(ValueError, match="the model's structure"):
            pa.ablate(model, data, "act", logits=1, **options)


def test_a_function_on_the_instance_is_the_networks_forward() -> None:
    """It refers to the model; on the copy it has to refer to the copy."""
    model = TwoHeads(FORMS["tensor"].form)
    own = model.forward
    model.forward = lambda x: {"logits": 2 * own(x)}
    x = images(8)
    assert surveyed(model, x).sites
    result = check(model, (x, torch.arange(8) % 4), ["act"])
    check_by_hand(result, TwoHeads(FORMS["tensor"].form), "act", lambda one: one(x.double()))


def test_attributions_are_of_the_logits_that_are_taken() -> None:
    data = images(16), torch.arange(16) % 4
    model, plain = TwoHeads(FORMS["dict"].form), TwoHeads(FORMS["tensor"].form)
    one, other = (
        pa.finetune(each, data, epochs=1, original=each, preserve_attributions=True, seed=0)
        for each in (model, plain)
    )
    assert one.history.equals(other.history)
    compared = [pa.compare(each, each, data, attributions=True) for each in (model, plain)]
    for each in compared:
        assert each.attributions is not None
        assert (each.attributions.maps["cosine"].dropna() > 0.999).all()


class Chooser:
    """An object beside the model that knows it."""

    def __init__(self, model: TwoHeads) -> None:
        self.model, self.calls = model, 0

    def pick(self, maps: Tensor) -> Tensor:
        return self.model.head(self.model.act2(maps))

    __call__ = pick


def by_closure(model: TwoHeads) -> Callable[[Any], Tensor]:
    return lambda maps: model.head(model.act2(maps))


def by_parts(model: TwoHeads) -> Callable[[Any], Tensor]:
    act, head = model.act2, model.head
    return lambda maps: head(act(maps))


def by_list(model: TwoHeads) -> Callable[[Any], Tensor]:
    parts = [model.act2, model.head]
    return lambda maps: parts[1](parts[0](maps))


def by_default(model: TwoHeads) -> Callable[[Any], Tensor]:
    return lambda maps, network=model: network.head(network.act2(maps))


def by_function(model: TwoHeads) -> Callable[[Any], Tensor]:
    inner = by_parts(model)
    return lambda maps: inner(maps)


def by_object(model: TwoHeads) -> Callable[[Any], Tensor]:
    chooser = Chooser(model)
    return lambda maps: chooser.pick(maps)


def by_parameters(model: TwoHeads) -> Callable[[Any], Tensor]:
    weight, bias = model.head.weight, model.head.bias
    return lambda maps: nn.functional.linear(model.act2(maps), weight, bias)


def in_a_notebook(model: TwoHeads) -> Callable[[Any], Tensor]:
    names: dict[str, Any] = {"model": model}
    exec("def head(h): return model.head(h)\ndef pick(maps): return head(model.act2(maps))", names)
    return names["pick"]


REFERRING: dict[str, Callable[[TwoHeads], Callable[[Any], Tensor]]] = {
    "closure": by_closure,
    "closure over modules": by_parts,
    "list": by_list,
    "default": by_default,
    "another function": by_function,
    "an object": by_object,
    "parameters": by_parameters,
    "notebook": in_a_notebook,
    "method of an object": lambda model: Chooser(model).pick,
    "callable object": Chooser,
    "method of the model": lambda model: model.last,
    "partial": lambda model: functools.partial(Unfinished.last, model),
}


class Unfinished(TwoHeads):
    """Returns maps, which a function of the user's makes logits of, by the model's own modules."""

    def __init__(self) -> None:
        super().__init__(FORMS["tensor"].form)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(self.act(self.conv(x))).mean((2, 3)))

    def last(self, maps: Tensor) -> Tensor:
        return self.head(self.act2(maps))


@pytest.mark.parametrize("name", REFERRING)
def test_a_function_for_the_logits_refers_to_the_copy(name: str) -> None:
    """Also in a copy of the copy, in float64, and where the units lie in what it calls."""
    model, x = Unfinished(), images()
    calls: list[Any] = []
    model.head.register_forward_hook(lambda module, _inputs, _output: calls.append(module))
    logits = REFERRING[name](model)
    double = copied(pa.classifier(model, logits=logits)).double()
    assert double(x.double()).dtype == torch.float64
    assert model.head not in calls
    assert model.head.weight.dtype == torch.float32
    check(model, (x, torch.arange(len(x)) % 4), ["act", "act2"], logits=logits)
    assert model.head not in calls


HEAD = nn.Linear(5, 4)


def test_weights_that_are_not_the_models_are_refused() -> None:
    model, other = Unfinished(), nn.Linear(5, 4)
    holder = Chooser(TwoHeads(FORMS["tensor"].form))
    for logits, name in (
        (lambda maps: other(maps), "'other'"),
        (lambda maps: HEAD(maps), "'HEAD'"),
        (lambda maps: holder.model.head(maps), "'holder.model'"),
        (functools.partial(lambda head, maps: head(maps), other), ""),
        (functools.partial(by_closure(model)), "'model'"),
    ):
        with pytest.raises(TypeError, match=f"logits: the function reaches .*{name}, which is no"):
            pa.classifier(model, logits=logits)
    softmax = nn.Softmax(1)
    assert pa.classifier(model, logits=lambda maps: softmax(maps))(images(2)).shape == (2, 5)


class Config:
    def __init__(self, id2label: Any) -> None:
        self.id2label = id2label


NAMES = ("ant", "bee", "cat", "dog")


@pytest.mark.parametrize(
    ("id2label", "given", "expected"),
    [
        (dict(enumerate(NAMES)), None, NAMES),
        ({str(number): NAMES[number] for number in (2, 0, 1, 3)}, None, NAMES),
        (dict(enumerate(NAMES)), ["a", "b", "c", "d"], ("a", "b", "c", "d")),
        ({number: f"LABEL_{number}" for number in range(4)}, None, ("0", "1", "2", "3")),
        (dict(enumerate(NAMES[:3])), None, ("0", "1", "2", "3")),
        ({name: number for number, name in enumerate(NAMES)}, None, ("0", "1", "2", "3")),
        (NAMES, None, ("0", "1", "2", "3")),
    ],
)
def test_classes_are_named_by_the_models_own_configuration(
    id2label: Any, given: list[str] | None, expected: tuple[str, ...]
) -> None:
    model, data = TwoHeads(FORMS["dict"].form), (images(8), torch.arange(8) % 4)
    model.config = Config(id2label)
    options: dict[str, Any] = {"class_names": given, "progress": False}
    assert pa.ablate(model, data, "act", audit=0, **options).class_names == expected
    assert pa.reference.ablate(model, data, "act", **options).class_names == expected
    assert pa.compare(model, model, data, class_names=given).class_names == expected
