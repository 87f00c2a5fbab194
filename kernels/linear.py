"""y = f(x w^T + b), f an activation. Formulas: fastmaml/ops/linear.py.

Tangents: t_y = f' (t_x w^T + x t_w^T + t_b);  t_grad_x = t_g w + g t_w;  t_grad_w = t_g^T x + g^T t_x
with g the gradient by x w^T + b. The gradient by w is not stored for its own sake: `Update` is its epilogue.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import load_grad, store_activated
from .norm import norm_arguments, norm_forward, norm_tile
from .tiles import (
    INTERPRETED,
    dot,
    load_scaled,
    number_or_elements,
    power_of_two,
    slopes_from,
    store_update,
    stride,
    update_arguments,
)
from .types import NO_ACTIVATION, NOTHING, Activation, Buffer, Norm, Param, Update


@triton.jit
def linear_forward_kernel(
    x_ptr,  # [T, M, I]
    w_ptr,  # [T, O, I]
    b_ptr,  # [T, O]
    y_ptr,  # [T, M, O], written in full; read by DUAL
    z_ptr,  # [T, M, O], the same before f
    t_x_ptr,  # [T, M, I]
    t_w_ptr,  # [T, O, I], times lr_w
    t_b_ptr,  # [T, O], times lr_b
    lr_w_ptr,
    lr_b_ptr,
    t_y_ptr,  # [T, M, O], written in full by DUAL
    t_z_ptr,  # [T, M, O]
    M,
    I,
    O,
    w_stride,  # from task to task, 0 where it is shared
    b_stride,
    t_w_stride,
    t_b_stride,
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
    NORM_AXIS: tl.constexpr,  # None: no norm behind it
    NORM_EPS: tl.constexpr,
    NORM_LR_W: tl.constexpr,
    NORM_LR_B: tl.constexpr,
    NORM_ACT: tl.constexpr,
    NORM_ATTR: tl.constexpr,
    NORM_READS_INPUT: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_T_X: tl.constexpr,
    HAS_T_W: tl.constexpr,
    HAS_T_B: tl.constexpr,
    LR_W: tl.constexpr,
    LR_B: tl.constexpr,
    ACT: tl.constexpr,
    ATTR: tl.constexpr,
    READS_INPUT: tl.constexpr,
    DUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = (t * M + m)[:, None]
    x_ptr += rows * I
    w_ptr += t * w_stride + o[None, :].to(tl.int64) * I
    if HAS_T_X:
        t_x_ptr += rows * I
    if HAS_T_W:
        t_w_ptr += t * t_w_stride
    o_mask = (o < O)[None, :]
    m_mask = (m < M)[:, None]

    acc = tl.zeros([BLOCK_M, BLOCK_O], dtype=y_ptr.dtype.element_ty)
    for start in range(0, I, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        x_mask = m_mask & (i < I)[None, :]
        w_mask = o_mask & (i < I)[:, None]
        if DUAL:
            if HAS_T_X:
                # [BLOCK_M, BLOCK_I], [BLOCK_I, BLOCK_O]
                t_x = tl.load(t_x_ptr + i[None, :], mask=x_mask, other=0.0)
                w = tl.load(w_ptr + i[:, None], mask=w_mask, other=0.0)
                acc = dot(t_x, w, acc, PRECISION)
            if HAS_T_W:
                x = tl.load(x_ptr + i[None, :], mask=x_mask, other=0.0)
                at = o[None, :].to(tl.int64) * I + i[:, None]
                t_w = load_scaled(t_w_ptr, lr_w_ptr, at, w_mask, LR_W)
                acc = dot(x, t_w, acc, PRECISION)
        else:
            x = tl.load(x_ptr + i[None, :], mask=x_mask, other=0.0)
            w = tl.load(w_ptr + i[:, None], mask=w_mask, other=0.0)
            acc = dot(x, w, acc, PRECISION)

    e = rows * O + o[None, :]
    mask = m_mask & o_mask
    if DUAL and HAS_T_B:
        acc += load_scaled(t_b_ptr + t * t_b_stride, lr_b_ptr, o, o < O, LR_B)[None, :]
    if not DUAL and HAS_B:
        acc += tl.load(b_ptr + t * b_stride + o, mask=o < O, other=0.0)[None, :]
    if NORM_AXIS is not None:
        x = tl.load(y_ptr + e, mask=mask, other=0.0) if DUAL else acc
        norm_tile(
            x, acc, t, m, o, M, O, norm_w_ptr, norm_b_ptr, norm_y_ptr, norm_z_ptr, statistics_ptr,
            norm_t_w_ptr, norm_t_b_ptr, norm_lr_w_ptr, norm_lr_b_ptr, norm_t_y_ptr, norm_t_z_ptr,
            norm_w_stride, norm_b_stride, norm_t_w_stride, norm_t_b_stride, NORM_AXIS, NORM_EPS,
            NORM_LR_W, NORM_LR_B, NORM_ACT, NORM_ATTR, NORM_READS_INPUT, True, DUAL,
        )  # fmt: skip
    store_activated(acc, y_ptr, z_ptr, t_y_ptr, t_z_ptr, e, mask, ACT, ATTR, READS_INPUT, DUAL)


@triton.jit
def linear_backward_input_kernel(
    g_ptr,  # [T, M, O]
    t_g_ptr,  # [T, M, O]
    at_ptr,  # [T, M, O]
    t_z_ptr,  # [T, M, O]
    w_ptr,  # [T, O, I]
    t_w_ptr,  # [T, O, I], times lr_w
    lr_w_ptr,
    out_ptr,  # [T, M, I]: grad_x, t_grad_x by DUAL; written in full or added to
    M,
    I,
    O,
    w_stride,
    t_w_stride,
    HAS_T_W: tl.constexpr,
    LR_W: tl.constexpr,
    ACT: tl.constexpr,
    ATTR: tl.constexpr,
    ADD: tl.constexpr,
    DUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.program_id(2) * BLOCK_I + tl.arange(0, BLOCK_I)
    rows = (t * M + m)[:, None]
    m_mask = (m < M)[:, None]
    i_mask = (i < I)[None, :]
    w_ptr += t * w_stride
    if HAS_T_W:
        t_w_ptr += t * t_w_stride

    acc = tl.zeros([BLOCK_M, BLOCK_I], dtype=out_ptr.dtype.element_ty)
    for start in range(0, O, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        g_mask = m_mask & (o < O)[None, :]
        g, t_g = load_grad(g_ptr, t_g_ptr, at_ptr, t_z_ptr, rows * O + o[None, :], g_mask, ACT, ATTR, DUAL)
        w_mask = (o < O)[:, None] & i_mask
        at = o[:, None].to(tl.int64) * I + i[None, :]
        # [BLOCK_O, BLOCK_I]
        w = tl.load(w_ptr + at, mask=w_mask, other=0.0)
        if DUAL:
            acc = dot(t_g, w, acc, PRECISION)
            if HAS_T_W:
                t_w = load_scaled(t_w_ptr, lr_w_ptr, at, w_mask, LR_W)
                acc = dot(g, t_w, acc, PRECISION)
        else:
            acc = dot(g, w, acc, PRECISION)

    e = rows * I + i[None, :]
    mask = m_mask & i_mask
    if ADD:
        acc += tl.load(out_ptr + e, mask=mask, other=0.0)
    tl.store(out_ptr + e, acc, mask=mask)


@triton.jit
def linear_backward_weight_kernel(
    x_ptr,  # [T, M, I]
    g_ptr,  # [T, M, O]
    t_x_ptr,  # [T, M, I]
    t_g_ptr,  # [T, M, O]
    at_ptr,  # [T, M, O]
    t_z_ptr,  # [T, M, O]
    dst_w_ptr,  # [T, O, I], written in full
    base_w_ptr,  # [T, O, I]
    lr_w_ptr,
    dst_b_ptr,  # [T, O], written in full
    base_b_ptr,  # [T, O]
    lr_b_ptr,
    scale_w_ptr,
    scale_b_ptr,
    M,
    I,
    O,
    dst_w_stride,
    base_w_stride,
    scale_w_stride,
    dst_b_stride,
    base_b_stride,
    scale_b_stride,
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
    HAS_T_X: tl.constexpr,
    ACT: tl.constexpr,
    ATTR: tl.constexpr,
    DUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.program_id(2) * BLOCK_I + tl.arange(0, BLOCK_I)
    o_mask = (o < O)[None, :]
    i_mask = (i < I)[None, :]

    acc = tl.zeros([BLOCK_O, BLOCK_I], dtype=x_ptr.dtype.element_ty)
    acc_b = tl.zeros([BLOCK_O], dtype=x_ptr.dtype.element_ty)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        rows = (t * M + m)[:, None]
        m_mask = (m < M)[:, None]
        g, t_g = load_grad(
            g_ptr, t_g_ptr, at_ptr, t_z_ptr, rows * O + o[None, :], m_mask & o_mask, ACT, ATTR, DUAL
        )
        if HAS_B:
            acc_b += tl.sum(t_g if DUAL else g, 0)
        if HAS_W:
            x_mask = m_mask & i_mask
            # [BLOCK_M, BLOCK_I]
            x = tl.load(x_ptr + rows * I + i[None, :], mask=x_mask, other=0.0)
            if DUAL:
                acc = dot(tl.trans(t_g), x, acc, PRECISION)
                if HAS_T_X:
                    t_x = tl.load(t_x_ptr + rows * I + i[None, :], mask=x_mask, other=0.0)
                    acc = dot(tl.trans(g), t_x, acc, PRECISION)
            else:
                acc = dot(tl.trans(g), x, acc, PRECISION)

    if HAS_W:
        store_update(
            acc, t, o[:, None].to(tl.int64) * I + i[None, :], (o < O)[:, None] & i_mask,
            dst_w_ptr, base_w_ptr, lr_w_ptr, scale_w_ptr, dst_w_stride, base_w_stride, scale_w_stride,
            BASE_W, LR_W, SCALE_W, SIGN_W,
        )  # fmt: skip
    if HAS_B and tl.program_id(2) == 0:
        store_update(
            acc_b, t, o, o < O,
            dst_b_ptr, base_b_ptr, lr_b_ptr, scale_b_ptr, dst_b_stride, base_b_stride, scale_b_stride,
            BASE_B, LR_B, SCALE_B, SIGN_B,
        )  # fmt: skip


# operands -> the longest block of the axis that is summed, and of the others. Without tensor cores the
# operands of a block lie in registers: 64 x 64 blocks spill.
LONGEST = {"float64": (16, 32), "ieee": (16, 32), "tf32": (32, 64), "bf16": (32, 64)}
if INTERPRETED.value:  # a tile costs a millisecond there, whatever its size
    LONGEST = dict.fromkeys(LONGEST, (64, 64))


# of the numbers of a group that a norm takes in the kernel of the linear layer before it
MOST_NORMED = 128


def tile(x: Tensor, I: int, O: int, *, reduce: str, precision: str, whole: str = "") -> dict[str, int]:
    """Blocks of a product of x [T, M, I], or its gradient, and w [T, O, I], or its own: as large as the sizes
    want, and at least what a tensor core takes.

    whole: M or O, of which one block is to hold all
    """
    M, operands = x.shape[1], "float64" if x.dtype == torch.float64 else precision
    along, across = LONGEST[operands]
    sizes = {"M": M, "I": I, "O": O}
    most = dict.fromkeys(sizes, across) | {reduce: along}
    if whole and sizes[whole] > across:
        most |= {"M": 16, "O": 16} | {whole: MOST_NORMED}
    blocks = {f"BLOCK_{n}": power_of_two(size, 16, most[n]) for n, size in sizes.items()}
    # what 4 warps have registers for: the forward kernel's operands of bfloat16 lie there twice
    most_of_4 = 32 * 32 * {"float64": 8, "bf16": 32 if reduce == "I" else 64}.get(operands, 64)
    large = blocks["BLOCK_M"] * blocks["BLOCK_I"] * blocks["BLOCK_O"] > most_of_4
    # One stage: loads ahead would lie in shared memory by columns where an operand is worked on before its
    # product (a factor f', a step size), all lanes in one bank.
    return blocks | {"num_warps": 8 if large else 4, "num_stages": 1}


def linear_forward(
    x: Buffer, w: Param, b: Param | None, y: Buffer, z: Buffer | None,
    act: Activation = NO_ACTIVATION, norm: Norm | None = None, *, dual: bool, precision: str = "ieee",
) -> None:  # fmt: skip
    """y [T, M, O] from x [T, M, I], w [T, O, I] and b [T, O], or its tangent; then the norm of y, in the same
    launch where a program can hold its groups.

    z: what f takes, kept where the backward pass reads it: the value if act.reads_input, the tangent if
    act.curved
    """
    (T, M, I), O = x.value.shape, y.value.shape[2]
    fused = norm if norm and (M, O)[norm.axis] <= MOST_NORMED else None
    blocks = tile(x.value, I, O, reduce="I", precision=precision, whole="MO"[fused.axis] if fused else "")
    b, z = b or Param(w.value), z or NOTHING
    grid = T, triton.cdiv(M, blocks["BLOCK_M"]), triton.cdiv(O, blocks["BLOCK_O"])
    linear_forward_kernel[grid](
        x.value, w.value, b.value, y.value, z.value,
        x.t_value, w.tangent, b.tangent, w.lr, b.lr, y.t_value, z.t_value,
        M, I, O, w.value.stride(0), b.value.stride(0), stride(w.tangent), stride(b.tangent),
        **norm_arguments(fused), HAS_B=b.value is not w.value, HAS_T_X=x.t_value is not None,
        HAS_T_W=w.tangent is not None, HAS_T_B=b.tangent is not None,
        LR_W=number_or_elements(w.lr), LR_B=number_or_elements(b.lr),
        ACT=act.name, ATTR=act.attr, READS_INPUT=act.reads_input, DUAL=dual, PRECISION=precision, **blocks,
    )  # fmt: skip
    if norm and not fused:
        norm_forward(y, *norm[:6], eps=norm.eps, axis=norm.axis, dual=dual)


def linear_backward_input(
    x: Buffer, w: Param, y: Buffer, z: Buffer | None,
    act: Activation = NO_ACTIVATION, *, add: bool, dual: bool, precision: str = "ieee",
) -> None:  # fmt: skip
    """The gradient by x [T, M, I] from that by y [T, M, O], or its tangent: written, or added to x's."""
    (T, M, I), O = x.value.shape, y.value.shape[2]
    blocks = tile(x.value, I, O, reduce="O", precision=precision)
    grid = T, triton.cdiv(M, blocks["BLOCK_M"]), triton.cdiv(I, blocks["BLOCK_I"])
    linear_backward_input_kernel[grid](
        y.grad, y.t_grad, slopes_from(y, z, act), None if z is None else z.t_value,
        w.value, w.tangent, w.lr, x.t_grad if dual else x.grad,
        M, I, O, w.value.stride(0), stride(w.tangent),
        HAS_T_W=w.tangent is not None, LR_W=number_or_elements(w.lr),
        ACT=act.name, ATTR=act.attr, ADD=add, DUAL=dual, PRECISION=precision, **blocks,
    )  # fmt: skip


def linear_backward_weight(
    x: Buffer, y: Buffer, z: Buffer | None, update_w: Update | None, update_b: Update | None,
    act: Activation = NO_ACTIVATION, *, dual: bool, precision: str = "ieee",
) -> None:  # fmt: skip
    """The gradients by w [T, O, I] and b [T, O], or their tangents, to where the updates say."""
    (T, M, I), O = x.value.shape, y.value.shape[2]
    if update_w is None:
        I = 1
    blocks = tile(x.value, I, O, reduce="M", precision=precision)
    grid = T, triton.cdiv(O, blocks["BLOCK_O"]), triton.cdiv(I, blocks["BLOCK_I"])
    linear_backward_weight_kernel[grid](
        x.value, y.grad, x.t_value, y.t_grad, slopes_from(y, z, act), None if z is None else z.t_value,
        M=M, I=I, O=O, **update_arguments("w", update_w), **update_arguments("b", update_b),
        HAS_T_X=x.t_value is not None,
        ACT=act.name, ATTR=act.attr, DUAL=dual, PRECISION=precision, **blocks,
    )  # fmt: skip
