"""Every layer op in a small network: its gradient and its Hessian-vector product; on the cpu backend.

value_and_grad is a plain forward and backward pass, hvp these and the dual passes. Before the op is a linear
layer with one input, so that the op's input has a gradient and a tangent. What that layer and the loss cost
is the row `mse`. Each is first held to fastmaml.reference in float64.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench.measure import error
from bench.meta_step import RIGHT
from fastmaml import functional, reference

BACKEND = "cpu"
FEW = 2  # tasks of the check in float64
SIZES = {"small": (10, 40), "large": (75, 256)}  # N examples, C channels
ROWS = 8  # of the [8, C / 8] that flatten makes [C] of


class Sum(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, C), nn.Linear(1, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def _after_linear(*make: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda C: nn.Sequential(nn.Linear(1, C), *(m(C) for m in make))


OPS: dict[str, Callable[[int], nn.Module]] = {
    "mse": _after_linear(),
    "cross_entropy": _after_linear(),
    "linear": _after_linear(lambda C: nn.Linear(C, C)),
    # between two linear layers relu is done by these, without a pass of its own
    "relu_linear": _after_linear(lambda C: nn.ReLU(), lambda C: nn.Linear(C, C)),
    "relu": _after_linear(lambda C: nn.ReLU()),
    "leaky_relu": _after_linear(lambda C: nn.LeakyReLU()),
    "tanh": _after_linear(lambda C: nn.Tanh()),
    "sigmoid": _after_linear(lambda C: nn.Sigmoid()),
    "silu": _after_linear(lambda C: nn.SiLU()),
    "gelu": _after_linear(lambda C: nn.GELU()),
    "gelu_tanh": _after_linear(lambda C: nn.GELU(approximate="tanh")),
    "batch_norm": _after_linear(nn.BatchNorm1d),
    "layer_norm": _after_linear(nn.LayerNorm),
    "add": Sum,
    "flatten": lambda C: nn.Sequential(nn.Linear(1, C // ROWS), nn.Flatten()),
}


def _gradient(library, dtype: torch.dtype, op: str, T: int, N: int, C: int) -> Callable[[], list[Tensor]]:
    model, params, _, data, loss = _network(dtype, op, T, N, C)
    how = {"loss": loss, "backend": BACKEND}
    return lambda: list(library.value_and_grad(model, params, *data, **how)[1].values())


def _hvp(library, dtype: torch.dtype, op: str, T: int, N: int, C: int) -> Callable[[], list[Tensor]]:
    model, params, v, data, loss = _network(dtype, op, T, N, C)
    return lambda: list(library.hvp(model, params, v, *data, loss=loss, backend=BACKEND).values())


def _network(dtype: torch.dtype, op: str, T: int, N: int, C: int):
    """Model, its parameters, a direction v, (x, y) of T tasks, loss; the same numbers in every dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OPS[op](C).requires_grad_(True)
        x = torch.randn(T, N, ROWS, 1) if op == "flatten" else torch.randn(T, N, 1)
        labels = op == "cross_entropy"
        y = torch.randint(C, (T, N)) if labels else torch.randn(T, N, C).to(dtype)
        params = {n: p.detach().to(dtype) for n, p in model.named_parameters()}
        v = {n: torch.randn(p.shape).to(dtype) for n, p in params.items()}
    return model.to(dtype), params, v, (x.to(dtype), y), "cross_entropy" if labels else "mse"


PASSES = {"gradient": _gradient, "hvp": _hvp}


@pytest.mark.benchmark(warmup=True, warmup_iterations=10, min_rounds=20, max_time=0.2)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tasks", [1, 32])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PASSES)
def test_op(benchmark, name: str, size: str, tasks: int, op: str) -> None:
    build, (N, C) = PASSES[name], SIZES[size]
    few = (torch.float64, op, FEW, N, C)
    truth = [a.detach() for a in build(reference, *few)()]
    assert error(build(functional, *few)(), truth) <= RIGHT
    benchmark.group = f"{name} N={N} C={C} T={tasks}"
    found = benchmark(build(functional, torch.float32, op, tasks, N, C))
    assert all(a.isfinite().all() for a in found)
