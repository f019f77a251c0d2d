"""Attribution maps of a network by Captum: which pixels speak for a class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyablate._validation import check_choice, check_count, optional
from pyablate.attribution.collapsed import map_site
from pyablate.attribution.lrp_modules import Unsupported, set_rules, traceable
from pyablate.network.classifier import giving_logits
from pyablate.network.forward import check_logits, forward, two_images
from pyablate.network.sites import check_model, evaluation
from pyablate.results.record import Floats

METHODS = ("grad_cam", "integrated_gradients", "lrp")
_MISSING = "attribution maps need Captum; install it with: pip install 'pyablate[attributions]'"
Method = Callable[[Tensor, Tensor], Tensor]


def attribution_maps(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    method: str = "grad_cam",
    *,
    layer: str | None = None,
    steps: int = 16,
    batch_size: int = 64,
) -> Floats:
    """Attribute the logit of a class to the pixels of each image, by Captum.

    Parameters
    ----------
    model : nn.Module
        Images ``[N, C, H, W]`` to logits ``[N, classes]``; it stays as it is.
    images : Tensor
        ``[N, C, H, W]``.
    target : Tensor
        int64 ``[N]``, the class that is explained.
    method : {"grad_cam", "integrated_gradients", "lrp"}
        Grad-CAM at a layer, resized to the image (bilinear), not negative; integrated gradients
        along the path from a zero image; or layer-wise relevance propagation by the epsilon rule.
        The last two are summed over the channels of the image and signed.
    layer : str, optional
        Of Grad-CAM: by default the last activation or block with maps.
    steps : int
        Of the path of integrated gradients, Gauss-Legendre.
    batch_size : int
        Images at a time.

    Returns
    -------
    float64 [N, H, W]

    Raises
    ------
    ImportError
        Captum is not installed.
    ValueError, TypeError
        Bad arguments, a layer without channel maps, or, for ``lrp``, a network with functions for
        which there is no rule.

    Examples
    --------
    >>> from pyablate.attribution import attribution_maps
    >>> attribution_maps(model, images[:4], labels[:4], "grad_cam").shape
    (4, 28, 28)
    """
    check_choice("method", method, METHODS)
    _check(model, images, target, steps, batch_size)
    optional("captum.attr", _MISSING)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluation(model),
        giving_logits(model),
    ):
        check_logits(forward(model, two_images(images)), 2)
        if method == "grad_cam":
            attribute = _grad_cam(model, images, layer)
        elif method == "lrp":
            attribute = _relevance(model, images)
        else:
            attribute = _integrated_gradients(model, steps)
        parts = [
            attribute(part, classes).detach().sum(1).double().cpu()
            for part, classes in parts_of(images, target, batch_size)
        ]
    found: Floats = torch.cat(parts).numpy()
    return found


def _grad_cam(model: nn.Module, images: Tensor, layer: str | None) -> Method:
    from captum.attr import LayerAttribution, LayerGradCam

    site = map_site(model, images[:1], layer)
    if site.axis != 1 or len(site.shape) != 3 or site.call is not None or not site.plain:
        raise ValueError(
            f"layer: Grad-CAM needs a module that gives maps [N, channels, h, w] once, "
            f"{site.name} gives {list(site.shape)} with units on axis {site.axis}"
        )
    explain = LayerGradCam(model, model.get_submodule(site.module))
    size = (images.shape[2], images.shape[3])

    def attribute(part: Tensor, classes: Tensor) -> Tensor:
        maps = explain.attribute(part, target=classes, relu_attributions=True)
        resized: Tensor = LayerAttribution.interpolate(maps, size, interpolate_mode="bilinear")
        return resized

    return attribute


def _integrated_gradients(model: nn.Module, steps: int) -> Method:
    from captum.attr import IntegratedGradients

    explain = IntegratedGradients(model)

    def attribute(part: Tensor, classes: Tensor) -> Tensor:
        size = max(len(part), 256)  # a path is cut into pieces of so many images
        found: Tensor = explain.attribute(
            part, target=classes, n_steps=steps, internal_batch_size=size
        )
        return found

    return attribute


def _relevance(model: nn.Module, images: Tensor) -> Method:
    from captum.attr import LRP

    try:
        traced, _ = traceable(model, images[:2], [])
    except Unsupported as error:
        raise ValueError(f"method: lrp has no rule for this network ({error})") from error

    def attribute(part: Tensor, classes: Tensor) -> Tensor:
        set_rules(traced)  # Captum takes them away each time
        found: Tensor = LRP(traced).attribute(part, target=classes)
        return found

    return attribute


def parts_of(images: Tensor, target: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images, ready for gradients, and their classes, a few at a time."""
    for part, classes in zip(images.split(size), target.split(size), strict=True):
        yield part.detach().clone().requires_grad_(), classes.to(part.device)


def _check(model: Any, images: Any, target: Any, steps: int, batch_size: int) -> None:
    check_model(model)
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) == 0:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected a tensor [N, C, H, W], got {got}")
    if not isinstance(target, Tensor) or target.shape != (len(images),):
        got = list(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"target: expected a tensor of {len(images)} classes, got {got}")
    check_count("steps", steps)
    check_count("batch_size", batch_size)
