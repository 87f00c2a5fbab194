"""The `cuda` backend against the reference: on a GPU where there is one, else its emulation on the CPU."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import error
from torch import Tensor, nn

import fastmaml
from fastmaml import functional, reference
from fastmaml.backends import choose, cuda, problem_for
from fastmaml.explain import explain
from fastmaml.losses import MSE, CrossEntropy
from fastmaml.models import omniglot_mlp, sine_mlp

pytestmark = pytest.mark.skipif(cuda.available() is not None, reason=cuda.available() or "")
DEVICE = torch.device("cpu" if cuda.EMULATED else "cuda")
EPS = torch.finfo(torch.float32).eps

OPS: dict[str, Any] = {
    "linear": lambda C: nn.Linear(C, C),
    "batch_norm": lambda C: nn.BatchNorm1d(C),
    "layer_norm": lambda C: nn.LayerNorm(C),
    "leaky_relu": lambda C: nn.LeakyReLU(0.1),
    "tanh": lambda C: nn.Tanh(),
    "sigmoid": lambda C: nn.Sigmoid(),
    "gelu": lambda C: nn.GELU(),
    "gelu_tanh": lambda C: nn.GELU(approximate="tanh"),
    "silu": lambda C: nn.SiLU(),
    "add": lambda C: Twice(C),
    "flatten": lambda C: nn.Sequential(Rows(C), nn.Flatten()),
}
# examples, width: a one, odd ones, one past a vector, a model's, one past a warp
SIZES = [(2, 1), (3, 5), (5, 17), (10, 40), (33, 49)]


class Twice(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.a = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + x


class Rows(nn.Module):
    """x and itself in two rows of an example: [N, C] -> [N, 2, C], by a linear layer on [N, 2, C] inputs"""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.a = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for float64 in the emulation, where values are proved; a GPU has what it has."""
    if cuda.EMULATED:
        monkeypatch.setattr(cuda, "shared_limit", lambda device: 1 << 20)


def everything(f, model, x, y, loss, v, how) -> list[Tensor]:
    """The loss, its gradient, and the derivatives of both: plain and dual sweeps, with the gradients of x."""
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    x = x.clone().requires_grad_()
    value, grads = f.value_and_grad(model, params, x, y, loss=loss, **how)
    total = value.sum() + sum((g * v[n]).sum() for n, g in grads.items())
    return [value, *grads.values(), *torch.autograd.grad(total, [*params.values(), x])]


