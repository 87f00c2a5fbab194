"""nn.Module -> Program: a flat list of layer ops over numbered buffers.

`trace` runs the model on a tensor without data and listens to every torch function it calls, by
torch.overrides.TorchFunctionMode. So whatever Python decides on the way (loops over hyperparameters, checks
of x.shape, len(x)) is simply followed, nothing of torch is patched, and a trace costs about as much as a call
of the model. torch.fx would have to record Python itself, and cannot follow a branch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from .ops import RECORDS, LayerOp, Unsupported
from .running import innermost

__all__ = ["Op", "Program", "Unsupported", "trace"]

Shape = tuple[int, ...]

# numbers of examples to trace with: a prime that is no layer's size, and 1, where code is likeliest to branch
_BATCHES = (999_983, 1)


@dataclass(frozen=True)
class Op:
    """One layer op. `name` finds its file in fastmaml/ops/, which says what it computes from what."""

    name: str
    inputs: tuple[int, ...]
    output: int
    params: tuple[str | None, ...]  # names as in model.named_parameters()
    attrs: tuple[tuple[str, float], ...]
    module: str  # path of the module that called it, for messages


@dataclass(frozen=True)
class Program:
    """Ops in order of execution. Buffer 0 is x; every op writes a buffer of its own, and none is left unread.

    buffers: shape of ONE example, per buffer; a buffer holds [T, N, *shape], contiguous
    """

    buffers: tuple[Shape, ...]
    ops: tuple[Op, ...]
    output: int


def trace(model: nn.Module, example_shape: Sequence[int], examples: int | None = None) -> Program:
    """The Program of `model` on an input [N, *example_shape], for N = `examples` alone or any N.

    Raises Unsupported, naming the module and the reason, for a model that has none; ValueError for one that
    cannot take such an input. Runs forward under the model's present training flags, changing nothing in it.
    """
    shape = tuple(int(n) for n in example_shape)
    names = {id(m): path for path, m in model.named_modules()}
    _check_modules(model)
    first, *others = (
        _Tape(model, names, N).trace(shape) for N in (_BATCHES if examples is None else [examples])
    )
    if any(other != first for other in others):
        raise Unsupported("", "what it computes depends on the number of examples", type(model).__name__)
    return first


def _check_modules(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise ValueError(f"parameter {name} has no shape yet: call the model once before using it here")
    for path, m in model.named_modules():
        why = None
        if m._backward_hooks or m._backward_pre_hooks:
            why = "has backward hooks, which only ordinary autograd calls"
        elif m._forward_hooks or m._forward_pre_hooks:
            why = "has forward hooks, which the layer ops would not call"
        elif getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod"):
            why = "is already compiled; give fastmaml the module as it was before torch.compile"
        if why:
            raise Unsupported(path, why, type(m).__name__)


class _Value:
    """What a tensor of the model's forward stands for: a buffer, or None once it has been overwritten."""

    __slots__ = ("buffer", "sharers", "tensor")

    def __init__(self, tensor: Tensor, buffer: int | None) -> None:
        self.tensor, self.buffer = tensor, buffer  # the tensor is held so that its id stays its own
        self.sharers: list[_Value] = [self]  # every value in the same memory


