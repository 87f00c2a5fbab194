"""y = w h + b,  h = (x - m) s,  m = mean of x over its last axis,  s = 1 / sqrt(mean (x - m)^2 + eps)

x [N, .., I], w [I] or none (ones), b [I] or none (zeros) -> y [N, .., I]; attribute eps.
Means are over a row.
backward: grad_b = sum of g over rows;  grad_w = sum of g h;  q = w g;  grad_x = s (q - mean q - h mean(q h))
tangent:  t_h = s (t_x - mean t_x - h mean(h t_x));  t_s = -s^2 mean(h t_x);  t_y = t_w h + w t_h + t_b
          t_grad_b = sum t_g;  t_grad_w = sum (t_g h + g t_h);  t_q = t_w g + w t_g
          t_grad_x = (t_s / s) grad_x + s (t_q - mean t_q - t_h mean(q h) - h mean(t_q h + q t_h))
Comes from nn.LayerNorm and F.layer_norm over one axis.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ._op import Attrs, LayerOp, ParamShapes, Shape, Shapes, Tape, Unsupported, check_shape


def output_shape(inputs: Shapes, params: ParamShapes, attrs: Attrs) -> Shape:
    (x,), (w, b) = inputs, params
    check_shape("weight", w, x[-1:])
    check_shape("bias", b, x[-1:])
    return x


def layer_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if len(normalized_shape) != 1:
        raise Unsupported("", f"layer_norm is over the last axis only, not over {list(normalized_shape)}")
    example = tuple(input.shape[1:])
    if example[-1:] != tuple(normalized_shape):
        got = "".join(f", {n}" for n in example)
        raise ValueError(f"input must have shape [N, .., {normalized_shape[0]}], got [N{got}]")
    return tape.op(LAYER_NORM, (input,), (weight, bias), {"eps": float(eps)})


LAYER_NORM = LayerOp("layer_norm", ("weight", "bias"), ("eps",), output_shape, {F.layer_norm: layer_norm})
