"""y = tanh z. Formulas: fastmaml/ops/tanh.py."""

import triton
import triton.language as tl


@triton.jit
def tanh(z):
    """Without cancellation, in float32 and float64: a rational function near 0 (Cephes, S. Moshier), where
    (1 - e) / (1 + e) with e = exp(-2 |z|) cancels."""
    s = z * z
    p = (-9.64399179425052238628e-1 * s - 9.92877231001918586564e1) * s - 1.61468768441708447952e3
    q = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s + 4.84406305325125486048e3
    small = z + z * s * (p / q)
    a = tl.abs(z)
    e = tl.exp(-2.0 * a)
    large = (1.0 - e) / (1.0 + e)
    return tl.where(a < 0.625, small, tl.where(z < 0, -large, large))


@triton.jit
def tanh_slopes(y):
    """(f', f'') from y = f(z)"""
    first = 1.0 - y * y
    return first, -2.0 * y * first
