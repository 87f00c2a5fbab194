"""L = sum_n s_n (log sum_c e^z_c - sum_c q_c z_c), q = (1 - smoothing) onehot(y) + smoothing / C

s_n = w_n / sum w (1 / N without weights). grad_z = s_n (p - q), p = softmax z.
tangent: t_grad_z = s_n p (t_z - <p, t_z>).  Szegedy et al. 2016 (label smoothing, arXiv 1512.00567).
"""

import triton
import triton.language as tl

from .mse import example_weight
from .tiles import as_number, check_group, power_of_two, warps_for
from .types import Buffer


@triton.jit
def cross_entropy_tile(
    z, t_z, y, s, c, C, n_mask, SMOOTHING: tl.constexpr, DUAL: tl.constexpr
):  # fmt: skip
    """(gradient or its tangent [BLOCK_N, BLOCK_C], losses [BLOCK_N] but by DUAL) of rows that are whole"""
    mask = n_mask[:, None] & (c < C)[None, :]
    top = tl.max(tl.where(mask, z, float("-inf")), 1)
    z = tl.where(mask, z - top[:, None], 0.0)
    p = tl.where(mask, tl.exp(z), 0.0)
    norm = tl.where(n_mask, tl.sum(p, 1), 1.0)
    p /= norm[:, None]
    if DUAL:
        return s[:, None] * p * (t_z - tl.sum(p * t_z, 1)[:, None]), s
    else:
        q = (c[None, :] == y[:, None]).to(z.dtype) * (1.0 - SMOOTHING) + SMOOTHING / as_number(C, z.dtype)
        expected = tl.sum(tl.where(mask & (q != 0), q * z, 0.0), 1)  # z may be -inf
        # a label out of range shows as NaN: to raise, the host would have to wait for it
        s = tl.where((y >= 0) & (y < C), s, float("nan"))
        return tl.where(mask, s[:, None] * (p - q), 0.0), tl.where(n_mask, s * (tl.log(norm) - expected), 0.0)


@triton.jit
def cross_entropy_kernel(
    z_ptr,  # [T, N, C]
    target_ptr,  # [T, N] int64
    weight_ptr,  # [T, N]
    t_z_ptr,  # [T, N, C]
    out_ptr,  # [T, N, C]: grad_z, t_grad_z by DUAL; written in full
    loss_ptr,  # [T], written in full but by DUAL
    N,
    C,
    SMOOTHING: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    DUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    dtype = z_ptr.dtype.element_ty
    loss = tl.zeros([BLOCK_N], dtype=dtype)
    c = tl.arange(0, BLOCK_C)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        s = example_weight(weight_ptr, t, n, n < N, N, dtype, HAS_WEIGHT, BLOCK_N)
        mask = (n < N)[:, None] & (c < C)[None, :]
        e = (t * N + n)[:, None] * C + c[None, :]
        z = tl.load(z_ptr + e, mask=mask, other=0.0)
        y = n
        t_z = z
        if DUAL:
            t_z = tl.load(t_z_ptr + e, mask=mask, other=0.0)
        else:
            y = tl.load(target_ptr + t * N + n, mask=n < N, other=-1)
        out, losses = cross_entropy_tile(z, t_z, y, s, c, C, n < N, SMOOTHING, DUAL)
        if not DUAL:
            loss += losses
        tl.store(out_ptr + e, out, mask=mask)
    if not DUAL:
        tl.store(loss_ptr + t, tl.sum(loss, 0))


def cross_entropy(z: Buffer, target, weight, loss, *, smoothing: float, dual: bool) -> None:
    """loss [T] and the gradient by z [T, N, C], or its tangent. target [T, N] int64; weight [T, N] or None"""
    T, N, C = z.value.shape
    check_group(C, "an output of classes")
    BLOCK_C = power_of_two(C, 1, 1 << 20)
    BLOCK_N = power_of_two(N, 1, max(2048 // BLOCK_C, 1))
    cross_entropy_kernel[(T,)](
        z.value, target, weight, z.t_value, z.t_grad if dual else z.grad, loss, N, C,
        SMOOTHING=smoothing, HAS_WEIGHT=weight is not None, DUAL=dual,
        BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, num_warps=warps_for(BLOCK_N * BLOCK_C, z.value),
    )  # fmt: skip
