"""Fingerprint of a run: hashes of model, data and options, and the versions that computed it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pyablate._native import build_info
from pyablate.data.dataset import Batch, Data
from pyablate.network.classifier import choice_of
from pyablate.network.graph import MARKER, Graph
from pyablate.runtime.distributed import MODULUS

if TYPE_CHECKING:
    from pyablate.runs.setup import Setup

Identity = dict[str, Any]
"""JSON: ``model``, ``data``, ``units``, ``classes``, ``options``, ``versions``."""


def identify(
    setup: Setup,
    *,
    dtype: torch.dtype,
    images: range,
    strategy: str,
    audit: int,
    seed: int,
    measures: Sequence[str],
    guarantee: Mapping[str, Any],
) -> Identity:
    """Describe a run by everything that its result depends on.

    Parameters
    ----------
    setup : Setup
        The run.
    dtype : torch.dtype
        In which weights are compared: the model's own, whatever precision works on them.
    images : range
        Those of this run, a part of the data under ``shard``.
    strategy, audit, seed, measures
        As :func:`pyablate.ablate` takes them.
    guarantee : mapping
        Options of a screened or an estimated run, its guarantee among them; none of an exact one.

    Returns
    -------
    dict
        JSON. The data's hash is not in it: it is known when all images have been read.
    """
    members = [job.members for job in setup.jobs]
    options: dict[str, Any] = {
        "intervention": str(setup.intervention),
        "strategy": strategy,
        "audit": int(audit),
        "seed": int(seed),
        "measures": list(measures),
        **guarantee,
    }
    for name in ("directions", "values"):
        given = getattr(setup.intervention, name)
        if given is not None:
            options[name] = _by_layer(given)
    if setup.axes:
        options["axis"] = dict(sorted(setup.axes.items()))
    labels = {} if setup.data.labelled else {"labels": "none"}
    return {
        "model": {
            "structure": _structure(setup.model, setup.graph),
            "weights": _weights(setup.model, dtype),
        },
        "data": {"images": len(setup.data), "first": images.start, "count": len(images), **labels},
        "units": {"count": setup.rows, "hash": _text(json.dumps(members))},
        "classes": {"count": setup.classes, "hash": _text(json.dumps(setup.class_names))},
        "options": options,
        "versions": {
            "pyablate": build_info()["version"],
            **{name: metadata.version(name) for name in ("torch", "numpy")},
        },
    }


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Name what differs between two identities, with both values where they can be read."""
    found = []
    for path, there, here in _leaves(theirs, ours):
        if there == here or (path in _READ_LATER and None in (there, here)):
            continue
        name = ".".join(path)
        hashed = path[-1] in _HASHES
        found.append(f"{_NAMES.get(name, name)}" + ("" if hashed else f" ({there}, now {here})"))
    return found


_READ_LATER = [("data", name) for name in ("hash", "others", "sample", "files")]
"""Known when all images have been read, or only of shards and where other images replace units."""

_HASHES = frozenset(
    "labels hash others sample files structure weights directions values".split()  # no figures
)

_NAMES = {
    "model.structure": "the model's structure",
    "model.weights": "the model's weights",
    "data.images": "the number of images",
    "data.first": "the first image of the shard",
    "data.count": "the number of images of the shard",
    "data.labels": "whether there are labels",
    "data.hash": "the images or labels",
    "data.others": "the images or labels",
    "data.sample": "the images or labels of the whole data set",
    "data.files": "the names or sizes of the image files",
    "units.count": "the number of units to ablate",
    "units.hash": "the units to ablate (layers, groups)",
    "classes.count": "the number of classes",
    "classes.hash": "the class names",
}


