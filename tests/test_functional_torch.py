"""The torch backend runs what has no kernel: any module and any callable loss, held to the reference."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmaml import functional, reference


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(F.softplus(self.first(x.flatten(1))))


class Detached(nn.Module):
    """torch.func.jvp goes through what torch.no_grad() holds constant."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.first(x.flatten(1))
        with torch.no_grad():
            scale = h.square().mean().sqrt()
        return self.second(torch.tanh(h / scale))


MODELS = {
    "no_grad": Detached,
    "conv": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 2, padding=1),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(3, 4),
    ),
    "tied": Tied,
    "norms": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.LayerNorm(6), nn.Linear(6, 4)
    ),
    "scaled": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 4)),
}
T = 3


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]().double()


def batch(N):
    x = torch.randn(T, N, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(T, N, 4, dtype=torch.float64)


def huber(output, target, weight=None):
    each = F.huber_loss(output, target, reduction="none").mean(1)
    return each.mean() if weight is None else (weight * each).sum() / weight.sum()


def assert_same(call, inputs, **knobs):
    """The outputs and the derivatives of call(functional) are those of call(reference)."""
    results = []
    for module in (functional, reference):
        out = call(module, backend="torch", **knobs)
        outs = list(out.values()) if isinstance(out, dict) else [out]
        torch.manual_seed(1)
        total = torch.stack([(o * torch.randn_like(o)).sum() for o in outs]).sum()
        grads = (
            torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True) if inputs else ()
        )
        results.append([*outs, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("knobs", [{}, {"chunk_tasks": 2, "checkpoint_every": 2}], ids=["whole", "chunks"])
def test_meta_loss(model, first_order, knobs):
    params = dict(model.named_parameters())
    (x_s, y_s), (x_q, y_q) = batch(4), batch(5)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(T, 4, dtype=torch.float64)

    def meta_loss(module, **knobs):
        options = {"loss": huber, "lr": lr, "steps": 3, "first_order": first_order}
        return module.meta_loss(model, params, (x_s, (y_s, weight)), (x_q, y_q), **options, **knobs)

    assert_same(meta_loss, [*params.values(), lr, x_s, x_q], **knobs)


@pytest.mark.parametrize("knobs", [{}, {"chunk_tasks": 2, "checkpoint_every": 1}], ids=["whole", "chunks"])
def test_inner_loop_with_step_sizes_of_every_shape(model, knobs):
    first, *others = params = dict(model.named_parameters())
    params[first] = params[first].detach().expand(T, *params[first].shape).clone().requires_grad_()
    x, y = batch(4)
    number = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    element = torch.full_like(params[first][0], 0.05).requires_grad_()
    lr = [dict.fromkeys(params, number), {first: element} | dict.fromkeys(others, 0.1), 0.2]

    def inner_loop(module, **knobs):
        return module.inner_loop(model, params, x, y, loss="mse", lr=lr, steps=3, **knobs)

    assert_same(inner_loop, [*params.values(), number, element, x], **knobs)


def test_apply_value_and_grad_and_hvp(model):
    params = dict(model.named_parameters())
    v = {n: torch.randn_like(p) for n, p in params.items()}
    x, y = batch(4)
    inputs = [*params.values(), x]
    assert_same(lambda module, **knobs: module.apply(model, params, x, **knobs), inputs)
    for part in (0, 1):
        assert_same(
            lambda module, part=part, **k: module.value_and_grad(model, params, x, y, loss="mse", **k)[part],
            inputs,
        )
    assert_same(lambda module, **knobs: module.hvp(model, params, v, x, y, loss="mse", **knobs), [])


def test_frozen_parameters_keep_their_gradient(model):
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    next(model.parameters()).requires_grad_(False)
    support, query = batch(4), batch(5)

    def meta_loss(module, **knobs):
        return module.meta_loss(model, params, support, query, loss="mse", lr=0.1, steps=2, **knobs)

    assert_same(meta_loss, list(params.values()))


def test_without_a_wanted_gradient_there_is_none(model):
    params = dict(model.named_parameters())
    support, query = batch(4), batch(5)
    with torch.no_grad():
        loss = functional.meta_loss(
            model, params, support, query, loss="mse", lr=0.1, steps=2, backend="torch", reduction="none"
        )
    assert not loss.requires_grad
    expected = reference.meta_loss(
        model, params, support, query, loss="mse", lr=0.1, steps=2, reduction="none"
    )
    torch.testing.assert_close(loss, expected)


def test_strided_inputs_and_a_changed_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    params = dict(model.named_parameters()) | {"0.weight": model.get_parameter("0.weight").t()}
    x = torch.randn(4, T, 5, dtype=torch.float64).permute(1, 2, 0)

    def apply():
        return functional.apply(model, params, x, backend="torch")

    torch.testing.assert_close(apply(), reference.apply(model, params, x))
    model[1] = nn.Sigmoid()
    torch.testing.assert_close(apply(), reference.apply(model, params, x))


def test_a_loss_whose_gradient_has_no_jvp(model):
    params = dict(model.named_parameters())
    support, query = batch(4), batch(5)

    def meta_loss(module, **knobs):
        return module.meta_loss(model, params, support, query, loss=plain_mse, lr=0.1, steps=2, **knobs)

    def plain_mse(output, target):
        return F.mse_loss(output, target)

    assert_same(meta_loss, [support[0], *params.values()])


def test_fast_weights_outlive_their_model():
    x, y = torch.randn(T, 4, 3), torch.randn(T, 4, 2)

    def adapted():
        model = nn.Sequential(nn.Linear(3, 2))
        params = dict(model.named_parameters())
        how = {"loss": "mse", "lr": 0.1, "steps": 2, "backend": "torch"}
        return functional.inner_loop(model, params, x, y, **how), params

    fast, params = adapted()
    assert (
        torch.autograd.grad(fast["0.weight"].sum(), list(params.values()), allow_unused=True)[0]
        .isfinite()
        .all()
    )
