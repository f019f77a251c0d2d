"""List which units are found in architectures of timm and transformers, and how they would run.

    python tools/architectures.py [NAME ...] [--output docs/results/architectures.md]

Weights are random; nothing is downloaded. The libraries are no dependencies of pyablate: what is
not installed is left out. One row per architecture: layers and units of ``"*"``, how many of these
layers have their units on which axis (batch counts as 0), attention heads, the axes that are
guesses, modules with weights whose units are in no chosen layer, and whether the network is
captured or must run by replay. Deep networks are made with few blocks, and images are small, where
a network allows it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyablate.network.capture import CaptureError, capture
from pyablate.network.sites import select, surveyed

TRANSFORMERS = """
    beit bit convnextv2 cvt dinov2 donut-swin focalnet hiera mobilevit mobilevitv2 poolformer
    pvt pvt_v2 regnet segformer siglip swiftformer swin swinv2 vit vit_msn
""".split()

TIMM = """
    beit_base_patch16_224 botnet26t_256 cait_xxs24_224 caformer_s18 coat_tiny coatnet_nano_rw_224
    convit_tiny convmixer_768_32 convnext_atto crossvit_9_240 cspresnet50 davit_tiny
    deit_tiny_distilled_patch16_224 densenet121 dla34 dpn68 edgenext_xx_small efficientformer_l1
    efficientnet_b0 eva02_tiny_patch14_224 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_100
    hgnet_tiny hrnet_w18_small inception_v3 lcnet_050 levit_128s maxvit_rmlp_nano_rw_256
    mixer_s32_224 mobilenetv2_100 mobilenetv3_small_100 mobileone_s0 mobilevit_xxs mobilevitv2_050
    mvitv2_tiny nfnet_l0 pit_ti_224 poolformer_s12 pvt_v2_b0 regnety_002 repvgg_a0 res2net50_14w_8s
    resmlp_12_224 resnest14d resnet18 resnetv2_50 rexnet_100 selecsls42 sequencer2d_s skresnet18
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 tiny_vit_5m_224 tnt_s_legacy_patch16_224
    twins_pcpvt_small vgg11_bn visformer_tiny vit_base_patch32_clip_quickgelu_224
    vit_small_patch32_224 volo_d1_224 xception41 xcit_nano_12_p16_224
""".split()

SIZE = 128
"""Height and width of images, where the network takes others than its usual ones."""


def declare_operators() -> None:
    """Declare operators of torchvision, whose wheel from PyPI has them for another torch."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)  # it takes its operators along when it goes


_KEPT: list[Any] = []


class Logits(nn.Module):
    """A classifier of transformers as a map from images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits alone."""
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