def _leaves(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    for name in dict.fromkeys([*ours, *theirs]):
        there, here = theirs.get(name), ours.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            yield from _leaves(there, here, (*path, name))
        else:
            yield (*path, name), there, here


def hash_images(batch: Batch, dtype: torch.dtype) -> int:
    """Hash the images and labels of a batch, so that hashes of batches add up to that of the data.

    The sum modulo 2^256 of a SHA-256 of each image, its label and its place: it does not depend
    on how the data are cut into batches, or on which machine read which.

    Parameters
    ----------
    batch : Batch
        Some images.
    dtype : torch.dtype
        In which they are compared.
    """
    pixels = batch.images.to("cpu", dtype).flatten(1).contiguous().numpy()
    places = np.stack([batch.index.numpy(), batch.labels.cpu().numpy()], axis=1)
    total = 0
    for place, image in zip(places, pixels, strict=True):
        digest = hashlib.sha256(place.tobytes())
        digest.update(image.data)
        total += int.from_bytes(digest.digest(), "big")
    return total % MODULUS


def glance(data: Data, dtype: torch.dtype) -> dict[str, str] | None:
    """Tell a whole data set without reading all of it.

    Parameters
    ----------
    data : Data
        All images.
    dtype : torch.dtype
        In which they are compared.

    Returns
    -------
    dict or None
        Hashes of ``SAMPLE`` images and labels spread over all, and of the names, sizes and classes
        of all files of a folder of images. None where nothing less than all can be read (loaders
        that shuffle, plain iterables), or all are in memory: those are hashed.
    """
    dataset = data.dataset
    if dataset is None:
        return None
    count = len(data)
    # One from each of equal stretches, at a place of its own: files often come in a pattern.
    edges = np.linspace(0, count, min(SAMPLE, count) + 1).astype(np.int64)
    draw = np.random.Generator(np.random.Philox(count)).random(len(edges) - 1)
    index = (edges[:-1] + draw * np.diff(edges)).astype(np.int64).tolist()
    total = sum(hash_images(batch, dtype) for batch in data.some(index)) % MODULUS
    told = {"sample": f"{total:064x}"}
    if hasattr(dataset, "listing"):
        digest = hashlib.sha256()
        for line in dataset.listing():
            digest.update(f"{line}\n".encode(errors="surrogateescape"))
        told["files"] = digest.hexdigest()
    return told


SAMPLE = 256
"""Images by which a data set is told that would take long to read."""


def _weights(model: nn.Module, dtype: torch.dtype) -> str:
    """Hash parameters, buffers and tensors held as plain attributes, with names and shapes."""
    attributes = (
        (f"{name}.{key}", value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    )
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers(), *attributes]:
        value = tensor.detach().to("cpu")
        value = value.to(dtype) if value.is_floating_point() else value
        digest.update(f"{name}{list(value.shape)}{value.dtype}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _structure(model: nn.Module, graph: Graph | None) -> str:
    """Hash what the network computes: its operators, or its modules and their source."""
    if graph is not None:
        return _operations(graph)
    kinds = dict.fromkeys(type(module) for module in model.modules())
    told = [choice] if (choice := choice_of(model)) else []
    return _text("\n".join([repr(model), *map(_source, kinds), *told]))


def _operations(graph: Graph) -> str:
    """Hash the logits by the operators that they come from, whatever their order and names.

    Which tensors are marked as sites makes no difference.
    """
    hashes: dict[fx.Node, str] = {}
    for node in graph.graph.nodes:
        if node.target is MARKER:
            hashes[node] = hashes[node.all_input_nodes[0]]
            continue
        args, options = fx.node.map_arg((node.args, node.kwargs), hashes.__getitem__)
        hashes[node] = _text(f"{node.op} {node.target} {args} {options}")
    return hashes[graph.output]


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed into a console, or compiled
        return f"{kind.__module__}.{kind.__qualname__}"


def _by_layer(given: Tensor | Mapping[str, Tensor]) -> str:
    by_layer = given if isinstance(given, Mapping) else {"": given}
    digest = hashlib.sha256()
    for layer in sorted(by_layer):
        matrix = torch.as_tensor(by_layer[layer]).detach().to("cpu", torch.float64)
        digest.update(f"{layer}{list(matrix.shape)}".encode())
        digest.update(_bytes(matrix))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(identity: Mapping[str, Any] | Sequence[Any]) -> str:
    """Hash an identity."""
    return _text(json.dumps(identity, sort_keys=True))


def table_fingerprint(model: nn.Module, data: Any, choices: Any) -> str:
    """Hash what a table of ablations depends on: modules, weights, all images, choices as JSON.

    Short, since it stands in each row. Unlike :func:`identify` it needs no captured network.
    """
    digest = hashlib.sha256((repr(model) + choice_of(model)).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(value.detach().cpu()))
    for batch in Data(data, dtype=torch.float32, device=torch.device("cpu")).batches(1024):
        digest.update(_bytes(batch.images))
        digest.update(_bytes(batch.labels))
    digest.update(json.dumps(choices).encode())
    return digest.hexdigest()[:16]
