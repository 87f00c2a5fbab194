"""What the `triton` backend would launch for a meta-step, found without a GPU: the passes run on CPU tensors,
and each launch is noted, or compiled for an architecture, instead of done."""

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastmaml.backends import factored_weights, problem_for
from fastmaml.backends.engine import Engine
from fastmaml.backends.request import Functions, Request, Result
from fastmaml.backends.small_mlp import SmallMlp
from fastmaml.backends.triton import engine_of
from fastmaml.losses import resolve

from .cases import Case

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    raise SystemExit("unset TRITON_INTERPRET: interpreted kernels do not compile")
kernels = importlib.import_module("fastmaml.kernels")


class _Driver:
    """Stands in for the CUDA driver, so that Triton specialises and compiles as it would at a launch."""

    def __init__(self, arch: int) -> None:
        self.arch, self.target = arch, GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are kept by device

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass
class Launches:
    """names: of the kernels, one for each launch; compiled: by identity; torch_ops: those that are no views
    flops: of the products;  bytes: of the tensors that a launch or op reads or writes, once each
    factored: the linear layers whose weights stay so"""

    names: list[str] = field(default_factory=list)
    compiled: dict[int, Any] = field(default_factory=dict)
    torch_ops: int = 0
    flops: int = 0
    bytes: int = 0
    factored: int = 0


class _Ops(TorchDispatchMode):
    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if is_work(func):
            self.launches.torch_ops += 1
            self.launches.bytes += _bytes(tree_leaves((args, kwargs, result)))
            if func.overloadpacket in flop_registry:
                count = flop_registry[func.overloadpacket]
                self.launches.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def is_work(func: Any) -> bool:
    """Does an ATen op launch a kernel? Views, and allocations that write nothing, do not."""
    returns = func._schema.returns
    is_view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    return not is_view and func._schema.name not in ("aten::empty", "aten::new_empty", "aten::detach")


def _size(a: Tensor) -> int:
    """Bytes of memory behind a tensor: what all tasks share counts once."""
    n = 1
    for size, stride in zip(a.shape, a.stride(), strict=True):
        n *= size if stride else 1
    return n * a.element_size()


def _bytes(arguments: Iterable[Any]) -> int:
    return sum(map(_size, {(a.data_ptr(), a.shape): a for a in arguments if isinstance(a, Tensor)}.values()))


def _flops(kernel: str, T: int, a: dict[str, Any]) -> int:
    """Of the products [M, I] x [I, O] of a linear layer's pass, by the kernel's arguments."""
    products = {
        "linear_forward_kernel": lambda: a["HAS_T_X"] + a["HAS_T_W"] if a["DUAL"] else 1,
        "linear_backward_input_kernel": lambda: 1 + (a["DUAL"] and a["HAS_T_W"]),
        "linear_backward_weight_kernel": lambda: a["HAS_W"] * (1 + (a["DUAL"] and a["HAS_T_X"])),
    }
    return 2 * T * a["M"] * a["I"] * a["O"] * products[kernel]() if kernel in products else 0


@contextmanager
def noted(arch: int | None = None) -> Iterator[Launches]:
    """Inside, a launch is noted; with an architecture (80, 90, ..) compiled too."""
    launches = Launches()
    if arch is not None:
        triton.runtime.driver.set_active(_Driver(arch))  # pyright: ignore
    original = JITFunction.__getitem__

    def launch_of(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            name = kernel.fn.__name__
            launches.names.append(name)
            launches.bytes += _bytes((*args, *kwargs.values()))
            launches.flops += _flops(name, grid[0], dict(zip(kernel.arg_names, args, strict=False)) | kwargs)
            if arch is not None:
                made = kernel.run(*args, grid=grid, warmup=True, **kwargs)
                launches.compiled[id(made)] = made

        return launch

    JITFunction.__getitem__ = launch_of  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield launches
    finally:
        JITFunction.__getitem__ = original  # pyright: ignore[reportAttributeAccessIssue]


def meta_step(
    case: Case, precision: str = "ieee", arch: int | None = None, *, fused: bool = True
) -> Launches:
    """The launches of a second-order meta-gradient by the parameters. precision: "float64", or that of the
    products in float32; fused: may it be one kernel where the network is small?"""
    dtype = torch.float64 if precision == "float64" else torch.float32
    if dtype is torch.float64:
        precision, fused = "ieee", False
    noted_here: list[Launches] = []

    def run(request: Request) -> Result:
        engine = engine_of(kernels, request, precision) if fused else Engine(kernels, request, precision)
        engine.load(request)
        with noted(arch) as launches, _Ops(launches):
            engine.run()
        if isinstance(engine, SmallMlp):
            launches.flops += _mlp_flops(engine)
        launches.factored = len(engine.sweep.rows)
        noted_here.append(launches)
        return engine.result()

    call(case, dtype, "triton", run)
    return noted_here[0]


def call(case: Case, dtype: torch.dtype, backend: str, run: Callable[[Request], Result]) -> None:
    """That meta-gradient as the backend is asked for it, with the weights factored that it would keep so."""
    model = case.model(dtype)
    support, query = case.data(dtype)
    problem = problem_for(model, support[0].shape[2:], resolve(case.loss))
    sizes = case.tasks, case.support, case.query, case.steps, 1, False
    none_own = (False,) * len(problem.names)
    Functions(run).meta_loss(
        problem,
        [p.detach() for p in model.parameters()],
        torch.full((case.steps, 1), case.lr, dtype=dtype),
        (support[0], (support[1], None)),
        (query[0], (query[1], None)),
        steps=case.steps,
        first_order=False,
        checkpoint_every=None,
        per_task=False,
        scale=1 / case.tasks,
        needs=frozenset({"params"}),
        factored=factored_weights(problem, backend, sizes, none_own, 1, None),
    )


def _mlp_flops(engine: SmallMlp) -> int:
    """Of the layers in one kernel: 2 N I O for each product. Plain: forward, and back to input and weight;
    dual: two products in the place of each, one where the input has no tangent, and the values and gradients
    made anew beside their tangents."""
    total = 0
    for node in engine.plan.nodes:
        (_, I), (_, O) = engine.plan.sizes[node.inputs[0]], engine.plan.sizes[node.out]
        moves = node.moves_in[0]
        plain = 2 + moves
        dual = (1 + moves) + 2 * moves + (1 + moves) + (1 + moves)
        assert engine.support is not None
        assert engine.query is not None
        N, Q = engine.support.x.shape[1], engine.query.x.shape[1]
        total += 2 * engine.T * I * O * (engine.K * N * (plain + dual) + Q * plain)
    return total
