"""A ranking as masks of torch.nn.utils.prune, and in Torch-Pruning's pruner."""

from __future__ import annotations

import pytest
import torch
from support.compressible import Dense, Mobile, images, made, silenced
from torch.nn.utils import prune

import pyablate as pa
from pyablate.compression import filter_ranking, importance, masked

torch_pruning = pytest.importorskip("torch_pruning")


@pytest.mark.parametrize("name", ["alexnet", "vgg_bn", "resnet"])
def test_masked_weights_silence_the_units(name):
    model, pictures, _ = pa.demo.load(name, limit=6)
    ranking = pa.rank(model, pictures[:1], "random", scope="layer")
    changed = masked(model, ranking, 0.3, pictures[:1])
    expected = silenced(model, pictures, ranking.units(0.3))
    with torch.no_grad():
        torch.testing.assert_close(changed(pictures), expected, atol=1e-4, rtol=1e-4)
        assert (model(pictures) - expected).abs().max() > 0.1
    pruned = [module for module in changed.modules() if prune.is_pruned(module)]
    assert pruned
    assert not prune.is_pruned(model)


def test_masks_of_tied_channels():
    model = made(Dense)  # no batch norm between the convolutions and the sums of channels
    ranking = pa.rank(model, images(), "random")
    changed = masked(model, ranking, 0.3, images())
    assert prune.is_pruned(changed.get_submodule("last"))


@pytest.mark.parametrize("network", [Mobile])
def test_torch_pruning_removes_what_the_ranking_says(network):
    model = made(network)
    ranking = pa.rank(model, images(), "random", seed=4)
    score = importance(model, ranking, images())
    graph = torch_pruning.DependencyGraph().build_dependency(model, images(), verbose=False)
    place = {unit: i for i, one in enumerate(ranking.order) for unit in one.units}
    expand = model.get_submodule("blocks.1.expand.0")
    pruner = graph.get_pruner_of_module(expand)
    group = graph.get_pruning_group(expand, pruner.prune_out_channels, list(range(16)))
    expected = [place[f"blocks.1.expand.2:{unit}"] for unit in range(16)]
    assert score(group).tolist() == expected


def test_a_whole_pruner_of_torch_pruning_agrees_with_remove():
    model, pictures, _ = pa.demo.load("vgg_bn", limit=6)
    ranking = filter_ranking(model, pictures[:1], "l2")
    removal = pa.remove(model, ranking, pictures[:1], fraction=0.25)
    theirs = pa.demo.network("vgg_bn")
    pruner = torch_pruning.pruner.BasePruner(
        theirs,
        pictures[:1],
        importance=importance(model, ranking, pictures[:1]),
        pruning_ratio=0.25,
        ignored_layers=[theirs.classifier],
    )
    pruner.step()
    with torch.no_grad():
        torch.testing.assert_close(theirs(pictures), removal.model(pictures))
