"""Factored fast weights: asked for, refused, chosen and explained."""

import re

import pytest
import torch
from cases import error
from torch import nn

import fastmaml
from fastmaml import forms, functional, reference
from fastmaml.backends import cpu, problem_for
from fastmaml.losses import MSE

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason="no C++ extension")
T, N, Q = 3, 4, 6


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(5, 300), nn.Tanh(), nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 2)
    return nn.Sequential(*layers).double()


def tasks() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(T, n, 5).double(), torch.randn(T, n, 2).double()) for n in (N, Q)]


def gradients(module, model, data, **how) -> torch.Tensor:
    how = {"loss": "mse", "lr": 0.05, "steps": 3} | how
    _, grads = module.meta_value_and_grad(model, dict(model.named_parameters()), *data, **how)
    return torch.cat([g.flatten() for g in grads.values()])


@pytest.mark.parametrize("form", [None, "dense", "factored", {"2.weight": "factored"}, {"0.weight": "dense"}])
@pytest.mark.parametrize("knobs", [{}, {"chunk_tasks": 2}, {"checkpoint_every": 1}, {"first_order": True}])
def test_every_form_is_the_reference(form, knobs: dict) -> None:
    model, data = network(), tasks()
    truth = gradients(reference, model, data, **{n: v for n, v in knobs.items() if n == "first_order"})
    assert error(gradients(functional, model, data, fast_weights=form, **knobs), truth) < 1e-12


def test_more_tasks_than_a_round_holds() -> None:
    model, (support, query) = network(), tasks()
    many = [tuple(a.repeat(70, 1, 1) for a in pair) for pair in (support, query)]
    found = gradients(functional, model, many, fast_weights="factored")
    assert error(found, gradients(functional, model, (support, query), fast_weights="dense")) < 1e-12


@pytest.mark.parametrize(
    "how",
    [{}, {"optimizer": fastmaml.SGD(0.9, 0.1, 0.5), "step_weights": [0.5, 0.0, 1.0]}],
    ids=["plain", "sgd"],
)
def test_bitwise_the_same_for_any_number_of_threads(how: dict) -> None:
    model, data = network().float(), [(x.float(), y.float()) for x, y in tasks()]
    many = [tuple(a.repeat(30, 1, 1) for a in pair) for pair in data]
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3, 5, 2):
            torch.set_num_threads(n)
            found.append(gradients(functional, model, many, fast_weights="factored", **how))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_nan_gives_nan() -> None:
    model, (support, query) = network(), tasks()
    support[0][1, 0, 0] = float("nan")
    assert gradients(functional, model, (support, query), fast_weights="factored").isnan().all()


def refuse(match: str, **how) -> None:
    with pytest.raises(ValueError, match=match):
        gradients(functional, network(), tasks(), **how)


def test_what_cannot_be_is_refused() -> None:
    refuse(
        re.escape('must be None, "dense", "factored" or a dict of them, got \'sparse\''),
        fast_weights="sparse",
    )
    refuse("'half'", fast_weights={"0.weight": "half"})
    refuse(r"names \['1.weight'\]", fast_weights={"1.weight": "dense"})
    each = {n: torch.full_like(p, 0.1) for n, p in network().named_parameters()}
    refuse("no fast weights can be factored .*a step size for each element", lr=each, fast_weights="factored")
    refuse("0.weight cannot be factored: it has a step size", lr=each, fast_weights={"0.weight": "factored"})
    with pytest.raises(ValueError, match="fast_weights"):
        fastmaml.MAML(network(), loss="mse", lr=0.1, steps=1, fast_weights="thin")


def test_weights_of_a_task_and_tied_ones_are_dense() -> None:
    model, data = network(), tasks()
    params = {n: p.detach().expand(T, *p.shape).contiguous() for n, p in model.named_parameters()}
    how = {"loss": "mse", "lr": 0.05, "steps": 2}
    with pytest.raises(ValueError, match="starts from weights of each task's own"):
        functional.meta_loss(model, params, *data, fast_weights="factored", **how)
    layer = nn.Linear(5, 5)
    tied = nn.Sequential(layer, nn.Tanh(), layer).double()
    problem = problem_for(tied, (5,), MSE())
    (first, second) = forms.layers(problem)
    assert first.tied
    assert second.tied
    with pytest.raises(ValueError, match="used by several layers"):
        functional.meta_loss(
            tied, dict(tied.named_parameters()), *[(x, x) for x, _ in data], fast_weights="factored", **how
        )


