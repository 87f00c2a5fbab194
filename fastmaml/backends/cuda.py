"""The `cuda` backend: one launch runs the whole inner loop, the tail, the adjoint and the sums over tasks.

A block takes a task, or where that is too large for one, on GPUs that have them, a cluster of 2 to 8 blocks.
The weights of a task and the activations of one step lie in their shared memory, so networks must be small:
`misfit` says by how much one is too large. The formulas are in csrc/cuda/<op>.cuh, the recursion in
csrc/cuda/task.cuh. The kernels are called by ctypes, in the library that nvcc made; or, for tests, on CPU
tensors in one that a host compiler made of the same source (`make emulation`): FASTMAML_EMULATE=1, set before
fastmaml is imported, takes that.

float32 products run in float32, or on tensor cores with TF32 or bfloat16 operands, as `precision=` or
torch.set_float32_matmul_precision ("highest", "high", "medium") says; sums and weights are float32.
"""

import ctypes
import importlib
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import cpu, precision
from . import torch as torch_backend
from .request import Examples, Functions, Request, Result

if TYPE_CHECKING:
    from . import Problem

_TAILS = {"weights": 0, "output": 1, "loss": 2, "curvature": 3}
_EMULATION = Path(__file__).parents[2] / "build" / "emulation" / "libfastmaml_cuda.so"

# csrc/cuda/table.h and plan.h have the same
_MOST_PARAMS, _MOST_SUMS = 64, 3
_MOST_THREADS = 256  # the launch bound of csrc/cuda/task.cuh


class _Sizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("itemsize", "N", "Q", "adjoint", "dual_step", "curvature", "x_s", "x_q", "lr"),
            *("threads", "limit", "blocks"),
        )
    ]


class _Set(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "target", "weight")] + [("n", ctypes.c_int64)]


class _Call(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("T", "K", "S", "every", "tail", "first_order", "precision")],
        ("scale", ctypes.c_double),
        ("params", ctypes.c_void_p * _MOST_PARAMS),
        ("own", ctypes.c_int64 * _MOST_PARAMS),
        *[(name, ctypes.c_void_p) for name in ("lr", "step_weights")],
        *[(name, _Set) for name in ("support", "query")],
        *[(name, ctypes.c_void_p) for name in ("seed", "grad_loss", "stored")],
        ("stored_sets", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("out", "loss", "grads", "grad_lr", "grad_x_s", "grad_x_q")],
    ]


class _Sum(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_void_p), ("total", ctypes.c_void_p), ("size", ctypes.c_int64)]


class _Sums(ctypes.Structure):
    _fields_ = [("of", _Sum * _MOST_SUMS), ("count", ctypes.c_int64), ("T", ctypes.c_int64)]


# 1, or the path of another library of the emulation
_GIVEN = os.environ.get("FASTMAML_EMULATE", "0")
# does it take CPU tensors, when named, to try the kernels without their device?
EMULATED = _GIVEN not in ("", "0")
DEVICE = "cuda"  # of the tensors that it takes by itself; None: any


def _path() -> str | None:
    if EMULATED:
        return str(_EMULATION) if _GIVEN == "1" else _GIVEN
    try:
        return importlib.import_module("fastmaml._C").__file__
    except ImportError:
        return None


@cache
def _load(path: str) -> ctypes.CDLL | None:
    """The library with the kernels, None if the one at `path` has none."""
    library = ctypes.CDLL(path)
    if not hasattr(library, "fastmaml_cuda_run"):
        return None
    for name, arguments in {
        "plan": [ctypes.c_char_p, *[ctypes.c_void_p] * 3, ctypes.c_char_p],
        "run": [*[ctypes.c_void_p] * 3, *[ctypes.c_int] * 2, ctypes.c_void_p],
        "error": [ctypes.c_int],
        "shared_limit": [ctypes.c_int],
        "has_code": [ctypes.c_int],
        "blocks": [ctypes.c_int],
    }.items():
        getattr(library, f"fastmaml_cuda_{name}").argtypes = arguments
    library.fastmaml_cuda_table_size.restype = ctypes.c_int64
    library.fastmaml_cuda_error.restype = ctypes.c_char_p
    return library


