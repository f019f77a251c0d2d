"""Attribution maps of a network, most of them by Captum: which pixels speak for a class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyablate._validation import check_choice, check_count, optional
from pyablate.attribution.collapsed import map_site
from pyablate.attribution.lrp_modules import Unsupported, set_rules, traceable
from pyablate.attribution.propagation import Propagation, Relevance, contrasted
from pyablate.network.classifier import giving_logits
from pyablate.network.forward import check_logits, forward, two_images
from pyablate.network.sites import Site, check_model, evaluation
from pyablate.results.arrays import Floats

METHODS = ("grad_cam", "integrated_gradients", "lrp")
"""By Captum."""

CONTRASTS = ("others", "negated")
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
    contrast: str = "others",
    batch_size: int = 64,
) -> Floats:
    """Attribute the logit of a class to the pixels of each image.

    Parameters
    ----------
    model : nn.Module
        Images ``[N, C, H, W]`` to logits ``[N, classes]``; it stays as it is.
    images : Tensor
        ``[N, C, H, W]``.
    target : Tensor
        int64 ``[N]``, the class that is explained.
    method : {"grad_cam", "integrated_gradients", "lrp", "clrp"}
        Grad-CAM at a layer, resized to the image (bilinear), not negative; integrated gradients
        along the path from a zero image; layer-wise relevance propagation by the epsilon rule; or
        contrastive relevance (Gu, Yang, Tresp 2018, arXiv:1812.02100), not negative: relevance by
        the z+ rule, and z^B at the images, whose box is that of all images given, minus that of a
        contrast, each divided by its sum, positive part. All but the last are computed by Captum;
        the second and third are signed, and all but the first summed over the channels.
    layer : str, optional
        Of Grad-CAM: by default the last activation or block with maps.
    steps : int
        Of the path of integrated gradients, Gauss-Legendre.
    contrast : {"others", "negated"}
        Of clrp: relevance that starts in equal parts at all other classes (CLRP1), or at the class
        itself with the weights of the last layer negated (CLRP2).
    batch_size : int
        Images at a time.

    Returns
    -------
    float64 [N, H, W]

    Raises
    ------
    ImportError
        Captum is not installed, and needed.
    ValueError, TypeError
        Bad arguments, a layer without channel maps, or, for ``lrp`` and ``clrp``, a network with
        functions for which there is no rule.

    Examples
    --------
    >>> from pyablate.attribution import attribution_maps
    >>> attribution_maps(model, images[:4], labels[:4], "grad_cam").shape
    (4, 28, 28)
    """
    check_choice("method", method, (*METHODS, "clrp"))
    check_choice("contrast", contrast, CONTRASTS)
    check_images(model, images, target, batch_size)
    check_count("steps", steps)
    if method != "clrp":
        optional("captum.attr", _MISSING)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluation(model),
        giving_logits(model),
    ):
        logits = forward(model, two_images(images))
        check_logits(logits, 2)
        check_classes(target, logits.shape[1])
        if method == "grad_cam":
            attribute = _grad_cam(model, images, layer)
        elif method == "lrp":
            attribute = _relevance(model, images)
        elif method == "clrp":
            attribute = _contrastive(model, images, contrast, batch_size)
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


def _contrastive(model: nn.Module, images: Tensor, contrast: str, size: int) -> Method:
    network = propagation(model, images, size)
    if contrast == "negated" and network.last is None:
        raise ValueError("contrast: the logits are not the output of one linear layer to negate")

    def attribute(part: Tensor, classes: Tensor) -> Tensor:
        def look(found: Relevance, start: Tensor) -> dict[str, Tensor]:
            return {"": found.at_image(start).sum(1, keepdim=True)}

        return contrasted(network, part, classes, contrast, look)[""]

    return attribute


def propagation(
    model: nn.Module,
    images: Tensor,
    size: int,
    sites: Sequence[Site] = (),
    every: Iterable[Tensor] | None = None,
) -> Propagation:
    """Make a copy that carries relevance of ``images`` ``[N, ...]``; refuse what has no rule.

    ``every`` are all images, some at a time, where ``images`` are but the first.
    """
    try:
        network = Propagation(model, images[:2], every or images.split(size), sites)
    except Unsupported as error:
        raise ValueError(f"model: relevance has no rule for this network ({error})") from error
    if not network.boxes:
        raise ValueError("model: relevance needs a layer with weights behind the images")
    return network


def parts_of(images: Tensor, target: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images, ready for gradients, and their classes, a few at a time."""
    for part, classes in zip(images.split(size), target.split(size), strict=True):
        yield part.detach().clone().requires_grad_(), classes.to(part.device)


def check_images(model: Any, images: Any, target: Any, batch_size: int) -> None:
    """Refuse images that are no ``[N, C, H, W]``, or classes that are not one for each."""
    check_model(model)
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) == 0:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected a tensor [N, C, H, W], got {got}")
    if not isinstance(target, Tensor) or target.shape != (len(images),):
        got = list(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"target: expected a tensor of {len(images)} classes, got {got}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target: expected numbers of classes, got {target.dtype}")
    check_count("batch_size", batch_size)


def check_classes(target: Tensor, classes: int) -> None:
    """Refuse classes that a network does not have."""
    if int(target.min()) < 0 or int(target.max()) >= classes:
        raise ValueError(
            f"target: expected classes 0 to {classes - 1}, "
            f"got {int(target.min())} to {int(target.max())}"
        )
