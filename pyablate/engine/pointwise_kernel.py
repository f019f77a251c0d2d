"""The Triton kernel behind :mod:`pyablate.engine.pointwise`; to be imported where Triton is."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZES = "rows positions images".split()
"""Arguments that change from slice to slice or layer to layer, and are not worth a compilation."""


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator, unused-ignore]
def _pointwise(  # type: ignore[no-untyped-def]
    delta,  # [rows, C], rows = pairs * positions
    weight,  # [O, C]
    addend,  # [rows, O]
    base,  # [images * positions, O]
    image,  # [pairs]
    out,  # [rows, O]
    rows,
    positions,
    images,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
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
    there = (row < rows)[:, None] & (column < outputs)[None, :]
    start = row.to(tl.int64)
    sums = tl.zeros((tile_rows, tile_outputs), dtype=tl.float32)
    for first in range(0, inputs, tile_inputs):
        k = first + tl.arange(0, tile_inputs)
        a = tl.load(
            delta + start[:, None] * inputs + k[None, :],
            mask=(row < rows)[:, None] & (k < inputs)[None, :],
            other=0.0,
        )
        b = tl.load(
            weight + column[None, :] * inputs + k[:, None],
            mask=(column < outputs)[None, :] & (k < inputs)[:, None],
            other=0.0,
        )
        sums = tl.dot(a, b, sums, input_precision=precision)
    pair = row // positions
    own = tl.load(image + pair, mask=row < rows, other=0)
    valid = (own >= 0) & (own < images)
    at = start[:, None] * outputs + column[None, :]
    if has_addend:
        sums += tl.load(addend + at, mask=there, other=0.0).to(tl.float32)
    clean_row = own.to(tl.int64) * positions + (row - pair * positions)
    clean = tl.load(
        base + clean_row[:, None] * outputs + column[None, :],
        mask=there & valid[:, None],
        other=0.0,
    ).to(tl.float32)
    # relu(clean + d) - relu(clean) as math.h has it; a NaN of any of them stays.
    top = tl.where(clean < 0, 0.0, clean)
    moved = sums + (clean - top)
    change = tl.where(moved < -top, -top, moved)
    change = tl.where(valid[:, None], change, float("nan"))
    tl.store(out + at, change.to(out.dtype.element_ty), mask=there)


def launch(
    delta: Tensor, weight: Tensor, image: Tensor, base: Tensor, addend: Tensor | None, out: Tensor
) -> None:
    """Fill ``out`` ``[P, O, H, W]``; maps are channels_last, ``weight`` is ``[O, C]``."""
    positions = delta.shape[2] * delta.shape[3]
    rows, (outputs, inputs) = len(delta) * positions, weight.shape
    if rows == 0:
        return
    if rows >= 1 << 31:
        raise ValueError(f"delta: expected fewer than 2^31 positions of all pairs, got {rows}")
    tiles: dict[str, Any] = {
        "tile_rows": 128,
        "tile_outputs": min(128, max(16, triton.next_power_of_2(outputs))),
        "tile_inputs": min(64, max(16, triton.next_power_of_2(inputs))),
    }
    grid = (triton.cdiv(rows, 128) * triton.cdiv(outputs, tiles["tile_outputs"]),)
    _pointwise[grid](
        delta,
        weight,
        delta if addend is None else addend,
        base,
        image,
        out,
        rows,
        positions,
        len(base),
        inputs=inputs,
        outputs=outputs,
        has_addend=addend is not None,
        precision="ieee" if delta.dtype == torch.float32 else "tf32",
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,  # the default, said because Triton 3.9 warns otherwise
        **tiles,
    )