def _library() -> ctypes.CDLL:
    path = _path()
    library = _load(path) if path else None
    assert library is not None
    return library


def available() -> str | None:
    """None, or why this backend is absent."""
    path = _path()
    if EMULATED:
        there = path and os.path.exists(path)
        return None if there else f"FASTMAML_EMULATE is set, but there is no {path}: make emulation builds it"
    if path is None or _load(path) is None:
        return "fastmaml was built without its CUDA kernels: reinstall it with nvcc at hand"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if _library().fastmaml_cuda_devices() == 0:  # its runtime is not torch's
        return (
            "the CUDA runtime that fastmaml was built with finds no device: the driver may be too old for it"
        )
    reasons = [why_no_code(index) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


@cache
def why_no_code(index: int) -> str | None:
    """None, or why this binary cannot run on the GPU of that index."""
    has = "{}.{}".format(*torch.cuda.get_device_capability(index))
    if tuple(map(int, has.split("."))) < (8, 0):
        return f"it needs a GPU of compute capability 8.0, this one has {has}"
    if error := _library().fastmaml_cuda_has_code(index):
        said = _library().fastmaml_cuda_error(error).decode()
        return (
            f"fastmaml was built without code for this GPU, of compute capability {has} ({said}): "
            f"reinstall it with nvcc at hand and TORCH_CUDA_ARCH_LIST={has}"
        )
    return None


def note() -> str:
    if EMULATED:
        return "CUDA kernels, compiled for the CPU: emulation, for tests"
    return "CUDA kernels, one launch for all tasks, CUDA devices"


def supports(problem: "Problem", device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or the reason why this backend cannot run the problem, whatever the number of examples."""
    if device.type != ("cpu" if EMULATED else "cuda"):
        return f"it takes {'CPU tensors here' if EMULATED else 'CUDA tensors'}, not {device.type}"
    if why := available():
        return why
    if not EMULATED and (why := why_no_code(_index(device))):
        return why
    return cpu.encode(problem, dtype)


class Sizes(NamedTuple):
    """The largest call of a function: N support examples and Q query examples.

    With N = 0 it is one on the query set alone, with second derivatives.
    """

    N: int
    Q: int


def misfit(problem: "Problem", device: torch.device, dtype: torch.dtype, sizes: Sizes | None) -> str | None:
    """Why a problem that it `supports` does not fit in shared memory, with all of its gradients; None if it
    does.

    In there are two sets of weights (three where one is used twice, and for second derivatives), the
    examples, and what is alive at once of the activations and their gradients and tangents.
    """
    if sizes is None:
        return "it does not run within torch.compile"
    _threads()
    try:
        N, Q = sizes
        plan = largest(problem, device, dtype, sizes)
    except ValueError as error:
        return str(error)
    if why := plan.misfit:
        return f"a task with {f'{N} support and {Q} query examples' if N else f'{Q} examples'} {why}"
    return None


def _index(device: torch.device) -> int:
    if EMULATED:
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def shared_limit(device: torch.device) -> int:
    """The bytes of shared memory that a block of this device can have."""
    return _shared_limit(_index(device))


@cache
def _shared_limit(index: int) -> int:
    most = _library().fastmaml_cuda_shared_limit(index)
    if most < 0:
        raise RuntimeError(_library().fastmaml_cuda_error(-most).decode())
    return most


def largest(problem: "Problem", device: torch.device, dtype: torch.dtype, sizes: Sizes) -> "Plan":
    """What a call with all gradients needs."""
    return _plan(problem, dtype.itemsize, device, **with_all_gradients(sizes))


def with_all_gradients(sizes: Sizes) -> dict[str, int]:
    """What a plan is made of, of a call with all of them."""
    N, Q = sizes
    how = {"adjoint": 1, "dual_step": N > 0, "curvature": N == 0, "x_s": N > 0, "x_q": Q > 0, "lr": N > 0}
    return {"N": N, "Q": Q, **how}


@cache
def _most_blocks(index: int) -> int:
    """Of a cluster on that GPU, 1 where it has none."""
    return _library().fastmaml_cuda_blocks(index)


class Plan(NamedTuple):
    table: ctypes.Array[ctypes.c_char]
    bytes: int  # of shared memory that a task needs
    P: int  # numbers of a set of weights
    blocks: int  # that share a task
    threads: int  # of each
    limit: int  # bytes of shared memory that each of them can have

    @property
    def misfit(self) -> str | None:
        most = self.limit * self.blocks
        team = "a block" if self.blocks == 1 else f"a cluster of {self.blocks} blocks"
        if self.bytes <= most:
            return None
        return f"needs {self.bytes} bytes of shared memory, {self.bytes - most} more than {team} can have"


def _threads() -> int:
    """Of a block, by FASTMAML_CUDA_THREADS, for tests; 0: as suits the sizes."""
    given = os.environ.get("FASTMAML_CUDA_THREADS", "0")
    if not given.isdecimal() or int(given) % 32 or int(given) > _MOST_THREADS:
        raise ValueError(
            f"FASTMAML_CUDA_THREADS must be a multiple of 32 up to {_MOST_THREADS}, or 0, got {given!r}"
        )
    return int(given)


def _plan(problem: "Problem", itemsize: int, device: torch.device, **sizes: int) -> Plan:
    return plan_within(problem, itemsize, shared_limit(device), _most_blocks(_index(device)), **sizes)


def plan_within(problem: "Problem", itemsize: int, limit: int, blocks: int, **sizes: int) -> Plan:
    """By at most so many blocks, each of `limit` bytes."""
    threads = _threads()
    key = "cuda plan", itemsize, threads, limit, blocks, *sizes.items()
    if key not in problem.memo:
        library = _library()
        table = ctypes.create_string_buffer(library.fastmaml_cuda_table_size())
        found, why = (ctypes.c_int64 * 4)(), ctypes.create_string_buffer(256)
        of = {**sizes, "itemsize": itemsize, "threads": threads, "limit": limit, "blocks": blocks}
        given = _Sizes(**{n: int(v) for n, v in of.items()})
        text = problem.encoded[itemsize].encode()
        if library.fastmaml_cuda_plan(text, ctypes.byref(given), table, found, why):
            raise ValueError(why.value.decode())
        need, P, blocks, threads = found
        problem.memo[key] = Plan(table, need, P, blocks, threads, limit)
    return problem.memo[key]


def _pointer(a: Tensor | None) -> int | None:
    return None if a is None else a.data_ptr()


def _set(examples: Examples | None) -> _Set:
    if examples is None:
        return _Set()
    return _Set(*map(_pointer, examples), examples.x.shape[1])


def run(q: Request) -> Result:
    x, K = q.like, q.steps
    T, itemsize = x.shape[0], x.element_size()
    adjoint = not q.want.isdisjoint({"params", "lr", "x_s"})
    plan = _plan(
        q.problem,
        itemsize,
        x.device,
        N=0 if q.support is None or K == 0 else q.support.x.shape[1],
        Q=0 if q.query is None else q.query.x.shape[1],
        adjoint=adjoint,
        dual_step=adjoint and K > 0 and not q.first_order,
        curvature=q.tail == "curvature",
        x_s="x_s" in q.want,
        x_q="x_q" in q.want,
        lr="lr" in q.want,
    )
    if why := plan.misfit:
        raise RuntimeError(f"backend 'cuda' cannot run this: it {why}")
    with nullcontext() if EMULATED else torch.cuda.device(x.device):
        return _run(q, plan, T, K, itemsize, adjoint)


def _run(q: Request, plan: Plan, T: int, K: int, itemsize: int, adjoint: bool) -> Result:
    x, problem, program = q.like, q.problem, q.problem.program
    assert program is not None
    P = problem.layouts[itemsize][1]
    result, sums, kept = Result(), _Sums(T=T), []

    def rows(name: str, *shape: int, make=x.new_empty, summed: bool = False) -> Tensor | None:
        """The row of every task, of which `result` gets the sum if that is wanted."""
        if name not in q.want:
            return None
        each = make((T, *shape))
        total = x.new_empty((1, *shape)) if summed else each
        if summed:
            sums.of[sums.count] = _Sum(each.data_ptr(), total.data_ptr(), each[0].numel())
            sums.count += 1
            kept.append(each)
        setattr(result, name, total)
        return each

    summed, n = q.rows == 1 and not q.per_task, 0 if q.query is None else q.query.x.shape[1]
    shape = (P,) if q.tail == "weights" else (n, *program.buffers[program.output])
    out = rows("out", *shape)
    loss = rows("loss", summed=not q.per_task)
    grads = rows("params", P, summed=summed)
    S = 1 if q.lr is None or K == 0 else q.lr.shape[1]
    grad_lr = rows("lr", K, S, make=x.new_zeros, summed=summed)
    grad_x_s = rows("x_s", *q.support.x.shape[1:], make=x.new_zeros) if q.support else None
    grad_x_q = rows("x_q", *q.query.x.shape[1:], make=x.new_zeros) if q.query else None

    every = q.checkpoint_every if 0 < q.checkpoint_every < K else max(K, 1)
    sets = (K - 1) // every + every - 1 if adjoint and K > 0 else 0  # as Task::stored in csrc/cuda/task.cuh
    stored = x.new_empty(T, sets, plan.P) if sets else None
    weights = _step_weights(problem, q.step_weights, x) if q.step_weights else None
    rounding = precision.PRECISIONS.index(precision.chosen(q.precision))
    call = _Call(
        T, K, S, every, _TAILS[q.tail], q.first_order, rounding, q.scale,
        (ctypes.c_void_p * _MOST_PARAMS)(*map(_pointer, q.params)), (ctypes.c_int64 * _MOST_PARAMS)(*q.own),
        _pointer(q.lr), _pointer(weights), _set(q.support), _set(q.query),
        *map(_pointer, (q.seed, q.grad_loss, stored)), sets,
        *map(_pointer, (out, loss, grads, grad_lr, grad_x_s, grad_x_q)),
    )  # fmt: skip
    stream = None if EMULATED else torch.cuda.current_stream(x.device).cuda_stream
    tables = plan.table, ctypes.byref(call), ctypes.byref(sums)
    library = _library()
    error = library.fastmaml_cuda_run(*tables, itemsize, _index(x.device), stream)
    if error:
        raise RuntimeError(f"backend 'cuda': {library.fastmaml_cuda_error(error).decode()}")
    if result.loss is not None and not q.per_task:
        result.loss = result.loss.view(())
    return result


def _step_weights(problem: "Problem", weights: Sequence[float], x: Tensor) -> Tensor:
    """On the device, kept from one call to the next."""
    key = "cuda step weights", weights, x.device, x.dtype
    if key not in problem.memo:
        problem.memo[key] = torch.tensor(weights, dtype=x.dtype, device=x.device)
    return problem.memo[key]


WITH_OPTIMIZER = "torch"  # runs inner loops with momentum, weight decay or clipping: they have no kernels yet


class _Functions(Functions):
    def _for(self, rule: Sequence[float]) -> Any:
        return torch_backend if rule else super()

    def inner_loop(self, problem, *args, rule=(), **how):
        return self._for(rule).inner_loop(problem, *args, rule=rule, **how)

    def inner_loop_backward(self, problem, *args, rule=(), **how):
        return self._for(rule).inner_loop_backward(problem, *args, rule=rule, **how)

    def meta_loss(self, problem, *args, rule=(), **how):
        return self._for(rule).meta_loss(problem, *args, rule=rule, **how)


def at(precision: str | None) -> Functions:
    """The functions below with products in that precision."""
    return _Functions(run, precision)


_functions = at(None)
apply = _functions.apply
apply_backward = _functions.apply_backward
value_and_grad = _functions.value_and_grad
value_and_grad_backward = _functions.value_and_grad_backward
inner_loop = _functions.inner_loop
inner_loop_backward = _functions.inner_loop_backward
meta_loss = _functions.meta_loss
