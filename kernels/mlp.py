"""The whole meta-gradient of an MLP with two hidden layers, one program for each task, weights in registers.

    W_{k+1} = W_k - a_k g_k,    v_k = v_{k+1} - H_k (a_k v_{k+1}),    v_K = scale * gradient of the query loss

W_k of the steps wait in memory; activations are made anew on the way back, in registers too. Weights lie as
[in, out] here, padded with zeros, and so do their tangents and gradients. Formulas of the layers: linear.py.
"""

import triton
import triton.language as tl

from .cross_entropy import cross_entropy_tile
from .elementwise import activate, slopes
from .mse import example_weight
from .tiles import as_number, dot, power_of_two
from .types import Activation


@triton.jit
def load_matrix(ptr, i, o, I, O):
    """[BLOCK_I, BLOCK_O] from [O, I]"""
    return tl.load(ptr + o[None, :] * I + i[:, None], mask=(i < I)[:, None] & (o < O)[None, :], other=0.0)


@triton.jit
def store_matrix(ptr, value, i, o, I, O):
    tl.store(ptr + o[None, :] * I + i[:, None], value, mask=(i < I)[:, None] & (o < O)[None, :])


@triton.jit
def load_vector(ptr, o, O):
    return tl.load(ptr + o, mask=o < O, other=0.0)


@triton.jit
def hidden(x, w, b, o, O, ACT: tl.constexpr, ATTR: tl.constexpr, PRECISION: tl.constexpr):
    """z = x w + b and f(z), 0 in the columns that pad it"""
    z = dot(x, w, tl.zeros([x.shape[0], w.shape[1]], dtype=x.dtype), PRECISION) + b[None, :]
    return z, tl.where((o < O)[None, :], activate(z, ACT, ATTR), 0.0)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    return dot(a, b, tl.zeros([a.shape[0], b.shape[1]], dtype=a.dtype), PRECISION)


