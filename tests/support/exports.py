"""Exports kept from test to test: exporting a network takes longer than most runs of it."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import pytest
import torch

from pyablate.network import capture
from pyablate.network.any_batch import Parts

_kept: dict[Any, Any] = {}


def keep(patch: pytest.MonkeyPatch) -> None:
    """Export each network that has a name in the tests once for each choice of layers."""
    export = capture._export

    def kept(model: Any, pair: Any, sites: Any) -> Any:
        if not hasattr(model, "known_as"):
            return export(model, pair, sites)
        digest = hashlib.sha256()
        for value in model.state_dict().values():
            digest.update(value.reshape(-1).view(torch.uint8).numpy())
        layers = tuple((site.name, site.call) for site in sites)
        key = (model.known_as, repr(model), digest.digest(), layers, pair.shape, pair.dtype)
        if key not in _kept:
            _kept[key] = export(model, pair, sites)
        whole = _kept[key]
        graph = copy.deepcopy(whole.graph)  # whoever reads a program changes its graph
        node = dict(zip(whole.graph.nodes, graph.nodes, strict=True))
        for old, new in node.items():
            new.name = old.name  # a copy avoids Python's own names, such as input
        constants = {node[old]: value for old, value in whole.constants.items()}
        return Parts(graph, node[whole.images], node[whole.logits], constants)

    patch.setattr(capture, "_export", kept)
