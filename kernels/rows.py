"""Rows of every task, scaled, to where they are kept: the factors of fast weights, see backends/rows.py."""

import triton
import triton.language as tl
from torch import Tensor

from .tiles import store_update, update_arguments
from .types import Update


@triton.jit
def rows_update_kernel(
    rows_ptr,  # [T, size]
    dst_rows_ptr,  # [T, size], written in full
    base_rows_ptr,  # [T, size]
    lr_rows_ptr,
    scale_rows_ptr,
    size,
    dst_rows_stride,
    base_rows_stride,
    scale_rows_stride,
    HAS_ROWS: tl.constexpr,
    BASE_ROWS: tl.constexpr,
    LR_ROWS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SIGN_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = e < size
    store_update(
        tl.load(rows_ptr + t * size + e, mask=mask, other=0.0), t, e, mask,
        dst_rows_ptr, base_rows_ptr, lr_rows_ptr, scale_rows_ptr,
        dst_rows_stride, base_rows_stride, scale_rows_stride,
        BASE_ROWS, LR_ROWS, SCALE_ROWS, SIGN_ROWS,
    )  # fmt: skip


BLOCK = 1024


def rows_update(rows: Tensor, update: Update) -> None:
    """dst = base + sign * scale * lr * rows. rows [T, R, C] contiguous; dst and base so in each task"""
    T, size = len(rows), rows[0].numel()
    rows_update_kernel[(T, triton.cdiv(size, BLOCK))](
        rows, size=size, **update_arguments("rows", update), BLOCK=BLOCK
    )