def compare(model: nn.Module, run, smooth: bool = True) -> None:
    """run(f, dtype, how) -> tensors: float64 to 1e-10, float32 at most twice as far as the reference."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        model.to(DEVICE, dtype)
        for f, how in ((reference, {}), (functional, {"backend": "cuda"})):
            try:
                found[f, dtype] = [a.detach() for a in run(f, dtype, how)]
            except RuntimeError as why:
                if cuda.EMULATED or "shared memory" not in str(why):
                    raise
                pytest.skip(f"not on this GPU: {why}")
    truth = found[reference, torch.float64]
    for i, wanted in enumerate(truth):
        off = {key: error(values[i], wanted) for key, values in found.items()}
        assert off[functional, torch.float64] <= 1e-10, (i, off)
        if smooth:  # a sign that flips in float32 says nothing
            assert off[functional, torch.float32] <= 2 * off[reference, torch.float32] + 16 * EPS, (i, off)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"N{s[0]}-C{s[1]}")
@pytest.mark.parametrize("op", OPS)
def test_op(op: str, size: tuple[int, int], plenty: None) -> None:
    (N, C), T = size, 2
    if (op == "layer_norm" and C < 3) or (op == "batch_norm" and N < 3):
        pytest.skip("a group of one or two has no curvature")
    rows, first = (2,) if op == "flatten" else (), nn.Identity() if op == "add" else nn.Linear(C, C)
    width = 2 * C if op == "flatten" else C
    model = nn.Sequential(first, OPS[op](C), nn.Linear(width, 3))
    x = torch.randn(T, N, *rows, C, dtype=torch.float64, device=DEVICE)
    y = torch.randint(3, (T, N), device=DEVICE)
    v = {n: torch.randn(T, *p.shape, dtype=torch.float64, device=DEVICE) for n, p in model.named_parameters()}

    def run(f, dtype, how):
        cast = {n: a.to(dtype) for n, a in v.items()}
        return everything(f, model, x.to(dtype), y, CrossEntropy(0.1), cast, how)

    # batch norm over 2 or 3 examples is ill-conditioned
    compare(model, run, smooth=op not in ("leaky_relu", "batch_norm"))


def mlp(*widths: int, norm: bool = False, act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), *([nn.BatchNorm1d(o)] if norm else []), act()]
    return nn.Sequential(*layers[: -2 if norm else -1])


# network, support and query examples, steps
MODELS = {
    "sine": (sine_mlp, 10, 10, 5),
    "smooth sine": (lambda: mlp(1, 40, 40, 1), 10, 10, 5),
    "policy": (lambda: mlp(2, 100, 100, 2), 20, 20, 2),
    "small Omniglot": (lambda: mlp(49, 32, 16, 16, 5, norm=True, act=nn.ReLU), 5, 75, 2),
    "wide": (lambda: mlp(3, 512, 2), 7, 9, 2),
    "many examples": (lambda: mlp(2, 9, 2), 100, 100, 2),
}


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, first_order: bool, plenty: None) -> None:
    check_model(name, first_order)


@pytest.fixture
def clusters() -> None:
    if cuda._most_blocks(cuda._index(DEVICE)) == 1:
        pytest.skip("this GPU has no clusters of blocks")


@pytest.mark.parametrize(
    ("name", "limit"), [("sine", 12 << 10), ("policy", 48 << 10), ("small Omniglot", 32 << 10)]
)
def test_model_by_a_cluster(name: str, limit: int, clusters: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that have less shared memory than the network takes"""
    monkeypatch.setattr(cuda, "shared_limit", lambda device: limit)
    if cuda.EMULATED:
        monkeypatch.setenv("FASTMAML_CUDA_THREADS", "32")
    model = check_model(name, first_order=False)
    (I,) = {m.in_features for m in model.modules() if isinstance(m, nn.Linear)} & {1, 2, 49}
    problem = problem_for(model, (I,), CrossEntropy() if name == "small Omniglot" else MSE())
    used = {plan.blocks for key, plan in problem.memo.items() if key[0] == "cuda plan"}
    assert used, problem.memo
    assert used <= {4, 8}


def check_model(name: str, first_order: bool) -> nn.Module:
    make, N, Q, steps = MODELS[name]
    model, T = make(), 3
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    I, O = linear[0].in_features, linear[-1].out_features
    x = [torch.randn(T, n, I, dtype=torch.float64, device=DEVICE) for n in (N, Q)]
    y: list[Tensor] = [torch.randn(T, n, O, dtype=torch.float64, device=DEVICE) for n in (N, Q)]
    if O == 5:
        y = [a.argmax(2) for a in y]

    def run(f, dtype, how):
        cast = lambda a: a.to(dtype) if a.is_floating_point() else a  # noqa: E731
        (x_s, x_q), (y_s, y_q) = ([cast(a).clone() for a in both] for both in (x, y))
        lr = torch.tensor(0.02, dtype=dtype, device=DEVICE, requires_grad=True)
        leaves = [*model.parameters(), lr, x_s.requires_grad_(), x_q.requires_grad_()]
        value = f.meta_loss(
            model, dict(model.named_parameters()), (x_s, y_s), (x_q, y_q),
            loss=CrossEntropy() if O == 5 else MSE(), lr=lr, steps=steps, first_order=first_order, **how,
        )  # fmt: skip
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        return [value, *(torch.zeros(1, device=DEVICE) if g is None else g for g in grads)]

    compare(model, run, smooth="smooth" in name or name in ("policy", "wide", "many examples"))
    return model


