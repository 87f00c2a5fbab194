"""y = w h + b,  h = (x - m) s,  m = mean of x over the N examples,  s = 1 / sqrt(mean (x - m)^2 + eps)

x [N, C], w [C] or none (ones), b [C] or none (zeros) -> y [N, C]; attribute eps; N > 1.
The statistics are those of the current set of the one task, in training and evaluation alike, as the MAML
papers do; running statistics are neither read nor written.
backward: grad_b = sum g;  grad_w = sum g h;  q = w g;  grad_x = s (q - mean q - h mean(q h))
tangent:  t_h = s (t_x - mean t_x - h mean(h t_x));  t_s = -s^2 mean(h t_x);  t_y = t_w h + w t_h + t_b
          t_grad_b = sum t_g;  t_grad_w = sum (t_g h + g t_h);  t_q = t_w g + w t_g
          t_grad_x = (t_s / s) grad_x + s (t_q - mean t_q - t_h mean(q h) - h mean(t_q h + q t_h))
Sums and means are over the examples.
Comes from nn.BatchNorm1d, whatever its settings, and F.batch_norm on batch statistics.
"""

import torch.nn.functional as F
from torch import Tensor

from ._op import Attrs, LayerOp, ParamShapes, Shape, Shapes, Tape, Unsupported, check_shape


def output_shape(inputs: Shapes, params: ParamShapes, attrs: Attrs) -> Shape:
    (x,), (w, b) = inputs, params
    if len(x) != 1:
        raise Unsupported("", f"batch_norm is done on examples of shape [C] only, these are {list(x)}")
    check_shape("weight", w, x)
    check_shape("bias", b, x)
    return x


def batch_norm(
    tape: Tape,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    # the tracer has set the statistics of BatchNorm modules to None, since those are ignored in either mode
    if running_mean is not None or running_var is not None:
        raise Unsupported("", "F.batch_norm with running statistics; use nn.BatchNorm1d, or give none")
    return tape.op(BATCH_NORM, (input,), (weight, bias), {"eps": float(eps)})


BATCH_NORM = LayerOp("batch_norm", ("weight", "bias"), ("eps",), output_shape, {F.batch_norm: batch_norm})
