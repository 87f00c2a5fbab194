"""What a layer op is: its roles, its shape rule, and the torch functions that it stands for."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

Shape = tuple[int, ...]


class Unsupported(Exception):
    """A model, or a part of it, that no layer op covers; such a model runs on the `torch` backend.

    module: path of the module at fault, as in `model.get_submodule(module)`; "" is the model itself
    why: the reason, and where there is one, what to write instead
    """

    def __init__(self, module: str, why: str, kind: str = "") -> None:
        super().__init__(module, why, kind)
        self.module, self.why, self.kind = module, why, kind

    def __str__(self) -> str:
        where = f"'{self.module}'" if self.module else "the model"
        return f"{where}{f' ({self.kind})' if self.kind else ''}: {self.why}"


class Tape(Protocol):
    """What a tracer offers to the functions of `LayerOp.records`; the tensors stand for values of the model."""

    def op(
        self,
        op: "LayerOp",
        inputs: Sequence[Any],
        params: Sequence[Tensor | None] = (),
        attrs: Mapping[str, float] | None = None,
    ) -> Tensor: ...

    def replace(self, target: Tensor, value: Tensor) -> Tensor:
        """What an in-place function does: from here on `target` has the value of `value`."""
        ...

    def copy(self, x: Tensor) -> Tensor:
        """A new tensor of the same value, sharing no memory with x."""
        ...

    def view(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns y, having noted that it shares memory with x: replacing one changes the other."""
        ...


@dataclass(frozen=True)
class LayerOp:
    """One kind of op of a Program. The op's file says what it computes, `output_shape` what it accepts.

    name: the basename that finds it in ops/, kernels/, csrc/ and the tests
    params: the roles of Op.params, in order; the op decides which of them may be None
    attrs: the names of Op.attrs, in order
    output_shape: (input shapes, parameter shapes, attrs) -> shape of one example of the output;
        raises ValueError for what is wrong in any case and Unsupported for what is right but not covered
    records: torch function -> the same signature behind a tape, recording the op
    """

    name: str
    params: tuple[str, ...]
    attrs: tuple[str, ...]
    output_shape: Callable[[Sequence[Shape], Sequence[Shape | None], Mapping[str, float]], Shape]
    records: Mapping[Any, Callable[..., Tensor]] = field(repr=False)


def activation(
    name: str, functions: Sequence[Any], inplace: Sequence[Any] = (), attrs: Mapping[str, float] | None = None
) -> LayerOp:
    """The LayerOp of an elementwise function with constants `attrs` (name -> torch's default).

    functions: take (input, *attrs, inplace=False);  inplace: the same without the flag, always in place
    """
    defaults = dict(attrs or {})

    def out_of_place(
        tape: Tape, input: Tensor, *values: float, inplace: bool = False, **named: float
    ) -> Tensor:
        # torch's own order is (input, *attrs, inplace), so one value too many is the flag
        if len(values) == len(defaults) + 1:
            inplace, values = bool(values[-1]), values[:-1]
        given = dict(zip(defaults, values, strict=False)) | named
        if len(values) > len(defaults) or not given.keys() <= defaults.keys():
            raise Unsupported("", f"{name} with arguments {sorted(named)} has no layer op")
        y = tape.op(op, (input,), attrs={key: float(x) for key, x in (defaults | given).items()})
        return tape.replace(input, y) if inplace else y

    def in_place(tape: Tape, input: Tensor, *values: float, **named: float) -> Tensor:
        return tape.replace(input, out_of_place(tape, input, *values, **named))

    records = dict.fromkeys(functions, out_of_place) | dict.fromkeys(inplace, in_place)
    op = LayerOp(name, (), tuple(defaults), same_shape, records)
    return op


def same_shape(inputs: Sequence[Shape], params: Sequence[Shape | None], attrs: Mapping[str, float]) -> Shape:
    return inputs[0]


def check_shape(name: str, got: Shape | None, wanted: Shape, optional: bool = False) -> None:
    """Raises ValueError "name must have shape [..], got [..]" where they differ; None passes if optional."""
    if got is None and optional:
        return
    if got is None:
        raise Unsupported("", f"{name} must be a parameter of the model")
    if got != wanted:
        raise ValueError(f"{name} must have shape {list(wanted)}, got {list(got)}")


def numel(shape: Shape) -> int:
    return math.prod(shape)
