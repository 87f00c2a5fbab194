"""L = sum_n s_n |z_n - y_n|^2 / C, s_n = w_n / sum w (1 / N without weights), C numbers in an example.

grad_z = 2 s_n (z - y) / C.  tangent: t_grad_z = 2 s_n t_z / C
"""

import triton
import triton.language as tl

from .tiles import as_number, power_of_two
from .types import Buffer


@triton.jit
def example_weight(
    weight_ptr, t, n, mask, N, dtype: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr
):
    """s_n of the examples n of task t; weight [T, N]"""
    if HAS_WEIGHT:
        total = tl.zeros([], dtype=dtype)
        for start in range(0, N, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            total += tl.sum(tl.load(weight_ptr + t * N + i, mask=i < N, other=0.0), 0)
        return tl.load(weight_ptr + t * N + n, mask=mask, other=0.0) / total
    else:
        return tl.where(mask, tl.zeros([BLOCK_N], dtype=dtype) + 1.0, 0.0) / as_number(N, dtype)


@triton.jit
def mse_kernel(
    z_ptr,  # [T, N, C]
    target_ptr,  # [T, N, C]
    weight_ptr,  # [T, N]
    t_z_ptr,  # [T, N, C]
    out_ptr,  # [T, N, C]: grad_z, t_grad_z by DUAL; written in full
    loss_ptr,  # [T], written in full but by DUAL
    N,
    C,
    HAS_WEIGHT: tl.constexpr,
    DUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    dtype = z_ptr.dtype.element_ty
    loss = tl.zeros([BLOCK_N, BLOCK_C], dtype=dtype)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        s = example_weight(weight_ptr, t, n, n < N, N, dtype, HAS_WEIGHT, BLOCK_N) / as_number(C, dtype)
        for first in range(0, C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            mask = (n < N)[:, None] & (c < C)[None, :]
            e = (t * N + n)[:, None] * C + c[None, :]
            if DUAL:
                d = tl.load(t_z_ptr + e, mask=mask, other=0.0)
            else:
                d = tl.load(z_ptr + e, mask=mask, other=0.0) - tl.load(target_ptr + e, mask=mask, other=0.0)
                loss += s[:, None] * d * d
            tl.store(out_ptr + e, 2.0 * s[:, None] * d, mask=mask)
    if not DUAL:
        tl.store(loss_ptr + t, tl.sum(tl.sum(loss, 1), 0))


def mse(z: Buffer, target, weight, loss, *, dual: bool) -> None:
    """loss [T] and the gradient by z [T, N, C], or its tangent. target [T, N, C]; weight [T, N] or None"""
    T, N = target.shape[:2] if weight is None else weight.shape
    C = z.value.numel() // max(T * N, 1)
    BLOCK_N = power_of_two(N, 1, 64)
    mse_kernel[(T,)](
        z.value, target, weight, z.t_value, z.t_grad if dual else z.grad, loss, N, C,
        HAS_WEIGHT=weight is not None, DUAL=dual, BLOCK_N=BLOCK_N,
        BLOCK_C=power_of_two(C, 1, 1024 // BLOCK_N),
    )  # fmt: skip
