"""What a layer op is: its roles, its shape rule, and the torch functions that it stands for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

Shape = tuple[int, ...]
Shapes = Sequence[Shape]
ParamShapes = Sequence[Shape | None]
Attrs = Mapping[str, float]


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
    """What a tracer offers to the functions of `LayerOp.records`; tensors stand for values of the model."""

    def op(
        self,
        op: "LayerOp",
        inputs: Sequence[Any],
        params: Sequence[Tensor | None] = (),
        attrs: Attrs | None = None,
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
    output_shape: Callable[[Shapes, ParamShapes, Attrs], Shape]
    records: Mapping[Any, Callable[..., Tensor]] = field(repr=False)


def activation(
    name: str, functions: Sequence[Any], inplace: Sequence[Any] = (), attrs: Attrs | None = None
) -> LayerOp:
    """The LayerOp of an elementwise function with constants `attrs` (name -> torch's default).

    functions: take (input, *attrs, inplace=False);  inplace: the same without the flag, always in place
    """
    defaults = dict(attrs or {})

    def out_of_place(tape: Tape, input: Tensor, *values: Any, **named: Any) -> Tensor:
        # torch's own order is (input, *attrs, inplace)
        given = dict(zip((*defaults, "inplace"), values, strict=False)) | named
        inplace = given.pop("inplace", False)
        if not given.keys() <= defaults.keys():
            raise Unsupported("", f"{name} with arguments {sorted(given)} has no layer op")
        y = tape.op(op, (input,), attrs={key: float(value) for key, value in (defaults | given).items()})
        return tape.replace(input, y) if inplace else y

    def in_place(tape: Tape, input: Tensor, *values: Any, **named: Any) -> Tensor:
        return out_of_place(tape, input, *values, **named, inplace=True)

    records = dict.fromkeys(functions, out_of_place) | dict.fromkeys(inplace, in_place)
    op = LayerOp(name, (), tuple(defaults), same_shape, records)
    return op


def same_shape(inputs: Shapes, params: ParamShapes, attrs: Attrs) -> Shape:
    return inputs[0]


def check_shape(name: str, got: Shape | None, wanted: Shape) -> None:
    """Raises ValueError "name must have shape [..], got [..]" where they differ; None passes."""
    if got is not None and got != wanted:
        raise ValueError(f"{name} must have shape {list(wanted)}, got {list(got)}")
