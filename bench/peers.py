"""The ways to get a meta-gradient that are compared: the gradient of the mean query loss, in parameter order.

A peer is a function `build(case, dtype)` that returns `step()`: one meta-step, gradients finished on return.
What a training loop does once (models, conversions) is done in `build`.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bench.cases import Case

Step = Callable[[], Sequence[Any]]
LOSSES = {"mse": nn.functional.mse_loss, "cross_entropy": nn.functional.cross_entropy}


class Absent(Exception):
    """The peer cannot run here; says why."""


def absence(name: str, error: Exception) -> str:
    """Why a peer has no row: it is absent, or breaks. Where fastmaml does, but for memory, that is raised."""
    if isinstance(error, Absent):
        return str(error)
    if name.startswith("fastmaml") and not isinstance(error, torch.OutOfMemoryError):
        raise error
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _need(module: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `higher` uses what torch has deprecated
            return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"{module} is not installed ({error})") from error


def import_libraries() -> None:
    """Import the peers' libraries, those that there are."""
    for module in ("jax", "higher"):
        with suppress(Absent):
            _need(module)


def _fastmaml(case: Case, dtype: torch.dtype, backend: str, autograd: bool = False) -> Step:
    functional, backends = _need("fastmaml.functional"), _need("fastmaml.backends")
    model = case.model(dtype)
    params = dict(model.named_parameters())
    support, query = case.data(dtype)
    x, sizes = support[0], backends.cuda.Sizes(case.support, case.query)
    try:
        backends.prepare(model, x.shape[2:], case.loss, x.device, dtype, backend, sizes)
    except RuntimeError as error:
        raise Absent(str(error)) from error
    how = {"loss": case.loss, "lr": case.lr, "steps": case.steps, "backend": backend}

    def gradient() -> list[Tensor]:
        return list(functional.meta_value_and_grad(model, params, support, query, **how)[1].values())

    def backward() -> list[Tensor | None]:
        for p in params.values():
            p.grad = None
        functional.meta_loss(model, params, support, query, **how).backward()
        return [p.grad for p in params.values()]

    return backward if autograd else gradient


def fastmaml_on(backend: str) -> Callable[[Case, torch.dtype], Step]:
    """The function that gives the meta-gradient and no graph, as torch.func.grad and jax.grad do."""
    return lambda case, dtype: _fastmaml(case, dtype, backend)


fastmaml_cpu = fastmaml_on("cpu")


def fastmaml_autograd(case: Case, dtype: torch.dtype) -> Step:
    """`meta_loss(..).backward()`, as a training script has it."""
    return _fastmaml(case, dtype, "cpu", autograd=True)


def reference(case: Case) -> list[Tensor]:
    """The truth: fastmaml.reference in float64."""
    ref = _need("fastmaml.reference")
    model = case.model(torch.float64)
    params = dict(model.named_parameters())
    support, query = case.data(torch.float64)
    loss = ref.meta_loss(model, params, support, query, loss=case.loss, lr=case.lr, steps=case.steps)
    return list(torch.autograd.grad(loss, list(params.values())))


def _task_loss(case: Case, model: nn.Module) -> Callable[..., Tensor]:
    """Query loss of one task after its inner loop, in torch.func, as its tutorials write it."""
    criterion = LOSSES[case.loss]

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return criterion(functional_call(model, params, (x,)), y)

    def task(params: dict[str, Tensor], x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor) -> Tensor:
        for _ in range(case.steps):
            g = grad(loss)(params, x_s, y_s)
            params = {name: p - case.lr * g[name] for name, p in params.items()}
        return loss(params, x_q, y_q)

    return task


def _func(
    case: Case, dtype: torch.dtype, wrap: Callable[[Callable], Callable], vmap_outside: bool = False
) -> Step:
    model = case.model(dtype)
    task = _task_loss(case, model)
    params = {name: p.detach() for name, p in model.named_parameters()}
    (x_s, y_s), (x_q, y_q) = case.data(dtype)
    tasks = (None, 0, 0, 0, 0)

    def mean_loss(*args: Any) -> Tensor:
        return vmap(task, tasks)(*args).mean()

    def mean_gradient(*args: Any) -> dict[str, Tensor]:
        return {name: g.mean(0) for name, g in vmap(grad(task), tasks)(*args).items()}

    gradient = wrap(mean_gradient if vmap_outside else grad(mean_loss))
    return lambda: list(gradient(params, x_s, y_s, x_q, y_q).values())