def of_transformers(name: str, depth: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Make a network of transformers with few blocks, and say what its images are."""
    from transformers import AutoConfig, AutoModelForImageClassification

    config = AutoConfig.for_model(name)
    vision = getattr(config, "vision_config", config)
    stages = hasattr(vision, "depths") or hasattr(vision, "hidden_sizes")
    for key in ("num_hidden_layers", "depth") if not stages else ():
        if isinstance(getattr(vision, key, None), int):
            setattr(vision, key, depth)
    config.num_labels = 10
    size = getattr(vision, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    model = AutoModelForImageClassification.from_config(config)
    return Logits(model.eval()), (getattr(vision, "num_channels", 3), height, width)


def of_timm(name: str, depth: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Make a network of timm, with few blocks where it lets itself, and say what its images are."""
    import timm

    several = [{key: (1,) * count} for key in ("depths", "layers") for count in (4, 3)]
    for options in ({"depth": depth}, *several, {}):
        try:
            model = timm.create_model(name, num_classes=10, **options).eval()
            break
        except (TypeError, ValueError, AssertionError, IndexError, RuntimeError, AttributeError):
            if not options:
                raise
    channels, *usual = model.default_cfg["input_size"]
    try:
        with torch.no_grad():
            model(torch.zeros(2, channels, SIZE, SIZE))
    except (AssertionError, RuntimeError, ValueError):
        return model, (channels, *usual)
    return model, (channels, SIZE, SIZE)


class Found(NamedTuple):
    """What is found in a network, in words."""

    layers: str
    units: str
    axes: str
    heads: str
    guessed: str
    left_out: str
    strategy: str
    seconds: str


def found(model: nn.Module, shape: tuple[int, ...], *, captured: bool = True) -> Found:
    """Look for units, and capture the network if that is wanted."""
    sample = torch.randn(2, *shape)
    begin = time.perf_counter()
    seen = surveyed(model, sample)
    looked = time.perf_counter() - begin
    chosen = select(seen.sites)
    axes = Counter(f"{site.axis} of {len(site.shape) + 1}" for site in chosen)
    heads = [site for site in seen.sites if site.kind == "heads"]
    strategy = "not tried"
    try:
        if captured:
            capture(model, sample, [*chosen, *heads])
            strategy = "captured"
    except CaptureError as error:
        strategy = f"replay ({error})"
    return Found(
        layers=str(len(chosen)),
        units=f"{sum(site.channels for site in chosen):,}",
        axes=", ".join(f"{axis}: {count}" for axis, count in sorted(axes.items())),
        heads=f"{sum(site.channels for site in heads)} in {len(heads)}" if heads else "",
        guessed=" ".join(site.name for site in chosen if site.name in seen.guessed),
        left_out=" ".join(dict.fromkeys(map(form, seen.left_out(chosen)))),
        strategy=strategy,
        seconds=f"{looked:.1f}",
    )


def form(name: str) -> str:
    """Name of a module without the numbers between its dots."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def known() -> Iterator[tuple[str, Callable[[str, int], tuple[nn.Module, tuple[int, ...]]]]]:
    """Give each name with the function that makes it."""
    yield from ((f"timm:{name}", of_timm) for name in TIMM)
    yield from ((name, of_transformers) for name in TRANSFORMERS)


def page(rows: dict[str, Found], depth: int) -> str:
    """Lay out what was found as a page of the documents."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "transformers"))
    replayed = sum(row.strategy.startswith("replay") for row in rows.values())
    tried = sum(row.strategy != "not tried" for row in rows.values())
    lines = [
        "# Architectures: which units are found",
        "",
        f"Written by `python tools/architectures.py` on {datetime.date.today()}, with {versions}. "
        f"Random weights, {depth} blocks where a network can be made with few, images of "
        f"{SIZE} x {SIZE} where it takes them. {len(rows)} networks; the capture of {tried} was "
        f"tried, and {replayed} of these go by replay.",
        "",
        '"Axes" counts the layers of `"*"` by the axis of their units and the number of axes, of '
        'which the batch is axis 0; "heads" are those of attention, in how many layers; "left out" '
        'are modules with weights whose units are in no layer of `"*"`, by their common form: each '
        "is a layer by its own name. See [layers](../guides/layers.md).",
        "",
        "| network | layers | units | axes | heads | axis guessed | left out | strategy |",
        "|---|---:|---:|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        quoted = row._replace(left_out=" ".join(f"`{one}`" for one in row.left_out.split()))
        cells = [f"`{name}`", *quoted[:-1]]
        lines.append(f"| {' | '.join(cell.replace('|', ' ') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def version(name: str) -> str:
    """Version of a package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(missing)"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="some of them; all by default")
    parser.add_argument("--depth", type=int, default=2, help="blocks of plain transformers")
    parser.add_argument("--no-capture", action="store_true", help="look for units only: fast")
    parser.add_argument("--output", type=Path, help="page to write the table to")
    given = parser.parse_args()
    declare_operators()
    rows: dict[str, Found] = {}
    for name, make in known():
        if given.names and name not in given.names:
            continue
        try:
            model, shape = make(name.removeprefix("timm:"), given.depth)
        except Exception as error:  # not installed, or not in this version of the library
            print(f"{name}: not made ({type(error).__name__}: {str(error)[:80]})", flush=True)
            continue
        try:
            rows[name] = found(model, shape, captured=not given.no_capture)
            print(f"{name}: {rows[name]}", flush=True)
        except Exception as error:  # the next may do better
            print(f"{name}: FAILED ({type(error).__name__}: {str(error)[:200]})", flush=True)
    if given.output is not None:
        given.output.write_text(page(rows, given.depth))


if __name__ == "__main__":
    main()