def test_maml_passes_it_on() -> None:
    model, (support, query) = network(), tasks()
    found = []
    for form in ("dense", "factored"):
        model.zero_grad()
        fastmaml.MAML(model, loss="mse", lr=0.1, steps=2, fast_weights=form)(*support, *query).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # pyright: ignore
    assert error(*found) < 1e-12
    assert not torch.equal(*found)


def test_maml_evaluates_with_factors() -> None:
    model, (support, query) = network(), tasks()
    how = {"loss": "mse", "lr": [0.1, 0.05], "steps": 2}
    truth, found = (
        fastmaml.MAML(model, fast_weights=form, **how).evaluate(*support, *query, steps=3).loss
        for form in ("dense", "factored")
    )
    assert found.shape == (4, T)
    assert error(found, truth) < 1e-12


def test_wide_layers_are_factored_and_explain_says_so() -> None:
    model = nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 5)
    )
    said = fastmaml.explain(model, torch.zeros(32, 5, 784), "cross_entropy", steps=5, queries=75)
    assert "T=32 N=5, 75 query examples, 5 steps" in said
    assert re.search(
        r"2\.weight +\[1024, 1024\] +factored +factored would take 0\.\d+ of the dense time", said
    )
    small = fastmaml.explain(fastmaml_sine(), torch.zeros(25, 10, 1), "mse", steps=5)
    assert re.search(r"2\.weight +\[40, 40\] +dense", small)
    told = fastmaml.explain(fastmaml_sine(), torch.zeros(25, 10, 1), "mse", steps=5, fast_weights="factored")
    assert re.search(r"2\.weight +\[40, 40\] +factored .* as told", told)


def test_explain_counts_the_optimizer_and_the_losses() -> None:
    x = torch.zeros(32, 5, 784)
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 5))
    how = {"steps": 3, "optimizer": fastmaml.SGD(0.9), "step_weights": [1.0, 0.0, 1.0]}
    said = fastmaml.explain(model, x, "cross_entropy", **how)
    assert "3 steps, losses after 2 of them, an optimizer" in said
    assert said != fastmaml.explain(model, x, "cross_entropy", steps=3)
    with pytest.raises(ValueError, match="a number for each of 3 steps, got 1"):
        fastmaml.explain(model, x, "cross_entropy", steps=3, step_weights=[1.0])


def fastmaml_sine() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


