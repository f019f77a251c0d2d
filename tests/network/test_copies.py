"""Copies of models that hold more than weights: activations, locks, files, past tensors."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.by_hand import check_by_hand
from torch import Tensor, nn

import pyablate as pa
from pyablate.network import copies
from pyablate.network.sites import copied


class Keeper(nn.Module):
    """A network that does something with its activations, and holds something."""

    def __init__(self, held: Any = None, keep: Callable[[Keeper, Tensor], Any] | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.act, self.fc2 = nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)
        self.held, self.keep = held, keep
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc1(x))
        if self.keep is not None:
            self.keep(self, h)
        return self.fc2(h - 0.4)


IMAGES = torch.randn(15, 5, generator=torch.Generator().manual_seed(3))
DATA = IMAGES, torch.arange(15) % 3


def in_dict(model: Keeper, h: Tensor) -> None:
    model.held["h"] = h


def in_list(model: Keeper, h: Tensor) -> None:
    model.held.append(h)


def in_deep_list(model: Keeper, h: Tensor) -> None:
    model.held["maps"].append({"h": h})


def as_attribute(model: Keeper, h: Tensor) -> None:
    model.last = h


def locked(model: Keeper, h: Tensor) -> None:
    with model.held:
        pass


def ran(model: nn.Module, *, inference: bool = False) -> nn.Module:
    """Leave tensors of a pass, with a history or of inference mode, where the model keeps them."""
    with torch.inference_mode(inference):
        model(IMAGES)
    return model


@torch.inference_mode()
def made_in_inference_mode() -> nn.Module:
    return Keeper()


class Inference(Keeper):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def hooked() -> nn.Module:
    model = Keeper([])
    model.act.register_forward_hook(lambda _m, _i, output: model.held.append(output))
    return model


SITUATIONS: dict[str, Callable[[], nn.Module]] = {
    "a dict of activations": lambda: Keeper({}, in_dict),
    "a list of activations": lambda: Keeper([], in_list),
    "an attribute": lambda: Keeper(None, as_attribute),
    "a dict, of a pass": lambda: ran(Keeper({}, in_dict)),
    "a list, of a pass": lambda: ran(Keeper([], in_list)),
    "an attribute, of a pass": lambda: ran(Keeper(None, as_attribute)),
    "deep down, of a pass": lambda: ran(Keeper(collections.defaultdict(list), in_deep_list)),
    "a dict, of inference mode": lambda: ran(Keeper({}, in_dict), inference=True),
    "an attribute, of inference mode": lambda: ran(Keeper(None, as_attribute), inference=True),
    "hooks that keep, of a pass": lambda: ran(hooked()),
    "weights of inference mode": made_in_inference_mode,
    "forward in inference mode": lambda: Inference(),
    "a lock": lambda: Keeper(threading.Lock(), locked),
    "locks in a list": lambda: Keeper([threading.RLock(), {"more": threading.Lock()}]),
    "a module of Python": lambda: Keeper(torch.nn.functional),
    "a generator": lambda: Keeper(number for number in range(3)),
    "a random generator": lambda: Keeper(torch.Generator()),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_model_runs_and_stays_as_it_was(name: str) -> None:
    model = SITUATIONS[name]()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    result = pa.ablate(model, DATA, "act", progress=False)
    check_by_hand(result, Keeper(), "act", lambda one: one(IMAGES.double()))
    assert result.strategy == {"act": "closed form"}
    agreement = pa.reference.compare(result, model, DATA, "act")
    assert agreement.mismatches == 0
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_file_is_shared_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copies._say_shared.cache_clear()
    with (tmp_path / "log.txt").open("w") as log:
        model = Keeper({"logs": [log]})
        pa.ablate(model, DATA, "act", progress=False)
        assert copied(model).held["logs"][0] is log
        assert not log.closed
    said = [record.message for record in caplog.records if "cannot be copied" in record.message]
    assert len(said) == 1
    assert said[0].startswith("model: held.logs.0 (TextIOWrapper) cannot be copied, and the work")


def test_what_refuses_even_so_is_told() -> None:
    class Refuses(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copies\nof me")

    with pytest.raises(TypeError, match=r"model: Sequential cannot be copied: no copies$"):
        pa.ablate(nn.Sequential(nn.ReLU(), Refuses(5, 3)), DATA, progress=False)


@pytest.mark.parametrize("run", [pa.ablate, pa.reference.ablate])
def test_weights_that_have_no_shape_yet_are_named(run: Callable[..., Any]) -> None:
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3)).eval()
    with pytest.raises(ValueError, match=r"model: 0 \(LazyLinear\) takes the shape .* run the"):
        run(lazy, DATA, progress=False)
    lazy(IMAGES)
    assert len(run(lazy, DATA, "1", progress=False).units) == 8


def test_hooks_and_functions_refer_to_the_copy() -> None:
    model = hooked()
    own = model.forward

    def forward(x: Tensor, again: bool = True) -> Tensor:
        return forward(x, again=False) if again else own(x) + model.held[0].sum()

    model.forward = forward
    copy = copied(model)
    model.fc1.weight.data.zero_()
    with torch.no_grad():
        assert copy(IMAGES).abs().sum() > 0
    assert model.held == []
    assert len(copy.held) == 1


def test_functions_of_a_notebook_refer_to_the_copy() -> None:
    names: dict[str, Any] = {"model": hooked()}
    exec("own = model.forward\nmodel.forward = lambda x: 2 * own(x)", names)
    copy = copied(names["model"])
    with torch.no_grad():
        names["model"].fc2.weight.zero_()
        assert copy(IMAGES).abs().sum() > 0
        assert names["model"](IMAGES).abs().sum() == 0


def test_defaults_of_functions_refer_to_the_copy() -> None:
    model = hooked()
    own = type(model).forward
    model.forward = lambda x, network=model: 2 * own(network, x)
    copy = copied(model)
    with torch.no_grad():
        model.fc2.weight.zero_()
        assert copy(IMAGES).abs().sum() > 0
        assert model(IMAGES).abs().sum() == 0
