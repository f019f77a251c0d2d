"""List which units are found in architectures of timm and transformers, and how they would run.

    python tools/architectures.py [NAME ...] [--depth 2]

Weights are random; nothing is downloaded. The libraries are no dependencies of pyablate: what is
not installed is left out. One line per architecture: layers and units of ``"*"``, how many of these
layers have their units on which axis (batch counts as 0), the axes that are guesses, modules with
weights whose units are in no chosen layer, and whether the network is captured or must run by
replay.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from pyablate.network.capture import CaptureError, capture
from pyablate.network.sites import select, surveyed

TRANSFORMERS = """
    beit bit convnext convnextv2 cvt data2vec-vision deit dinov2 dinov2_with_registers
    donut-swin efficientnet focalnet hgnet_v2 hiera ijepa levit mobilenet_v1 mobilenet_v2
    mobilevit mobilevitv2 poolformer pp_lcnet pvt pvt_v2 regnet resnet segformer siglip
    swiftformer swin swinv2 textnet vit vit_msn
""".split()

TIMM = """
    beit_base_patch16_224 botnet26t_256 cait_xxs24_224 caformer_s18 coat_tiny
    coatnet_nano_rw_224 convit_tiny convmixer_768_32 convnext_atto convnextv2_atto
    crossvit_9_240 cspresnet50 davit_tiny deit3_small_patch16_224
    deit_tiny_distilled_patch16_224 densenet121 dla34 dpn68 edgenext_xx_small
    efficientformer_l1 efficientnet_b0 efficientnetv2_rw_t eva02_tiny_patch14_224
    fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gernet_s ghostnet_100 hardcorenas_a
    hgnet_tiny hrnet_w18_small inception_v3 lcnet_050 levit_128s maxvit_rmlp_nano_rw_256
    mixer_s32_224 mnasnet_100 mobilenetv2_100 mobilenetv3_small_100 mobileone_s0
    mobilevit_xxs mobilevitv2_050 mvitv2_tiny nfnet_l0 pit_ti_224 poolformer_s12 pvt_v2_b0
    regnetx_002 regnety_002 repvgg_a0 res2net50_14w_8s resmlp_12_224 resnest14d resnet18
    resnetv2_50 rexnet_100 selecsls42 sequencer2d_s skresnet18
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 tf_efficientnet_b0
    tiny_vit_5m_224 tnt_s_patch16_224 twins_pcpvt_small vgg11_bn visformer_tiny
    vit_base_patch32_clip_quickgelu_224 vit_small_patch32_224 volo_d1_224 xception41
    xcit_nano_12_p16_224
""".split()


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


def of_timm(name: str, _depth: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Make a network of timm, and say what its images are."""
    import timm

    model = timm.create_model(name, num_classes=10).eval()
    return model, model.default_cfg["input_size"]


def line(model: nn.Module, shape: tuple[int, ...]) -> str:
    """Say what is found in a network."""
    sample = torch.randn(2, *shape)
    begin = time.perf_counter()
    seen = surveyed(model, sample)
    looked = time.perf_counter() - begin
    chosen = select(seen.sites)
    axes = Counter(f"{site.axis} of {len(site.shape) + 1}" for site in chosen)
    guessed = [site.name for site in chosen if site.name in seen.guessed]
    left = dict.fromkeys(
        re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in seen.left_out(chosen)
    )
    try:
        capture(model, sample, chosen)
        strategy = "captured"
    except CaptureError as error:
        strategy = f"replay ({error})"
    on = ", ".join(f"axis {axis}: {count}" for axis, count in sorted(axes.items()))
    return (
        f"{len(chosen)} layers, {sum(site.channels for site in chosen):,} units ({on}); guessed: "
        f"{' '.join(guessed) or 'none'}; left out: {' '.join(left) or 'none'}; {strategy}; "
        f"{looked:.1f} s"
    )


def known() -> Iterator[tuple[str, Callable[[str, int], tuple[nn.Module, tuple[int, ...]]]]]:
    """Give each name with the function that makes it."""
    yield from ((name, of_transformers) for name in TRANSFORMERS)
    yield from ((f"timm:{name}", of_timm) for name in TIMM)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="some of them; all by default")
    parser.add_argument("--depth", type=int, default=2, help="blocks of plain transformers")
    given = parser.parse_args()
    for name, make in known():
        if given.names and name not in given.names:
            continue
        try:
            model, shape = make(name.removeprefix("timm:"), given.depth)
        except Exception as error:  # not installed, or not in this version of the library
            print(f"{name}: not made ({type(error).__name__}: {str(error)[:80]})", flush=True)
            continue
        try:
            print(f"{name}: {line(model, shape)}", flush=True)
        except Exception as error:  # the next may do better
            print(f"{name}: FAILED ({type(error).__name__}: {str(error)[:200]})", flush=True)


if __name__ == "__main__":
    main()