@triton.jit
def loss_tile(
    z, t_z, target_ptr, weight_ptr, t, n, N, o, O,
    CLASSES: tl.constexpr, SMOOTHING: tl.constexpr, HAS_WEIGHT: tl.constexpr, DUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(gradient of the output or its tangent, loss but by DUAL)"""
    s = example_weight(weight_ptr, t, n, n < N, N, z.dtype, HAS_WEIGHT, BLOCK_N)
    if CLASSES:
        y = tl.load(target_ptr + t * N + n, mask=n < N, other=-1)
        d, losses = cross_entropy_tile(z, t_z, y, s, o, O, n < N, SMOOTHING, DUAL)
        return d, tl.sum(losses, 0)
    else:
        s = s[:, None] / as_number(O, z.dtype)
        mask = (n < N)[:, None] & (o < O)[None, :]
        if DUAL:
            return tl.where(mask, 2.0 * s * t_z, 0.0), tl.sum(tl.sum(s, 1), 0)
        else:
            y = tl.load(target_ptr + (t * N + n)[:, None] * O + o[None, :], mask=mask, other=0.0)
            e = tl.where(mask, z - y, 0.0)
            return 2.0 * s * e, tl.sum(tl.sum(s * e * e, 1), 0)


@triton.jit
def rate(lr_ptr, k, place, PER_TENSOR: tl.constexpr):
    if PER_TENSOR:
        return tl.load(lr_ptr + k * 6 + place)
    else:
        return tl.load(lr_ptr + k)


@triton.jit
def mlp_kernel(
    x_s_ptr,  # [T, N, I]
    y_s_ptr,  # [T, N, O], or [T, N] int64
    weight_s_ptr,  # [T, N]
    x_q_ptr,  # [T, Q, I]
    y_q_ptr,  # [T, Q, O], or [T, Q] int64
    weight_q_ptr,  # [T, Q]
    w_ptr,  # [T, P], or [P] shared by all
    lr_ptr,  # [K], or [K, 6]
    scale_ptr,  # [1]: of v
    kept_ptr,  # [K, T, P]: W_0 .. W_{K-1}
    v_ptr,  # [T, P], written where there are parameters
    loss_ptr,  # [T], of the query set
    T,
    N,
    Q,
    K,
    I,
    H,
    G,
    O,
    P,
    w_stride,  # P or 0
    at_w1,  # places in the flat vector
    at_b1,
    at_w2,
    at_b2,
    at_w3,
    at_b3,
    WANTS_GRAD: tl.constexpr,
    FIRST_ORDER: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    CLASSES: tl.constexpr,
    SMOOTHING: tl.constexpr,
    WEIGHT_S: tl.constexpr,
    WEIGHT_Q: tl.constexpr,
    ACT: tl.constexpr,
    ATTR: tl.constexpr,
    READS_INPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    n, m = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_Q)
    i, h, g, o = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_O)
    w_ptr += t * w_stride
    w1 = load_matrix(w_ptr + at_w1, i, h, I, H)
    w2 = load_matrix(w_ptr + at_w2, h, g, H, G)
    w3 = load_matrix(w_ptr + at_w3, g, o, G, O)
    b1 = load_vector(w_ptr + at_b1, h, H)
    b2 = load_vector(w_ptr + at_b2, g, G)
    b3 = load_vector(w_ptr + at_b3, o, O)
    x = tl.load(
        x_s_ptr + (t * N + n)[:, None] * I + i[None, :], mask=(n < N)[:, None] & (i < I)[None, :], other=0.0
    )
    x_q = tl.load(
        x_q_ptr + (t * Q + m)[:, None] * I + i[None, :], mask=(m < Q)[:, None] & (i < I)[None, :], other=0.0
    )

    each_step = (t * 0 + T) * P
    kept_ptr += t * P
    for k in range(K):
        if WANTS_GRAD and not FIRST_ORDER:
            kept = kept_ptr + k * each_step
            store_matrix(kept + at_w1, w1, i, h, I, H)
            store_matrix(kept + at_w2, w2, h, g, H, G)
            store_matrix(kept + at_w3, w3, g, o, G, O)
            tl.store(kept + at_b1 + h, b1, mask=h < H)
            tl.store(kept + at_b2 + g, b2, mask=g < G)
            tl.store(kept + at_b3 + o, b3, mask=o < O)
        z1, h1 = hidden(x, w1, b1, h, H, ACT, ATTR, PRECISION)
        z2, h2 = hidden(h1, w2, b2, g, G, ACT, ATTR, PRECISION)
        z3 = product(h2, w3, PRECISION) + b3[None, :]
        d3, _s = loss_tile(
            z3, z3, y_s_ptr, weight_s_ptr, t, n, N, o, O, CLASSES, SMOOTHING, WEIGHT_S, False, BLOCK_N
        )
        f2, s2 = slopes(z2 if READS_INPUT else h2, ACT, ATTR)
        d2 = tl.where((g < G)[None, :], f2 * product(d3, tl.trans(w3), PRECISION), 0.0)
        f1, s1 = slopes(z1 if READS_INPUT else h1, ACT, ATTR)
        d1 = tl.where((h < H)[None, :], f1 * product(d2, tl.trans(w2), PRECISION), 0.0)
        w1 -= rate(lr_ptr, k, 0, PER_TENSOR) * product(tl.trans(x), d1, PRECISION)
        b1 -= rate(lr_ptr, k, 1, PER_TENSOR) * tl.sum(d1, 0)
        w2 -= rate(lr_ptr, k, 2, PER_TENSOR) * product(tl.trans(h1), d2, PRECISION)
        b2 -= rate(lr_ptr, k, 3, PER_TENSOR) * tl.sum(d2, 0)
        w3 -= rate(lr_ptr, k, 4, PER_TENSOR) * product(tl.trans(h2), d3, PRECISION)
        b3 -= rate(lr_ptr, k, 5, PER_TENSOR) * tl.sum(d3, 0)

    zq1, hq1 = hidden(x_q, w1, b1, h, H, ACT, ATTR, PRECISION)
    zq2, hq2 = hidden(hq1, w2, b2, g, G, ACT, ATTR, PRECISION)
    zq3 = product(hq2, w3, PRECISION) + b3[None, :]
    dq3, loss = loss_tile(
        zq3, zq3, y_q_ptr, weight_q_ptr, t, m, Q, o, O, CLASSES, SMOOTHING, WEIGHT_Q, False, BLOCK_Q
    )
    tl.store(loss_ptr + t, loss)
    if WANTS_GRAD:
        scale = tl.load(scale_ptr)
        dq3 *= scale
        fq2, _2 = slopes(zq2 if READS_INPUT else hq2, ACT, ATTR)
        dq2 = tl.where((g < G)[None, :], fq2 * product(dq3, tl.trans(w3), PRECISION), 0.0)
        fq1, _1 = slopes(zq1 if READS_INPUT else hq1, ACT, ATTR)
        dq1 = tl.where((h < H)[None, :], fq1 * product(dq2, tl.trans(w2), PRECISION), 0.0)
        v1, c1 = product(tl.trans(x_q), dq1, PRECISION), tl.sum(dq1, 0)
        v2, c2 = product(tl.trans(hq1), dq2, PRECISION), tl.sum(dq2, 0)
        v3, c3 = product(tl.trans(hq2), dq3, PRECISION), tl.sum(dq3, 0)
        if not FIRST_ORDER:
            tl.debug_barrier()  # what other threads of the program have stored is read
            for back in range(K):
                k = K - 1 - back
                kept = kept_ptr + k * each_step
                w1 = load_matrix(kept + at_w1, i, h, I, H)
                w2 = load_matrix(kept + at_w2, h, g, H, G)
                w3 = load_matrix(kept + at_w3, g, o, G, O)
                b1 = load_vector(kept + at_b1, h, H)
                b2 = load_vector(kept + at_b2, g, G)
                b3 = load_vector(kept + at_b3, o, O)
                u1, u2, u3 = (
                    v1 * rate(lr_ptr, k, 0, PER_TENSOR),
                    v2 * rate(lr_ptr, k, 2, PER_TENSOR),
                    v3 * rate(lr_ptr, k, 4, PER_TENSOR),
                )
                z1, h1 = hidden(x, w1, b1, h, H, ACT, ATTR, PRECISION)
                f1, s1 = slopes(z1 if READS_INPUT else h1, ACT, ATTR)
                t_z1 = product(x, u1, PRECISION) + (c1 * rate(lr_ptr, k, 1, PER_TENSOR))[None, :]
                t_h1 = tl.where((h < H)[None, :], f1 * t_z1, 0.0)
                z2, h2 = hidden(h1, w2, b2, g, G, ACT, ATTR, PRECISION)
                f2, s2 = slopes(z2 if READS_INPUT else h2, ACT, ATTR)
                t_z2 = product(t_h1, w2, PRECISION) + (c2 * rate(lr_ptr, k, 3, PER_TENSOR))[None, :]
                t_z2 = dot(h1, u2, t_z2, PRECISION)
                t_h2 = tl.where((g < G)[None, :], f2 * t_z2, 0.0)
                z3 = product(h2, w3, PRECISION) + b3[None, :]
                t_z3 = product(t_h2, w3, PRECISION) + (c3 * rate(lr_ptr, k, 5, PER_TENSOR))[None, :]
                t_z3 = dot(h2, u3, t_z3, PRECISION)
                d3, _s = loss_tile(
                    z3, z3, y_s_ptr, weight_s_ptr, t, n, N, o, O, CLASSES, SMOOTHING, WEIGHT_S, False, BLOCK_N
                )
                t_d3, _t = loss_tile(
                    z3,
                    t_z3,
                    y_s_ptr,
                    weight_s_ptr,
                    t,
                    n,
                    N,
                    o,
                    O,
                    CLASSES,
                    SMOOTHING,
                    WEIGHT_S,
                    True,
                    BLOCK_N,
                )
                e2 = product(d3, tl.trans(w3), PRECISION)
                t_e2 = dot(d3, tl.trans(u3), product(t_d3, tl.trans(w3), PRECISION), PRECISION)
                d2 = tl.where((g < G)[None, :], f2 * e2, 0.0)
                t_d2 = f2 * t_e2
                if ACT != "leaky_relu":
                    t_d2 += s2 * t_z2 * e2
                t_d2 = tl.where((g < G)[None, :], t_d2, 0.0)
                e1 = product(d2, tl.trans(w2), PRECISION)
                t_e1 = dot(d2, tl.trans(u2), product(t_d2, tl.trans(w2), PRECISION), PRECISION)
                t_d1 = f1 * t_e1
                if ACT != "leaky_relu":
                    t_d1 += s1 * t_z1 * e1
                t_d1 = tl.where((h < H)[None, :], t_d1, 0.0)
                v1 -= product(tl.trans(x), t_d1, PRECISION)
                c1 -= tl.sum(t_d1, 0)
                v2 -= dot(tl.trans(t_h1), d2, product(tl.trans(h1), t_d2, PRECISION), PRECISION)
                c2 -= tl.sum(t_d2, 0)
                v3 -= dot(tl.trans(t_h2), d3, product(tl.trans(h2), t_d3, PRECISION), PRECISION)
                c3 -= tl.sum(t_d3, 0)
        v_ptr += t * P
        store_matrix(v_ptr + at_w1, v1, i, h, I, H)
        store_matrix(v_ptr + at_w2, v2, h, g, H, G)
        store_matrix(v_ptr + at_w3, v3, g, o, G, O)
        tl.store(v_ptr + at_b1 + h, c1, mask=h < H)
        tl.store(v_ptr + at_b2 + g, c2, mask=g < G)
        tl.store(v_ptr + at_b3 + o, c3, mask=o < O)


# What registers hold without spilling, in float32 and with 8 warps: examples of a set, numbers of an input or
# an output, width of a hidden layer. Hidden layers 64 wide spilled 1.3 to 3 KiB a thread.
MOST = {"examples": 16, "ends": 16, "hidden": 32}


def mlp(
    support, query, w, lr, scale, kept, v, loss, widths: tuple[int, int, int, int], places: tuple[int, ...],
    act: Activation, *, classes: bool, smoothing: float, steps: int, first_order: bool,
) -> None:  # fmt: skip
    """loss [T] of the query set after `steps` steps, and v = scale times the meta-gradient, flat [T, P].

    support, query: (x [T, N, I], target, weight or None); w [T, P] or [1, P]; lr [K, 1] or [K, 6]; scale [1]
    kept: [K, T, P], written over; v: None if it is not wanted; widths: input, two hidden layers, output
    places: of the weight and bias of each layer in the flat vector
    """
    (x_s, y_s, weight_s), (x_q, y_q, weight_q) = support, query
    T, N, Q = x_s.shape[0], x_s.shape[1], x_q.shape[1]
    I, H, G, O = widths
    P = w.shape[1]
    sizes = {"N": N, "Q": Q, "I": I, "H": H, "G": G, "O": O}
    mlp_kernel[(T,)](
        x_s, y_s, weight_s, x_q, y_q, weight_q, w, lr, scale, kept, v, loss,
        T, N, Q, steps, I, H, G, O, P, P if len(w) > 1 else 0, *places,
        WANTS_GRAD=v is not None, FIRST_ORDER=first_order, PER_TENSOR=lr.shape[1] > 1,
        CLASSES=classes, SMOOTHING=smoothing, WEIGHT_S=weight_s is not None, WEIGHT_Q=weight_q is not None,
        ACT=act.name, ATTR=act.attr, READS_INPUT=act.reads_input, PRECISION="ieee", num_warps=8,
        **{f"BLOCK_{name}": power_of_two(size, 16, MOST["hidden"]) for name, size in sizes.items()},
    )  # fmt: skip
