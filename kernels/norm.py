"""Batch and layer norm: y = f(w h + b), h = (x - m) s, over groups of numbers. f is an activation.

A group is a column of a task for batch norm (AXIS 0), a row for layer norm (AXIS 1); w and b are of columns.
Formulas: fastmaml/ops/batch_norm.py. Statistics [T, groups, 4]: m, s, and, for the tangent, mean t_x and
mean (h t_x).
"""

import triton
import triton.language as tl

from .elementwise import activate, load_grad, slopes
from .tiles import (
    as_number,
    check_group,
    load_scaled,
    number_or_elements,
    power_of_two,
    slopes_from,
    store_update,
    stride,
    update_arguments,
)
from .types import NO_ACTIVATION, Activation, Buffer, Param, Update


@triton.jit
def mean(a, count, AXIS: tl.constexpr):
    """Of each group, to be broadcast over it."""
    return tl.expand_dims(tl.sum(a, AXIS), AXIS) / count


@triton.jit
def norm_forward_kernel(
    x_ptr,  # [T, M, C]
    w_ptr,  # [T, C]
    b_ptr,  # [T, C]
    y_ptr,  # [T, M, C], written in full; read by DUAL
    z_ptr,  # [T, M, C]
    statistics_ptr,  # [T, groups, 4], two of them written, the others by DUAL
    t_x_ptr,  # [T, M, C]
    t_w_ptr,  # [T, C], times lr_w
    t_b_ptr,  # [T, C], times lr_b
    lr_w_ptr,
    lr_b_ptr,
    t_y_ptr,  # [T, M, C], written in full by DUAL
    t_z_ptr,  # [T, M, C]
    M,
    C,
    w_stride,
    b_stride,
    t_w_stride,
    t_b_stride,
    EPS: tl.constexpr,
    AXIS: tl.constexpr,
    HAS_W: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_T_X: tl.constexpr,
    HAS_T_W: tl.constexpr,
    HAS_T_B: tl.constexpr,
    LR_W: tl.constexpr,
    LR_B: tl.constexpr,
    ACT: tl.constexpr,
    ATTR: tl.constexpr,
    READS_INPUT: tl.constexpr,
    STORE_Z: tl.constexpr,
    DUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (m < M)[:, None] & (c < C)[None, :]
    c_mask = c < C
    e = (t * M + m)[:, None] * C + c[None, :]
    group = tl.expand_dims(t * C + c if AXIS == 0 else t * M + m, AXIS)
    group_mask = tl.expand_dims(c_mask if AXIS == 0 else m < M, AXIS)
    statistics_ptr += group * 4
    x = tl.load(x_ptr + e, mask=mask, other=0.0)
    count = as_number(M if AXIS == 0 else C, x.dtype)
    if DUAL:
        s = tl.load(statistics_ptr + 1, mask=group_mask, other=0.0)
        h = (x - tl.load(statistics_ptr, mask=group_mask, other=0.0)) * s
        h = tl.where(mask, h, 0.0)
        out = tl.zeros([BLOCK_M, BLOCK_C], dtype=x.dtype)
        if HAS_T_X:
            t_x = tl.load(t_x_ptr + e, mask=mask, other=0.0)
            t_m = mean(t_x, count, AXIS)
            along = mean(h * t_x, count, AXIS)
            tl.store(statistics_ptr + 2, t_m, mask=group_mask)
            tl.store(statistics_ptr + 3, along, mask=group_mask)
            out = s * (t_x - t_m - h * along)
            if HAS_W:
                out *= tl.load(w_ptr + t * w_stride + c, mask=c_mask, other=0.0)[None, :]
        if HAS_T_W:
            out += h * load_scaled(t_w_ptr + t * t_w_stride, lr_w_ptr, c, c_mask, LR_W)[None, :]
        if HAS_T_B:
            out += load_scaled(t_b_ptr + t * t_b_stride, lr_b_ptr, c, c_mask, LR_B)[None, :]
        if STORE_Z:
            tl.store(t_z_ptr + e, out, mask=mask)
        if ACT != "none":
            at_ptr = z_ptr if READS_INPUT else y_ptr
            first, _ = slopes(tl.load(at_ptr + e, mask=mask, other=0.0), ACT, ATTR)
            out *= first
        tl.store(t_y_ptr + e, out, mask=mask)
    else:
        center = mean(x, count, AXIS)
        d = tl.where(mask, x - center, 0.0)
        s = 1.0 / tl.sqrt(mean(d * d, count, AXIS) + EPS)
        tl.store(statistics_ptr, center, mask=group_mask)
        tl.store(statistics_ptr + 1, s, mask=group_mask)
        out = d * s
        if HAS_W:
            out *= tl.load(w_ptr + t * w_stride + c, mask=c_mask, other=0.0)[None, :]
        if HAS_B:
            out += tl.load(b_ptr + t * b_stride + c, mask=c_mask, other=0.0)[None, :]
        if STORE_Z:
            tl.store(z_ptr + e, out, mask=mask)
        tl.store(y_ptr + e, activate(out, ACT, ATTR), mask=mask)


@triton.jit
def norm_backward_kernel(
    x_ptr,  # [T, M, C]
    g_ptr,  # [T, M, C]
    t_x_ptr,  # [T, M, C]
    t_g_ptr,  # [T, M, C]
    at_ptr,  # [T, M, C]
    t_z_ptr,  # [T, M, C]
    statistics_ptr,  # [T, groups, 4]
    w_ptr,  # [T, C]
    t_w_ptr,  # [T, C], times lr
    t_lr_ptr,
    out_ptr,  # [T, M, C]: grad_x, t_grad_x by DUAL; written in full or added to
    dst_w_ptr,  # [T, C], written in full
    base_w_ptr,  # [T, C]
    lr_w_ptr,
    dst_b_ptr,  # [T, C], written in full
    base_b_ptr,  # [T, C]
    lr_b_ptr,
    scale_w_ptr,
    scale_b_ptr,
    M,
    C,
    w_stride,
    t_w_stride,
    dst_w_stride,
    base_w_stride,
    scale_w_stride,
    dst_b_stride,
    base_b_stride,
    scale_b_stride,
    AXIS: tl.constexpr,
    HAS_PARAM: tl.constexpr,
    HAS_T_X: tl.constexpr,
    HAS_T_W: tl.constexpr,
    T_LR: tl.constexpr,
    WANTS_X: tl.constexpr,
    ADD: tl.constexpr,
    HAS_W: tl.constexpr,
    BASE_W: tl.constexpr,
    LR_W: tl.constexpr,
    SCALE_W: tl.constexpr,
    SIGN_W: tl.constexpr,
    HAS_B: tl.constexpr,
    BASE_B: tl.constexpr,
    LR_B: tl.constexpr,
    SCALE_B: tl.constexpr,
    SIGN_B: tl.constexpr,
    ACT: tl.constexpr,
    ATTR: tl.constexpr,
    DUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < C
    dtype = x_ptr.dtype.element_ty
    acc_w = tl.zeros([BLOCK_C], dtype=dtype)
    acc_b = tl.zeros([BLOCK_C], dtype=dtype)
    count = as_number(M if AXIS == 0 else C, dtype)
    if HAS_PARAM:
        w = tl.load(w_ptr + t * w_stride + c, mask=c_mask, other=0.0)[None, :]
    if HAS_T_W:
        t_w = load_scaled(t_w_ptr + t * t_w_stride, t_lr_ptr, c, c_mask, T_LR)[None, :]

    for start in range(0, M, BLOCK_M):  # once for batch norm: a column is a group
        m = start + tl.arange(0, BLOCK_M)
        mask = (m < M)[:, None] & c_mask[None, :]
        e = (t * M + m)[:, None] * C + c[None, :]
        at = tl.expand_dims(t * C + c if AXIS == 0 else t * M + m, AXIS) * 4
        group_mask = tl.expand_dims(c_mask if AXIS == 0 else m < M, AXIS)
        g, t_g = load_grad(g_ptr, t_g_ptr, at_ptr, t_z_ptr, e, mask, ACT, ATTR, DUAL)
        s = tl.load(statistics_ptr + at + 1, mask=group_mask, other=0.0)
        center = tl.load(statistics_ptr + at, mask=group_mask, other=0.0)
        h = tl.where(mask, (tl.load(x_ptr + e, mask=mask, other=0.0) - center) * s, 0.0)
        q = g
        if HAS_PARAM:
            q = g * w
        if DUAL:
            t_h = tl.zeros([BLOCK_M, BLOCK_C], dtype=dtype)
            if HAS_T_X:
                t_m = tl.load(statistics_ptr + at + 2, mask=group_mask, other=0.0)
                along = tl.load(statistics_ptr + at + 3, mask=group_mask, other=0.0)
                t_h = s * (tl.load(t_x_ptr + e, mask=mask, other=0.0) - t_m - h * along)
                t_h = tl.where(mask, t_h, 0.0)
            acc_w += tl.sum(t_g * h + g * t_h, 0)
            acc_b += tl.sum(t_g, 0)
            if WANTS_X:
                t_q = t_g
                if HAS_PARAM:
                    t_q = t_g * w
                if HAS_T_W:
                    t_q += g * t_w
                q_h = mean(q * h, count, AXIS)
                out = t_q - mean(t_q, count, AXIS) - h * mean(t_q * h + q * t_h, count, AXIS) - t_h * q_h
                if HAS_T_X:  # t_s / s = -s along
                    out -= s * along * (q - mean(q, count, AXIS) - h * q_h)
                out *= s
        else:
            acc_w += tl.sum(g * h, 0)
            acc_b += tl.sum(g, 0)
            if WANTS_X:
                out = s * (q - mean(q, count, AXIS) - h * mean(q * h, count, AXIS))
        if WANTS_X:
            if ADD:
                out += tl.load(out_ptr + e, mask=mask, other=0.0)
            tl.store(out_ptr + e, out, mask=mask)

    if HAS_W:
        store_update(
            acc_w, t, c, c_mask,
            dst_w_ptr, base_w_ptr, lr_w_ptr, scale_w_ptr, dst_w_stride, base_w_stride, scale_w_stride,
            BASE_W, LR_W, SCALE_W, SIGN_W,
        )  # fmt: skip
    if HAS_B:
        store_update(
            acc_b, t, c, c_mask,
            dst_b_ptr, base_b_ptr, lr_b_ptr, scale_b_ptr, dst_b_stride, base_b_stride, scale_b_stride,
            BASE_B, LR_B, SCALE_B, SIGN_B,
        )  # fmt: skip


def tile(M: int, C: int, axis: int) -> dict[str, int]:
    """A tile holds whole groups, and about 2048 numbers if they leave the choice."""
    check_group(M if axis == 0 else C, "a group of a norm")
    if axis == 0:
        BLOCK_M = power_of_two(M, 1, 1 << 20)
        return _with_warps({"BLOCK_M": BLOCK_M, "BLOCK_C": power_of_two(C, 1, max(2048 // BLOCK_M, 1))})
    BLOCK_C = power_of_two(C, 1, 1 << 20)
    return _with_warps({"BLOCK_M": power_of_two(M, 1, max(2048 // BLOCK_C, 1)), "BLOCK_C": BLOCK_C})


def _with_warps(blocks: dict[str, int]) -> dict[str, int]:
    numbers = blocks["BLOCK_M"] * blocks["BLOCK_C"]
    return blocks | {"num_warps": 4 if numbers <= 4096 else 8 if numbers <= 8192 else 16}


def norm_forward(
    x: Buffer, w: Param | None, b: Param | None, y: Buffer, z: Buffer | None, statistics,
    act: Activation = NO_ACTIVATION, *, eps: float, axis: int, dual: bool,
) -> None:  # fmt: skip
    """y [T, M, C] and the statistics, or their tangents. z: as in linear_forward"""
    T, M, C = x.value.shape
    blocks = tile(M, C, axis)
    W, B = w or Param(x.value), b or Param(x.value)
    stored_z = None if z is None else z.t_value if dual else z.value
    norm_forward_kernel[(T, triton.cdiv(M, blocks["BLOCK_M"]), triton.cdiv(C, blocks["BLOCK_C"]))](
        x.value, W.value, B.value, y.value, None if z is None else z.value, statistics,
        x.t_value, W.tangent, B.tangent, W.lr, B.lr, y.t_value, stored_z,
        M, C, W.value.stride(0), B.value.stride(0), stride(W.tangent), stride(B.tangent),
        EPS=eps, AXIS=axis, HAS_W=w is not None, HAS_B=b is not None, HAS_T_X=x.t_value is not None,
        HAS_T_W=W.tangent is not None, HAS_T_B=B.tangent is not None,
        LR_W=number_or_elements(W.lr), LR_B=number_or_elements(B.lr),
        ACT=act.name, ATTR=act.attr, READS_INPUT=act.reads_input,
        STORE_Z=stored_z is not None, DUAL=dual, **blocks,
    )  # fmt: skip


def norm_backward(
    x: Buffer, w: Param | None, y: Buffer, z: Buffer | None, statistics,
    update_w: Update | None, update_b: Update | None, act: Activation = NO_ACTIVATION,
    *, axis: int, wants_x: bool, add: bool, dual: bool,
) -> None:  # fmt: skip
    """The gradient by x from that by y, or its tangent, written or added to what is there, if it is wanted;
    and those by w and b [T, C] to where the updates say."""
    T, M, C = x.value.shape
    blocks = tile(M, C, axis)
    W = w or Param(x.value)
    norm_backward_kernel[(T, triton.cdiv(C, blocks["BLOCK_C"]))](
        x.value, y.grad, x.t_value, y.t_grad,
        slopes_from(y, z, act), None if z is None else z.t_value,
        statistics, W.value, W.tangent, W.lr, x.t_grad if dual else x.grad,
        M=M, C=C, w_stride=W.value.stride(0), t_w_stride=stride(W.tangent),
        AXIS=axis, HAS_PARAM=w is not None, HAS_T_X=x.t_value is not None, HAS_T_W=W.tangent is not None,
        T_LR=number_or_elements(W.lr), WANTS_X=wants_x, ADD=add,
        **update_arguments("w", update_w), **update_arguments("b", update_b),
        ACT=act.name, ATTR=act.attr, DUAL=dual, **blocks,
    )  # fmt: skip
