"""y = a + b. Formulas: fastmaml/ops/add.py; flatten is a sum of one term."""

from .elementwise import accumulate
from .types import Buffer


def add_forward(a: Buffer, b: Buffer | None, y: Buffer, *, dual: bool) -> None:
    """y [T, M, C], or its tangent; a tangent that is None is zero"""
    if dual:
        terms = [x.t_value for x in (a, b) if x is not None and x.t_value is not None]
        accumulate(y.t_value, *terms)
    else:
        accumulate(y.value, a.value, None if b is None else b.value)


def add_backward(x: Buffer, y: Buffer, *, add: bool, dual: bool) -> None:
    """The gradient by one of the terms, or its tangent: written, or added to what is there."""
    if dual:
        accumulate(x.t_grad, y.t_grad, add=add)
    else:
        accumulate(x.grad, y.grad, add=add)
