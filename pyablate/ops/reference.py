"""The native operations in plain PyTorch.

They are the oracle of the compiled backends and the path taken where the compiled module is missing
or does not know the device. Arguments have been checked by :mod:`pyablate.ops`, which documents
each operation; shapes are repeated here only where a formula needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyablate.ops.activations import Activation
    from pyablate.ops.quantized import Quantized

_UNFOLD_ELEMENTS = 1 << 24  # unit_delta unfolds its maps in pieces of at most this many elements


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which tensors of ``dtype`` are accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def apply_activation(z: Tensor, activation: Activation) -> Tensor:
    """Apply ``activation`` elementwise."""
    a, b = activation.a, activation.b
    match activation.name:
        case "identity":
            return z
        case "relu":
            return z.relu()
        case "hardtanh":
            return z.clamp(a, b)
        case "leaky_relu":
            return functional.leaky_relu(z, a)
        case "elu":
            return functional.elu(z, a)
        case "gelu":
            # In float64: with AVX-512 PyTorch 2.13 makes NaN of infinity in float32.
            return functional.gelu(z.double()).to(z.dtype)
        case "gelu_tanh":
            return functional.gelu(z, approximate="tanh")
        case "silu":
            return functional.silu(z)
        case "hardswish":
            return functional.hardswish(z)
        case "hardsigmoid":
            return functional.hardsigmoid(z)
        case "sigmoid":
            return z.sigmoid()
        case "tanh":
            return z.tanh()
    raise ValueError(f"activation: unknown name {activation.name!r}")


def masked_copies(x: Tensor, image: Tensor, unit: Tensor, value: Tensor, *, axis: int) -> Tensor:
    """Copy ``x[image]`` with one unit of each copy replaced."""
    out = x[image.long()]
    pairs = (unit >= 0).nonzero().squeeze(1)
    rows = out.movedim(axis, 1)  # [P, C, ...], a view of out
    replacement = value[pairs] if value.dim() else value.expand(pairs.numel())
    shape = (pairs.numel(), *rows.shape[2:])
    if replacement.dim() == 1:
        replacement = replacement.reshape(-1, *[1] * (rows.dim() - 2)).expand(shape)
    rows[pairs, unit[pairs].long()] = replacement.to(x.dtype)
    return out


def _decide(logits: Tensor, change: Tensor, limit: Tensor) -> Tensor:
    """Argmax of their sum over the last axis, lowest on equality; -1 unless the margin > limit.

    Logits of minus infinity never win; -1 also if a change or the largest sum is not finite.
    """
    values = logits + change + (change - change)  # NaN where the change is not finite
    best, index = values.max(-1)
    # max() may name any of several equal classes; the lowest is asked for
    index = (values == best.unsqueeze(-1)).to(torch.uint8).argmax(-1)
    margin = best - values.scatter(-1, index.unsqueeze(-1), -torch.inf).amax(-1)
    return torch.where(best.isfinite() & (margin > limit), index, -1).to(torch.int32)


def head_flips(
    logits: Tensor, delta: Tensor, weight: Tensor, baseline: Tensor, tolerance: Tensor
) -> Tensor:
    """Decide every (image, unit) by scanning all classes; no shortcut is needed for the answer."""
    del baseline  # only the shortcut of the compiled backends reads it
    out = torch.empty(delta.shape, dtype=torch.int32, device=delta.device)
    columns = weight.t()
    for n in range(delta.shape[0]):
        out[n] = _decide(logits[n], delta[n].unsqueeze(1) * columns, tolerance[n])
    return out


def unit_delta(
    delta: Tensor,
    weight: Tensor,
    channel: Tensor,
    image: Tensor,
    column: Tensor,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    activation: Activation | None,
    base: Tensor | None,
    base_image: Tensor | None,
    out: Tensor,
    quantized: Quantized | None,
) -> Tensor:
    """Convolve single maps with the filters of their input channel, by unfolding; fill ``out``."""
    dtype = compute_dtype(delta.dtype)
    _, kernel_h, kernel_w, outputs = weight.shape
    size = output_size(delta.shape[-2:], (kernel_h, kernel_w), stride, padding, dilation)
    pairs = image.numel()
    per_pair = max(1, kernel_h * kernel_w * size[0] * size[1])
    step = max(1, _UNFOLD_ELEMENTS // per_pair)
    for start in range(0, pairs, step):
        some = slice(start, min(start + step, pairs))
        maps = delta[image[some].long(), column[some].long()].to(dtype)
        taps = functional.unfold(
            maps.unsqueeze(1), (kernel_h, kernel_w), dilation, padding, stride
        )  # [P, kh * kw, Ho * Wo]
        filters = weight[channel[column[some].long()].long()].to(dtype).flatten(1, 2)
        result = torch.bmm(filters.transpose(1, 2), taps).reshape(-1, outputs, *size)
        if activation is not None:
            assert base is not None
            rows = base[(image if base_image is None else base_image)[some].long()].to(dtype)
            result = apply_activation(rows + result, activation) - apply_activation(
                rows, activation
            )
        out[some] = result
    if quantized is not None:
        quantized.fill(out)
    return out


def delta_winograd(
    delta: Tensor,
    weight: Tensor,
    *,
    padding: tuple[int, int],
    activation: Activation | None,
    base: Tensor | None,
    image: Tensor | None,
    addend: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Convolve, by the sum over taps, add and activate; fill ``out``."""
    result = functional.conv2d(delta, weight, padding=padding)
    result = result if addend is None else result + addend
    if activation is not None:
        assert base is not None
        assert image is not None
        rows = base[image.long()].to(result.dtype)
        result = apply_activation(rows + result, activation) - apply_activation(rows, activation)
    return out.copy_(result)


