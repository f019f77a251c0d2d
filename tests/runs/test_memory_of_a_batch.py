"""How many images a batch may have: by the memory that the clean run really keeps."""

from __future__ import annotations

import pytest
import torch
from support import networks

from pyablate import interventions
from pyablate.engine.suffix import Suffix, needed
from pyablate.network.graph import MARKER
from pyablate.runs import setup as prepare

IMAGES = 6


@pytest.mark.parametrize("name", ["residual", "mlp"])
def test_marked_outputs_are_counted_once(name):
    model, images, labels = networks.network(name, IMAGES)
    options = prepare.SetupOptions(None, None, interventions.parse("zero"), precision="fp32")
    setup = prepare.prepare(model, (images, labels), options)
    kept = needed(Suffix.of(setup.graph, job) for job in setup.jobs)
    assert any(node.target is MARKER and prepare._owner(node) in kept for node in kept)
    with torch.no_grad():
        tensors = setup.graph.run(images, kept)
    memory = {value.data_ptr(): value.nbytes for value in tensors.values()}
    owners = {prepare._owner(node) for node in kept}
    counted = sum(setup.graph.elements(node) for node in owners)
    assert counted * images.element_size() * IMAGES == sum(memory.values())
