"""The inner loop's optimizer is torch's, and the losses on every step are those of the weights there.

Their derivatives are drawn in test_random_programs.py.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmaml import MAML, SGD, FactoredWeight, functional, reference
from fastmaml.backends import cpu

BACKENDS = ["reference", "torch"] if cpu.available() is not None else ["reference", "cpu", "torch"]
T, K = 3, 4
OPTIMIZERS = [
    SGD(),
    SGD(momentum=0.9),
    SGD(weight_decay=0.1),
    SGD(max_grad_norm=0.5),
    SGD(momentum=0.5, weight_decay=0.2, max_grad_norm=1.0),
]


def problem() -> tuple[nn.Sequential, dict[str, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    sets = [(torch.randn(T, n, 3).double(), torch.randn(T, n, 2).double()) for n in (4, 5)]
    return model, dict(model.named_parameters()), sets[0], sets[1]


def call(name: str, backend: str, *args, **how):
    if backend == "reference":
        return getattr(reference, name)(*args, loss="mse", lr=0.3, **how)
    return getattr(functional, name)(*args, loss="mse", lr=0.3, backend=backend, **how)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_steps_are_those_of_torch_optim(backend: str, optimizer: SGD, frozen: bool) -> None:
    model, params, support, _ = problem()
    model[0].bias.requires_grad_(not frozen)
    fast = call("inner_loop", backend, model, params, *support, steps=K, optimizer=optimizer)
    for t, (x, y) in enumerate(zip(*support, strict=True)):
        again = problem()[0]
        again[0].bias.requires_grad_(not frozen)
        sgd = torch.optim.SGD(
            again.parameters(), lr=0.3, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay
        )
        for _ in range(K):
            sgd.zero_grad()
            nn.functional.mse_loss(again(x), y).backward()
            if optimizer.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(again.parameters(), optimizer.max_grad_norm)
            sgd.step()
        for n, p in again.named_parameters():
            torch.testing.assert_close(fast[n][t], p, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("width", [32, 63, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_clipping_does_not_read_what_lies_between_the_rows(
    backend: str, width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).to(dtype)
    params = dict(model.named_parameters())
    sets = [(torch.randn(T, n, 5).to(dtype), torch.randn(T, n, 3).to(dtype)) for n in (4, 5)]
    nan = {n: torch.full_like(p, torch.nan) for n, p in params.items()}
    call("meta_loss", backend, model, nan, *sets, steps=K)  # and what it leaves in the memory that is kept
    how = {"steps": K, "optimizer": SGD(max_grad_norm=0.3)}
    found, wanted = (
        torch.autograd.grad(call("meta_loss", by, model, params, *sets, **how), list(params.values()))
        for by in (backend, "reference")
    )
    atol, rtol = (1e-5, 1e-4) if dtype is torch.float32 else (1e-13, 1e-12)
    torch.testing.assert_close(found, wanted, atol=atol, rtol=rtol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_step_weights_add_up_the_losses_of_every_step(backend: str, reduction: str) -> None:
    model, params, *sets = problem()
    how = {"optimizer": SGD(momentum=0.9), "reduction": reduction}
    each = [call("meta_loss", backend, model, params, *sets, steps=k, **how) for k in range(1, K + 1)]
    weights = [0.1, 0.0, 2.0, 0.5]
    found = call("meta_loss", backend, model, params, *sets, steps=K, step_weights=weights, **how)
    wanted = sum(w * loss for w, loss in zip(weights, each, strict=True))
    torch.testing.assert_close(found, wanted, atol=1e-13, rtol=1e-13)
    with torch.no_grad():  # another path: no gradients are made
        again = call("meta_loss", backend, model, params, *sets, steps=K, step_weights=weights, **how)
    torch.testing.assert_close(again, found.detach(), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_only_the_gradient_of_the_query_set(backend: str) -> None:
    model, params, support, (x, y) = problem()
    model.requires_grad_(False)
    x.requires_grad_()
    how = {"steps": K, "step_weights": [1.0] * K, "optimizer": SGD(0.5, 0.1, 1.0)}
    fixed = {n: p.detach() for n, p in params.items()}
    grads = [
        torch.autograd.grad(call("meta_loss", b, model, fixed, support, (x, y), **how), x)[0]
        for b in (backend, "reference")
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("optimizer", OPTIMIZERS[1:], ids=str)
def test_factors_are_the_weights(backend: str, optimizer: SGD) -> None:
    model, params, support, query = problem()
    how = {"steps": K, "optimizer": optimizer}
    dense = call("inner_loop", backend, model, params, *support, **how)
    factors = call("inner_loop", backend, model, params, *support, fast_weights="factored", **how)
    assert isinstance(factors["0.weight"], FactoredWeight)
    for n in params:
        w = factors[n].dense() if isinstance(factors[n], FactoredWeight) else factors[n]
        torch.testing.assert_close(w.detach(), dense[n].detach())
    losses = [
        call("meta_loss", backend, model, params, support, query, fast_weights=form, **how)
        for form in (None, "dense", "factored", {"0.weight": "factored"})
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_maml_evaluates_what_it_trains(optimizer: SGD) -> None:
    model, params, support, query = problem()
    maml = MAML(model, loss="mse", lr=0.3, steps=2, optimizer=optimizer, step_weights=[0.5, 1.0])
    loss = maml.evaluate(*support, *query, steps=K).loss
    for k in range(K + 1):
        how = {"steps": k, "optimizer": optimizer, "reduction": "none"}
        torch.testing.assert_close(loss[k], call("meta_loss", "torch", model, params, support, query, **how))
    torch.testing.assert_close(maml(*support, *query), (0.5 * loss[1] + loss[2]).mean())
    assert str(optimizer) in repr(maml)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("form", ["dense", "factored"])
def test_clipping_at_zero_gradient_and_by_infinity(backend: str, form: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    params, query = dict(model.named_parameters()), problem()[3]
    x, y = torch.zeros(T, 4, 3).double(), torch.zeros(T, 4, 2).double()
    for support, norm in (((x, y), 1e-7), (query, float("inf"))):
        how = {"steps": 1, "optimizer": SGD(max_grad_norm=norm)}
        _, grads = call(
            "meta_value_and_grad", backend, model, params, support, query, fast_weights=form, **how
        )
        _, truth = call("meta_value_and_grad", "reference", model, params, support, query, **how)
        for n in params:
            torch.testing.assert_close(grads[n], truth[n])


def nearly_fitted() -> tuple[nn.Linear, Tensor, Tensor]:
    """The gradient is far less than that of each example."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    x, y = torch.randn(1, 20, 4), 100 * torch.randn(1, 20, 2)
    best = torch.linalg.lstsq(torch.cat([x[0], torch.ones(20, 1)], 1), y[0]).solution
    with torch.no_grad():
        model.weight.copy_(best[:4].T + 1e-2 * torch.randn(2, 4))
        model.bias.copy_(best[4])
    return model, x, y


