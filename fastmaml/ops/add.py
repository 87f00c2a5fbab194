"""y = a + b

a, b [N, ..] of equal shape -> y [N, ..]; both may be the same buffer.
backward: grad_a = g;  grad_b = g.  tangent: t_y = t_a + t_b;  t_grad alike
Comes from a + b, a += b, torch.add without alpha; adding a plain 0, as sum() does, is nothing.
"""

from numbers import Number
from typing import Any

import torch
from torch import Tensor

from ._op import Attrs, LayerOp, ParamShapes, Shape, Shapes, Tape, Unsupported


def output_shape(inputs: Shapes, params: ParamShapes, attrs: Attrs) -> Shape:
    a, b = inputs
    if a != b:
        raise Unsupported("", f"add needs two values of one shape, got [N, *{list(a)}] and [N, *{list(b)}]")
    return a


def add(tape: Tape, input: Any, other: Any, *, alpha: float = 1) -> Tensor:
    if alpha != 1:
        raise Unsupported("", f"torch.add with alpha={alpha} has no layer op")
    for x, number in ((input, other), (other, input)):
        if isinstance(number, Number):
            if number != 0:
                raise Unsupported("", f"adding the constant {number} has no layer op")
            return tape.copy(x)
    return tape.op(ADD, (input, other))


def add_(tape: Tape, input: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    return tape.replace(input, add(tape, input, other, alpha=alpha))


_functions = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_inplace = (Tensor.add_, Tensor.__iadd__)
ADD = LayerOp("add", (), (), output_shape, dict.fromkeys(_functions, add) | dict.fromkeys(_inplace, add_))
