"""y = w h + b,  h = (x - m) s,  m = mean of x over its last axis,  s = 1 / sqrt(mean (x - m)^2 + eps)

x [N, .., I], w [I] or none (ones), b [I] or none (zeros) -> y [N, .., I]; attribute eps. Means are over a row.
backward: grad_b = sum of g over rows;  grad_w = sum of g h;  q = w g;  grad_x = s (q - mean q - h mean(q h))
tangent:  t_h = s (t_x - mean t_x - h mean(h t_x));  t_s = -s^2 mean(h t_x);  t_y = t_w h + w t_h + t_b
          t_grad_b = sum t_g;  t_grad_w = sum (t_g h + g t_h);  t_q = t_w g + w t_g
          t_grad_x = (t_s / s) grad_x + s (t_q - mean t_q - t_h mean(q h) - h mean(t_q h + q t_h))
Comes from nn.LayerNorm and F.layer_norm over one axis.
"""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from ._op import LayerOp, Shape, Tape, Unsupported, check_shape


def output_shape(
    inputs: Sequence[Shape], params: Sequence[Shape | None], attrs: Mapping[str, float]
) -> Shape:
    (x,), (w, b) = inputs, params
    check_shape("weight", w, x[-1:], optional=True)
    check_shape("bias", b, x[-1:], optional=True)
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
        raise Unsupported(
            "", f"layer_norm is done over the last axis only, not over {list(normalized_shape)}"
        )
    if input.dim() < 2 or input.shape[-1] != normalized_shape[0]:
        raise ValueError(
            f"the input of this layer_norm must end in {list(normalized_shape)}, got shape [N, {list(input.shape[1:])}]"
        )
    return tape.op(LAYER_NORM, (input,), (weight, bias), {"eps": float(eps)})


LAYER_NORM = LayerOp("layer_norm", ("weight", "bias"), ("eps",), output_shape, {F.layer_norm: layer_norm})
