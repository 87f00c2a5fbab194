"""The reference is held to finite differences in float64, and its losses to torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmaml.reference as reference
from fastmaml.losses import MSE, CrossEntropy, resolve
from fastmaml.optimizers import SGD


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(3, 3), nn.Linear(3, 3, bias=False), nn.Linear(2, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
    "batch_norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)),
    "layer_norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 3)),
    "tied": Tied,
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().double()


def batch(loss, T=2, N=4):
    x = torch.randn(T, N, 3, dtype=torch.float64)
    return x, torch.randint(3, (T, N)) if loss == "cross_entropy" else torch.randn_like(x)


def assert_derivative(function, params, *more):
    """d/dinputs of <function(params, *more), u>, u random, against a difference in a random direction."""
    n = len(params)
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (*params.values(), *more)]
    ahead = [torch.randn_like(tensor) for tensor in inputs]

    def outputs(step=0.0):
        moved = [tensor + step * a for tensor, a in zip(inputs, ahead, strict=True)]
        out = function(dict(zip(params, moved[:n], strict=True)), *moved[n:])
        return list(out.values()) if isinstance(out, dict) else [out]

    u = [torch.randn_like(out) for out in outputs()]
    grads = torch.autograd.grad(outputs(), inputs, u, allow_unused=True, materialize_grads=True)
    along = sum((g * a).sum() for g, a in zip(grads, ahead, strict=True))
    change = [(b - a) / 2e-6 for a, b in zip(outputs(-1e-6), outputs(1e-6), strict=True)]
    expected = sum((c * w).sum() for c, w in zip(change, u, strict=True))
    torch.testing.assert_close(along, expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("more", [{}, {"optimizer": SGD(0.9, 0.1, 0.2), "step_weights": [0.5, 2.0]}])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_meta_loss_has_the_derivative_of_finite_differences(model, loss, more):
    params = dict(model.named_parameters())
    (x_s, y_s), (x_q, y_q) = batch(loss), batch(loss, N=3)
    lr = torch.tensor(0.1, dtype=torch.float64)

    def meta_loss(params, lr, x_s, x_q):
        return reference.meta_loss(
            model, params, (x_s, y_s), (x_q, y_q), loss=loss, lr=lr, steps=2, reduction="none", **more
        )

    assert_derivative(meta_loss, params, lr, x_s, x_q)


def test_inner_loop_has_the_derivative_of_finite_differences(model):
    params = dict(model.named_parameters())
    first, *others = params
    x, y = batch("mse")

    def fast(params, number, column, x):
        lr = [dict.fromkeys(params, number), {first: column} | dict.fromkeys(others, 0.05)]
        return reference.inner_loop(model, params, x, y, loss="mse", lr=lr, steps=2)

    number = torch.tensor(0.1, dtype=torch.float64)
    column = torch.full_like(params[first], 0.05)[..., :1]
    mixed = params | {first: params[first].expand(2, *params[first].shape)}
    assert_derivative(fast, mixed, number, column, x)


def test_value_and_grad_and_hvp_are_its_derivatives(model):
    params = {n: p.detach().expand(2, *p.shape).clone() for n, p in model.named_parameters()}
    v = {n: torch.randn_like(p) for n, p in params.items()}
    x, y = batch("cross_entropy")
    weight = torch.rand(2, 4, dtype=torch.float64)

    def value_and_grad(params, x):
        return reference.value_and_grad(model, params, x, (y, weight), loss=CrossEntropy(0.1))

    assert_derivative(lambda params, x: value_and_grad(params, x)[0], params, x)
    step = 1e-6
    ahead, back = ({n: p + s * step * v[n] for n, p in params.items()} for s in (1, -1))
    _, grads = value_and_grad(params, x)
    product = reference.hvp(model, params, v, x, (y, weight), loss=CrossEntropy(0.1))
    slope = (value_and_grad(ahead, x)[0] - value_and_grad(back, x)[0]) / (2 * step)
    along = sum((grads[n] * v[n]).flatten(1).sum(1) for n in params)
    torch.testing.assert_close(along, slope, atol=1e-8, rtol=1e-6)
    for n in params:
        curve = (value_and_grad(ahead, x)[1][n] - value_and_grad(back, x)[1][n]) / (2 * step)
        torch.testing.assert_close(product[n], curve, atol=1e-8, rtol=1e-6)


def test_first_order_takes_every_inner_gradient_as_a_constant(model):
    params = dict(model.named_parameters())
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    (x_s, y_s), query = batch("mse"), batch("mse")
    x_s.requires_grad_()

    def meta_loss():
        options = {"loss": "mse", "lr": lr, "steps": 1, "first_order": True, "reduction": "sum"}
        return reference.meta_loss(model, params, (x_s, y_s), query, **options)

    fast = reference.inner_loop(model, params, x_s, y_s, loss="mse", lr=lr, steps=1)
    _, v = reference.value_and_grad(model, fast, *query, loss="mse")
    _, g = reference.value_and_grad(model, params, x_s, y_s, loss="mse")
    inputs = [*params.values(), lr, x_s]
    found = torch.autograd.grad(meta_loss(), inputs, allow_unused=True, materialize_grads=True)
    *grads, grad_lr, grad_x = found
    for a, n in zip(grads, params, strict=True):
        torch.testing.assert_close(a, v[n].sum(0))
    torch.testing.assert_close(grad_lr, -sum((v[n] * g[n]).sum() for n in params))
    assert not grad_x.any()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_norm_uses_the_statistics_of_the_set_and_keeps_none(training):
    norm = nn.BatchNorm1d(3).double().train(training)
    x, _ = batch("mse")
    out = reference.apply(norm, dict(norm.named_parameters()), x)
    for t in range(2):
        expected = (x[t] - x[t].mean(0)) / (x[t].var(0, correction=0) + norm.eps).sqrt()
        torch.testing.assert_close(out[t], expected)
    assert norm.num_batches_tracked == 0
    assert norm.running_mean is not None
    assert not norm.running_mean.any()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        reference.apply(norm, dict(norm.named_parameters()), x[:, :1])


def test_frozen_parameters_stay_and_still_have_a_gradient():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    model[0].requires_grad_(False)
    adapted = reference.inner_loop(model, params, *batch("mse"), loss="mse", lr=0.1, steps=3)
    assert list(adapted) == list(params)
    assert adapted["0.weight"].equal(params["0.weight"].expand(2, 4, 3))
    assert not adapted["2.weight"][0].equal(params["2.weight"])
    loss = reference.meta_loss(model, params, batch("mse"), batch("mse"), loss="mse", lr=0.1, steps=3)
    assert all(g.any() for g in torch.autograd.grad(loss, list(params.values())))


def test_unused_parameters_stay_too():
    model = Tied().double()
    params = dict(model.named_parameters())
    assert "second.weight" not in params
    adapted = reference.inner_loop(model, params, *batch("mse"), loss="mse", lr=0.1, steps=2)
    assert adapted["unused.weight"][1].equal(params["unused.weight"])


def test_reduction_and_zero_steps(model):
    params = dict(model.named_parameters())
    support, query = batch("mse"), batch("mse")

    def meta_loss(reduction):
        return reference.meta_loss(
            model, params, support, query, loss="mse", lr=0.1, steps=0, reduction=reduction
        )

    each = meta_loss("none")
    torch.testing.assert_close(each, reference.value_and_grad(model, params, *query, loss="mse")[0])
    torch.testing.assert_close(meta_loss("sum"), each.sum())
    torch.testing.assert_close(meta_loss("mean"), each.mean())


def test_losses_are_those_of_torch():
    output, target, labels = torch.randn(5, 3), torch.randn(5, 3), torch.randint(3, (5,))
    weight = torch.rand(5)
    torch.testing.assert_close(MSE()(output, target), F.mse_loss(output, target))
    for smoothing in (0.0, 0.1, 1.0):
        each = F.cross_entropy(output, labels, label_smoothing=smoothing, reduction="none")
        loss = CrossEntropy(smoothing)
        torch.testing.assert_close(loss(output, labels), each.mean())
        torch.testing.assert_close(loss(output, labels, weight), (weight * each).sum() / weight.sum())
    torch.testing.assert_close(
        MSE()(output, target, torch.tensor([0, 0, 1.0, 0, 0])), F.mse_loss(output[2], target[2])
    )
    assert MSE()(output[:, 0], target[:, 0]).shape == ()


def test_losses_are_named_or_callable():
    assert resolve("mse") == MSE()
    assert resolve(F.mse_loss) is F.mse_loss
    with pytest.raises(ValueError, match="cross_entropy"):
        resolve("hinge")
    with pytest.raises(TypeError, match="int"):
        resolve(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[0, 1\], got 2"):
        CrossEntropy(2)


def test_a_module_used_twice_keeps_its_parameters() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model = nn.Sequential(block, nn.Tanh(), block)
    before = dict(model.named_parameters())
    mean = block[1].running_mean
    x = torch.randn(3, 4, 2)
    params = {n: (2 * p).detach().requires_grad_() for n, p in before.items()}
    reference.meta_loss(model, params, (x, x), (x, x), loss="mse", lr=0.1, steps=1).backward()
    assert all(p is before[n] for n, p in model.named_parameters())
    assert block[1].running_mean is mean
