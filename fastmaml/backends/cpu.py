"""The `cpu` backend: C++ kernels; one call runs the whole inner loop, the tail and the adjoint of every task.

Tensors come detached, parameters in the order of `problem.names`. The formulas are in csrc/cpu/<op>.h, the
recursion in csrc/cpu/inner_loop.h.
"""

import importlib
import math
import struct
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..losses import MSE, CrossEntropy
from ..program import Op, Program

if TYPE_CHECKING:
    from . import Problem

try:
    _C = importlib.import_module("fastmaml._C")  # registers torch.ops.fastmaml
except ImportError as error:
    _C = None
    _WHY_ABSENT = f"the C++ extension is not built ({error}); reinstall fastmaml with a C++ compiler at hand"

# csrc/program.h has the same numbers
_KINDS = {
    "linear": 0,
    "batch_norm": 1,
    "layer_norm": 2,
    "relu": 3,
    "leaky_relu": 3,
    "tanh": 4,
    "sigmoid": 5,
    "gelu": 6,
    "silu": 7,
    "add": 8,
    "flatten": 9,
}
_LOSSES = {type(None): 0, MSE: 1, CrossEntropy: 2}
_ATTRIBUTE = {"batch_norm": "eps", "layer_norm": "eps", "leaky_relu": "negative_slope", "gelu": "tanh"}


def available() -> str | None:
    """None, or why this backend is absent."""
    return None if _C is not None else _WHY_ABSENT


def isa() -> str:
    """The instruction set of the kernels: amx, avx512, avx2, generic; at most FASTMAML_ISA if that is set."""
    return _C.isa() if _C is not None else "none"


DEVICE = "cpu"  # of the tensors that it takes by itself; None: any
EMULATED = False


