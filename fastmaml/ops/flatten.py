"""y = x with the axes of an example made one

x [N, ..] -> y [N, product of ..]; a copy. On the Program's input alone it is nothing: x then arrives flat.
backward: grad_x = g in x's shape.  tangent: t_y and t_grad_x alike, from t_x and t_g.
Comes from nn.Flatten, flatten, view, reshape and their kin, where they keep the examples and flatten all the rest.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._op import LayerOp, Shape, Tape, Unsupported, numel


def output_shape(
    inputs: Sequence[Shape], params: Sequence[Shape | None], attrs: Mapping[str, float]
) -> Shape:
    return (numel(inputs[0]),)


def _as(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def record(tape: Tape, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        N, *example = input.shape
        view = function(input, *args, **kwargs)
        if view.shape == input.shape:
            return tape.view(input, tape.copy(input))
        if view.shape == (N, numel(tuple(example))):
            return tape.view(input, tape.op(FLATTEN, (input,)))
        got = f"{function.__name__} from {_batch(input.shape, N)} to {_batch(view.shape, N)}"
        if len(view.shape) == 1 and view.shape[0] == N:
            raise Unsupported("", f"{got}: keep the last axis, and give y the same shape")
        raise Unsupported("", f"{got}: only flattening everything but the first axis has a layer op")

    return record


def _batch(shape: Sequence[int], N: int) -> str:
    return (
        "[" + ", ".join("N" if n == N else f"{n // N} N" if n and n % N == 0 else str(n) for n in shape) + "]"
    )


_functions = (
    *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.unflatten),
    *(Tensor.flatten, Tensor.reshape, Tensor.squeeze, Tensor.unsqueeze, Tensor.unflatten),
    *(Tensor.view, Tensor.view_as, Tensor.reshape_as, Tensor.contiguous),
)
FLATTEN = LayerOp("flatten", (), (), output_shape, {f: _as(f) for f in _functions})
