"""y = f(x) for every activation, alone or at the end of another op's kernel.

backward: grad_x = f' g.  tangent: t_y = f' t_x;  t_grad_x = f' t_g + f'' t_x g
"""

import triton
import triton.language as tl

from .gelu import gelu, gelu_slopes
from .leaky_relu import leaky_relu, leaky_relu_slope
from .sigmoid import sigmoid, sigmoid_slopes
from .silu import silu, silu_slopes
from .tanh import tanh, tanh_slopes
from .types import Activation, Buffer


@triton.jit
def activate(z, ACT: tl.constexpr, ATTR: tl.constexpr):
    if ACT == "leaky_relu":
        return leaky_relu(z, ATTR)
    elif ACT == "tanh":
        return tanh(z)
    elif ACT == "sigmoid":
        return sigmoid(z)
    elif ACT == "gelu":
        return gelu(z, ATTR != 0)
    elif ACT == "silu":
        return silu(z)
    else:
        return z


@triton.jit
def slopes(at, ACT: tl.constexpr, ATTR: tl.constexpr):
    """(f', f''). at: z where Activation.reads_input, y elsewhere; f'' is not read where f is not curved"""
    if ACT == "leaky_relu":
        return leaky_relu_slope(at, ATTR), at
    elif ACT == "tanh":
        return tanh_slopes(at)
    elif ACT == "sigmoid":
        return sigmoid_slopes(at)
    elif ACT == "gelu":
        return gelu_slopes(at, ATTR != 0)
    else:
        return silu_slopes(at)


@triton.jit
def load_grad(
    g_ptr,  # [.., C]: the gradient by y = f(z)
    t_g_ptr,  # its tangent
    at_ptr,  # z or y, see `slopes`
    t_z_ptr,  # the tangent of z, where f is curved
    e,
    mask,
    ACT: tl.constexpr,
    ATTR: tl.constexpr,
    DUAL: tl.constexpr,
):
    """The gradient by z and its tangent; the second is not to be read without DUAL."""
    g = tl.load(g_ptr + e, mask=mask, other=0.0)
    t_g = g
    if DUAL:
        t_g = tl.load(t_g_ptr + e, mask=mask, other=0.0)
    if ACT != "none":
        first, second = slopes(tl.load(at_ptr + e, mask=mask, other=0.0), ACT, ATTR)
        if DUAL:
            t_g = first * t_g
            if ACT != "leaky_relu":
                t_g += second * tl.load(t_z_ptr + e, mask=mask, other=0.0) * g
            t_g = tl.where(mask, t_g, 0.0)  # behind the mask f may have an infinite slope
        g = tl.where(mask, first * g, 0.0)
    return g, t_g


@triton.jit
def store_activated(
    z,  # of a layer, its tangent by DUAL
    y_ptr,  # written; read by DUAL
    z_ptr,  # written if it is there; read by DUAL if READS_INPUT
    t_y_ptr,
    t_z_ptr,
    e,
    mask,
    ACT: tl.constexpr,
    ATTR: tl.constexpr,
    READS_INPUT: tl.constexpr,
    DUAL: tl.constexpr,
):
    """z and y = f(z), or their tangents"""
    if DUAL:
        if t_z_ptr is not None:
            tl.store(t_z_ptr + e, z, mask=mask)
        if ACT != "none":
            at_ptr = z_ptr if READS_INPUT else y_ptr
            first, _ = slopes(tl.load(at_ptr + e, mask=mask, other=0.0), ACT, ATTR)
            z *= first
        tl.store(t_y_ptr + e, z, mask=mask)
    else:
        if z_ptr is not None:
            tl.store(z_ptr + e, z, mask=mask)
        tl.store(y_ptr + e, activate(z, ACT, ATTR), mask=mask)


