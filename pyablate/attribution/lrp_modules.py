"""Layer-wise relevance propagation (LRP): a traced copy for Captum in which every step is a module.

Captum's rules hang on modules, one call each. A sum, an average or a join that the network
writes as a function would pass relevance on undivided, so such functions become modules here.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from pyablate._validation import first_line
from pyablate.network.batch_norm import fold_norms, norms_behind
from pyablate.network.classifier import logits_of
from pyablate.network.forward import forward
from pyablate.network.sites import Site, copied, hooked

_LINEAR = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.Identity,
    nn.Flatten,
)
_RECTIFIED = (nn.ReLU, nn.Dropout, nn.Tanh)  # which Captum passes relevance through
_RELU: tuple[Any, ...] = (functional.relu, torch.relu, "relu", "relu_", torch.relu_)
_VIEWS: tuple[Any, ...] = (torch.flatten, torch.reshape, "flatten", "view", "reshape")
_SIZES: tuple[Any, ...] = ("size", getattr, operator.getitem)
_STEPS: tuple[Any, ...] = (
    operator.add,
    operator.iadd,
    torch.add,
    "add",
    "add_",
    operator.sub,
    operator.truediv,
    operator.mul,
    torch.mean,
    "mean",
    torch.cat,
    functional.avg_pool2d,
    functional.adaptive_avg_pool2d,
    functional.max_pool2d,
    functional.dropout,
)
_SCALES: tuple[Any, ...] = (operator.sub, operator.truediv, operator.mul)


class Unsupported(Exception):
    """The network does something for which there is no rule."""


class _Step(nn.Module):
    """A function of tensors as a module; everything that is no tensor is fixed."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.call(*tensors)


def _pass(x: Tensor) -> Tensor:
    """Return the values in a tensor of its own: Captum hooks what goes in and what comes out."""
    return x.clone()


def traceable(
    model: nn.Module, images: Tensor, sites: Sequence[Site]
) -> tuple[fx.GraphModule, dict[str, str]]:
    """Trace a network and mark the sites.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    images : Tensor
        A few, on which copy and original must agree.
    sites : sequence of Site
        Wanted.

    Returns
    -------
    traced : fx.GraphModule
        The copy, with parameters that need no gradients.
    taps : dict
        Path of the module behind each site that was found in the copy.

    Raises
    ------
    Unsupported
        The network cannot be traced, or holds something without a rule.
    """
    try:
        traced = fx.symbolic_trace(copied(model))
        _return_logits(traced, model)
    except Exception as error:  # tracing fails in as many ways as there are networks
        raise Unsupported(first_line(error)) from error
    behind = {site.name: _last_node(traced.graph, site) for site in sites}
    _to_modules(traced)
    _fold_batch_norm(traced)
    taps = {}
    for number, (name, node) in enumerate(behind.items()):
        if node is not None:
            taps[name] = f"tap_{number}"
            _insert(traced, node, taps[name], _Step(_pass))
    traced.graph.lint()
    traced.recompile()
    return traced, _verified(model, traced, images, sites, taps)


def _return_logits(traced: fx.GraphModule, model: nn.Module) -> None:
    """Let a traced copy, which is one of the model's own forward, return what the model does."""
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    logits = logits_of(model, output.args[0])
    if logits is not output.args[0]:
        output.args = (logits,)
        traced.graph.eliminate_dead_code()


def set_rules(traced: nn.Module) -> None:
    """Give every module of the copy its rule: epsilon for all that is linear."""
    from captum.attr._utils.lrp_rules import EpsilonRule

    for module in traced.modules():
        if not any(True for _ in module.children()) and type(module) not in _RECTIFIED:
            module.rule = EpsilonRule()


def _last_node(graph: fx.Graph, site: Site) -> fx.Node | None:
    """Node that holds the output of a site's module, as far as names tell."""
    if not site.plain:
        return None
    calls = [n for n in graph.nodes if n.op == "call_module" and n.target == site.module]
    if calls:
        number = (site.call or 1) - 1
        return calls[number] if number < len(calls) else None
    inside = [n for n in graph.nodes if site.module in n.meta.get("nn_module_stack", {})]
    return inside[-1] if inside and site.call is None else None


def _insert(traced: fx.GraphModule, node: fx.Node, name: str, module: nn.Module) -> None:
    """Put a module behind a node."""
    traced.add_module(name, module)
    with traced.graph.inserting_after(node):
        tap = traced.graph.call_module(name, (node,))
    node.replace_all_uses_with(tap, delete_user_cb=lambda user: user is not tap)


