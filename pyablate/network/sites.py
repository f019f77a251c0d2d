"""Which tensors of a network hold units, what they are called, and how they are selected.

A *site* is the output of a module (or of one call of it) that has the batch first and an axis
whose entries are units: the channels of a map, the features of a fully connected layer, the
hidden features of a transformer's MLP. Where units pass a nonlinearity that no module's output
stands for (a residual sum, a functional norm or gate), it is the result of that function. Sites are
found by running the network once on a small sample and watching every operator, so this works for
every network, whether or not it can be exported.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyablate._validation import first_line, nearest
from pyablate.data.inputs import Inputs
from pyablate.network.classifier import Choice, check_choice_of_logits, giving_logits
from pyablate.network.copies import copied, seen_through
from pyablate.network.forward import own_dtype
from pyablate.network.hooks import SPEAKING, Kind, Site, evaluation, hooked
from pyablate.network.survey import Survey, survey
from pyablate.runtime.determinism import uncompiled
from pyablate.runtime.locks import export_lock
from pyablate.runtime.out_of_memory import is_shortage

__all__ = [
    "Kind",
    "Site",
    "Survey",
    "asks_for_everything",
    "check_channels",
    "check_model",
    "copied",
    "evaluation",
    "hooked",
    "parse_label",
    "select",
    "sites",
    "surveyed",
]


def sites(
    model: nn.Module,
    sample: Any,
    *,
    axis: Mapping[str, int] | None = None,
    logits: Choice = None,
) -> list[Site]:
    """List every site of a network, in the order in which the network computes them.

    Parameters
    ----------
    model : nn.Module
        The network. It is run once in evaluation mode without gradients and left as it was.
    sample : Tensor, dict or tuple of Tensor
        A batch of inputs, ``[N, ...]``; one image is enough. Several inputs of the network by
        keyword or by position.
    axis : dict, optional
        Axis of the units of some layers, by name, where you know better than the graph: 0 is the
        batch.
    logits : str, int or callable, optional
        What the network's logits are, where it returns more; see :func:`pyablate.classifier`.

    Returns
    -------
    list of Site
        Modules whose output is one floating-point tensor ``[N, ..., units, ...]``, and results of
        functions where units pass a nonlinearity that no module's output stands for. The
        network's own output (its logits) is not a site: it holds classes.

    Raises
    ------
    ValueError
        ``axis`` names no layer, or an axis that it has not.
    TypeError
        ``model`` is no module, or (in part) TorchScript, where hooks do not reach.

    Examples
    --------
    >>> [site.name for site in pa.sites(model, images[:1]) if site.kind == "activation"]
    ['features.2', 'features.6', 'features.9', 'features.13', 'features.16']
    """
    return surveyed(model, sample, axis, logits).sites


def surveyed(
    model: nn.Module,
    sample: Any,
    axis: Mapping[str, int] | None = None,
    logits: Choice = None,
) -> Survey:
    """Find the sites as :func:`sites` does, and which weights have their units at which of them."""
    check_model(model)
    check_choice_of_logits(logits)
    inputs = None
    if not isinstance(sample, Tensor):
        inputs = Inputs.of(sample)
        sample = inputs.pack(sample, own_dtype(model))
    model = seen_through(model)
    with (
        export_lock(),
        uncompiled(),
        torch.inference_mode(False),
        giving_logits(model, logits, inputs),
    ):
        try:
            found = survey(model, sample.clone())
        except (RuntimeError, IndexError) as error:
            if is_shortage(error):
                raise
            what = inputs or f"an input of shape {list(sample.shape[1:])}"
            raise ValueError(f"data: the model fails on {what}: {first_line(error)}") from error
    return found.with_axes(axis or {})


def asks_for_everything(
    layers: str | Sequence[str] | None, groups: Sequence[Sequence[str]] | None = None
) -> bool:
    """Whether ``"*"`` is among the layers, given or by default."""
    return groups is None if layers is None else "*" in _as_list(layers)


def check_model(model: object) -> None:
    """Check that a model is a network whose layers can be seen at work.

    Raises
    ------
    TypeError
        It is no module, or (in part) compiled to TorchScript, where hooks do not reach.
    ValueError
        A lazy module, or one on the meta device, has no weights yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if any(part is not None and is_lazy(part) for part in _own(module)):
            raise ValueError(
                f"model: {name or 'the model'} ({type(module).__name__}) takes the shape of its "
                "weights from its first input and has seen none; run the model on a batch, then "
                "load its weights"
            )
        if any(part is not None and part.is_meta for part in _own(module)):
            raise ValueError(
                f"model: {name or 'the model'} ({type(module).__name__}) is on the meta device and "
                "has no weights; load them, for example with model.to_empty and load_state_dict"
            )
        if isinstance(module, torch.jit.ScriptModule):
            what = f"{name} is" if name else "this is"
            raise TypeError(
                f"model: {what} TorchScript, whose layers cannot be reached; "
                "give the network from which it was scripted or traced"
            )


