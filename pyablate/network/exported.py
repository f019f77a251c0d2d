"""Exported programs (``.pt2``) as modules whose submodules have their names, without pickles."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.export.unflatten import InterpreterModule, UnflattenedModule
from torch.nn.utils.parametrize import type_before_parametrizations

from pyablate._validation import first_line
from pyablate.io.pt2_check import check_archive
from pyablate.runtime.locks import export_lock

logger = logging.getLogger("pyablate")

MAX_BYTES = 64 << 30
"""Limit of an unpacked archive and of its tensors; the largest image classifiers have some 10."""


CHECKED = importlib.util.find_spec("torch.export.pt2_archive") is not None
"""Whether this torch keeps programs in the kind of archive that is checked; 2.6 had another."""


class ExportedModel(nn.Module):
    """An exported program as a plain module: submodules under their names, hooks that fire.

    Unlike the module torch makes of a program, it can be copied, converted and exported again.

    Parameters
    ----------
    source : torch.export.UnflattenedModule
        Takes one tensor and returns one; its submodules are taken over.
    """

    def __init__(self, source: UnflattenedModule) -> None:
        super().__init__()
        for name, child in source._modules.items():
            self.add_module(name, child)
        for name, parameter in source._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in source._buffers.items():
            kept = name not in source._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=kept)
        self.graph = source.graph
        for node in self.graph.nodes:
            if node.op == "get_attr" and not hasattr(self, node.target.partition(".")[0]):
                setattr(self, node.target, getattr(source, node.target))
        for module in self.modules():
            graph = getattr(module, "graph", None)
            for node in graph.nodes if isinstance(graph, torch.fx.Graph) else ():
                node.meta.clear()  # symbolic tensors, which cannot be copied

    def forward(self, images: Tensor) -> Tensor:
        """Return what the program returns for `images`."""
        run = torch.fx.Interpreter(self, graph=self.graph).run
        outputs: tuple[Tensor] = run(images, enable_io_processing=False)
        return outputs[0]


def load_exported(path: Path) -> nn.Module:
    """Load an exported program (``.pt2``) as a module whose submodules carry their names.

    The archive is checked before torch reads it (:mod:`pyablate.io.pt2_check`): unpickling is
    restricted to tensors, the graph to operators of torch that compute. Refused are programs in
    training mode, with a fixed batch size, or with other than one tensor in and one out.
    """
    if not path.is_file():
        raise FileNotFoundError(f"model: expected an exported program, found no file {str(path)!r}")
    name = str(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(f"model: {name!r} is no exported program (.pt2 archive)")
    if not CHECKED:
        raise ValueError(
            f"model: {name!r} is not read with torch {torch.__version__}, whose archives of "
            "exported programs are not checked here: use a newer torch, or name the network as "
            "module:factory"
        )
    try:
        check_archive(path, max_bytes=MAX_BYTES)
        with quiet_export(), _only_tensors_unpickled():
            program = torch.export.load(path)
            _check_program(program, name)
            return ExportedModel(torch.export.unflatten(program))
    except OSError:
        raise
    except pickle.UnpicklingError:
        raise ValueError(f"model: {name!r} holds pickled objects, expected tensors only") from None
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("model:"):
            raise
        # The archive reader raises whatever the damage leads to.
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise ValueError(f"model: {name!r} could not be loaded ({reason})") from error


def original_type(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module; of one in an exported program, that before the export.

    A parametrization (weight norm, spectral norm) changes the class too, and is looked through.
    Only the classes of `torch.nn` are told: of a user's own class nothing but the name is left, and
    the class of the exported module stands for it.
    """
    name = module.type_name() if isinstance(module, InterpreterModule) else None
    if name is None or not name.startswith("torch.nn.modules."):
        return cast(type[nn.Module], type_before_parametrizations(module))
    found = getattr(nn, name.rpartition(".")[2], None)
    return found if isinstance(found, type) else type(module)


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


@contextmanager
def quiet_export() -> Iterator[None]:
    """Hold the lock of torch.export, and silence it meanwhile: our errors take one line."""
    with export_lock(), _silenced():
        yield


@contextmanager
def _silenced() -> Iterator[None]:
    loggers = [
        logging.getLogger(f"torch.{name}") for name in ("export", "fx.experimental", "_subclasses")
    ]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    try:
        # torch writes the graph of a failed export straight to standard error
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()) as said:
            warnings.simplefilter("ignore")
            yield
        logger.debug("torch.export: %s", said.getvalue())
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


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
    returned = [spec.kind for spec in program.graph_signature.output_specs]
    if returned.count(OutputKind.USER_OUTPUT) != 1:
        raise ValueError(
            f"model: expected one output (the logits) of {name!r}, found "
            f"{returned.count(OutputKind.USER_OUTPUT)}"
        )
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
