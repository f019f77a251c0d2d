"""Reading of weights and exported programs, without arbitrary pickles."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.export.unflatten import InterpreterModule

# Where trainers put the weights inside a checkpoint, in the order tried.
_NESTED = ("state_dict", "model_state_dict", "model")
# Wrappers (DataParallel, torch.compile) that leave their name in front of every key.
_WRAPPERS = ("module.", "_orig_mod.")
_NAMED = 3
# Members of a .pt2 archive that are unpickled without restriction.
_PICKLED_MEMBER = re.compile(r"data/constants/(custom|opaque)_obj_")


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the weights in a safetensors file or a checkpoint of ``torch.save``.

    A checkpoint holds a state dict, or a dict with one under "state_dict", "model_state_dict" or
    "model"; the prefixes "module." and "_orig_mod." are dropped where every key has them.

    Raises
    ------
    OSError
        The file is missing or unreadable.
    ValueError
        The file is damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights: expected a file, found none at {str(path)!r}")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"weights: {str(path)!r} is no safetensors file ({error})") from None
    return _without_wrappers(_state_in(_unpickle_tensors(path), path))


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `model`; missing, unexpected and misshapen entries are all named.

    The batch counter of batch norm may be missing: old checkpoints lack it, evaluation does not
    read it.

    Raises
    ------
    ValueError
        `state` does not fit; the model is unchanged then.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    misshapen = [
        f"{k}: expected {list(own[k].shape)}, found {list(state[k].shape)}"
        for k in own
        if k in state and own[k].shape != state[k].shape
    ]
    faults = [
        f"{len(names)} {kind} ({_first(names)})"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if faults:
        raise ValueError(f"weights: {source!r} does not fit the model: {'; '.join(faults)}")
    model.load_state_dict(state, strict=False)


def load_exported(path: Path) -> nn.Module:
    """Load an exported program (``.pt2``) as a module whose submodules carry their names.

    Unpickling is restricted to tensors and archives with custom objects are refused, but the graph
    itself is a program: load only files you trust.

    Raises
    ------
    OSError
        The file is missing or unreadable.
    ValueError
        The file is no exported program, was exported in training mode, with a fixed batch size,
        or takes other than one input.
    """
    if not path.is_file():
        raise FileNotFoundError(f"model: expected an exported program, found no file {str(path)!r}")
    name = str(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(f"model: {name!r} is no exported program (.pt2 archive)")
    with zipfile.ZipFile(path) as archive:
        if any(_PICKLED_MEMBER.search(member) for member in archive.namelist()):
            raise ValueError(f"model: {name!r} holds pickled objects, expected tensors only")
    try:
        with _only_tensors_unpickled(), warnings.catch_warnings():
            # torch's own deprecations, raised while it rebuilds the graph.
            warnings.simplefilter("ignore", FutureWarning)
            program = torch.export.load(path)
            _check_program(program, name)
            return torch.export.unflatten(program)
    except OSError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("model:"):
            raise
        # The archive reader raises whatever the damage leads to.
        raise ValueError(f"model: {name!r} could not be loaded ({_one_line(error)})") from error


def original_type(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module; of one in an exported program, that before the export.

    Only the classes of `torch.nn` are told: of a user's own class nothing but the name is left, and
    the class of the exported module stands for it.
    """
    name = module.type_name() if isinstance(module, InterpreterModule) else None
    if name is None or not name.startswith("torch.nn.modules."):
        return type(module)
    found = getattr(nn, name.rpartition(".")[2], None)
    return found if isinstance(found, type) else type(module)


def _unpickle_tensors(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:
        # The restricted unpickler stumbles over foreign bytes in many ways.
        raise ValueError(
            f"weights: {str(path)!r} is damaged or holds objects other than tensors; "
            "expected a state dict"
        ) from None


def _state_in(content: Any, path: Path) -> dict[str, Tensor]:
    found = content
    if isinstance(content, dict):
        for key in _NESTED:
            if isinstance(content.get(key), dict):
                found = content[key]
                break
    if not isinstance(found, dict) or not found:
        raise ValueError(
            f"weights: expected a state dict in {str(path)!r}, found {type(found).__name__}"
            + (" without entries" if isinstance(found, dict) else "")
        )
    strange = [str(k) for k, v in found.items() if not isinstance(v, Tensor)]
    if strange:
        raise ValueError(
            f"weights: expected tensors only in {str(path)!r}, "
            f"found {len(strange)} other entries ({_first(strange)})"
        )
    return found


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS:
        if all(key.startswith(prefix) for key in state):
            return _without_wrappers({k.removeprefix(prefix): v for k, v in state.items()})
    return state


@contextmanager
def _only_tensors_unpickled() -> Iterator[None]:
    # torch.export.load asks torch.load for unrestricted unpickling; this variable overrules it.
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_program(program: torch.export.ExportedProgram, name: str) -> None:
    wanted = {
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.USER_INPUT
    }
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    shapes = [node.meta["val"].shape for node in inputs if node.name in wanted]
    if len(shapes) != 1 or not len(shapes[0]):
        raise ValueError(f"model: expected one input (the images) of {name!r}, found {len(shapes)}")
    if isinstance(shapes[0][0], int):
        raise ValueError(
            f"model: {name!r} was exported for batches of {shapes[0][0]}; expected a dynamic "
            'batch: export with dynamic_shapes=({0: torch.export.Dim("batch")},)'
        )
    for node in program.graph.nodes:
        if node.op == "call_function" and _is_training(node):
            raise ValueError(
                f"model: {name!r} was exported in training mode ({node.target}); "
                "expected model.eval() before the export"
            )


def _is_training(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    for position, argument in enumerate(schema.arguments):
        if argument.name in ("train", "training"):
            given = node.args[position] if position < len(node.args) else None
            return node.kwargs.get(argument.name, given) is True
    return False


def _first(names: list[str]) -> str:
    more = [f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join(names[:_NAMED] + more)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
