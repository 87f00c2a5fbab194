"""fastmaml.MAML: an nn.Module like any other, over the public functions."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastmaml import MAML, functional, reference


@pytest.fixture(params=["cpu", "torch"])
def maml(request):
    if request.param == "cpu":
        pytest.importorskip("fastmaml._C")
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)).double()
    return MAML(model, loss="cross_entropy", lr=0.1, steps=2, backend=request.param)


def episodes(T=3):
    sets = [(torch.randn(T, N, 3, dtype=torch.float64), torch.randint(4, (T, N))) for N in (4, 6)]
    return *sets[0], *sets[1]


def test_the_loss_is_the_reference_meta_loss(maml):
    x_s, y_s, x_q, y_q = episodes()
    params = dict(maml.model.named_parameters())
    expected = reference.meta_loss(
        maml.model, params, (x_s, y_s), (x_q, y_q), loss="cross_entropy", lr=0.1, steps=2
    )
    loss = maml(x_s, y_s, x_q, y_q)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for p, g in zip(params.values(), torch.autograd.grad(expected, list(params.values())), strict=True):
        torch.testing.assert_close(p.grad, g)


def test_it_can_be_differentiated_after_a_call_in_inference_mode(maml):
    data = episodes()
    with torch.inference_mode():
        maml.evaluate(*data)
        maml.adapt(*data[:2])
    maml.adapt(*data[:2])["0.weight"].sum().backward()
    maml(*data).backward()


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_it_learns_under_any_optimiser(maml, optimiser):
    data = episodes()
    optimiser = optimiser(maml.parameters(), lr=0.02)
    first = maml(*data)
    for _ in range(15):
        optimiser.zero_grad()
        maml(*data).backward()
        optimiser.step()
    assert maml(*data) < first


def test_copies_pickles_and_state_dicts_compute_the_same(maml):
    data = episodes()
    loss = maml(*data)
    other = MAML(copy.deepcopy(maml.model), loss="cross_entropy", lr=0.1, steps=2, backend=maml.backend)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(maml.state_dict())
    for same in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml)), other):
        assert same(*data).equal(loss)
        assert not any(p is q for p, q in zip(same.parameters(), maml.parameters(), strict=True))


def test_evaluate_gives_loss_and_accuracy_after_every_step(maml):
    x_s, y_s, x_q, y_q = episodes()
    result = maml.evaluate(x_s, y_s, x_q, y_q, steps=4)
    assert result.loss.shape == result.accuracy.shape == (5, 3)
    assert not result.loss.requires_grad
    params = dict(maml.model.named_parameters())
    for steps in range(5):
        fast = reference.inner_loop(maml.model, params, x_s, y_s, loss="cross_entropy", lr=0.1, steps=steps)
        value, _ = reference.value_and_grad(maml.model, fast, x_q, y_q, loss="cross_entropy")
        hits = reference.apply(maml.model, fast, x_q).argmax(-1) == y_q
        torch.testing.assert_close(result.loss[steps], value)
        torch.testing.assert_close(result.accuracy[steps], hits.double().mean(1))


def test_evaluate_goes_on_with_the_last_step_size(maml):
    x_s, y_s, x_q, y_q = episodes()
    maml.lr = [0.5, 0.1]
    longer = maml.evaluate(x_s, y_s, x_q, y_q, steps=3)
    maml.lr = [0.5, 0.1, 0.1]
    torch.testing.assert_close(longer.loss, maml.evaluate(x_s, y_s, x_q, y_q, steps=3).loss)


def test_regression_has_no_accuracy():
    maml = MAML(nn.Linear(3, 1), loss="mse", lr=0.1, steps=1, backend="torch")
    result = maml.evaluate(
        torch.randn(2, 4, 3), torch.randn(2, 4, 1), torch.randn(2, 5, 3), torch.randn(2, 5, 1)
    )
    assert result.accuracy is None
    assert result.loss.shape == (2, 2)


def test_adapt_is_differentiable_and_serves_apply(maml):
    x_s, y_s, x_q, _ = episodes()
    fast = maml.adapt(x_s, y_s)
    assert list(fast) == [n for n, _ in maml.model.named_parameters()]
    assert all(w.shape[0] == 3 for w in fast.values())
    functional.apply(maml.model, fast, x_q, backend=maml.backend).sum().backward()
    assert all(p.grad is not None for p in maml.parameters())
    with torch.no_grad():
        assert not maml.adapt(x_s, y_s, steps=5)["0.weight"].requires_grad


def test_step_sizes_can_be_learned(maml):
    maml.lr = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    assert "lr" in dict(maml.named_parameters())
    (grad_lr,) = torch.autograd.grad(maml(*episodes()), [maml.lr])
    assert grad_lr.abs() > 0


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="steps"):
        MAML(nn.Linear(1, 1), loss="mse", lr=0.1, steps=-1)