def test_every_order_of_the_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cuda.EMULATED:
        pytest.skip("the GPU orders its threads")
    model = mlp(3, 17, 9, 4, norm=True, act=nn.SiLU)
    x, y = torch.randn(2, 6, 3), torch.randn(2, 6, 4)
    results = []
    for order in ("forward", "reverse", "random:1", "random:2"):
        monkeypatch.setenv("FASTMAML_EMULATE_ORDER", order)
        for threads in ("64", "128"):
            monkeypatch.setenv("FASTMAML_CUDA_THREADS", threads)
            call = {"loss": "mse", "lr": 0.1, "steps": 3, "backend": "cuda"}
            params = dict(model.named_parameters())
            _, grads = functional.meta_value_and_grad(model, params, (x, y), (x, y), **call)
            results.append(torch.cat([g.flatten() for g in grads.values()]))
    assert all(torch.equal(r, results[0]) for r in results)


def bytes_of(model: nn.Module, N: int, Q: int, I: int, dtype: torch.dtype = torch.float32) -> int:
    problem = problem_for(model, (I,), MSE())
    assert cuda.supports(problem, DEVICE, torch.float32) is None
    return cuda.largest(problem, DEVICE, dtype, cuda.Sizes(N, Q)).bytes


def test_bytes() -> None:
    """Rows are an odd number of 16-byte vectors long."""

    def row(n: int) -> int:
        vectors = math.ceil(n / 4)
        return 4 * (vectors + 1 - vectors % 2)

    N, Q, widths = 10, 6, (3, 40, 24, 2)
    weights = sum(o * row(i) + row(o) for i, o in pairwise(widths))
    # in the dual sweep: x; a number for each parameter and warp; what is alive at the end of the forward
    # pass, hidden values with tangents; and the first gradients
    fixed = 2 * weights + N * row(3) + 4 * math.ceil(N / 4) + 64
    hidden = 2 * N * (row(40) + row(24))
    need = bytes_of(mlp(*widths, act=nn.ReLU), N, Q, 3)
    assert need >= 4 * (fixed + hidden)
    assert need <= 4 * (fixed + 6 * 4 + hidden + 2 * N * (row(40) + row(24) + 2 * row(2) + row(3)))
    assert bytes_of(mlp(*widths, act=nn.ReLU), N, Q, 3, torch.float64) > 1.8 * need


def test_what_fits_where() -> None:
    """163 KiB are on sm_80, 227 on sm_90 and 100, 99 on sm_120."""
    assert bytes_of(sine_mlp(), 10, 10, 1) < 40 << 10
    assert bytes_of(mlp(2, 100, 100, 2), 20, 20, 2) < 163 << 10
    problem = problem_for(omniglot_mlp(), (1, 28, 28), CrossEntropy())
    assert cuda.supports(problem, DEVICE, torch.float32) is None
    why = cuda.misfit(problem, DEVICE, torch.float32, cuda.Sizes(5, 75))
    assert why is not None
    assert "a task with 5 support and 75 query examples needs 2" in why
    plan = cuda.largest(problem, DEVICE, torch.float32, cuda.Sizes(5, 75))
    team = "a block" if plan.blocks == 1 else "a cluster of 8 blocks"
    assert why.endswith(f"{plan.bytes - plan.blocks * plan.limit} more than {team} can have")