class Odd(nn.Module):
    """No Program: a sine, rows within an example, a weight that something else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.read = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(4, 4)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N, 2, 3]
        h = torch.sin(self.second(torch.sin(self.first(x))))
        h = self.read(h) * (1 + self.read.weight.square().mean())
        return self.head(h.flatten(1))


@pytest.mark.parametrize("how", [{}, {"first_order": True}, {"reduction": "sum"}])
def test_the_torch_backend_finds_linear_layers_without_a_program(how: dict) -> None:
    torch.manual_seed(0)
    model = Odd().double()
    data = [(torch.randn(T, n, 2, 3).double(), torch.randn(T, n, 2).double()) for n in (N, Q)]
    truth = gradients(reference, model, data, **how)
    with pytest.warns(UserWarning, match="falls back to its torch backend"):
        gradients(functional, model, data, **how)
    (problem,) = [p for p in [problem_for(model, (2, 3), MSE())] if p.program is None]
    found = {problem.names[layer.weight]: (layer.rows, layer.tied) for layer in forms.layers(problem)}
    assert found == {
        "first.weight": (2, False),
        "second.weight": (2, False),
        "read.weight": (2, True),
        "head.weight": (1, False),
    }
    for form in ("factored", {"second.weight": "factored"}):
        assert error(gradients(functional, model, data, fast_weights=form, **how), truth) < 1e-12


def test_a_loss_without_forward_derivatives_stays_dense() -> None:
    model, data = network(), tasks()
    how = {"loss": nn.functional.huber_loss, "backend": "torch"}
    truth = gradients(reference, model, data, loss=nn.functional.huber_loss)
    assert error(gradients(functional, model, data, fast_weights="factored", **how), truth) < 1e-12


@pytest.mark.parametrize("chunk", [None, 2])
def test_factors_are_the_fast_weights(chunk: int | None) -> None:
    model, ((x, y), (x_q, _)) = network(), tasks()
    params, how = dict(model.named_parameters()), {"loss": "mse", "lr": 0.05}
    truth = functional.inner_loop(model, params, x, y, steps=5, **how)
    truth = {n: w.detach() for n, w in truth.items()}
    fast = functional.inner_loop(
        model, params, x, y, steps=2, fast_weights={"2.weight": "factored"}, chunk_tasks=chunk, **how
    )
    weight = fast["2.weight"]
    assert isinstance(weight, fastmaml.FactoredWeight)
    assert (weight.shape, weight.d.shape) == ((T, 200, 300), (T, 2 * N, 200))
    fast = functional.inner_loop(model, fast, x, y, steps=3, **how)  # goes on with them
    assert isinstance(fast["2.weight"], fastmaml.FactoredWeight)
    assert isinstance(fast["0.weight"], torch.Tensor)
    assert error(fast["2.weight"].dense().detach(), truth["2.weight"]) < 1e-12
    output = functional.apply(model, fast, x_q, chunk_tasks=chunk)
    assert error(output.detach(), functional.apply(model, truth, x_q)) < 1e-12
    x_q.requires_grad_()
    with torch.no_grad():
        fast = functional.inner_loop(model, params, x, y, steps=5, fast_weights="factored", **how)
    (found,) = torch.autograd.grad(functional.apply(model, fast, x_q).square().sum(), x_q)
    (wanted,) = torch.autograd.grad(functional.apply(model, truth, x_q).square().sum(), x_q)
    assert error(found, wanted) < 1e-12


def through_fast_weights(
    module, model: nn.Module, data, params: dict, lr, *, first_order: bool, optimizer, again: bool, **how
) -> list[torch.Tensor]:
    """Gradients of a loss of the user's own, and of the weights themselves, by params, lr and x."""
    (x, y), (x_q, _) = data
    params = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
    x = x.clone().requires_grad_()
    lr = {n: torch.tensor(0.03 + 0.01 * i) for i, n in enumerate(params)} if lr == "each" else lr
    rates = [a.double().requires_grad_() for a in (lr.values() if isinstance(lr, dict) else lr)]
    lr = dict(zip(lr, rates, strict=True)) if isinstance(lr, dict) else rates
    sgd = {"loss": "mse", "first_order": first_order, "optimizer": optimizer}
    fast = module.inner_loop(model, params, x, y, lr=lr, steps=3, **sgd, **how)
    if again:  # from what came out
        chunk = {"chunk_tasks": how["chunk_tasks"]} if "chunk_tasks" in how else {}
        fast = module.inner_loop(model, fast, 2 * x, y, lr=[rates[0]], steps=1, **sgd, **chunk)
    out = module.apply(model, fast, x_q)
    total = (out**3).sum() + out.sin().sum()
    for w in fast.values():
        total = total + 0.01 * (w.dense() if isinstance(w, fastmaml.FactoredWeight) else w).square().sum()
    leaves = [*params.values(), *rates, x]
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for a, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(
    "sgd",
    [None, fastmaml.SGD(0.9), fastmaml.SGD(0.0, 0.1), fastmaml.SGD(0.8, 0.1, 0.5)],
    ids=["plain", "momentum", "decay", "clipped"],
)
@pytest.mark.parametrize(
    "how",
    [
        {"fast_weights": "factored"},
        {"fast_weights": "factored", "again": True},
        {"fast_weights": {"2.weight": "factored"}, "chunk_tasks": 2, "lr": "each"},
        {"fast_weights": "factored", "frozen": "2.weight", "again": True, "chunk_tasks": 1},
        {"fast_weights": "factored", "own": "0.bias", "frozen": "0.weight"},
    ],
    ids=["all", "twice", "one", "frozen", "own"],
)
def test_a_gradient_flows_through_the_factors(how: dict, sgd, first_order: bool) -> None:
    model, data, how = network(), tasks(), dict(how)
    frozen, own, again = how.pop("frozen", ""), how.pop("own", ""), how.pop("again", False)
    lr = how.pop("lr", [torch.tensor(0.05), torch.tensor(0.02), torch.tensor(0.04)])
    for n, p in model.named_parameters():
        p.requires_grad_(n != frozen)
    params: dict[str, torch.Tensor] = dict(model.named_parameters())
    if own:
        params[own] = params[own] * torch.arange(1.0, T + 1)[:, None]
    same = {"first_order": first_order, "optimizer": sgd, "again": again}
    truth = through_fast_weights(reference, model, data, params, lr, **same)
    found = through_fast_weights(functional, model, data, params, lr, **same, **how)
    for a, b in zip(found, truth, strict=True):
        assert a.shape == b.shape
        assert error(a, b) < 1e-10 or float(b.abs().max()) < 1e-12


