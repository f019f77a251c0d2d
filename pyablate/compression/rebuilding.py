"""A smaller network as its weights, and the code that makes a network for them.

The code needs what made the original, torch and safetensors: not this package, nor Torch-Pruning.
"""

from __future__ import annotations

import os
import pprint
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyablate.io.atomic import check_file, replace_file
from pyablate.io.weights import write_state

MARK = '"""Written by pyablate: '

_CODE = '''{mark}the network of {weights}, made from {maker}.

In the shell: ``{module}:make_model --weights {weights}``.
"""

from pathlib import Path

import torch
from torch import nn

# What modules know of their sizes, and shapes of their weights, where the original has others.
SIZES = {sizes}
SHAPES = {shapes}
# Of all weights; None where it is the original's, which has several.
DTYPE = {dtype}


def original() -> nn.Module:
    """Make the network that this one was made from."""
    {imported}

    return {made}


def make_model() -> nn.Module:
    """Make the network, with weights yet to be loaded."""
    model = original()
    for name, own in SIZES.items():
        vars(model.get_submodule(name)).update(own)
    for name, shape in SHAPES.items():
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        new = getattr(module, own).detach().new_zeros(shape)
        if own in module._parameters:
            new = nn.Parameter(new, new.is_floating_point())
        setattr(module, own, new)
    return model if DTYPE is None else model.to(DTYPE)


def load_model() -> nn.Module:
    """Make the network and load its weights, which lie beside this file."""
    from safetensors.torch import load_file

    model = make_model()
    state = load_file(Path(__file__).with_name({weights!r}))
    for name, own in model.state_dict().items():
        if own.dtype != state[name].dtype:
            raise ValueError(f"{{name}}: made in {{own.dtype}}, saved in {{state[name].dtype}}")
    model.load_state_dict(state)
    return model.eval()
'''


def save_weights(
    model: nn.Module, original: nn.Module, maker: str, path: str | os.PathLike[str]
) -> None:
    """Write the weights of a smaller network, and a file of code that makes a network for them.

    Parameters
    ----------
    model : nn.Module
        The smaller network, such as ``removal.model``; it may have been trained further.
    original : nn.Module
        The network that it was made from, with modules of the same names.
    maker : str
        What makes the original, as the shell names it: ``module:factory``, ``demo:NAME``,
        ``torchvision:NAME`` or ``timm:NAME``.
    path : path
        A file called ``*.safetensors``; the code goes beside it, under the same name with ``.py``.
        Its ``load_model()`` gives the network, its ``make_model()`` one to be trained or loaded.

    Raises
    ------
    ValueError
        Another suffix, a name that no Python module has, another ``maker``, or networks with
        other modules or weights, or with weights in several precisions that are not the original's.
    OSError
        A file cannot be written, or one is there under the name of the code that this function did
        not write.

    Examples
    --------
    >>> removal = pa.remove(model, ["features.16:3"], images[:2])
    >>> save = pa.compression.save_weights
    >>> save(removal.model, model, "demo:vgg_bn", "smaller.safetensors")
    >>> import runpy
    >>> runpy.run_path("smaller.py")["load_model"]().classifier.in_features
    127
    """
    target = Path(path)
    if target.suffix != ".safetensors" or not target.stem.isidentifier():
        raise ValueError(
            "path: expected a file called NAME.safetensors, with a NAME that Python can import, "
            f"got {str(path)!r}"
        )
    code = target.with_suffix(".py")
    check_file(target, "path")
    check_file(code, "path")
    if code.exists() and not code.read_text("utf-8", errors="replace").startswith(MARK):
        raise FileExistsError(f"path: {code} is there, and not written by pyablate")
    imported, made = _maker(maker)
    text = _CODE.format(
        mark=MARK,
        weights=target.name,
        module=target.stem,
        maker=maker,
        imported=imported,
        made=made,
        sizes=pprint.pformat(_sizes(model, original), width=88),
        shapes=pprint.pformat(_shapes(model, original), width=88),
        dtype=_dtype(model, original),
    )
    write_state(model, target)
    replace_file(code, text.encode())


def _maker(spec: str) -> tuple[str, str]:
    """Return an import and an expression for what makes the original."""
    prefix, colon, name = spec.partition(":")
    libraries = {
        "demo": ("from pyablate import demo", f"demo.build({name!r})"),
        "torchvision": (
            "from torchvision import models",
            f"models.get_model({name!r}, weights=None)",
        ),
        "timm": ("import timm", f"timm.create_model({name!r})"),
    }
    if prefix in libraries and re.fullmatch(r"[\w./-]+", name):
        return libraries[prefix]
    words = [*prefix.split("."), *name.split(".")]
    if not colon or not all(word.isidentifier() for word in words):
        raise ValueError(
            "maker: expected module:factory, demo:NAME, torchvision:NAME or timm:NAME, got "
            f"{spec!r}"
        )
    return f"import {prefix}", f"{prefix}.{name}()"


def _sizes(model: nn.Module, original: nn.Module) -> dict[str, dict[str, Any]]:
    """Whole numbers among the attributes of modules, as far as they differ from the original's."""
    others = dict(original.named_modules())
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if type(module) is not type(others.get(name)):
            raise ValueError(f"model: expected the modules of the original, got {name!r}")
        known = vars(others[name])
        own = {
            key: value
            for key, value in vars(module).items()
            if _is_size(value) and key != "training" and value != known.get(key)
        }
        if own:
            found[name] = own
    return found


def _is_size(value: Any) -> bool:
    several = value if isinstance(value, tuple) else (value,)
    return all(isinstance(each, int) for each in several)


def _shapes(model: nn.Module, original: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters and buffers that differ from the original's."""
    theirs = original.state_dict()
    ours = model.state_dict()
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())[0]
        raise ValueError(f"model: expected the weights of the original, and no other than {odd!r}")
    return {name: tuple(v.shape) for name, v in ours.items() if v.shape != theirs[name].shape}


def _dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Floating dtypes of the weights and buffers by name."""
    state = model.state_dict()
    return {name: t.dtype for name, t in state.items() if t.is_floating_point()}


def _dtype(model: nn.Module, original: nn.Module) -> torch.dtype | None:
    """Precision of all weights; None where they have several, those of the original.

    The code makes a network in the maker's precision, into which weights would be rounded unsaid.
    """
    ours, theirs = _dtypes(model), _dtypes(original)
    if len(set(ours.values())) == 1:
        return next(iter(ours.values()))
    odd = [name for name, dtype in ours.items() if dtype != theirs[name]]
    if odd:
        raise ValueError(
            "model: expected weights of one dtype, or of those of the original; got "
            f"{ours[odd[0]]} at {odd[0]}, where the original has {theirs[odd[0]]}"
        )
    return None
