"""torch.library.opcheck of every operator, and a compiled training step."""

import pytest
import torch
from torch import nn

import fastmaml
from fastmaml import SGD, functional, losses
from fastmaml.backends import cpu, problem_for

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason="no C++ extension")
T, N, Q, K = 3, 4, 5, 2


def _arguments(own: bool):
    model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 2))
    problem = problem_for(model, (6,), losses.MSE())
    assert cpu.supports(problem, torch.device("cpu"), torch.float32) is None
    program = problem.encoded[4]
    params = [torch.randn((T, *p.shape) if own else p.shape) for p in model.parameters()]
    s, q = ((torch.randn(T, n, 6), torch.randn(T, n, 2), None) for n in (N, Q))
    v, lr = torch.randn(T, problem.layout(4)[1]), torch.full((K, 1), 0.1)
    factored = [] if own else [0, 4]  # the weights of the linear layers
    rule = [0.9, 0.1, 1.0] if own else []
    return {
        "apply": (params, s[0], program),
        "apply_backward": (params, s[0], torch.randn(T, N, 2), program, True, True),
        "value_and_grad": (params, *s, program),
        "value_and_grad_backward": (params, *s, torch.randn(T), v, program, False, True, True),
        "inner_loop": (params, lr, *s, program, K, rule),
        "inner_loop_backward": (params, lr, *s, v, program, K, False, rule, 0, True, True, True),
        "meta_loss": (
            params,
            lr,
            *s,
            *q,
            program,
            K,
            0.5,
            True,
            False,
            1,
            False,
            True,
            True,
            False,
            factored,
            rule,
            [0.5] * (K - 1) + [1.0] if rule else [],
        ),
    }


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", _arguments(False))
def test_opcheck(name: str, own: bool) -> None:
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.fastmaml, name).default, _arguments(own)[name], test_utils=checks)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_training_step_is_the_same() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))

    def loss(support, query):
        params = dict(model.named_parameters())
        return functional.meta_loss(model, params, support, query, loss="mse", lr=0.1, steps=K)

    compiled = torch.compile(loss, fullgraph=True)
    for tasks in (T, T + 1):  # the second makes it a symbol
        sets = [(torch.randn(tasks, n, 6), torch.randn(tasks, n, 2)) for n in (N, Q)]
        grads = [torch.autograd.grad(f(*sets), list(model.parameters())) for f in (loss, compiled)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_torch_backend_says_that_it_cannot_be_compiled() -> None:
    model = nn.Sequential(nn.Linear(6, 2))

    def loss(support, query):
        params = dict(model.named_parameters())
        how = {"loss": "mse", "lr": 0.1, "steps": K, "backend": "torch"}
        return functional.meta_loss(model, params, support, query, **how)

    sets = [(torch.randn(T, n, 6), torch.randn(T, n, 2)) for n in (N, Q)]
    with pytest.raises(Exception, match=r"do not run within torch\.compile"):
        torch.compile(loss)(*sets)


CALLS = {
    "apply": lambda model, p, s, q: functional.apply(model, p, q[0]).square().sum(),
    "value_and_grad": lambda model, p, s, q: sum(
        (g * g).sum() for g in functional.value_and_grad(model, p, *s, loss="mse")[1].values()
    ),
    "inner_loop": lambda model, p, s, q: sum(
        (w * w).sum() for w in functional.inner_loop(model, p, *s, loss="mse", lr=0.1, steps=K).values()
    ),
    "meta_loss with SGD": lambda model, p, s, q: functional.meta_loss(
        model, p, s, q, loss="mse", lr=0.1, steps=K, optimizer=SGD(0.9, 0.1, 1.0), step_weights=[1.0] * K
    ),
    "MAML": lambda model, p, s, q: fastmaml.MAML(model, loss="mse", lr=0.1, steps=K)(*s, *q),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CALLS)
def test_compiled_functions_and_their_derivatives_are_the_same(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    support, query = ((torch.randn(T, n, 6), torch.randn(T, n, 2)) for n in (N, Q))

    def run() -> torch.Tensor:
        return CALLS[name](model, dict(model.named_parameters()), support, query)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    values = [f() for f in (run, compiled)]
    torch.testing.assert_close(*values)
    grads = [torch.autograd.grad(value, list(model.parameters())) for value in values]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["hvp", "meta_value_and_grad"])
def test_compiled_functions_without_derivatives_are_the_same(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    params = {n: p.detach() for n, p in model.named_parameters()}
    support, query = ((torch.randn(T, n, 6), torch.randn(T, n, 2)) for n in (N, Q))

    def run() -> dict[str, torch.Tensor]:
        if name == "hvp":
            return functional.hvp(model, params, params, *support, loss="mse")
        return functional.meta_value_and_grad(model, params, support, query, loss="mse", lr=0.1, steps=K)[1]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")()
    for n, a in run().items():
        torch.testing.assert_close(compiled[n], a)