def test_the_norm_of_factors_whose_examples_cancel() -> None:
    model, x, y = nearly_fitted()
    w = call(
        "inner_loop", "torch", model, dict(model.named_parameters()), x, y,
        steps=1, optimizer=SGD(max_grad_norm=1e-3), fast_weights={"weight": "factored"},
    )  # fmt: skip
    d, rows = w["weight"].d[0].detach().double(), w["weight"].x[0].detach().double()
    bias = (w["bias"][0] - model.bias).detach().double()
    norm = ((d.T @ rows).square().sum() + bias.square().sum()).sqrt()
    assert abs(float(norm) / (0.3 * 1e-3) - 1) < 0.02


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_step_of_factors_as_long_as_it_is_clipped_to(backend: str) -> None:
    model, x, y = nearly_fitted()
    model.bias.requires_grad_(False)
    x_q = 1e4 * torch.eye(4)[None]
    with torch.no_grad():
        query = x_q, model(x_q)
    how = {"steps": 1, "optimizer": SGD(max_grad_norm=1e-3), "fast_weights": "factored"}
    loss = call("meta_loss", backend, model, dict(model.named_parameters()), (x, y), query, **how)
    # the mean of 8 squares of 1e4 (W_1 - W_0), whose norm is 0.3 * 1e-3
    assert abs((8 * loss.item()) ** 0.5 / (1e4 * 0.3 * 1e-3) - 1) < 0.02


