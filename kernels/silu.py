"""y = z sigmoid(z). Formulas: fastmaml/ops/silu.py."""

import triton
import triton.language as tl  # noqa: F401  (the interpreter wants it in sight)

from .sigmoid import sigmoid


@triton.jit
def silu(z):
    return z * sigmoid(z)


@triton.jit
def silu_slopes(z):
    """(f', f'')"""
    s = sigmoid(z)
    t = s * (1.0 - s)
    return s + z * t, t * (2.0 + z * (1.0 - 2.0 * s))
