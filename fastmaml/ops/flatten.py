"""y = x with the axes of an example made one

x [N, ..] -> y [N, product of ..]; a copy. On the Program's input alone it is nothing: x then arrives flat.
backward: grad_x = g in x's shape.  tangent: t_y and t_grad_x alike, from t_x and t_g.
Comes from nn.Flatten, flatten, view, reshape and the like, where they keep the examples and flatten the rest.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._op import Attrs, LayerOp, ParamShapes, Shape, Shapes, Tape, Unsupported


def output_shape(inputs: Shapes, params: ParamShapes, attrs: Attrs) -> Shape:
    return (math.prod(inputs[0]),)


def _as(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def record(tape: Tape, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        N, *example = input.shape
        y = function(input, *args, **kwargs)
        if y.shape == input.shape:
            return tape.view(input, tape.copy(input))
        if y.shape == (N, math.prod(example)):
            return tape.view(input, tape.op(FLATTEN, (input,)))
        did = f"{function.__name__} from {_batch(input.shape, N)} to {_batch(y.shape, N)}"
        if y.shape == (N,):
            raise Unsupported("", f"{did}: keep the last axis, and give y the same shape")
        raise Unsupported("", f"{did}: only flattening all but the first axis has a layer op")

    return record


def _batch(shape: Sequence[int], N: int) -> str:
    sizes = ("N" if n == N else f"{n // N} N" if n and n % N == 0 else str(n) for n in shape)
    return f"[{', '.join(sizes)}]"


_functions = (
    *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.unflatten),
    *(Tensor.flatten, Tensor.reshape, Tensor.squeeze, Tensor.unsqueeze, Tensor.unflatten),
    *(Tensor.view, Tensor.view_as, Tensor.reshape_as, Tensor.contiguous),
)
FLATTEN = LayerOp("flatten", (), (), output_shape, {f: _as(f) for f in _functions})