def _own(module: nn.Module) -> list[Tensor | None]:
    return [*module._parameters.values(), *module._buffers.values()]


def select(found: Sequence[Site], layers: str | Sequence[str] | None = None) -> list[Site]:
    """Choose sites by name or glob, in the order of ``found``.

    Parameters
    ----------
    found : sequence of Site
        What :func:`sites` returned.
    layers : str or sequence of str, optional
        Dotted module names, taken as they are, and globs. ``"*"`` (the default) is every
        activation and block output. Any other glob selects the activations and blocks that it
        matches, or, if it matches none of these, all the layers that it matches, or, if it matches
        none either, all heads, queries, keys and values.

    Raises
    ------
    ValueError
        A pattern selects nothing; the message offers the nearest names.

    Examples
    --------
    >>> [site.name for site in pa.select(pa.sites(model, images[:1]), "features.1*")]
    ['features.13', 'features.16']
    """
    wanted: set[str] = set()
    for pattern in _as_list(layers):
        wanted.update(site.name for site in _matches(found, pattern))
    return [site for site in found if site.name in wanted]


def check_channels(chosen: Iterable[Site]) -> None:
    """Check that units are single channels or features.

    Raises
    ------
    ValueError
        A layer holds attention heads, which are several features each.
    """
    for site in chosen:
        if site.width > 1:
            raise ValueError(
                f"layers: {site.name!r} holds attention heads, {site.width} features each; "
                "expected layers whose units are single channels or features"
            )


def parse_label(
    found: Sequence[Site], label: str, count: Callable[[Site], int] = lambda site: site.channels
) -> tuple[Site, int]:
    """Turn ``"layer:unit"`` into its site and unit.

    Raises
    ------
    ValueError, TypeError
        The label is malformed or no string, the layer unknown or the unit out of range.
    """
    if not isinstance(label, str):
        raise TypeError(f'unit label: expected "layer:unit", got {type(label).__name__}')
    name, colon, unit = label.rpartition(":")
    if not colon or not unit.isdecimal():
        raise ValueError(f'unit label: expected "layer:unit" such as "features.3:7", got {label!r}')
    site = _named(found, name)
    units = count(site)
    if int(unit) >= units:
        raise ValueError(
            f"unit {unit} of layer {name!r} is out of range: the layer has {units} units "
            f"(0 to {units - 1})"
        )
    return site, int(unit)


def _as_list(layers: str | Sequence[str] | None) -> list[str]:
    if layers is None:
        return ["*"]
    patterns = [layers] if isinstance(layers, str) else list(layers)
    if not patterns:
        raise ValueError('layers: expected names or globs such as "*", got an empty list')
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"layers: expected strings, got {type(pattern).__name__}")
    return patterns


def _matches(found: Sequence[Site], pattern: str) -> list[Site]:
    exact = [site for site in found if site.name == pattern]
    if exact:
        return exact
    if not any(mark in pattern for mark in "*?["):
        return [_named(found, pattern)]
    matched = [site for site in found if fnmatch.fnmatchcase(site.name, pattern)]
    speaking = [site for site in matched if site.kind in SPEAKING]
    if pattern == "*" and not speaking:
        raise ValueError(
            'layers: "*" means activation and block outputs, and this network has none; name the '
            f"layers instead, for example {[site.name for site in found[:4]]}"
        )
    if not matched:
        raise ValueError(f"layers: no layer matches {pattern!r}{_nearest(found, pattern)}")
    return speaking or [site for site in matched if site.kind == "layer"] or matched


def _named(found: Sequence[Site], name: str) -> Site:
    for site in found:
        if site.name == name:
            return site
    raise ValueError(f"layers: no layer that holds units is called {name!r}{_nearest(found, name)}")


def _nearest(found: Sequence[Site], name: str) -> str:
    return nearest(name, [site.name for site in found])