class _Tape(TorchFunctionMode):
    """Records the ops of one call of the model on N examples; `ops.Tape` says what the ops ask of it."""

    def __init__(self, model: nn.Module, names: dict[int, str], N: int) -> None:
        super().__init__()
        self.model, self.names, self.N = model, names, N
        self.params = {id(p): name for name, p in model.named_parameters()}
        # BatchNorm modules always use the statistics of the current set, so these are not there to be read
        norms = (m for m in model.modules() if isinstance(m, _BatchNorm))
        self.statistics = {id(b) for m in norms for b in m.buffers(recurse=False)}
        first = next(iter(model.parameters()), None)
        self.like = torch.empty(0) if first is None else first
        self.values: dict[int, _Value] = {}
        self.buffers: list[Shape] = []
        self.ops: list[Op] = []

    def trace(self, shape: Shape) -> Program:
        x = self._new(shape)
        try:
            with torch.enable_grad(), self:
                y = self.model(x)
        except (Unsupported, ValueError):
            raise
        except Exception as error:
            path, kind = self._where(error)
            raise Unsupported(path, f"{type(error).__name__} while tracing it: {error}", kind) from error
        if not isinstance(y, Tensor):
            kind = type(self.model).__name__
            raise Unsupported("", f"must return one tensor, returned {type(y).__name__}", kind)
        return _tidy(Program(tuple(self.buffers), tuple(self.ops), self._buffer(y)))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            if args and id(args[0]) in self.statistics and func in _COUNTING:
                return _COUNTING[func](args[0])
            record = RECORDS.get(func)
            if record is not None:
                return self._record(record, func, args, kwargs)
            if func in _QUESTIONS:
                return self._answer(func, args, kwargs)
            if func is torch._C._set_grad_enabled:
                return func(*args, **kwargs)
            raise Unsupported("", f"{_name(func)} has no layer op{_HINTS.get(_name(func), '')}")
        except Unsupported as error:
            if error.kind:
                raise
            path, kind = self._where()
            raise Unsupported(path, error.why, kind) from None
        except ValueError as error:
            path, kind = self._where()
            raise ValueError(f"'{path}' ({kind}): {error}" if path else f"the model: {error}") from None

    def _record(self, record: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if not torch.is_grad_enabled():
            why = "under torch.no_grad() or in a custom autograd function"
            raise Unsupported("", f"{_name(func)} {why}: its derivatives are not those of the layer op")
        if func is F.batch_norm:
            args = tuple(None if id(a) in self.statistics else a for a in args)
            kwargs = {key: None if id(a) in self.statistics else a for key, a in kwargs.items()}
        return record(self, *args, **kwargs)

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # the tensors of the trace have no data and no device: they answer as tensors of the model's would
        if func in _OF_THE_MODEL and args and id(args[0]) in self.values:
            return func(self.like)
        return func(*args, **kwargs)

    def op(
        self,
        op: LayerOp,
        inputs: Sequence[Any],
        params: Sequence[Tensor | None] = (),
        attrs: Mapping[str, float] | None = None,
    ) -> Tensor:
        attrs = attrs or {}
        read = tuple(self._buffer(x) for x in inputs)
        names = tuple(None if p is None else self._param(p) for p in params)
        shapes = [None if p is None else tuple(p.shape) for p in params]
        shape = op.output_shape([self.buffers[b] for b in read], shapes, attrs)
        y = self._new(shape)
        path, _ = self._where()
        self.ops.append(Op(op.name, read, len(self.buffers) - 1, names, tuple(attrs.items()), path))
        return y

    def replace(self, target: Tensor, value: Tensor) -> Tensor:
        old, new = self.values[id(target)], self.values[id(value)]
        for other in old.sharers:
            other.buffer = new.buffer if other.tensor.shape == target.shape else None
        return target

    def copy(self, x: Tensor) -> Tensor:
        y = _meta(x.shape)
        self.values[id(y)] = _Value(y, self._buffer(x))
        return y

    def view(self, x: Tensor, y: Tensor) -> Tensor:
        old, new = self.values[id(x)], self.values[id(y)]
        old.sharers.append(new)
        new.sharers = old.sharers
        return y

    def _new(self, shape: Shape) -> Tensor:
        x = _meta((self.N, *shape))
        self.values[id(x)] = _Value(x, len(self.buffers))
        self.buffers.append(shape)
        return x

    def _buffer(self, x: Any) -> int:
        value = self.values.get(id(x))
        if value is not None and value.buffer is not None:
            return value.buffer
        if value is not None:
            raise Unsupported("", "reads a view of a tensor that was changed in place since")
        if id(x) in self.params:
            raise Unsupported("", f"uses parameter {self.params[id(x)]} as a value, which no layer op does")
        what = f"a tensor of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise Unsupported("", f"computes with {what} that no layer op made from the input")

    def _param(self, p: Tensor) -> str:
        name = self.params.get(id(p))
        if name is None:
            raise Unsupported("", f"a weight of shape {list(p.shape)} is not one of model.named_parameters()")
        return name

    def _where(self, error: BaseException | None = None) -> tuple[str, str]:
        """Path and class of the innermost module now running, or running when `error` was raised."""
        path, module = innermost(self.names, error, until=_TRACE) or ("", self.model)
        return path, type(module).__name__


_TRACE = _Tape.trace.__code__


def _tidy(program: Program) -> Program:
    """Drops ops that nothing reads, takes x flat if it is only ever flattened, numbers buffers in order."""
    live, kept = {program.output}, []
    for op in reversed(program.ops):
        if op.output in live:
            live.update(op.inputs)
            kept.append(op)
    ops = kept[::-1]

    same: dict[int, int] = {0: 0}
    x_shape = program.buffers[0]
    readers = [op for op in ops if 0 in op.inputs]
    if program.output != 0 and readers and all(op.name == "flatten" for op in readers):
        ops = [op for op in ops if op not in readers]
        same.update((op.output, 0) for op in readers)
        x_shape = program.buffers[readers[0].output]

    buffers = [x_shape]
    for op in ops:
        same[op.output] = len(buffers)
        buffers.append(program.buffers[op.output])
    ops = [replace(op, inputs=tuple(same[b] for b in op.inputs), output=same[op.output]) for op in ops]
    return Program(tuple(buffers), tuple(ops), same[program.output])


def _meta(shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, device="meta")


def _name(func: Any) -> str:
    if func.__name__ == "__get__":  # x.T, x.data, ..: the getter of a property
        return f"x.{func.__self__.__name__}"
    return func.__name__


def _getters(*names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names if hasattr(Tensor, name)}


_OF_THE_MODEL = _getters("device", "dtype", "is_cpu", "is_cuda", "is_meta", "requires_grad") | {
    Tensor.is_floating_point,
    torch.is_floating_point,
    Tensor.get_device,
}
_QUESTIONS = (
    _OF_THE_MODEL
    | _getters("shape", "ndim", "layout", "is_sparse", "is_quantized", "is_nested", "is_leaf", "names")
    | {Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__, torch.numel}
    | {Tensor.is_contiguous, Tensor.stride, Tensor.is_complex, torch.is_complex}
)
# BatchNorm counts its calls, and with momentum=None divides by the count; neither matters here
_COUNTING: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.add_: lambda n: n,
    Tensor.__float__: lambda n: 1.0,
}
_HINTS = {
    "matmul": "; write x @ w.T + b as F.linear(x, w, b)",
    "t": "; write x @ w.t() + b as F.linear(x, w, b)",
    "x.T": "; write x @ w.T + b as F.linear(x, w, b)",
    "mul": "; x * torch.sigmoid(x) is F.silu(x)",
    "clamp": "; if it is a ReLU, write F.relu(x)",
    "to": "; give x in the model's dtype and device instead",
}
