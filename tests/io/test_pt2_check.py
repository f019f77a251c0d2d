"""Exported programs run no code when they are loaded: what torch would run is refused first."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.touch import Touch
from torch import Tensor, nn

from pyablate.cli.model_specs import load_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sound program."""
    pytest.importorskip("torch.export.pt2_archive", reason="torch 2.6 had another archive")

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.linear(x.flatten(1))).reshape(2 * x.shape[0], 2)[::2]

    path = tmp_path_factory.mktemp("exported") / "small.pt2"
    program = torch.export.export(
        Small().eval(), (torch.rand(3, 2, 3),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    torch.export.save(program, path)
    return path


Change = Callable[[str, bytes], bytes]


def rewritten(source: Path, target: Path, change: Change, **more: bytes) -> Path:
    """Return a copy with changed members, and some more of them."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.namelist():
            new.writestr(member, change(member, old.read(member)))
        root = old.namelist()[0].split("/")[0]
        for name, content in more.items():
            new.writestr(f"{root}/{name}", content)
    return target


def in_model(change: Callable[[dict[str, Any]], None]) -> Change:
    def rewrite(member: str, content: bytes) -> bytes:
        if not member.endswith("models/model.json"):
            return content
        model = json.loads(content)
        change(model)
        return json.dumps(model).encode()

    return rewrite


def nodes(model: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = model["graph_module"]["graph"]["nodes"]
    return found


def with_target(target: str) -> Change:
    return in_model(lambda model: nodes(model)[-1].update(target=target))


def with_expression(text: str) -> Change:
    def change(model: dict[str, Any]) -> None:
        values = model["graph_module"]["graph"]["tensor_values"].values()
        size = next(s for value in values for s in value["sizes"] if "as_expr" in s)
        size["as_expr"]["expr_str"] = text

    return in_model(change)


def with_structure(spec: Any) -> Change:
    def change(model: dict[str, Any]) -> None:
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = json.dumps([1, spec])

    return in_model(change)


def with_pickled_weight(trap: Path) -> Change:
    def change(member: str, content: bytes) -> bytes:
        if member.endswith("weights/weight_0"):
            buffer = io.BytesIO()
            torch.save(Touch(trap), buffer)
            return buffer.getvalue()
        if member.endswith("model_weights_config.json"):
            config = json.loads(content)
            next(iter(config["config"].values()))["use_pickle"] = True
            return json.dumps(config).encode()
        return content

    return change


def with_pickled_inputs(trap: Path) -> Change:
    buffer = io.BytesIO()
    torch.save(((Touch(trap),), {}), buffer)
    return lambda name, content: buffer.getvalue() if "sample_inputs" in name else content


DEFAULTS = {
    "type": "collections.defaultdict",
    "context": json.dumps(
        {"default_factory_module": "this", "default_factory_name": "s", "dict_context": []}
    ),
    "children_spec": [],
}
ENUMS = {
    "type": "builtins.dict",
    "context": json.dumps([{"__enum__": True, "fqn": "this:s", "name": "x"}]),
    "children_spec": [],
}
PROGRAMS: dict[str, Callable[[Path], Change]] = {
    "pickled weight": with_pickled_weight,
    "pickled inputs": with_pickled_inputs,
    "size that runs": lambda trap: with_expression(f"__import__('os').mkdir({str(trap)!r})"),
    "size that runs built-ins": lambda trap: with_expression(
        "exec(" + "+".join(f"chr({ord(c)})" for c in f"import os; os.mkdir({str(trap)!r})") + ")"
    ),
    "size that never ends": lambda _: with_expression("Pow(Integer(9), Pow(9, Pow(9, 9)))"),
    "size as a power": lambda _: with_expression("9**9**9**9"),
    "function of the system": lambda _: with_target("torch.os.system"),
    "attribute of an operator": lambda _: with_target("torch.ops.aten.__class__.mro"),
    "operator that opens files": lambda _: with_target("torch.ops.aten.from_file.default"),
    "operator of a library": lambda _: with_target("torch.ops.elsewhere.run.default"),
    "loader of libraries": lambda _: with_target("torch.ops.load_library"),
    "module named by a structure": lambda _: with_structure(DEFAULTS),
    "class named by a structure": lambda _: with_structure(ENUMS),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_an_exported_program_runs_no_code(kind, exported, tmp_path, trap):
    path = rewritten(exported, tmp_path / "evil.pt2", PROGRAMS[kind](trap))
    with pytest.raises(ValueError, match=r"model: '.*evil.pt2' (holds|calls|takes)"):
        load_model(str(path))
    assert not trap.exists()


@pytest.mark.parametrize("kind", ["pickled weight", "pickled inputs", "size that runs"])
def test_torch_itself_would_have_run_it(kind, exported, tmp_path, trap):
    path = rewritten(exported, tmp_path / "evil.pt2", PROGRAMS[kind](trap))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
        with contextlib.suppress(Exception):  # after the damage is done
            torch.export.load(path)
    assert trap.exists()


@pytest.mark.parametrize(
    "member",
    [
        "data/aotinductor/model/model.so",
        "data/constants/custom_obj_0",
        "x/code.so",
        "data/constants/opaque_obj_0",
    ],
)
def test_an_exported_program_with_foreign_members(member, exported, tmp_path):
    path = rewritten(exported, tmp_path / "a.pt2", lambda _, content: content, **{member: b"x"})
    with pytest.raises(ValueError, match=r"holds (compiled code|pickled objects)"):
        load_model(str(path))


def test_an_exported_program_that_claims_too_much(exported, tmp_path):
    def change(member: str, content: bytes) -> bytes:
        if not member.endswith("model_weights_config.json"):
            return content
        config = json.loads(content)
        for entry in config["config"].values():
            entry["tensor_meta"]["sizes"] = [{"as_int": 1 << 40}]
            entry["tensor_meta"]["strides"] = [{"as_int": 0}]
        return json.dumps(config).encode()

    with pytest.raises(ValueError, match=r"unpacks to \d+ bytes, the limit is"):
        load_model(str(rewritten(exported, tmp_path / "a.pt2", change)))


def test_a_sound_exported_program_loads(exported, tmp_path):
    path = rewritten(exported, tmp_path / "a.pt2", lambda _, content: content)
    assert load_model(str(path))(torch.rand(5, 2, 3)).shape == (5, 2)
