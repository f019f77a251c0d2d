"""Batch norm in evaluation mode: its scale and shift, and folding it into the weights before it."""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from pyablate.network import near_tie
from pyablate.network.forward import forward
from pyablate.network.graph import BATCH_NORM, CONVOLUTIONS, Graph
from pyablate.network.graph_passes import add_constant
from pyablate.network.sites import copied

logger = logging.getLogger("pyablate")

_AGREEMENT = 1e-4
"""Share of the largest logit by which folding may change one."""

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def scale_and_shift(
    mean: Tensor, variance: Tensor, eps: float, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel to which batch norm comes down, float64."""
    scale = torch.rsqrt(variance.double() + eps)
    scale = scale if gamma is None else scale * gamma.double()
    shift = -mean.double() * scale
    return scale, shift if beta is None else shift + beta.double()


def norm_scale(graph: Graph, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """:func:`scale_and_shift` of a node of a captured network."""
    gamma, beta, mean, variance = (
        graph.in_double(arg) if isinstance(arg, fx.Node) else None for arg in norm.args[1:5]
    )
    assert mean is not None
    assert variance is not None
    return scale_and_shift(mean, variance, cast(float, norm.args[6]), gamma, beta)


def module_scale(norm: Any) -> Tensor:
    """Scale of :func:`scale_and_shift` of a module with running statistics, float64."""
    found = scale_and_shift(norm.running_mean, norm.running_var, norm.eps, norm.weight, None)[0]
    return found.detach()


def fold_batch_norm(graph: Graph) -> None:
    """Scale the filters of a convolution by the batch norm that alone reads it."""
    for node in list(graph.graph.nodes):
        if node.target is not BATCH_NORM:
            continue
        conv = node.args[0]
        value = next((user for user in node.users if user.target is operator.getitem), None)
        foldable = (
            value is not None
            and len(node.users) == 1
            and len(conv.users) == 1
            and conv.target in CONVOLUTIONS
            and conv.args[1] in graph.constants
            and (len(conv.args) < 3 or conv.args[2] is None or conv.args[2] in graph.constants)
        )
        if foldable:
            _fold(graph, conv, node)
            cast(fx.Node, value).replace_all_uses_with(conv)
            graph.graph.erase_node(cast(fx.Node, value))
            graph.graph.erase_node(node)


def _fold(graph: Graph, conv: fx.Node, norm: fx.Node) -> None:
    scale, shift = norm_scale(graph, norm)
    weight = cast(fx.Node, conv.args[1])
    dtype = graph.constants[weight].dtype
    bias = conv.args[2] if len(conv.args) > 2 else None
    old = graph.in_double(bias) if isinstance(bias, fx.Node) else 0.0
    filters = graph.in_double(weight)
    folded = filters * scale.reshape(-1, *[1] * (filters.ndim - 1))
    new_weight = add_constant(graph, f"{conv.name}_folded_weight", folded, dtype)
    new_bias = add_constant(graph, f"{conv.name}_folded_bias", old * scale + shift, dtype)
    conv.args = (conv.args[0], new_weight, new_bias, *conv.args[3:])


def norms_to_fold(model: nn.Module, sample: Tensor) -> list[tuple[str, str]]:
    """Name each convolution or linear layer that batch norm alone reads, with that norm.

    The code of the model, in evaluation mode, is followed on symbols, and the folded network tried
    on a batch of inputs. Nothing is named where that fails: folding saves time, no more.
    """
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # whatever a network's own code raises when it meets symbols
        logger.debug("batch norm is not folded, the network cannot be traced: %s", error)
        return []
    pairs = [
        pair
        for pair in norms_behind(graph, model)
        if _folds(*(model.get_submodule(name) for name in pair))
    ]
    folded = copied(model)
    fold_norms(folded, pairs)
    with torch.no_grad():
        logits, same = forward(model, sample), forward(folded, sample)
    return pairs if near_tie.disagreement(same, logits) <= _AGREEMENT else []


def fold_norms(model: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Scale weights by the norms that read them, in place; the norms hand on what they get.

    The pairs are from :func:`norms_to_fold` of this network, or of one with more channels.
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


def norms_behind(graph: fx.Graph, model: nn.Module) -> Iterator[tuple[str, str]]:
    """Name modules and the batch norms that alone read what they put out; both are called once."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        alone = set(source.users) == {node} and calls[node.target] == calls[source.target] == 1
        if alone and isinstance(model.get_submodule(node.target), _BatchNorm):
            yield cast(str, source.target), node.target


def _folds(weighted: nn.Module, norm: nn.Module) -> bool:
    """Whether these modules do what their classes do, with statistics that stand still."""
    if type(weighted) not in _WEIGHTED or not isinstance(norm, _BatchNorm) or norm.training:
        return False
    hooked = any(each._forward_hooks or each._forward_pre_hooks for each in (weighted, norm))
    if hooked or norm.running_mean is None or norm.weight is None:
        return False
    return len(cast(Tensor, weighted.weight)) == norm.num_features  # else of another axis