def test_gradients_through_factors_end_with_an_error() -> None:
    model, ((x, y), (x_q, _)) = network(), tasks()
    params, how = dict(model.named_parameters()), {"lr": 0.05, "steps": 2, "fast_weights": "factored"}
    huber = {"loss": nn.functional.huber_loss, "backend": "torch"}
    total = functional.apply(model, functional.inner_loop(model, params, x, y, **huber, **how), x_q).sum()
    with pytest.raises(RuntimeError, match="no forward derivative of the model or the loss"):
        total.backward()
    with pytest.raises(RuntimeError, match="no forward derivative"):  # known from now on
        functional.inner_loop(model, params, x, y, **huber, **how)
    fast = functional.inner_loop(model, params, x, y, loss="mse", **how)
    total = functional.apply(model, fast, x_q).square().sum()
    (g, *_) = torch.autograd.grad(total, list(params.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative of this order"):
        g.sum().backward()


def test_factors_where_they_cannot_be() -> None:
    model, ((x, y), _) = network(), tasks()
    params, how = dict(model.named_parameters()), {"loss": "mse", "lr": 0.05, "steps": 1}
    fast = functional.inner_loop(model, params, x, y, fast_weights="factored", **how)
    with pytest.raises(TypeError, match=r"apply and inner_loop take factored weights.*0.weight"):
        functional.value_and_grad(model, fast, x, y, loss="mse")
    with pytest.raises(ValueError, match=r"'0.weight'\] come as factors"):
        functional.inner_loop(model, fast, x, y, fast_weights={"0.weight": "dense"}, **how)
    with pytest.raises(ValueError, match=r"'0.weight'.*\] come as factors"):
        functional.inner_loop(model, fast, x, y, fast_weights="dense", **how)
    each = {n: torch.full_like(p, 0.1) for n, p in params.items()}
    with pytest.raises(ValueError, match="not one for each element"):
        functional.inner_loop(model, fast, x, y, loss="mse", lr=each, steps=1)
    dense = {"fast_weights": {"0.weight": "dense"}, "optimizer": fastmaml.SGD(max_grad_norm=0.1)}
    found = functional.inner_loop(model, params, x, y, **dense, **how)["0.weight"]
    assert isinstance(found, torch.Tensor)
    with pytest.raises(RuntimeError, match="not used by any F"):
        functional.apply(Unlinear(model), {f"of.{n}": w for n, w in fast.items()}, x, backend="torch")


class Unlinear(nn.Module):
    """The same parameters, without a linear layer."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((p.sum() * x for p in self.of.parameters()), 0 * x)


def test_fast_weights_lie_in_memory_of_their_own() -> None:
    model, ((x, y), _) = network(), tasks()
    model[0].bias.requires_grad_(False)
    params = {n: p.detach() for n, p in model.named_parameters()}
    kept = {n: p.clone() for n, p in params.items()}
    how = {"loss": "mse", "lr": 0.1, "steps": 1, "fast_weights": "factored"}
    fast = functional.inner_loop(model, params, x[:1], y[:1], **how)
    for w in fast.values():
        if isinstance(w, torch.Tensor):
            w.zero_()
        else:
            assert not w.detach().requires_grad
    assert all(torch.equal(params[n], kept[n]) for n in params)
