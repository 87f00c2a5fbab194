"""fastmaml.MAML: an nn.Module like any other, over the public functions."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmaml import MAML, functional, losses, reference


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


def test_adapt_goes_on_with_the_last_step_size(maml):
    x_s, y_s, *_ = episodes()
    maml.lr = [0.5, 0.1]
    longer = maml.adapt(x_s, y_s, steps=3)
    params = dict(maml.model.named_parameters())
    expected = reference.inner_loop(
        maml.model, params, x_s, y_s, loss="cross_entropy", lr=[0.5, 0.1, 0.1], steps=3
    )
    for name, w in expected.items():
        torch.testing.assert_close(longer[name], w)


@pytest.mark.parametrize("make", [list, tuple, nn.ParameterList])
@pytest.mark.parametrize("count", [0, 2, 7])
def test_a_list_of_step_sizes_has_one_for_each_step(make, count):
    lr = make(torch.full((), 0.1) for _ in range(count))
    with pytest.raises(ValueError, match=f"lr must be one, or a list of steps = 5, got a list of {count}"):
        MAML(nn.Linear(1, 1), loss="mse", lr=lr, steps=5)


def test_a_list_of_step_sizes_given_later_is_checked_too(maml):
    maml.lr = [0.1] * 3
    with pytest.raises(ValueError, match="steps = 2, got a list of 3"):
        maml(*episodes())
    maml.lr = []
    with pytest.raises(ValueError, match="lr holds no step size"):
        maml.evaluate(*episodes())


def test_evaluate_weights_loss_and_accuracy_alike(maml):
    x_s, y_s, x_q, y_q = episodes()
    weight = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64).expand(3, 6)
    weighted = maml.evaluate(x_s, y_s, x_q, (y_q, weight))
    fast = maml.adapt(x_s, y_s)
    hits = functional.apply(maml.model, fast, x_q, backend=maml.backend).argmax(-1) == y_q
    as_often = hits[:, [0, 1, 1, 2, 3]]  # as the weights say
    torch.testing.assert_close(weighted.accuracy[-1], as_often.double().mean(1))
    value, _ = reference.value_and_grad(maml.model, fast, x_q, (y_q, weight), loss="cross_entropy")
    torch.testing.assert_close(weighted.loss[-1], value)


def test_evaluate_takes_the_targets_that_forward_takes(maml):
    x_s, y_s, x_q, y_q = episodes()
    plain = maml.evaluate(x_s, y_s, x_q, y_q)
    same = maml.evaluate(x_s, (y_s, None), x_q, (y_q, None))
    assert torch.equal(same.loss, plain.loss)
    assert torch.equal(same.accuracy, plain.accuracy)
    assert maml(x_s, (y_s, None), x_q, (y_q, None)) == maml(x_s, y_s, x_q, y_q)


@pytest.mark.parametrize("loss", ["cross_entropy", F.cross_entropy])
@pytest.mark.parametrize("steps", [0, 1])
def test_evaluate_checks_what_it_is_given(maml, loss, steps):
    x_s, y_s, x_q, y_q = episodes()
    maml.loss = loss
    for spoiled, match in [
        ((x_s, y_s[:2], x_q, y_q), r"support y must have shape \[3, 4\], got \[2, 4\]"),
        ((x_s, y_s, x_q, y_q[:2]), r"query y must have shape \[3, 6\], got \[2, 6\]"),
        ((x_s, y_s, x_q, y_q[:, :2]), r"query y must have shape \[3, 6\], got \[3, 2\]"),
        ((x_s, y_s, x_q, y_q + 4), "query y must hold labels from 0 to 3"),
        ((x_s, y_s, x_q[:2], y_q[:2]), r"query x must have shape \[3, 6, 3\], got \[2, 6, 3\]"),
    ]:
        with pytest.raises(ValueError, match=match):
            maml.evaluate(*spoiled, steps=steps)


@pytest.mark.parametrize("method", ["adapt", "evaluate"])
def test_steps_are_counted(maml, method):
    data = episodes()[: 2 if method == "adapt" else 4]
    maml.lr = [0.1, 0.1]
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        getattr(maml, method)(*data, steps=-1)
    with pytest.raises(TypeError, match=r"steps must be an integer, got 1\.5"):
        getattr(maml, method)(*data, steps=1.5)


@pytest.mark.parametrize("model", [nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 4), nn.Softplus())])
def test_labels_that_torch_ignores_are_no_hits_and_no_misses(model):
    x_s, y_s, x_q, y_q = (a.float() if a.is_floating_point() else a for a in episodes())
    y_q[:, 4:] = losses.IGNORED
    result = MAML(model, loss=F.cross_entropy, lr=0.1, steps=1, backend="torch").evaluate(x_s, y_s, x_q, y_q)
    fewer = MAML(model, loss="cross_entropy", lr=0.1, steps=1, backend="torch")
    expected = fewer.evaluate(x_s, y_s, x_q[:, :4], y_q[:, :4])
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.accuracy, expected.accuracy)


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


def test_a_step_size_for_each_step_can_be_learned(maml):
    sizes = [torch.tensor(a, dtype=torch.float64) for a in (0.1, 0.2)]
    listed = MAML(maml.model, loss="cross_entropy", lr=nn.ParameterList(sizes), steps=2, backend=maml.backend)
    assert {"lr.0", "lr.1"} <= dict(listed.named_parameters()).keys()
    data, lr = episodes(), [s.clone().requires_grad_() for s in sizes]
    (x_s, y_s), (x_q, y_q) = data[:2], data[2:]
    loss, params = listed(*data), dict(maml.model.named_parameters())
    expected = reference.meta_loss(
        maml.model, params, (x_s, y_s), (x_q, y_q), loss="cross_entropy", lr=lr, steps=2
    )
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        torch.autograd.grad(loss, list(listed.lr)), torch.autograd.grad(expected, lr), strict=True
    ):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(listed.evaluate(*data).loss[-1].mean(), loss)


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, output, target):
        return self.scale * (output - target).square().mean()


@pytest.mark.parametrize(
    ("spoiled", "error", "match"),
    [
        ({"model": lambda x: x}, TypeError, "model must be an nn.Module, got function"),
        ({"model": nn.Linear}, TypeError, "model must be an nn.Module, got type"),
        ({"steps": -1}, ValueError, "steps must be at least 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer"),
        ({"loss": nn.MSELoss}, TypeError, r"not the class: MSELoss\(\)"),
        ({"loss": Learned()}, ValueError, r"\['scale'\] get no gradient .* fastmaml\.reference"),
        ({"lr": "0.1"}, TypeError, "lr must be a number.*got str"),
        ({"lr": [0.1, None]}, TypeError, "lr must be a number.*got NoneType"),
        ({"lr": {"weight": 0.1, "bias": "0.1"}}, TypeError, "lr must be a number.*got str"),
        ({"lr": torch.rand(2)}, ValueError, r"lr must have shape \[\], got \[2\]: .* list of numbers"),
        ({"backend": "gpu"}, ValueError, r"backend must be one of \['cuda', 'triton', 'cpu', 'torch'\]"),
        ({"chunk_tasks": 0}, ValueError, "chunk_tasks must be at least 1"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1"),
        ({"optimizer": torch.optim.SGD}, TypeError, "optimizer must be a fastmaml.SGD"),
    ],
)
def test_what_needs_no_data_is_checked_at_once(spoiled, error, match):
    given = {"model": nn.Linear(1, 1), "loss": "mse", "lr": 0.1, "steps": 2}
    with pytest.raises(error, match=match):
        MAML(**(given | spoiled))