def _to_modules(traced: fx.GraphModule) -> None:
    """Give every call its own module."""
    sizes: set[fx.Node] = set()
    for number, node in enumerate(list(traced.graph.nodes)):
        if node.op == "call_module":
            _own_module(traced, node, f"{str(node.target).replace('.', '_')}_call_{number}")
        elif node.op in ("call_function", "call_method"):
            tensors = [arg for arg in node.all_input_nodes if arg not in sizes]
            if not tensors or (node.target in _SIZES and _is_size(node, sizes)):
                sizes.add(node)
            elif node.target in _RELU:
                _become(traced, node, f"relu_{number}", nn.ReLU(), tensors)
            elif node.target in _VIEWS:
                if len(tensors[0].users) > 1 and any(
                    u not in sizes | {node} for u in _readers(tensors[0])
                ):
                    raise Unsupported(f"a view of {tensors[0]} that others read too")
            else:
                _as_step(traced, node, number, tensors)


def _readers(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target not in _SIZES]


def _is_size(node: fx.Node, sizes: set[fx.Node]) -> bool:
    if node.target == "size" or node.args[0] in sizes:
        return True
    return node.target is getattr and node.args[1] == "shape"


def _own_module(traced: fx.GraphModule, node: fx.Node, name: str) -> None:
    """Copy the module for this call alone; in place would hide what went in."""
    module: Any = copy.deepcopy(traced.get_submodule(cast(str, node.target)))
    if type(module) not in _RECTIFIED and not isinstance(module, _LINEAR):
        raise Unsupported(f"{type(module).__name__} at {node.target}")
    if isinstance(module, (nn.Identity, nn.Flatten)):  # which may return what they were given
        inner = module
        module = _Step(lambda x: _pass(inner(x)))
    if hasattr(module, "inplace"):
        module.inplace = False
    traced.add_module(name, module)
    node.target = name


def _fold_batch_norm(traced: fx.GraphModule) -> None:
    """Fold batch norm into the convolution that it alone reads; the two are one linear map."""
    for layer, norm in list(norms_behind(traced.graph, traced)):
        if isinstance(traced.get_submodule(layer), nn.modules.conv._ConvNd):
            fold_norms(traced, [(layer, norm)])
            traced.add_module(norm, _Step(_pass))


def _as_step(traced: fx.GraphModule, node: fx.Node, number: int, tensors: list[fx.Node]) -> None:
    """Turn a function into a module, if it is linear in what depends on the images."""
    depends = [arg for arg in tensors if arg.op != "get_attr"]
    known = node.target in _STEPS or node.target in _SIZES
    if not known or (len(depends) > 1 and node.target in _SCALES):
        raise Unsupported(f"{node.target} at {node.name}")
    name = node.target if isinstance(node.target, str) else None
    call: Any = (lambda x, *a, **k: getattr(x, name)(*a, **k)) if name else node.target
    inputs = list(dict.fromkeys(depends))
    fixed = {a: _constant(traced, a) for a in tensors if a.op == "get_attr"}
    args, kwargs = node.args, node.kwargs

    def apply(*values: Tensor) -> Tensor:
        at = {**fixed, **dict(zip(inputs, values, strict=True))}
        given = fx.node.map_arg((args, kwargs), at.__getitem__)
        return cast(Tensor, call(*given[0], **given[1]))

    _become(traced, node, f"step_{number}", _Step(apply), inputs)


def _constant(traced: fx.GraphModule, node: fx.Node) -> Tensor:
    held: Tensor = operator.attrgetter(cast(str, node.target))(traced)
    return held.detach()


def _become(
    traced: fx.GraphModule, node: fx.Node, name: str, module: nn.Module, inputs: list[fx.Node]
) -> None:
    traced.add_module(name, module)
    node.op, node.target, node.args, node.kwargs = "call_module", name, tuple(inputs), {}


def _verified(
    model: nn.Module,
    traced: fx.GraphModule,
    images: Tensor,
    sites: Sequence[Site],
    taps: dict[str, str],
) -> dict[str, str]:
    """Keep the taps at which the copy computes what the original does."""
    outputs: dict[str, Tensor] = {}

    def see(site: Site, _call: int, output: Tensor) -> Tensor:
        outputs[site.name] = output.clone()
        return output

    inner: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            inner[name] = output.clone()

        return hook

    handles = [traced.get_submodule(t).register_forward_hook(watch(n)) for n, t in taps.items()]
    with torch.no_grad(), hooked(model, sites, see):
        expected, logits = forward(model, images), forward(traced, images)
    for handle in handles:
        handle.remove()
    if not isinstance(logits, Tensor) or not torch.allclose(logits, expected, rtol=1e-4, atol=1e-5):
        raise Unsupported("its traced copy computes something else")
    return {
        name: path
        for name, path in taps.items()
        if name in inner
        and inner[name].shape == outputs[name].shape
        and torch.allclose(inner[name], outputs[name], rtol=1e-4, atol=1e-5)
    }
