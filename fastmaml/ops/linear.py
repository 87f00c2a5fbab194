"""y = x w^T + b

x [N, .., I], w [O, I], b [O] or none -> y [N, .., O]; the axes between are rows, like further examples.
backward: grad_x = g w;  grad_w = g^T x;  grad_b = sum of g over rows
tangent:  t_y = t_x w^T + x t_w^T + t_b;  t_grad_x = t_g w + g t_w;  t_grad_w = t_g^T x + g^T t_x;  t_grad_b = sum t_g
Comes from nn.Linear and F.linear with the model's own parameters.
"""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from ._op import LayerOp, Shape, Tape, Unsupported, check_shape


def output_shape(
    inputs: Sequence[Shape], params: Sequence[Shape | None], attrs: Mapping[str, float]
) -> Shape:
    (x,), (w, b) = inputs, params
    if w is None or len(w) != 2:
        raise Unsupported("", "the weight of a linear layer must be a parameter of shape [out, in]")
    if not x or x[-1] != w[1]:
        raise ValueError(f"the input of this linear layer must have {w[1]} features, got shape [N{_tail(x)}]")
    check_shape("bias", b, (w[0],), optional=True)
    return (*x[:-1], w[0])


def linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return tape.op(LINEAR, (input,), (weight, bias))


def _tail(shape: Shape) -> str:
    return "".join(f", {n}" for n in shape)


LINEAR = LayerOp("linear", ("weight", "bias"), (), output_shape, {F.linear: linear})