def grad_vmap(case: Case, dtype: torch.dtype) -> Step:
    """Eager torch.func: gradient of the vmapped loss. The usual form; wrong through BatchNorm."""
    return _func(case, dtype, lambda f: f)


def vmap_grad(case: Case, dtype: torch.dtype) -> Step:
    """Eager torch.func: vmapped gradient, averaged. Right through BatchNorm."""
    return _func(case, dtype, lambda f: f, vmap_outside=True)


def _compiled(dtype: torch.dtype) -> Callable[[Callable], Callable]:
    torch._dynamo.reset()  # else a second case of other sizes would be compiled for dynamic shapes
    # float64 is only ever checked: the same traced derivatives without the minutes of code generation
    backend = "inductor" if dtype == torch.float32 else "aot_eager"
    return lambda f: torch.compile(f, fullgraph=True, dynamic=False, backend=backend)


def compile_grad_vmap(case: Case, dtype: torch.dtype) -> Step:
    return _func(case, dtype, _compiled(dtype))


def compile_vmap_grad(case: Case, dtype: torch.dtype) -> Step:
    return _func(case, dtype, _compiled(dtype), vmap_outside=True)


def loop(case: Case, dtype: torch.dtype) -> Step:
    """A Python loop over tasks with ordinary autograd through the unrolled steps."""
    model = case.model(dtype)
    criterion = LOSSES[case.loss]
    theta: dict[str, Tensor] = dict(model.named_parameters())
    support, query = case.data(dtype)

    def step() -> list[Tensor | None]:
        for p in theta.values():
            p.grad = None
        for x_s, y_s, x_q, y_q in zip(*support, *query, strict=True):
            params: dict[str, Tensor] = dict(theta)
            for _ in range(case.steps):
                loss = criterion(functional_call(model, params, (x_s,)), y_s)
                grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
                params = {n: p - case.lr * g for (n, p), g in zip(params.items(), grads, strict=True)}
            (criterion(functional_call(model, params, (x_q,)), y_q) / case.tasks).backward()
        return [p.grad for p in theta.values()]

    return step


def higher_loop(case: Case, dtype: torch.dtype) -> Step:
    """The `higher` library as its examples use it: a task at a time, differentiable SGD."""
    higher = _need("higher")
    model = case.model(dtype)
    criterion = LOSSES[case.loss]
    sgd = torch.optim.SGD(model.parameters(), lr=case.lr)
    support, query = case.data(dtype)

    def step() -> list[Tensor | None]:
        sgd.zero_grad()
        for x_s, y_s, x_q, y_q in zip(*support, *query, strict=True):
            with higher.innerloop_ctx(model, sgd, copy_initial_weights=False) as (fast, inner):
                for _ in range(case.steps):
                    inner.step(criterion(fast(x_s), y_s))
                (criterion(fast(x_q), y_q) / case.tasks).backward()
        return [p.grad for p in model.parameters()]

    return step


def jax_jit(case: Case, dtype: torch.dtype) -> Step:
    _need("jax")
    from bench import peer_jax

    return peer_jax.build(case, dtype)


PEERS: dict[str, Callable[[Case, torch.dtype], Step]] = {
    "fastmaml": fastmaml_cpu,
    "fastmaml-autograd": fastmaml_autograd,
    "fastmaml-torch": fastmaml_on("torch"),
    "grad-vmap": grad_vmap,
    "vmap-grad": vmap_grad,
    "compile": compile_grad_vmap,
    "compile-vmap-grad": compile_vmap_grad,
    "loop": loop,
    "higher": higher_loop,
    "jax": jax_jit,
}
DEFAULT = tuple(name for name in PEERS if name != "compile-vmap-grad")
