"""The `triton` backend: Triton kernels, op by op over all tasks, the whole call recorded in a CUDA graph.

The kernels are in kernels/<op>.py, what is run in sweep.py and engine.py. TRITON_INTERPRET=1, set before
fastmaml is imported, makes it take CPU tensors: the kernels are then interpreted, emulation for tests alone.

float32 products run in float32, or with TF32 or bfloat16 operands and float32 sums, as `precision=` or
torch.set_float32_matmul_precision ("highest", "high", "medium") says; weights stay float32.
"""

import functools
import importlib
import os
import threading
import warnings
from collections import OrderedDict
from math import prod
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..losses import CrossEntropy
from . import cpu, precision
from .engine import Engine
from .request import Examples, Functions, Request, Result
from .small_mlp import SmallMlp, fits

if TYPE_CHECKING:
    from . import Problem

# does it take CPU tensors, when named, to try the kernels without their device?
EMULATED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cuda"  # of the tensors that it takes by itself; None: any
_KEPT = 8  # engines of a Problem: each holds its buffers


@functools.cache
def kernels() -> ModuleType | str:
    """fastmaml.kernels, imported when first asked for (triton takes its time), or why it cannot be."""
    try:
        return importlib.import_module("fastmaml.kernels")
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install 'fastmaml[triton]'"


def available() -> str | None:
    """None, or why this backend is absent."""
    if not EMULATED and not torch.cuda.is_available():
        return "no CUDA device"
    return why if isinstance(why := kernels(), str) else None


def note() -> str:
    if EMULATED:
        return "Triton kernels, interpreted on the CPU: emulation, for tests"
    return "Triton kernels in a CUDA graph, CUDA devices"


def supports(problem: "Problem", device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or the reason why this backend cannot run the problem."""
    if device.type != ("cpu" if EMULATED else "cuda"):
        return f"it takes {'CPU tensors here' if EMULATED else 'CUDA tensors'}, not {device.type}"
    if isinstance(why := kernels(), str):
        return why
    return cpu.why_no_kernels(problem, dtype)


def misfit(problem: "Problem", sizes: tuple[int, int] | None) -> str | None:
    """Why a problem that it `supports` has a norm or an output that no program holds, None if it has none.

    sizes: support and query examples, None where they are not known
    """
    passes, program = kernels(), problem.program
    assert isinstance(passes, ModuleType)
    assert program is not None
    groups = []
    for op in program.ops:
        *rows, columns = program.buffers[op.inputs[0]] or (1,)
        if op.name == "batch_norm":
            groups.append(("a batch norm over the rows of a task", prod(rows) * max(sizes or (0,))))
        elif op.name == "layer_norm":
            groups.append(("a layer norm", columns))
    if isinstance(problem.loss, CrossEntropy):
        groups.append(("an output of classes", program.buffers[program.output][-1]))
    most = passes.GROUP_MOST
    return next((f"{what} has {n} numbers, it takes {most}" for what, n in groups if n > most), None)


def engine_of(passes: ModuleType, request: Request, rounding: str = "ieee") -> Engine:
    """What runs a request: one program a task where that fits, sweeps over all tasks else."""
    kind = SmallMlp if fits(passes, request, rounding) else Engine
    return kind(passes, request, rounding)


class _Recorded:
    """An engine and, from the second call on, the graph that runs it."""

    def __init__(self, request: Request, rounding: str) -> None:
        passes = kernels()
        assert isinstance(passes, ModuleType)
        with torch.inference_mode(False), torch.no_grad():
            self.engine = engine_of(passes, request, rounding)
        self.graph: Any = None
        self.calls, self.recordable = 0, True
        self.lock = threading.Lock()  # one call at a time in its buffers

    def run(self, request: Request) -> Result:
        with self.lock:
            self.engine.load(request)
            if self.graph is None and self.calls > 0 and self.recordable and _records(request.like):
                self._record()
            if self.graph is None:
                self.engine.run()
            else:
                self.graph.replay()
            self.calls += 1
            return self.engine.result()

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.engine.run()
        except RuntimeError as error:
            self.recordable = False
            warnings.warn(f"fastmaml runs its triton backend without a CUDA graph: {error}", stacklevel=2)
        else:
            self.graph = graph


def _records(x: Tensor) -> bool:
    """FASTMAML_CUDA_GRAPHS=0 switches it off."""
    return x.is_cuda and os.environ.get("FASTMAML_CUDA_GRAPHS", "1") != "0"


_choosing = threading.Lock()


def run(request: Request) -> Result:
    rounding = precision.chosen(request.precision)
    if not request.like.is_cuda:
        return _engine(request, rounding).run(request)
    with torch.cuda.device(request.like.device):
        if torch.cuda.is_current_stream_capturing():  # buffers of the caller's recording, and no graph in it
            recorded = _Recorded(request, rounding)
            recorded.recordable = False
            return recorded.run(request)
        return _engine(request, rounding).run(request)


def _engine(request: Request, rounding: str) -> _Recorded:
    known: OrderedDict[Any, _Recorded] = request.problem.memo.setdefault("triton", OrderedDict())
    key = _kind(request, rounding)
    with _choosing:
        if key not in known:
            if len(known) >= _KEPT:
                known.popitem(last=False)
            known[key] = _Recorded(request, rounding)
        known.move_to_end(key)
        return known[key]


def _kind(q: Request, rounding: str) -> tuple[Any, ...]:
    """What decides which kernels run on which buffers. Streams have buffers of their own."""
    x = q.like

    def shapes(examples: Examples | None) -> Any:
        return None if examples is None else tuple([None if a is None else a.shape for a in examples])

    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return (
        x.dtype, x.device, stream, rounding, q.factored,
        q.tail, q.want, q.own, shapes(q.support), shapes(q.query),
        None if q.lr is None else q.lr.shape, q.steps, q.first_order, q.rule, q.step_weights,
        q.checkpoint_every, None if q.seed is None else q.seed.shape, q.grad_loss is None, q.scale,
        q.per_task,
    )  # fmt: skip


def at(precision: str | None) -> Functions:
    """The functions below with products in that precision."""
    return Functions(run, precision)


_functions = at(None)
apply = _functions.apply
apply_backward = _functions.apply_backward
value_and_grad = _functions.value_and_grad
value_and_grad_backward = _functions.value_and_grad_backward
inner_loop = _functions.inner_loop
inner_loop_backward = _functions.inner_loop_backward
meta_loss = _functions.meta_loss
