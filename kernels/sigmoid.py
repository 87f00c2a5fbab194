"""y = 1 / (1 + exp(-z)). Formulas: fastmaml/ops/sigmoid.py."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(z):
    e = tl.exp(-tl.abs(z))  # does not overflow
    return tl.where(z < 0, e, e * 0 + 1) / (1.0 + e)


@triton.jit
def sigmoid_slopes(y):
    """(f', f'') from y = f(z)"""
    first = y * (1.0 - y)
    return first, first * (1.0 - 2.0 * y)