def test_as_few_blocks_as_have_room(clusters: None, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_for(mlp(2, 100, 100, 2), (2,), MSE())
    assert cuda.supports(problem, DEVICE, torch.float32) is None
    plan = lambda: cuda.largest(problem, DEVICE, torch.float32, cuda.Sizes(10, 10))  # noqa: E731
    need = plan().bytes
    for limit, blocks in (
        (need, 1),
        (need - 16, 2),
        (need // 2 + 4096, 2),
        (need // 2 - 16, 4),
        (need // 5, 8),
    ):
        monkeypatch.setattr(cuda, "shared_limit", lambda device, limit=limit: limit // 16 * 16)
        assert plan().blocks == blocks
        assert plan().misfit is None
    monkeypatch.setattr(cuda, "shared_limit", lambda device: need // 160 * 16)
    assert "more than a cluster of 8 blocks can have" in (plan().misfit or "")


def test_what_does_not_fit_says_so() -> None:
    model = nn.Linear(500, 500)
    x = torch.randn(2, 3, 500, device=DEVICE)
    model.to(DEVICE)
    problem = problem_for(model, (500,), MSE())
    assert choose(problem, DEVICE, torch.float32, None, cuda.Sizes(3, 3)) is not cuda
    with pytest.raises(RuntimeError, match=r"more than a (block|cluster of 8 blocks) can have"):
        functional.value_and_grad(model, dict(model.named_parameters()), x, x, loss="mse", backend="cuda")
    many = nn.Sequential(*[nn.Tanh() for _ in range(60)])
    with pytest.raises(RuntimeError, match="at most 48 layer ops, not 60"):
        functional.apply(many, {}, x, backend="cuda")


def test_it_is_named_as_what_it_is() -> None:
    model = mlp(2, 5, 1).to(DEVICE)
    info = next(b for b in fastmaml.backends() if b.name == "cuda")
    assert info.available
    assert ("emulation" in info.note) == cuda.EMULATED
    said = str(explain(model, torch.zeros(1, 3, 2, device=DEVICE), loss="mse"))
    assert ("cuda: emulated here" in said) if cuda.EMULATED else "backend: cuda" in said


def test_explain_says_where_an_inner_optimizer_runs() -> None:
    model, x = mlp(2, 5, 1).to(DEVICE), torch.randn(2, 3, 2, device=DEVICE)
    sent = "cuda has no kernels for this optimizer: inner loops with it run on torch"
    assert sent in explain(model, x, loss="mse", optimizer=fastmaml.SGD(momentum=0.9))
    assert sent not in explain(model, x, loss="mse", optimizer=fastmaml.SGD())
    assert sent not in explain(model, x, loss="mse")
    assert sent not in explain(nn.Sequential(model, nn.Softplus()), x, optimizer=fastmaml.SGD(momentum=0.9))
    y, call = torch.randn(2, 3, 1, device=DEVICE), {"loss": "mse", "lr": 0.1, "steps": 2}
    (_, there), (_, here) = (
        functional.meta_value_and_grad(
            model, dict(model.named_parameters()), (x, y), (x, y),
            optimizer=fastmaml.SGD(momentum=0.9), backend=name, fast_weights="dense", **call,
        )
        for name in ("torch", "cuda")
    )  # fmt: skip
    assert all(torch.equal(there[n], here[n]) for n in there)


def test_gradients_by_x_alone() -> None:
    """Nothing of the parameters is wanted, so the query set's frame is all that has gradients."""
    model = mlp(3, 9, 4, act=nn.Tanh)
    params = {n: p.detach() for n, p in model.double().named_parameters()}
    x = torch.randn(2, 5, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    y = torch.randn(2, 5, 4, dtype=torch.float64, device=DEVICE)
    params = {n: p.to(DEVICE) for n, p in params.items()}
    for call in (
        lambda f, **how: f.apply(model, params, x, **how).square().sum(),
        lambda f, **how: f.value_and_grad(model, params, x, y, loss="mse", **how)[0].sum(),
        lambda f, **how: f.meta_loss(model, params, (x, y), (x, y), loss="mse", lr=0.1, steps=0, **how),
        lambda f, **how: f.meta_loss(
            model, params, (x.detach(), y), (x, y), loss="mse", lr=0.1, steps=2, **how
        ),
    ):
        (truth,), (actual,) = (
            torch.autograd.grad(call(f, **how), x)
            for f, how in ((reference, {}), (functional, {"backend": "cuda"}))
        )
        torch.testing.assert_close(actual, truth, rtol=1e-10, atol=1e-12)


def test_a_label_out_of_range_gives_nan_on_a_gpu() -> None:
    """Where nobody reads the labels beforehand"""
    if cuda.EMULATED:
        pytest.skip("labels on the CPU are checked")
    model = mlp(3, 4)
    y = torch.tensor([[0, 4]], device=DEVICE)
    params = dict(model.to(DEVICE).named_parameters())
    value, _ = functional.value_and_grad(
        model, params, torch.randn(1, 2, 3, device=DEVICE), y, loss="cross_entropy", backend="cuda"
    )
    assert value.isnan().all()
