"""y = z where z > 0, slope z elsewhere; relu has slope 0. Formulas: fastmaml/ops/leaky_relu.py."""

import triton
import triton.language as tl


@triton.jit
def leaky_relu(z, SLOPE: tl.constexpr):
    # a NaN stays one: it is not below zero; and -inf times 0 would become one
    return tl.where(z <= 0, tl.zeros_like(z) if SLOPE == 0 else z * SLOPE, z)


@triton.jit
def leaky_relu_slope(at, SLOPE: tl.constexpr):
    """at: z, or y where the slope is not negative"""
    return tl.where(at > 0, at * 0 + 1, at * 0 + SLOPE)
