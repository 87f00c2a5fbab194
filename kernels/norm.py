"""Batch and layer norm: y = f(w h + b), h = (x - m) s, over groups of numbers. f is an activation.

A group is a column of a task for batch norm (AXIS 0), a row for layer norm (AXIS 1); w and b are of columns.
Formulas: fastmaml/ops/batch_norm.py. Statistics [T, groups, 4]: m, s, and, for the tangent, mean t_x and
mean (h t_x).
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .elementwise import load_grad, store_activated
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
    warps_for,
)
from .types import NO_ACTIVATION, Activation, Buffer, Norm, Param, Update


@triton.jit
def mean(a, count, AXIS: tl.constexpr):
    """Of each group, to be broadcast over it."""
    return tl.expand_dims(tl.sum(a, AXIS), AXIS) / count


@triton.jit
def norm_tile(
    x,  # [BLOCK_M, BLOCK_C], whole groups
    t_x,  # its tangent, read by DUAL if HAS_T_X
    t,
    m,
    c,
    M,
    C,
    w_ptr,  # [T, C]
    b_ptr,  # [T, C]
    y_ptr,  # [T, M, C], written in full; read by DUAL
    z_ptr,  # [T, M, C]
    statistics_ptr,  # [T, groups, 4], two of them written, the others by DUAL
    t_w_ptr,  # [T, C], times lr_w
    t_b_ptr,  # [T, C], times lr_b
    lr_w_ptr,
    lr_b_ptr,
    t_y_ptr,  # [T, M, C], written in full by DUAL
    t_z_ptr,  # [T, M, C]
    w_stride,
    b_stride,
    t_w_stride,
    t_b_stride,
    AXIS: tl.constexpr,
    EPS: tl.constexpr,
    LR_W: tl.constexpr,
    LR_B: tl.constexpr,
    ACT: tl.constexpr,
    ATTR: tl.constexpr,
    READS_INPUT: tl.constexpr,
    HAS_T_X: tl.constexpr,
    DUAL: tl.constexpr,
):
    """The forward pass on what a program holds of x"""
    c_mask = c < C
    mask = (m < M)[:, None] & c_mask[None, :]
    e = (t * M + m)[:, None] * C + c[None, :]
    group = tl.expand_dims(t * C + c if AXIS == 0 else t * M + m, AXIS)
    group_mask = tl.expand_dims(c_mask if AXIS == 0 else m < M, AXIS)
    statistics_ptr += group * 4
    count = as_number(M if AXIS == 0 else C, x.dtype)
    if DUAL:
        s = tl.load(statistics_ptr + 1, mask=group_mask, other=0.0)
        h = (x - tl.load(statistics_ptr, mask=group_mask, other=0.0)) * s
        h = tl.where(mask, h, 0.0)
        out = tl.zeros_like(x)
        if HAS_T_X:
            t_x = tl.where(mask, t_x, 0.0)
            t_m = mean(t_x, count, AXIS)
            along = mean(h * t_x, count, AXIS)
            tl.store(statistics_ptr + 2, t_m, mask=group_mask)
            tl.store(statistics_ptr + 3, along, mask=group_mask)
            out = s * (t_x - t_m - h * along)
            if w_ptr is not None:
                out *= tl.load(w_ptr + t * w_stride + c, mask=c_mask, other=0.0)[None, :]
        if t_w_ptr is not None:
            out += h * load_scaled(t_w_ptr + t * t_w_stride, lr_w_ptr, c, c_mask, LR_W)[None, :]
        if t_b_ptr is not None:
            out += load_scaled(t_b_ptr + t * t_b_stride, lr_b_ptr, c, c_mask, LR_B)[None, :]
    else:
        center = mean(tl.where(mask, x, 0.0), count, AXIS)
        d = tl.where(mask, x - center, 0.0)
        s = 1.0 / tl.sqrt(mean(d * d, count, AXIS) + EPS)
        tl.store(statistics_ptr, center, mask=group_mask)
        tl.store(statistics_ptr + 1, s, mask=group_mask)
        out = d * s
        if w_ptr is not None:
            out *= tl.load(w_ptr + t * w_stride + c, mask=c_mask, other=0.0)[None, :]
        if b_ptr is not None:
            out += tl.load(b_ptr + t * b_stride + c, mask=c_mask, other=0.0)[None, :]
    store_activated(out, y_ptr, z_ptr, t_y_ptr, t_z_ptr, e, mask, ACT, ATTR, READS_INPUT, DUAL)


@triton.jit
def norm_forward_kernel(
    x_ptr,  # [T, M, C]
    t_x_ptr,  # [T, M, C]
    M,
    C,
    norm_w_ptr,  # these as in norm_tile
    norm_b_ptr,
    norm_y_ptr,
    norm_z_ptr,
    statistics_ptr,
    norm_t_w_ptr,
    norm_t_b_ptr,
    norm_lr_w_ptr,
    norm_lr_b_ptr,
    norm_t_y_ptr,
    norm_t_z_ptr,
    norm_w_stride,
    norm_b_stride,
    norm_t_w_stride,
    norm_t_b_stride,
    NORM_AXIS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    NORM_LR_W: tl.constexpr,
    NORM_LR_B: tl.constexpr,
    NORM_ACT: tl.constexpr,
    NORM_ATTR: tl.constexpr,
    NORM_READS_INPUT: tl.constexpr,
    HAS_T_X: tl.constexpr,
    DUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (m < M)[:, None] & (c < C)[None, :]
    e = (t * M + m)[:, None] * C + c[None, :]
    x = tl.load(x_ptr + e, mask=mask, other=0.0)
    t_x = x
    if DUAL and HAS_T_X:
        t_x = tl.load(t_x_ptr + e, mask=mask, other=0.0)
    norm_tile(
        x, t_x, t, m, c, M, C, norm_w_ptr, norm_b_ptr, norm_y_ptr, norm_z_ptr, statistics_ptr,
        norm_t_w_ptr, norm_t_b_ptr, norm_lr_w_ptr, norm_lr_b_ptr, norm_t_y_ptr, norm_t_z_ptr,
        norm_w_stride, norm_b_stride, norm_t_w_stride, norm_t_b_stride, NORM_AXIS, NORM_EPS,
        NORM_LR_W, NORM_LR_B, NORM_ACT, NORM_ATTR, NORM_READS_INPUT, HAS_T_X, DUAL,
    )  # fmt: skip


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


def tile(x: Tensor, axis: int) -> dict[str, int]:
    """A tile of x [T, M, C] holds whole groups, and about 2048 numbers if they leave the choice."""
    _, M, C = x.shape
    check_group(M if axis == 0 else C, "a group of a norm")
    if axis == 0:
        BLOCK_M = power_of_two(M, 1, 1 << 20)
        BLOCK_C = power_of_two(C, 1, max(2048 // BLOCK_M, 1))
    else:
        BLOCK_C = power_of_two(C, 1, 1 << 20)
        BLOCK_M = power_of_two(M, 1, max(2048 // BLOCK_C, 1))
    return {"BLOCK_M": BLOCK_M, "BLOCK_C": BLOCK_C, "num_warps": warps_for(BLOCK_M * BLOCK_C, x)}


def norm_arguments(norm: Norm | None) -> dict[str, Any]:
    """The arguments of a kernel for the norm that it computes, if any."""
    nothing: Any = None
    n = norm or Norm(None, None, Buffer(nothing), None, nothing, NO_ACTIVATION, 0.0, nothing)
    w, b, z = n.w or Param(nothing), n.b or Param(nothing), n.z or Buffer(nothing)
    return {
        "norm_w_ptr": w.value,
        "norm_b_ptr": b.value,
        "norm_y_ptr": n.y.value,
        "norm_z_ptr": z.value,
        "statistics_ptr": n.statistics,
        "norm_t_w_ptr": w.tangent,
        "norm_t_b_ptr": b.tangent,
        "norm_lr_w_ptr": w.lr,
        "norm_lr_b_ptr": b.lr,
        "norm_t_y_ptr": n.y.t_value,
        "norm_t_z_ptr": z.t_value,
        "norm_w_stride": stride(w.value),
        "norm_b_stride": stride(b.value),
        "norm_t_w_stride": stride(w.tangent),
        "norm_t_b_stride": stride(b.tangent),
        "NORM_AXIS": n.axis,
        "NORM_EPS": n.eps,
        "NORM_LR_W": number_or_elements(w.lr),
        "NORM_LR_B": number_or_elements(b.lr),
        "NORM_ACT": n.act.name,
        "NORM_ATTR": n.act.attr,
        "NORM_READS_INPUT": n.act.reads_input,
    }


def norm_forward(
    x: Buffer, w: Param | None, b: Param | None, y: Buffer, z: Buffer | None, statistics,
    act: Activation = NO_ACTIVATION, *, eps: float, axis: int, dual: bool,
) -> None:  # fmt: skip
    """y [T, M, C] and the statistics, or their tangents. z: as in linear_forward"""
    T, M, C = x.value.shape
    blocks = tile(x.value, axis)
    norm_forward_kernel[(T, triton.cdiv(M, blocks["BLOCK_M"]), triton.cdiv(C, blocks["BLOCK_C"]))](
        x.value, x.t_value, M, C, **norm_arguments(Norm(w, b, y, z, statistics, act, eps, axis)),
        HAS_T_X=x.t_value is not None, DUAL=dual, **blocks,
    )  # fmt: skip


def norm_backward(
    x: Buffer, w: Param | None, y: Buffer, z: Buffer | None, statistics,
    update_w: Update | None, update_b: Update | None, act: Activation = NO_ACTIVATION,
    *, axis: int, wants_x: bool, add: bool, dual: bool,
) -> None:  # fmt: skip
    """The gradient by x from that by y, or its tangent, written or added to what is there, if it is wanted;
    and those by w and b [T, C] to where the updates say."""
    T, M, C = x.value.shape
    blocks = tile(x.value, axis)
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
