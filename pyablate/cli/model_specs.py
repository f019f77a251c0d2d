"""Networks named by a word, as on the command line: ``demo:vgg_bn``, ``my_module:make_model``."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyablate import demo
from pyablate._validation import nearest, optional
from pyablate.cli.data_specs import Pixels
from pyablate.io.weights import load_state, read_state
from pyablate.network.exported import load_exported

_log = logging.getLogger("pyablate")

MODEL_SPECS = ("demo:NAME", "module:factory", "FILE.pt2", "torchvision:NAME", "timm:NAME")
_PREFIXES = ("demo", "torchvision", "timm")


def load_model(
    spec: str,
    weights: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Return the model that `spec` names, in evaluation mode.

    Parameters
    ----------
    spec : str
        ``demo:NAME``, a network shipped with the package; ``module:factory``, a dotted module
        importable from the working directory and the name of a function that takes no arguments,
        or of a module instance; ``FILE.pt2``, a program of `torch.export`, exported in evaluation
        mode with a dynamic batch (it runs what it holds: open only files you trust);
        ``torchvision:NAME`` or ``timm:NAME``, where installed. The last two come with the
        pretrained weights of their library, downloaded where needed, unless `weights` is given.
    weights : path, optional
        A safetensors file, or a checkpoint read with ``weights_only=True``: a state dict, or a
        dict with one under any one key ("state_dict", "model", "net", "ema", ...); prefixes of
        names ("module.", "model.", "backbone.") are matched where exactly one reading fits.
    device : str or torch.device, optional
        Where to put the model; by default it stays where it was made.

    Raises
    ------
    ValueError
        `spec`, `weights` or `device` is not what was expected.
    OSError
        A file is missing or unreadable.
    ImportError
        A module or library is not installed.
    """
    place = None if device is None else _usable_device(device)
    state = None if weights is None else read_state(Path(weights))
    model = _model(spec, pretrained=state is None)
    if state is not None:
        load_state(model, state, os.fspath(weights or ""))
    return (model if place is None else model.to(place)).eval()


def _model(spec: str, *, pretrained: bool) -> nn.Module:
    if spec.endswith(".pt2"):
        return load_exported(Path(spec))
    prefix, colon, name = spec.partition(":")
    if not (prefix and colon and name):
        near = nearest(spec, [f"demo:{network}" for network in demo.NETWORKS], 1)
        raise ValueError(f"model: expected {' | '.join(MODEL_SPECS)}, got {spec!r}{near}")
    if prefix == "demo":
        return demo.network(name) if pretrained else demo.build(name)
    if prefix == "torchvision":
        return _torchvision(name, pretrained)
    if prefix == "timm":
        return _timm(name, pretrained)
    return _from_module(prefix, name, spec, pretrained)


def _torchvision(name: str, pretrained: bool) -> nn.Module:
    models = _library("torchvision", "torchvision.models")
    _known("torchvision", name, models.list_models())
    return _built(lambda: models.get_model(name, weights="DEFAULT" if pretrained else None), name)


def _timm(name: str, pretrained: bool) -> nn.Module:
    timm = _library("timm", "timm")
    # timm takes "name.tag" for one of several sets of weights.
    _known("timm", name.partition(".")[0], timm.list_models())
    return _built(lambda: timm.create_model(name, pretrained=pretrained), name)


def own_pixels(spec: str, model: nn.Module) -> Pixels | None:
    """Return how a model of timm or torchvision wants its images prepared; None of others."""
    library, _, name = spec.partition(":")
    if library == "timm":
        found = importlib.import_module("timm.data").resolve_data_config({}, model=model)
        height, width = found["input_size"][-2:]
        size = (math.floor(width / found["crop_pct"]), width) if height == width else None
        if size is None or found.get("crop_mode", "center") != "center":
            _log.warning(
                "data: %s takes images of %d x %d, cropped by %r: expected squares from the "
                "centre; prepare the images beforehand for the accuracy it is known for",
                *(spec, height, width, found.get("crop_mode", "center")),
            )
        return Pixels(spec, size, found["interpolation"], found["mean"], found["std"])
    if library == "torchvision":
        models = importlib.import_module("torchvision.models")
        found = models.get_model_weights(name).DEFAULT.transforms()
        size = found.resize_size[0], found.crop_size[0]
        return Pixels(spec, size, found.interpolation.value, found.mean, found.std)
    return None


def _library(name: str, module: str) -> Any:
    return optional(module, f"model: {name}:NAME needs {name}: pip install {name}")


def _known(library: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        near = nearest(name, names)
        raise ValueError(f"model: expected the name of a {library} model, got {name!r}{near}")


def _from_module(module: str, name: str, spec: str, pretrained: bool) -> nn.Module:
    with _importable_from_cwd():
        try:
            found = attrgetter(name)(importlib.import_module(module))
        except ModuleNotFoundError as error:
            raise ImportError(
                f"model: cannot import {module!r} ({error}); expected a module, or one of "
                f"{', '.join(_PREFIXES)}, before the colon"
            ) from error
        except AttributeError as error:
            raise ValueError(f"model: no {name!r} in the module {module!r} ({error})") from error
        except Exception as error:  # whatever a user's module raises, a SyntaxError among them
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"model: importing {module!r} failed: {reason}") from error
        if isinstance(found, nn.Module):
            return found
        if not callable(found):
            raise ValueError(
                f"model: expected a function or torch.nn.Module at {spec!r}, "
                f"found {type(found).__name__}"
            )
        if pretrained:
            _remind_of_weights(found, spec)
        return _built(found, spec)


def _remind_of_weights(factory: Callable[..., Any], spec: str) -> None:
    """Say that a factory has trained weights and is called without."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # of code that tells nothing of itself
        return
    for name in ("weights", "pretrained"):
        if name in parameters and not parameters[name].default:
            _log.warning(
                "model: %s takes %s=, and is called without: the network may be untrained. Give "
                "--weights FILE, or a function that calls it as you mean it",
                spec,
                name,
            )
            return


def _built(factory: Callable[[], Any], spec: str) -> nn.Module:
    try:
        model = factory()
    except (ImportError, OSError):
        raise
    except Exception as error:
        # Whatever a user's factory raises: the name of the model tells more than the line of ours.
        raise ValueError(f"model: {spec!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model: expected {spec!r} to return a torch.nn.Module, got {type(model).__name__}"
        )
    return model


@contextmanager
def _importable_from_cwd() -> Iterator[None]:
    # As with "python -m"; an installed command has its own folder there instead.
    cwd = os.getcwd()
    sys.path.insert(0, cwd)
    try:
        yield
    finally:
        sys.path.remove(cwd)


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"device: expected one this machine has, got {str(device)!r} ({reason})"
        ) from None
    return place
