"""The Triton kernel of :mod:`pyablate.engine.fused_convolution`; to be imported where Triton is."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ROWS = 128

SIZES = "rows positions images height width line".split()
"""Arguments that change from slice to slice or layer to layer, and are not worth a compilation."""


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator, unused-ignore]
def _convolution(  # type: ignore[no-untyped-def]
    delta,  # [pairs, height, width, C]
    weight,  # [O, tall * wide, C], a kernel of tall x wide taps
    addend,  # [rows, O], rows = pairs * positions of the result
    base,  # [images * positions, O]
    image,  # [pairs]
    out,  # [rows, O]
    rows,
    positions,
    images,
    height,
    width,
    line,  # positions in a line of the result
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    tall: tl.constexpr,
    wide: tl.constexpr,
    stride_y: tl.constexpr,
    stride_x: tl.constexpr,
    padding_y: tl.constexpr,
    padding_x: tl.constexpr,
    dilation_y: tl.constexpr,
    dilation_x: tl.constexpr,
    has_addend: tl.constexpr,
    precision: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_inputs: tl.constexpr,
):
    # Programs that share rows of delta are neighbours, so that they find them in the cache.
    across: tl.constexpr = (outputs + tile_outputs - 1) // tile_outputs
    program = tl.program_id(0)
    row = (program // across) * tile_rows + tl.arange(0, tile_rows)
    column = (program % across) * tile_outputs + tl.arange(0, tile_outputs)
    pair = row // positions
    place = row - pair * positions
    top = place // line * stride_y - padding_y
    left = place % line * stride_x - padding_x
    corner = (pair.to(tl.int64) * height + top) * width + left
    sums = tl.zeros((tile_rows, tile_outputs), dtype=tl.float32)
    # One loop over taps and blocks of channels: two would fill the pipeline anew at each tap.
    blocks: tl.constexpr = (inputs + tile_inputs - 1) // tile_inputs
    for step in range(0, tall * wide * blocks):
        tap = step // blocks
        k = (step - tap * blocks) * tile_inputs + tl.arange(0, tile_inputs)
        down = tap // wide * dilation_y
        right = tap % wide * dilation_x
        inside = row < rows
        if padding_y + padding_x > 0:  # without, no window crosses the border
            inside &= (top + down >= 0) & (top + down < height)
            inside &= (left + right >= 0) & (left + right < width)
        a = tl.load(
            delta + (corner + (down * width + right))[:, None] * inputs + k[None, :],
            mask=inside[:, None] & (k < inputs)[None, :],
            other=0.0,
        )
        b = tl.load(
            weight + (column * (tall * wide) + tap)[None, :] * inputs + k[:, None],
            mask=(column < outputs)[None, :] & (k < inputs)[:, None],
            other=0.0,
        )
        sums = tl.dot(a, b, sums, input_precision=precision)
    there = (row < rows)[:, None] & (column < outputs)[None, :]
    own = tl.load(image + pair, mask=row < rows, other=0)
    valid = (own >= 0) & (own < images)
    at = row.to(tl.int64)[:, None] * outputs + column[None, :]
    if has_addend:
        sums += tl.load(addend + at, mask=there, other=0.0).to(tl.float32)
    clean_row = own.to(tl.int64) * positions + place
    clean = tl.load(
        base + clean_row[:, None] * outputs + column[None, :],
        mask=there & valid[:, None],
        other=0.0,
    ).to(tl.float32)
    # relu(clean + d) - relu(clean) as math.h has it; a NaN of any of them stays.
    active = tl.where(clean < 0, 0.0, clean)
    moved = sums + (clean - active)
    change = tl.where(moved < -active, -active, moved)
    change = tl.where(valid[:, None], change, float("nan"))
    tl.store(out + at, change.to(out.dtype.element_ty), mask=there)


def launch(
    delta: Tensor,
    weight: Tensor,
    image: Tensor,
    base: Tensor,
    addend: Tensor | None,
    out: Tensor,
    geometry: list[list[int]],
) -> None:
    """Fill ``out`` ``[P, O, Ho, Wo]``; it, other maps and ``weight`` are channels_last.

    ``geometry`` has both sizes of stride, padding and dilation.
    """
    stride, padding, dilation = geometry
    (outputs, inputs, tall, wide), (height, width) = weight.shape, delta.shape[2:]
    positions = out.shape[2] * out.shape[3]
    rows = len(delta) * positions
    if rows == 0:
        return
    if rows > (1 << 31) - TILE_ROWS:
        raise ValueError(f"delta: expected fewer than 2^31 positions of all pairs, got {rows}")
    tiles: dict[str, Any] = {
        "tile_rows": TILE_ROWS,
        "tile_outputs": min(128, max(16, triton.next_power_of_2(outputs))),
        "tile_inputs": min(64, max(16, triton.next_power_of_2(inputs))),
    }
    grid = (triton.cdiv(rows, TILE_ROWS) * triton.cdiv(outputs, tiles["tile_outputs"]),)
    _convolution[grid](
        delta,
        weight,
        delta if addend is None else addend,
        base,
        image,
        out,
        rows,
        positions,
        len(base),
        height,
        width,
        out.shape[3],
        inputs=inputs,
        outputs=outputs,
        tall=tall,
        wide=wide,
        stride_y=stride[0],
        stride_x=stride[1],
        padding_y=padding[0],
        padding_x=padding[1],
        dilation_y=dilation[0],
        dilation_x=dilation[1],
        has_addend=addend is not None,
        precision="ieee" if delta.dtype == torch.float32 else "tf32",
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,  # the default, said because Triton 3.9 warns otherwise
        **tiles,
    )