@triton.jit
def elementwise_forward_kernel(
    x_ptr,  # [size]
    y_ptr,  # [size], written in full; read by DUAL
    t_x_ptr,  # [size]
    t_y_ptr,  # [size], written in full by DUAL
    size,
    ACT: tl.constexpr,
    ATTR: tl.constexpr,
    READS_INPUT: tl.constexpr,
    DUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = e < size
    if DUAL:
        at_ptr = x_ptr if READS_INPUT else y_ptr
        first, _ = slopes(tl.load(at_ptr + e, mask=mask, other=0.0), ACT, ATTR)
        tl.store(t_y_ptr + e, first * tl.load(t_x_ptr + e, mask=mask, other=0.0), mask=mask)
    else:
        tl.store(y_ptr + e, activate(tl.load(x_ptr + e, mask=mask, other=0.0), ACT, ATTR), mask=mask)


@triton.jit
def elementwise_backward_kernel(
    x_ptr,  # [size]
    y_ptr,  # [size]
    g_ptr,  # [size]
    t_x_ptr,  # [size]
    t_g_ptr,  # [size]
    out_ptr,  # [size]: grad_x, t_grad_x by DUAL; written in full or added to
    size,
    ACT: tl.constexpr,
    ATTR: tl.constexpr,
    READS_INPUT: tl.constexpr,
    ADD: tl.constexpr,
    DUAL: tl.constexpr,
    HAS_T_X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = e < size
    at_ptr = x_ptr if READS_INPUT else y_ptr
    first, second = slopes(tl.load(at_ptr + e, mask=mask, other=0.0), ACT, ATTR)
    g = tl.load((t_g_ptr if DUAL else g_ptr) + e, mask=mask, other=0.0)
    out = first * g
    if DUAL and HAS_T_X and ACT != "leaky_relu":
        t_x = tl.load(t_x_ptr + e, mask=mask, other=0.0)
        out += second * t_x * tl.load(g_ptr + e, mask=mask, other=0.0)
    if ADD:
        out += tl.load(out_ptr + e, mask=mask, other=0.0)
    tl.store(out_ptr + e, out, mask=mask)


@triton.jit
def accumulate_kernel(
    a_ptr,  # [size]
    b_ptr,  # [size]
    out_ptr,  # [size]: a, + b, + what is there
    size,
    HAS_B: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = e < size
    out = tl.load(a_ptr + e, mask=mask, other=0.0)
    if HAS_B:
        out += tl.load(b_ptr + e, mask=mask, other=0.0)
    if ADD:
        out += tl.load(out_ptr + e, mask=mask, other=0.0)
    tl.store(out_ptr + e, out, mask=mask)


BLOCK = 1024


def elementwise_forward(x: Buffer, y: Buffer, act: Activation, *, dual: bool) -> None:
    """y, or its tangent. x, y [T, M, C]"""
    size = y.value.numel()
    elementwise_forward_kernel[(triton.cdiv(size, BLOCK),)](
        x.value, y.value, x.t_value, y.t_value, size,
        ACT=act.name, ATTR=act.attr, READS_INPUT=act.reads_input, DUAL=dual, BLOCK=BLOCK,
    )  # fmt: skip


def elementwise_backward(x: Buffer, y: Buffer, act: Activation, *, add: bool, dual: bool) -> None:
    """The gradient by x from that by y, or its tangent: written, or added to what is there."""
    size = y.value.numel()
    elementwise_backward_kernel[(triton.cdiv(size, BLOCK),)](
        x.value, y.value, y.grad, x.t_value, y.t_grad, x.t_grad if dual else x.grad, size,
        ACT=act.name, ATTR=act.attr, READS_INPUT=act.reads_input, ADD=add, DUAL=dual,
        HAS_T_X=x.t_value is not None, BLOCK=BLOCK,
    )  # fmt: skip


def accumulate(out, a, b=None, *, add: bool = False) -> None:
    """out (+)= a + b, tensors of one size"""
    size = out.numel()
    accumulate_kernel[(triton.cdiv(size, BLOCK),)](a, b, out, size, HAS_B=b is not None, ADD=add, BLOCK=BLOCK)
