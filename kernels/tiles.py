"""What several kernels share: products in a chosen precision, the update in an epilogue, sizes of blocks."""

import os
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .types import Activation, Buffer, Update

# The interpreter multiplies the bits of bfloat16: there operands are rounded to it, then taken as float32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, with operands of float32 in the precision wanted; float64 stays what it is"""
    if a.dtype == tl.float64:
        return tl.dot(a, b, acc, out_dtype=tl.float64)
    elif PRECISION == "bf16":
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def as_number(n, dtype: tl.constexpr):
    """A size as a number to divide by. Where it is 1 the compiler has put a constant in its place."""
    return tl.zeros([], dtype=dtype) + n


@triton.jit
def load_scaled(ptr, lr_ptr, e, mask, LR: tl.constexpr):
    """The elements e of a tangent, times its step sizes: types.Param"""
    a = tl.load(ptr + e, mask=mask, other=0.0)
    if LR == "elements":
        a *= tl.load(lr_ptr + e, mask=mask, other=0.0)
    elif LR == "number":
        a *= tl.load(lr_ptr)
    return a


@triton.jit
def store_update(
    grad,
    t,
    e,
    mask,
    dst_ptr,
    base_ptr,
    lr_ptr,
    scale_ptr,
    dst_stride,
    base_stride,
    scale_stride,
    BASE: tl.constexpr,
    LR: tl.constexpr,
    SCALE: tl.constexpr,
    SIGN: tl.constexpr,
):
    """dst = base + sign * scale * lr * grad, at the elements e of task t"""
    if LR == "elements":
        grad *= tl.load(lr_ptr + e, mask=mask, other=0.0)
    elif LR == "number":
        grad *= tl.load(lr_ptr)
    if SCALE:
        grad *= tl.load(scale_ptr + t * scale_stride)
    if SIGN < 0:
        grad = -grad
    if BASE:
        grad += tl.load(base_ptr + t * base_stride + e, mask=mask, other=0.0)
    tl.store(dst_ptr + t * dst_stride + e, grad, mask=mask)


def update_arguments(name: str, u: Update | None) -> dict[str, Any]:
    """The arguments of a kernel for the update of parameter `name`."""
    u, present = u or Update(None), u is not None  # pyright: ignore[reportArgumentType]
    N = name.upper()
    return {
        f"dst_{name}_ptr": u.dst,
        f"base_{name}_ptr": u.base,
        f"lr_{name}_ptr": u.lr,
        f"scale_{name}_ptr": u.scale,
        f"dst_{name}_stride": u.dst.stride(0) if present else 0,
        f"base_{name}_stride": 0 if u.base is None else u.base.stride(0),
        f"scale_{name}_stride": 0 if u.scale is None or u.scale.numel() == 1 else 1,
        f"HAS_{N}": present,
        f"BASE_{N}": u.base is not None,
        f"LR_{N}": number_or_elements(u.lr),
        f"SCALE_{N}": u.scale is not None,
        f"SIGN_{N}": u.sign,
    }


def stride(a: Tensor | None) -> int:
    """From task to task"""
    return 0 if a is None else a.stride(0)


def slopes_from(y: Buffer, z: Buffer | None, act: Activation) -> Tensor:
    """What f' and f'' are found from, see elementwise.slopes"""
    return z.value if act.reads_input and z is not None else y.value


def number_or_elements(lr: Tensor | None) -> str:
    return "none" if lr is None else "number" if lr.numel() == 1 else "elements"


# of a norm, or of the classes of an output: a program holds it in registers, or spills it
GROUP_MOST = 16384


def check_group(n: int, what: str) -> None:
    if n > GROUP_MOST:
        raise ValueError(f"{what} of {n} numbers is more than the Triton kernels take: {GROUP_MOST}")


def power_of_two(n: int, least: int, most: int) -> int:
    return max(least, min(most, triton.next_power_of_2(n)))


def warps_for(numbers: int, x: Tensor) -> int:
    """Of a program that holds so many numbers like x's at once, and what is made of them, in registers: the
    dual backward pass of a norm spills with more than 64 bytes a thread. With 16 warps a thread has half the
    registers."""
    size = numbers * x.element_size()
    return 4 if size <= 8 << 10 else 8 if size <= 32 << 10 else 16