def test_bad_input() -> None:
    for bad in ({"momentum": -0.1}, {"weight_decay": float("inf")}, {"max_grad_norm": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SGD(**bad)
    model, params, support, query = problem()
    sgd = torch.optim.SGD(model.parameters())
    for f in (functional, reference):
        with pytest.raises(TypeError, match=r"fastmaml\.SGD or None, got torch\.optim\.sgd\.SGD"):
            f.meta_loss(model, params, support, query, loss="mse", lr=0.1, steps=1, optimizer=sgd)
        with pytest.raises(ValueError, match="a number for each of 2 steps, got 1"):
            f.meta_loss(model, params, support, query, loss="mse", lr=0.1, steps=2, step_weights=[1.0])
    with pytest.raises(ValueError, match="a number for each of 2 steps, got 3"):
        MAML(model, loss="mse", lr=0.1, steps=2, step_weights=[1.0, 1.0, 1.0])
    for weights, error in (
        (torch.ones(2, requires_grad=True), ValueError),
        ([torch.ones((), requires_grad=True), 1.0], ValueError),
        ("12", TypeError),
        (["1", "2"], TypeError),
        (0.5, TypeError),
        (torch.tensor(0.5), TypeError),
        (np.array(0.5), TypeError),
        (torch.ones(2, 2), TypeError),
        ([1.0, 2j], TypeError),
        ([1.0, True], TypeError),
        ({0: 1.0, 1: 1.0}, TypeError),
        ([1.0, float("nan")], ValueError),
        ([1.0, float("inf")], ValueError),
        ([1.0, 10**400], ValueError),
    ):
        with pytest.raises(error, match="step_weights"):
            functional.meta_loss(
                model, params, support, query, loss="mse", lr=0.1, steps=2, step_weights=weights
            )
    with pytest.raises(ValueError, match="a number for each of 0 steps"):
        MAML(model, loss="mse", lr=0.1, steps=0, step_weights=[])


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ("0.9", TypeError),
        (True, TypeError),
        (0.5j, TypeError),
        (np.array([0.5]), TypeError),
        (float("nan"), ValueError),
        (10**400, ValueError),
        (torch.tensor(0.5, requires_grad=True), ValueError),
    ],
)
@pytest.mark.parametrize("name", ["momentum", "weight_decay", "max_grad_norm"])
def test_what_is_no_number(name: str, bad, error) -> None:
    with pytest.raises(error, match=name):
        SGD(**{name: bad})


def test_numbers_of_any_kind() -> None:
    halves: list[Any] = [np.float32(0.5), np.array(0.5), torch.tensor(0.5)]
    for half in halves:
        assert SGD(half, half, half) == SGD(0.5, 0.5, 0.5)
    model, params, *sets = problem()
    wanted = call("meta_loss", "torch", model, params, *sets, steps=2, step_weights=[0.5, 2.0])
    for weights in (np.array([0.5, 2]), [np.float32(0.5), np.int64(2)], torch.tensor([0.5, 2]), (0.5, 2)):
        found = call("meta_loss", "torch", model, params, *sets, steps=2, step_weights=weights)
        assert torch.equal(found, wanted)


def test_maml_keeps_its_own_weights() -> None:
    model, _, support, query = problem()
    weights = [0.5, 2.0]
    maml = MAML(model, loss="mse", lr=0.3, steps=2, step_weights=weights)
    before = maml(*support, *query)
    weights[0] = 100.0
    assert torch.equal(maml(*support, *query), before)
