"""y = x w^T + b

x [N, .., I], w [O, I], b [O] or none -> y [N, .., O]; the axes between are rows, like further examples.
backward: grad_x = g w;  grad_w = g^T x;  grad_b = sum of g over rows
tangent:  t_y = t_x w^T + x t_w^T + t_b
          t_grad_x = t_g w + g t_w;  t_grad_w = t_g^T x + g^T t_x;  t_grad_b = sum of t_g over rows
Comes from nn.Linear and F.linear with the model's own parameters.
"""

import torch.nn.functional as F
from torch import Tensor

from ._op import Attrs, LayerOp, ParamShapes, Shape, Shapes, Tape, Unsupported, check_shape


def output_shape(inputs: Shapes, params: ParamShapes, attrs: Attrs) -> Shape:
    (x,), (w, b) = inputs, params
    if w is None or len(w) != 2:
        raise Unsupported("", "the weight of a linear layer must be a parameter of shape [out, in]")
    if x[-1:] != w[1:]:
        got = "".join(f", {n}" for n in x)
        raise ValueError(f"input must have shape [N, .., {w[1]}], got [N{got}]")
    check_shape("bias", b, w[:1])
    return (*x[:-1], w[0])


def linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return tape.op(LINEAR, (input,), (weight, bias))


LINEAR = LayerOp("linear", ("weight", "bias"), (), output_shape, {F.linear: linear})
