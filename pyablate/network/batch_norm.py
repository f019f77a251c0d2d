"""Batch norm put into the weights in front of it, so that a pass has fewer operations."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from pyablate.network import near_tie
from pyablate.network.forward import forward
from pyablate.network.sites import copied

logger = logging.getLogger("pyablate")

_AGREEMENT = 1e-4
"""Share of the largest logit by which folding may change one."""

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def norms_to_fold(model: nn.Module, sample: Tensor) -> list[tuple[str, str]]:
    """Name each convolution or linear layer that batch norm alone reads, with that norm.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode. Its code is followed on symbols.
    sample : Tensor
        A batch of inputs, ``[N, ...]``, on which the folded network is tried.

    Returns
    -------
    list of (str, str)
        Empty where the code cannot be followed or the folded network is another one; folding saves
        time, no more.
    """
    try:
        nodes = list(fx.symbolic_trace(model).graph.nodes)
    except Exception as error:  # whatever a network's own code raises when it meets symbols
        logger.debug("batch norm is not folded, the network cannot be traced: %s", error)
        return []
    calls = [node.target for node in nodes if node.op == "call_module"]
    pairs = [
        (node.args[0].target, node.target)
        for node in nodes
        if _reads_alone(node)
        and calls.count(node.target) == calls.count(node.args[0].target) == 1
        and _folds(model.get_submodule(node.args[0].target), model.get_submodule(node.target))
    ]
    folded = copied(model)
    fold_norms(folded, pairs)
    with torch.no_grad():
        logits, same = forward(model, sample), forward(folded, sample)
    return pairs if near_tie.disagreement(same, logits) <= _AGREEMENT else []


def fold_norms(model: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Scale weights by the norms that read them and let the norms hand on what they get.

    Parameters
    ----------
    model : nn.Module
        It is changed.
    pairs : list of (str, str)
        From :func:`norms_to_fold` of this network, or of one with more channels.
    """
    for before, behind in pairs:
        weighted: Any = model.get_submodule(before)
        norm: Any = model.get_submodule(behind)
        fuse = fuse_linear_bn_weights if isinstance(weighted, nn.Linear) else fuse_conv_bn_weights
        weighted.weight, weighted.bias = fuse(
            weighted.weight,
            weighted.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        model.set_submodule(behind, nn.Identity())


def _reads_alone(node: fx.Node) -> bool:
    """Whether a node calls a module on what another module puts out and nobody else reads."""
    if node.op != "call_module" or len(node.args) != 1:
        return False
    source = node.args[0]
    return (
        isinstance(source, fx.Node) and source.op == "call_module" and set(source.users) == {node}
    )


def _folds(weighted: nn.Module, norm: nn.Module) -> bool:
    """Whether these modules do what their classes do, with statistics that stand still."""
    if type(weighted) not in _WEIGHTED or not isinstance(norm, _BatchNorm) or norm.training:
        return False
    hooked = any(each._forward_hooks or each._forward_pre_hooks for each in (weighted, norm))
    if hooked or norm.running_mean is None or norm.weight is None:
        return False
    return len(cast(Tensor, weighted.weight)) == norm.num_features  # else of another axis