def depthwise(
    x: Tensor,
    weight: Tensor,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    out: Tensor,
) -> Tensor:
    """Convolve each channel by its own filter; fill ``out``."""
    return out.copy_(functional.conv2d(x, weight, None, stride, padding, dilation, len(weight)))


def output_size(
    size: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """Return the spatial size (height, width) of a convolution's output."""
    height, width = (
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    return height, width


def delta_activation(
    base: Tensor,
    delta: Tensor,
    image: Tensor,
    activation: Activation,
    *,
    out: Tensor,
    addend: Tensor | None,
    scales: Sequence[Tensor | None],
    quantized: Quantized | None,
) -> Tensor:
    """Write act(base[image] + d) - act(base[image]) to ``out``; d is the sum of both deltas."""
    change = _sum(delta, addend, scales)
    out.copy_(_activation_change(base[image.long()].to(change.dtype), change, activation))
    if quantized is not None:
        quantized.fill(out)
    return out


def perturbed(base: Tensor, delta: Tensor, image: Tensor) -> Tensor:
    """Return base[image] + delta."""
    dtype = compute_dtype(delta.dtype)
    return base[image.long()].to(dtype) + delta.to(dtype)


def subtracted(after: Tensor, base: Tensor, image: Tensor, dtype: torch.dtype) -> Tensor:
    """Return after - base[image], and 0 where they are equal."""
    rows = base[image.long()].to(after.dtype)
    return torch.where(after == rows, torch.zeros_like(after), after - rows).to(dtype)


def delta_product(
    base: Tensor, delta: Tensor, other_base: Tensor, other: Tensor, image: Tensor
) -> Tensor:
    """Return da (b + db) + a db, and the difference itself where that is not finite."""
    dtype, rows = compute_dtype(delta.dtype), image.long()
    first, second = delta.to(dtype), other.to(dtype)
    a, b = base[rows].to(dtype), other_base[rows].to(dtype)
    change = first * (b + second) + a * second
    before, after = a * b, (a + first) * (b + second)
    otherwise = torch.where(after == before, torch.zeros_like(after), after - before)
    return torch.where(change.isfinite(), change, otherwise).to(delta.dtype)


def delta_mean(
    base: Tensor,
    delta: Tensor,
    image: Tensor,
    activation: Activation,
    *,
    addend: Tensor | None,
    scales: Sequence[Tensor | None],
) -> Tensor:
    """Return the mean of :func:`delta_activation` over the positions."""
    change = _sum(delta, addend, scales)
    rows = base[image.long()].to(change.dtype)
    return _activation_change(rows, change, activation).mean((2, 3))


def _activation_change(rows: Tensor, change: Tensor, activation: Activation) -> Tensor:
    if activation.name == "identity":
        return change
    return apply_activation(rows + change, activation) - apply_activation(rows, activation)


def _sum(delta: Tensor, addend: Tensor | None, scales: Sequence[Tensor | None]) -> Tensor:
    """Add two deltas, each times its pair's factor, in the dtype of accumulation."""
    change = _scaled(delta, scales[0])
    return change if addend is None else change + _scaled(addend, scales[1])


def _scaled(delta: Tensor, scale: Tensor | None) -> Tensor:
    delta = delta.to(compute_dtype(delta.dtype))
    return delta if scale is None else delta * scale.reshape(-1, *[1] * (delta.dim() - 1))


def delta_max_pool(
    base: Tensor,
    delta: Tensor,
    image: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    out_size: tuple[int, int],
    activation: Activation | None,
    scale: Tensor | None,
    out: Tensor,
    quantized: Quantized | None,
) -> Tensor:
    """Write max_pool(act(base + delta)) - max_pool(act(base)) to ``out``."""
    rows = base[image.long()].to(compute_dtype(delta.dtype))
    after = rows + _scaled(delta, scale)
    infinite = rows == torch.inf  # has no difference, not even behind a bounded function
    if activation is not None:
        rows, after = apply_activation(rows, activation), apply_activation(after, activation)

    def pool(z: Tensor) -> Tensor:
        # Padding with -inf to just the size that out_size needs stands for padding and ceil_mode.
        margins = []
        for i in (1, 0):
            need = (out_size[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1
            margins += [padding[i], need - padding[i] - z.shape[2 + i]]
        z = functional.pad(z, margins, value=-torch.inf)
        return functional.max_pool2d(z, kernel, stride, 0, dilation)

    before, after = pool(rows), pool(after)
    # a window wholly in the padding has nothing that could change
    nothing = (before == -torch.inf) & (after == -torch.inf)
    change = torch.where(nothing, 0.0, after - before)
    out.copy_(torch.where(pool(infinite.to(rows.dtype)) > 0, torch.nan, change))
    if quantized is not None:
        quantized.fill(out)
    return out


def classify(
    logits: Tensor,
    delta: Tensor,
    image: Tensor,
    tolerance: Tensor,
    *,
    relative: float,
) -> Tensor:
    """Return argmax(logits[image] + delta), -1 where the margin is too small to be trusted."""
    limit = tolerance[image.long()]
    if relative != 0:
        limit = limit + relative * (delta.amax(-1) - delta.amin(-1))
    return _decide(logits[image.long()], delta, limit)


def confusion_counts(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """Count [unit, label, predicted] from predictions [U, N] and labels [N]."""
    units = prediction.shape[0]
    cell = label.long() * classes + prediction.long()
    cell = cell + torch.arange(units, device=cell.device).unsqueeze(1) * (classes * classes)
    counts = torch.bincount(cell.flatten(), minlength=units * classes * classes)
    return counts.to(torch.int32).view(units, classes, classes)


def map_moments(
    x: Tensor, axis: int, pooled: Tensor, active: Tensor, least: Tensor, positive: Tensor
) -> None:
    """Mean of each map and whether it is positive somewhere; least and positive go on."""
    maps = x.to(compute_dtype(x.dtype)).movedim(axis, 0)
    maps = maps.flatten(2) if maps.dim() > 2 else maps.unsqueeze(2)
    pooled.copy_(maps.mean(dim=2))
    active.copy_((maps > 0).any(dim=2))
    torch.minimum(least, maps.amin(dim=(1, 2)), out=least)
    positive += (maps > 0).sum(dim=(1, 2))


def class_moments(
    pooled: Tensor, active: Tensor, label: Tensor, classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum, sum of squares, maximum and active images by [unit, class] of pooled maps [C, N]."""
    units, row, wide = len(pooled), label.long(), pooled.double()
    sums = wide.new_zeros(2, units, classes)
    sums.index_add_(2, row, torch.stack([wide, wide.square()]))
    maximum = wide.new_full((units, classes), -torch.inf)
    maximum.scatter_reduce_(1, row.expand(wide.shape), wide, "amax")
    active_images = torch.zeros(units, classes, dtype=torch.int64, device=pooled.device)
    active_images.index_add_(1, row, active.long())
    return sums[0], sums[1], maximum, active_images


def class_ranks(
    x: Tensor, label: Tensor, count: Tensor, bins: int, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rank sums, gains, first images, quantiles by class, and widths, of x [U, N]."""
    units, images = x.shape
    classes = len(count)
    values, order = torch.sort(x, dim=1, descending=True, stable=True)
    labels = label.long()[order]
    nan = values.isnan()  # the first; they are equal
    place = torch.zeros_like(order)
    place[:, 1:] = (values[:, 1:] != values[:, :-1]) & ~nan[:, 1:]
    place = place.cumsum(1)  # 0 for the greatest, 1 for those that come next
    greater = torch.searchsorted(place, place)
    at_least = torch.searchsorted(place, place, right=True)
    tables = torch.zeros(2, units, classes, dtype=torch.int64, device=x.device)
    rank_sum = tables[0].scatter_add_(1, labels, greater + at_least)
    first = tables[1].scatter_add_(1, labels[:, :top], torch.ones_like(labels[:, :top]))
    # Class after class, each in the order of its activations: an image is a hit of its own place.
    places = torch.argsort(labels, dim=1, stable=True)
    gain = torch.zeros_like(rank_sum)
    for k, passing in enumerate(at_least.gather(1, places).split(count.tolist(), dim=1)):
        hits = torch.arange(1, passing.shape[1] + 1, device=x.device)
        if len(hits):
            gain[:, k] = (images * hits - count[k] * passing).amax(dim=1)
    quantiles = joint_histogram((images - at_least) * bins // images, labels, bins, classes)
    low, high = values[:, -1:].double(), values[:, :1].double()
    width = ((values.double() - low) / (high - low) * bins).nan_to_num(0.0)  # 0 / 0 too
    width = width.long().clamp(max=bins - 1)
    widths = joint_histogram(width, torch.zeros_like(width), bins, 1)[..., 0]
    return rank_sum, gain, first.int(), quantiles, widths


def joint_histogram(code: Tensor, label: Tensor, bins: int, classes: int) -> Tensor:
    """Count [unit, bin, class] from bins and labels [U, N], int32."""
    units = code.shape[0]
    first = torch.arange(units, device=code.device).unsqueeze(1) * (bins * classes)
    cell = first + code * classes + label
    counts = torch.bincount(cell.flatten(), minlength=units * bins * classes)
    return counts.to(torch.int32).view(units, bins, classes)