def supports(problem: "Problem", device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or the reason why this backend cannot run the problem."""
    if _C is None:
        return _WHY_ABSENT
    if device.type != "cpu":
        return f"it takes CPU tensors, not {device.type}"
    return encode(problem, dtype)


def why_no_kernels(problem: "Problem", dtype: torch.dtype) -> str | None:
    """Why neither csrc/ nor kernels/ has what the problem needs, on any device; None if they do."""
    if dtype not in (torch.float32, torch.float64):
        return f"it takes float32 and float64, not {dtype}"
    if problem.program is None:
        return problem.why_no_program or "the model has no Program"
    if type(problem.loss) not in _LOSSES:
        return "the loss is a callable; it knows MSE and CrossEntropy"
    if isinstance(problem.loss, CrossEntropy) and len(problem.program.buffers[problem.program.output]) != 1:
        return "cross entropy takes outputs [N, C] here"
    return None


def encode(problem: "Problem", dtype: torch.dtype) -> str | None:
    """Fills problem.encoded, or says why csrc/ has no kernels for the problem, on the CPU or a GPU."""
    why = why_no_kernels(problem, dtype)
    if why is None and not problem.encoded:  # here, where torch.compile does not look on
        problem.encoded.update({itemsize: _text(problem, itemsize) for itemsize in (4, 8)})
    return why


def _fold_relu(program: Program) -> dict[int, tuple[int, float]]:
    """{op: (producer, slope)} for each (leaky) relu that its neighbours can do: before it a linear or norm
    layer that feeds nothing else, after it one linear, which finds the slope in the sign of its input."""
    readers: dict[int, list[int]] = {}
    for i, op in enumerate(program.ops):
        for b in op.inputs:
            readers.setdefault(b, []).append(i)
    writer = {op.output: i for i, op in enumerate(program.ops)}
    folded = {}
    for i, op in enumerate(program.ops):
        slope = dict(op.attrs).get("negative_slope", 0.0)
        if op.name not in ("relu", "leaky_relu") or slope < 0 or op.output == program.output:
            continue
        before, after = writer.get(op.inputs[0]), readers.get(op.output, [])
        if before is None or program.ops[before].name not in ("linear", "batch_norm", "layer_norm"):
            continue
        if readers[op.inputs[0]] == [i] and len(after) == 1 and program.ops[after[0]].name == "linear":
            folded[i] = (before, slope)
    return folded


def _rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def _text(problem: "Problem", itemsize: int) -> str:
    """The program as the text that csrc/program.h decodes: one argument costs less than sixty."""
    program = problem.program
    assert program is not None
    folded = _fold_relu(program)
    slopes = dict(folded.values())
    masks = {program.ops[i].output: slope for i, (_, slope) in folded.items()}
    outputs = {before: program.ops[i].output for i, (before, _) in folded.items()}
    index = {name: i for i, name in enumerate(problem.names)}
    ops = [(i, op) for i, op in enumerate(program.ops) if i not in folded]
    unused = {program.ops[i].inputs[0] for i in folded}
    matrices = {op.params[0] for _, op in ops if op.name == "linear"}
    offsets, size = problem.layout(itemsize)

    numbers = [len(program.buffers), len(problem.names), len(ops), program.output, size]
    numbers += (_LOSSES[type(problem.loss)], _bits(getattr(problem.loss, "label_smoothing", 0.0)))
    for b, shape in enumerate(program.buffers):
        numbers += (0, 1) if b in unused else _rows_and_columns(shape)
    for name, shape, adapt, offset in zip(problem.names, problem.shapes, problem.adapt, offsets, strict=True):
        matrix = name in matrices
        numbers += (*(shape if matrix else (math.prod(shape), 1)), int(matrix), int(adapt), offset)
    for i, op in ops:
        w, b = (-1 if p is None else index[p] for p in (*op.params, None, None)[:2])
        inputs = (*op.inputs, -1)[:2]
        numbers += (_KINDS[op.name], *inputs, outputs.get(i, op.output), w, b)
        numbers += (int(i in slopes), int(inputs[0] in masks))
        numbers += map(_bits, (_attribute(op), slopes.get(i, 0.0), masks.get(inputs[0], 0.0)))
    return " ".join(map(str, numbers))


def _attribute(op: Op) -> float:
    return float(dict(op.attrs)[_ATTRIBUTE[op.name]]) if op.name in _ATTRIBUTE else 0.0


def _bits(value: float) -> int:
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return bits


def _encoded(problem: "Problem", x: Tensor) -> str:
    return problem.encoded[x.element_size()]


def _place(outputs: list[Tensor], want: tuple[bool, ...]) -> list[Tensor | None]:
    """The operators return what is wanted and no more: None goes where the rest would be."""
    found = iter(outputs)
    return [next(found) if wanted else None for wanted in want]


def apply(problem, params, x):
    (out,) = _op.apply(params, x, _encoded(problem, x))
    return out.view(*x.shape[:2], *problem.program.buffers[problem.program.output])


def apply_backward(problem, params, x, grad_out, *, needs):
    want = "params" in needs, "x" in needs
    return _place(_op.apply_backward(params, x, grad_out, _encoded(problem, x), *want), want)


def value_and_grad(problem, params, x, y):
    return _op.value_and_grad(params, x, *y, _encoded(problem, x))


def value_and_grad_backward(problem, params, x, y, grad_loss, v, *, needs, per_task=False):
    want = "params" in needs, "x" in needs
    encoded = _encoded(problem, x)
    return _place(_op.value_and_grad_backward(params, x, *y, grad_loss, v, encoded, per_task, *want), want)


def inner_loop(problem, params, lr, x, y, *, steps, rule=()):
    return _op.inner_loop(params, lr, x, *y, _encoded(problem, x), steps, rule)[0]


def inner_loop_backward(
    problem, params, lr, x, y, v, *, steps, first_order, checkpoint_every, needs, rule=()
):
    want = "params" in needs, "lr" in needs and steps > 0, "x" in needs
    encoded, every = _encoded(problem, x), checkpoint_every or 0
    out = _op.inner_loop_backward(params, lr, x, *y, v, encoded, steps, first_order, rule, every, *want)
    grads, grad_lr, grad_x = _place(out, want)
    return grads, _over_tasks(grad_lr, False), grad_x


# The schema has them as defaults: every argument that Python passes costs a tenth of a microsecond.
_USUAL = False, 0, False, False, False, False, (), (), ()


def meta_loss(
    problem, params, lr, support, query,
    *, steps, first_order, rule=(), step_weights=(), checkpoint_every, per_task, scale, needs, factored=(),
):  # fmt: skip
    (x_s, y_s), (x_q, y_q) = support, query
    want = "params" in needs, "lr" in needs and steps > 0, "x_s" in needs, "x_q" in needs
    rest = first_order, checkpoint_every or 0, per_task, *want[1:], factored, rule, step_weights
    loss, *out = _op.meta_loss(
        params, lr, x_s, *y_s, x_q, *y_q, _encoded(problem, x_s), steps, scale, want[0],
        *(() if rest == _USUAL else rest),
    )  # fmt: skip
    grads, grad_lr, grad_s, grad_q = _place(out, want)
    return loss, grads, _over_tasks(grad_lr, per_task), grad_s, grad_q


def _over_tasks(grad_lr: Tensor | None, per_task: bool) -> Tensor | None:
    """[1, K, S] unless a row per task is wanted: kernels give rows too where a parameter is of one task."""
    return grad_lr if grad_lr is None or per_task or len(grad_lr) == 1 else grad_lr.sum(0, keepdim=True)


class _Operators:
    """The operators, found once: torch.ops looks them up at every call."""

    apply: Any
    apply_backward: Any
    value_and_grad: Any
    value_and_grad_backward: Any
    inner_loop: Any
    inner_loop_backward: Any
    meta_loss: Any


_op = _Operators()

# The shapes of the operators' results, for torch.compile.


_HEAD = 7  # numbers before those of the buffers


def _rows_and_P(params: list[Tensor], program: str, T: int, per_task: bool) -> tuple[int, int]:
    """Of the gradient, as encoded above."""
    numbers = list(map(int, program.split()))
    first = _HEAD + 2 * numbers[0]
    own = any(p.numel() != numbers[first + 5 * i] * numbers[first + 5 * i + 1] for i, p in enumerate(params))
    return T if per_task or own else 1, numbers[4]


def _wanted(x: Tensor, *shapes) -> list[Tensor]:
    return [x.new_empty(shape) for wanted, shape in shapes if wanted]


def _register_fakes() -> None:
    fake = torch.library.register_fake

    @fake("fastmaml::apply")
    def _(params, x, program):
        numbers = list(map(int, program.split()))
        at = _HEAD + 2 * numbers[3]
        return [x.new_empty(x.shape[0], x.shape[1], numbers[at] * numbers[at + 1])]

    @fake("fastmaml::apply_backward")
    def _(params, x, grad_out, program, grad_params, grad_x):
        rows, P = _rows_and_P(params, program, x.shape[0], False)
        return _wanted(x, (grad_params, (rows, P)), (grad_x, x.shape))

    @fake("fastmaml::value_and_grad")
    def _(params, x, y, weight, program):
        return [x.new_empty(x.shape[0]), x.new_empty(_rows_and_P(params, program, x.shape[0], True))]

    @fake("fastmaml::value_and_grad_backward")
    def _(params, x, y, weight, grad_loss, v, program, per_task, grad_params, grad_x):
        rows, P = _rows_and_P(params, program, x.shape[0], per_task)
        return _wanted(x, (grad_params, (rows, P)), (grad_x, x.shape))

    @fake("fastmaml::inner_loop")
    def _(params, lr, x, y, weight, program, steps, rule):
        return [x.new_empty(_rows_and_P(params, program, x.shape[0], True))]

    @fake("fastmaml::inner_loop_backward")
    def _(params, lr, x, y, weight, v, program, steps, first_order, rule, checkpoint_every,
          grad_params, grad_lr, grad_x):  # fmt: skip
        rows, P = _rows_and_P(params, program, x.shape[0], False)
        lr_grad = grad_lr and steps > 0, (rows, steps, lr.shape[1])
        return _wanted(x, (grad_params, (rows, P)), lr_grad, (grad_x, x.shape))

    @fake("fastmaml::meta_loss")
    def _(params, lr, x_s, y_s, weight_s, x_q, y_q, weight_q, program, steps, scale, grad_params,
          first_order=False, checkpoint_every=0, per_task=False, grad_lr=False, grad_x_s=False,
          grad_x_q=False, factored=(), rule=(), step_weights=()):  # fmt: skip
        rows, P = _rows_and_P(params, program, x_s.shape[0], per_task)
        lr_grad = grad_lr and steps > 0, (rows, steps, lr.shape[1])
        grads = _wanted(x_s, (grad_params, (rows, P)), lr_grad, (grad_x_s, x_s.shape), (grad_x_q, x_q.shape))
        return [x_s.new_empty(x_s.shape[:1] if per_task else ()), *grads]


if _C is not None:
    _register_fakes()
    # They are called from autograd Functions only. Without a word on this, torch would set up (25 us a call)
    # a graph node that says that they have no derivative.
    _library = torch.library.Library("fastmaml", "IMPL")
    for _name in _Operators.__annotations__:
        _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
        setattr(_op, _name, getattr(torch.ops.fastmaml, _name).default)
