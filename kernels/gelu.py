"""y = z Phi(z), or its tanh approximation. Formulas: fastmaml/ops/gelu.py."""

import triton
import triton.language as tl

from .tanh import tanh


@triton.jit
def gelu(z, TANH: tl.constexpr):
    if TANH:
        return 0.5 * z * (1.0 + tanh(0.79788456080286535588 * z * (1.0 + 0.044715 * z * z)))
    else:
        return 0.5 * z * (1.0 + tl.erf(0.70710678118654752440 * z))


@triton.jit
def gelu_slopes(z, TANH: tl.constexpr):
    """(f', f'')"""
    if TANH:
        r = tanh(0.79788456080286535588 * z * (1.0 + 0.044715 * z * z))
        u1 = 0.79788456080286535588 * (1.0 + 0.134145 * z * z)
        u2 = 0.79788456080286535588 * 0.26829 * z
        r1 = (1.0 - r * r) * u1
        r2 = (1.0 - r * r) * (u2 - 2.0 * r * u1 * u1)
        return 0.5 * (1.0 + r + z * r1), r1 + 0.5 * z * r2
    else:
        density = 0.39894228040143267794 * tl.exp(-0.5 * z * z)
        first = 0.5 * (1.0 + tl.erf(0.70710678118654752440 * z)) + z * density
        return first, density * (2.0 - z * z)
