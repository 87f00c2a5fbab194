"""What the `triton` backend would launch for a meta-step, found without a GPU: the passes run on CPU tensors,
and each launch is noted, or compiled for an architecture, instead of done."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastmaml.backends import problem_for
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
    flops: of the products;  bytes: of the tensors that a launch reads or writes, once each"""

    names: list[str] = field(default_factory=list)
    compiled: dict[int, Any] = field(default_factory=dict)
    torch_ops: int = 0
    flops: int = 0
    bytes: int = 0


class _Ops(TorchDispatchMode):
    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if is_work(func):
            self.launches.torch_ops += 1
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


@contextmanager
def noted(arch: int | None = None) -> Iterator[Launches]:
    """Inside, a launch is noted; with an architecture (80, 90, ..) compiled too."""
    launches = Launches()
    if arch is not None:
        triton.runtime.driver.set_active(_Driver(arch))  # pyright: ignore
    original = JITFunction.__getitem__

    def launch_of(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            launches.names.append(kernel.fn.__name__)
            tensors = {(a.data_ptr(), a.shape): a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)}
            launches.bytes += sum(map(_size, tensors.values()))
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
    model = case.model(dtype)
    support, query = case.data(dtype)
    problem = problem_for(model, support[0].shape[2:], resolve(case.loss))
    noted_here: list[Launches] = []

    def run(request: Request) -> Result:
        engine = engine_of(kernels, request, precision) if fused else Engine(kernels, request, precision)
        engine.load(request)
        with noted(arch) as launches, _Ops(launches):
            engine.run()
        launches.flops = _product_flops(engine)
        noted_here.append(launches)
        return engine.result()

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
    )
    return noted_here[0]


def _product_flops(engine: Engine) -> int:
    """Of the linear layers: 2 M I O for each product. Plain: forward, and back to input and weight; dual: two
    products in the place of each, one where the input has no tangent."""
    total = 0
    for node in engine.plan.nodes:
        if node.name != "linear":
            continue
        (R, I), (_, O) = engine.plan.sizes[node.inputs[0]], engine.plan.sizes[node.out]
        moves = node.moves_in[0]
        plain = 2 + moves
        dual = (1 + moves) + 2 * moves + (1 + moves)
        if isinstance(engine, SmallMlp):  # values and gradients are made anew beside their tangents
            dual += 1 + moves
        assert engine.support is not None
        assert engine.query is not None
        N, Q = engine.support.x.shape[1], engine.query.x.shape[1]
        total += 2 * engine.T * R * I * O * (engine.K * N * (plain + dual) + Q * plain)
    return total
